"""One training loop for the networks that the engine needs: the detector (and judge) and the generator.

Runs under ``accelerate launch`` with any number of processes, plain or with DeepSpeed, resumes from its last
checkpoint by the same command, keeps an exponential moving average of the weights, and writes beside the result
what made it. ``training.batch`` is the global batch. What chance decides about an image (order, augmentation, noise)
is drawn for the whole batch, so a step is the same however the batch is divided over processes and parts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine import cluster, workplan
from engine.augmentation import Moves
from engine.averaging import WeightAverage
from engine.checkpoints import Checkpoints, check_identity
from engine.parallelism import Parallel
from engine.publish import publish_json, read_json
from engine.real_data import RealData
from engine.records import StopRequested, UsageError
from engine.settings import flatten
from engine.telemetry import EventLog, Progress
from engine.training_config import LOGS, RECORD, TrainConfig

Draws = Mapping[str, Tensor]  # name -> what was drawn for each image of a batch (N, ...)


class Task(Protocol):
    """What a network must bring to be trained here."""

    model: nn.Module

    def draw(self, count: int, stream: torch.Generator) -> Draws:
        """Return what chance decides for each of ``count`` images, on the CPU."""
        ...

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Return the mean loss, a scalar, of uint8 images (N, C, S, S) and labels (N,)."""
        ...

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return what is recorded of the trained network, measured on data it was not trained on."""
        ...

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write the trained network in the form that the engine loads."""
        ...


class Trainer:
    """Trains one :class:`Task` to ``training.steps`` steps."""

    def __init__(self, task: Task, data: RealData, config: TrainConfig, stop: cluster.StopWatch) -> None:
        self._config, self._task, self._stop = config, task, stop
        self._options = options = config.training
        self._output = Path(config.output)
        self._parallel = parallel = Parallel(options.batch, options.accumulation)
        self._identity = {"config": flatten(config, ("identity",)), "data_digest": data.digest}
        images, labels = data.load_all()
        if data.skipped:
            self._say(f"{len(data.skipped)} training images could not be read, the first: {data.skipped[0]}")
        absent = sorted(set(range(len(data.class_names))) - set(labels.tolist()))
        if absent:
            raise UsageError(f"data.path: class {absent[0]} ({data.class_names[absent[0]]}) has no readable image")
        self._images, self._labels = torch.from_numpy(images), torch.from_numpy(labels)
        # ZeRO-3 takes the weights of the model apart: what is saved at the end is put together in a copy
        self._whole = copy.deepcopy(task.model) if parallel.launch.strategy == "zero-3" else None
        optimizer = torch.optim.AdamW(
            task.model.parameters(), options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.99)
        )
        self._model, self._optimizer = parallel.prepare(task.model, optimizer)
        self._average = WeightAverage(self._model.parameters(), options.ema_decay)
        self._checkpoints = Checkpoints(self._output, parallel, self._identity)
        self._log = EventLog(self._output / LOGS, parallel.rank)
        self._step, self._seconds = 0, 0.0

    def _rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step: linear warm-up, then cosine decay."""
        warmup, total = self._options.warmup_steps, self._options.steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * float(np.cos(np.pi * (step - warmup) / max(1, total - warmup)))

    def _order(self, step: int) -> np.ndarray:
        """Return the image positions of a step's whole batch: a pure function of seed and step."""
        batch, count = self._options.batch, len(self._labels)
        wanted = np.arange(step * batch, (step + 1) * batch)
        epochs = {
            e: workplan.generator(self._options.seed, workplan.TRAINING_ORDER, int(e)).permutation(count)
            for e in np.unique(wanted // count)
        }
        return np.array([epochs[index // count][index % count] for index in wanted])

    def _train_step(self) -> Tensor:
        """Do one optimiser step; returns this process's mean loss, still on the device."""
        options, parallel = self._options, self._parallel
        mixed = workplan.generator(options.seed, workplan.TRAINING_NOISE, self._step)
        stream = torch.Generator().manual_seed(int(mixed.integers(2**62)))
        moves = Moves.draw(options.batch, stream, options.flip, options.shift)
        draws = self._task.draw(options.batch, stream)
        mine = torch.from_numpy(workplan.share(np.arange(options.batch), parallel.rank, parallel.size))
        order = torch.from_numpy(self._order(self._step))
        total = torch.zeros((), device=parallel.device)
        self._set_learning_rate()
        for places in mine.split(parallel.part_size):
            images = moves.take(places).apply(self._images[order[places]]).to(parallel.device)
            labels = self._labels[order[places]].to(parallel.device)
            with parallel.part(self._model):
                drawn = {name: value[places] for name, value in draws.items()}
                loss = self._task.loss(self._model, images, labels, drawn)
                parallel.accelerator.backward(loss)
                parallel.clip(self._model)
                self._optimizer.step()
                self._optimizer.zero_grad()
            total += loss.detach() / parallel.accumulation
        self._average.step(self._model.parameters())
        self._step += 1
        return total

    def _set_learning_rate(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * self._rate(self._step)

    def run(self, command: str) -> dict[str, Any]:
        """Train to the last step and write the result; returns its record.

        Raises StopRequested after a checkpoint where stopping was asked for; the same command resumes.
        """
        finished = self._output / RECORD
        if finished.exists():
            made = read_json(finished, "use another --output")
            check_identity(finished, {name: made.get(name) for name in self._identity}, self._identity)
            self._say(f"{self._output} is complete; nothing to do")
            return {}
        self._resume()
        self._train()
        return self._finish(command)

    def _train(self) -> None:
        options, parallel = self._options, self._parallel
        progress = Progress(
            "training",
            options.steps,
            unit="steps",
            enabled=parallel.is_first,
            every=options.progress_seconds,
            done=self._step,
        )
        losses, note = torch.zeros((), device=parallel.device), ""
        counted = 0
        while self._step < options.steps:
            begin = time.perf_counter()
            losses, counted = losses + self._train_step(), counted + 1
            self._seconds += time.perf_counter() - begin
            done = self._step == options.steps
            if done or self._step % options.log_steps == 0:
                note = self._note(float(parallel.mean(losses)) / counted)
                losses, counted = torch.zeros_like(losses), 0
            progress.show(self._step, note, final=done)
            stopping = self._step % 10 == 0 and parallel.any(self._stop.requested())
            if not done and (stopping or self._step % options.checkpoint_steps == 0):
                self._checkpoints.save(self._step, self._average, {"seconds": self._seconds})
            if stopping and not done:
                raise StopRequested(f"stopped early by {self._stop.reason}; the same command continues")

    def _note(self, loss: float) -> str:
        if self._parallel.is_first:
            rate = self._options.learning_rate * self._rate(self._step - 1)
            self._log.write("training", step=self._step, loss=loss, learning_rate=rate, seconds=round(self._seconds, 3))
        return f"loss {loss:.4f}"

    def _say(self, line: str) -> None:
        if self._parallel.is_first:
            print(line, flush=True)

    def _resume(self) -> None:
        state = self._checkpoints.load(self._average)
        if state is not None:
            self._step, self._seconds = state["step"], state["seconds"]
            self._say(f"resuming at step {self._step} of {self._options.steps}")

    @torch.no_grad()
    def _result(self) -> nn.Module:
        """Return the averaged network with whole weights in float32 (in the first process; everyone must call)."""
        network: nn.Module = self._whole or self._parallel.accelerator.unwrap_model(self._model)
        network.float()
        average = self._average.gather(self._parallel.accelerator.unwrap_model(self._model).parameters())
        for parameter, weight in zip(network.parameters(), average, strict=True):
            parameter.copy_(weight)
        if self._whole is not None:
            whole = dict(self._whole.named_buffers())
            for name, buffer in self._parallel.accelerator.unwrap_model(self._model).named_buffers():
                whole[name].copy_(buffer)
        return network.to(self._parallel.device).eval()

    def _finish(self, command: str) -> dict[str, Any]:
        parallel, finished = self._parallel, self._output / RECORD
        model = self._result()
        if not parallel.is_first:  # measuring may take longer than a collective call waits
            self._stop.wait(finished.exists, 0.2)
            return {}
        self._task.save(self._output, model)
        record = {
            "command": command,
            **self._identity,
            "figures": self._task.figures(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "processes": parallel.size,
            "strategy": parallel.launch.strategy,
            "precision": parallel.launch.precision,
            "accumulation": parallel.accumulation,
            "device": parallel.device.type,
            "seconds": round(self._seconds, 1),
            "torch": torch.__version__,
            "training_images": len(self._labels),
        }
        publish_json(finished, record)
        self._checkpoints.remove()
        return record
