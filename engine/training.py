"""One training loop for the networks that the engine needs: the detector (and judge) and the generator.

Runs under ``accelerate launch`` with any number of processes, resumes from its last checkpoint by
the same command, keeps an exponential moving average of the weights, and writes beside the result
what made it. ``training.batch`` is the global batch: it is divided over the processes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine import cluster, workplan
from engine.augmentation import mirror_and_shift
from engine.config import DataConfig
from engine.publish import canonical_json, publish_json, read_json, replace_bytes
from engine.real_data import RealData
from engine.records import StopRequested, UsageError
from engine.settings import RUNTIME, flatten, key, section
from engine.telemetry import Progress

_CHECKPOINTS, _RECORD = "checkpoints", "training.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The optimisation."""

    seed: int = key(0, "seed of weights, order, augmentation and noise", low=0, high=2**31)
    steps: int = key(2000, "optimiser steps", low=1)
    batch: int = key(64, "global batch: images of one step over all processes", low=1)
    learning_rate: float = key(1e-3, "peak learning rate of AdamW", low=0.0)
    weight_decay: float = key(0.01, "weight decay of AdamW", low=0.0)
    warmup_steps: int = key(100, "steps of linear warm-up before the cosine decay", low=0)
    ema_decay: float = key(
        0.999, "decay of the moving average of the weights that is saved; 0: none", low=0.0, high=1.0
    )
    flip: bool = key(True, "mirror half of the images")
    shift: int = key(0, "shift images by up to this many pixels", low=0)
    label_drop: float = key(0.1, "generator only: share of labels replaced by the null class", low=0.0, high=1.0)
    checkpoint_steps: int = key(500, "steps between checkpoints", kind=RUNTIME, low=1)
    progress_seconds: float = key(10.0, "time between progress lines", kind=RUNTIME, low=0.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The network that is trained."""

    architecture: str = key("resnet", "detector only: network family of transformers", choices=("resnet", "regnet"))
    widths: tuple[int, ...] = key((32, 64, 128), "channels of each level", low=8)
    layers: int = key(1, "blocks of each level", low=1)
    image_size: int = key(32, "pixels of a side", low=8)
    input_size: int = key(0, "detector only: side to which images are resized; 0 keeps image_size", low=0)
    channels: int = key(1, "1 grey, 3 RGB", low=1, high=3)
    patch: int = key(2, "generator only: pixels of a side that become channels", low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything ``engine/train_detector.py`` and ``engine/train_generator.py`` need."""

    output: str = key("", "folder for the trained model (--output)", kind=RUNTIME)
    data: DataConfig = section(DataConfig)
    network: NetworkConfig = section(NetworkConfig)
    training: TrainingConfig = section(TrainingConfig)


class Task(Protocol):
    """What a network must bring to be trained here."""

    model: nn.Module

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, stream: torch.Generator) -> Tensor:
        """Return the scalar loss of uint8 images (N, C, S, S) and labels (N,)."""
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
        from diffusers.training_utils import EMAModel

        self._config, self._task, self._stop, self._digest = config, task, stop, data.digest
        self._options = options = config.training
        self._output = Path(config.output)
        self._accelerator = Accelerator()
        if options.batch % self._accelerator.num_processes:
            raise UsageError(
                f"training.batch: {options.batch} given; it must be a multiple of the "
                f"{self._accelerator.num_processes} processes"
            )
        images, labels = data.load_all()
        if data.skipped:
            self._say(f"{len(data.skipped)} training images could not be read, the first: {data.skipped[0]}")
        absent = sorted(set(range(len(data.class_names))) - set(labels.tolist()))
        if absent:
            raise UsageError(f"data.path: class {absent[0]} ({data.class_names[absent[0]]}) has no readable image")
        self._images, self._labels = torch.from_numpy(images), torch.from_numpy(labels)
        optimizer = torch.optim.AdamW(
            task.model.parameters(), options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.99)
        )
        self._ema = EMAModel(task.model.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self._model, self._optimizer = self._accelerator.prepare(task.model, optimizer)
        self._ema.to(self._accelerator.device)
        self._accelerator.register_for_checkpointing(self._schedule, self._ema)
        self._step, self._seconds = 0, 0.0

    def _rate(self, step: int) -> float:
        warmup, total = self._options.warmup_steps, self._options.steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * float(np.cos(np.pi * (step - warmup) / max(1, total - warmup)))

    def _positions(self, step: int) -> Tensor:
        """Return this process's image positions of a step: a pure function of seed, step and rank."""
        batch, count = self._options.batch, len(self._labels)
        wanted = np.arange(step * batch, (step + 1) * batch)
        epochs = {
            e: workplan.generator(self._options.seed, workplan.TRAINING_ORDER, int(e)).permutation(count)
            for e in np.unique(wanted // count)
        }
        order = np.array([epochs[index // count][index % count] for index in wanted])
        return torch.from_numpy(workplan.share(order, self._accelerator.process_index, self._accelerator.num_processes))

    def _train_step(self) -> float:
        positions = self._positions(self._step)
        mixed = workplan.generator(
            self._options.seed, workplan.TRAINING_NOISE, self._step, self._accelerator.process_index
        )
        stream = torch.Generator().manual_seed(int(mixed.integers(2**62)))
        images = mirror_and_shift(self._images[positions], stream, self._options.flip, self._options.shift)
        device = self._accelerator.device
        loss = self._task.loss(self._model, images.to(device), self._labels[positions].to(device), stream)
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._ema.step(self._model.parameters())
        self._step += 1
        return float(loss.detach())

    def run(self, command: str) -> dict[str, Any]:
        """Train to the last step and write the result; returns its record.

        Raises StopRequested after a checkpoint where stopping was asked for; the same command resumes.
        """
        finished = self._output / _RECORD
        if finished.exists():
            made = read_json(finished, "use another --output")
            self._check_identity(finished, {name: made.get(name) for name in ("config", "data_digest")})
            self._say(f"{self._output} is complete; nothing to do")
            return {}
        self._resume()
        progress = Progress(
            "training",
            self._options.steps,
            unit="steps",
            enabled=self._accelerator.is_main_process,
            every=self._options.progress_seconds,
            done=self._step,
        )
        while self._step < self._options.steps:
            begin = time.perf_counter()
            loss = self._train_step()
            self._seconds += time.perf_counter() - begin
            done = self._step == self._options.steps
            progress.show(self._step, f"loss {loss:.4f}", final=done)
            stopping = self._step % 10 == 0 and self._anyone_stops()
            if not done and (stopping or self._step % self._options.checkpoint_steps == 0):
                self._checkpoint()
            if stopping and not done:
                raise StopRequested(f"stopped early by {self._stop.reason}; the same command continues")
        return self._finish(command)

    def _anyone_stops(self) -> bool:
        flag = torch.tensor([float(self._stop.requested())], device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum").item())

    def _say(self, line: str) -> None:
        if self._accelerator.is_main_process:
            print(line, flush=True)

    def _identity(self) -> dict[str, Any]:
        return {"config": flatten(self._config, ("identity",)), "data_digest": self._digest}

    def _checkpoint(self) -> None:
        """Write a checkpoint under a temporary name, rename it, drop the one before."""
        folder = self._output / _CHECKPOINTS
        staged, final = folder / "staged", folder / f"step-{self._step:08d}"
        if self._accelerator.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(staged))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            state = {"step": self._step, "seconds": self._seconds, "identity": self._identity()}
            replace_bytes(staged / "state.json", canonical_json(state))
            os.rename(staged, final)
            for old in folder.glob("step-*"):
                if old != final:
                    shutil.rmtree(old)
        self._accelerator.wait_for_everyone()

    def _check_identity(self, place: Path, theirs: dict[str, Any]) -> None:
        mine = self._identity()
        if theirs != mine:
            before = theirs.get("config") or {}
            changed = [k for k, v in mine["config"].items() if before.get(k) != v] or ["the data itself"]
            raise UsageError(f"{place}: made with other values of {', '.join(changed)}; use another --output")

    def _resume(self) -> None:
        found = sorted((self._output / _CHECKPOINTS).glob("step-*/state.json"))
        if not found:
            return
        state = read_json(found[-1], "use another --output")
        self._check_identity(found[-1].parent, state["identity"])
        self._accelerator.load_state(str(found[-1].parent))
        self._step, self._seconds = state["step"], state["seconds"]
        self._say(f"resuming at step {self._step} of {self._options.steps}")

    def _finish(self, command: str) -> dict[str, Any]:
        self._accelerator.wait_for_everyone()
        model = self._accelerator.unwrap_model(self._model)
        if self._options.ema_decay:
            self._ema.copy_to(model.parameters())
        record: dict[str, Any] = {}
        if self._accelerator.is_main_process:
            model.eval()
            self._task.save(self._output, model)
            record = {
                "command": command,
                "config": flatten(self._config, ("identity",)),
                "data_digest": self._digest,
                "figures": self._task.figures(model),
                "parameters": sum(p.numel() for p in model.parameters()),
                "processes": self._accelerator.num_processes,
                "device": self._accelerator.device.type,
                "seconds": round(self._seconds, 1),
                "torch": torch.__version__,
                "training_images": len(self._labels),
            }
            publish_json(self._output / _RECORD, record)
            shutil.rmtree(self._output / _CHECKPOINTS, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()
        return record


def with_output(config: TrainConfig, output: str | None) -> TrainConfig:
    """Return ``config`` with ``--output`` applied; raises UsageError where neither names a folder."""
    config = dataclasses.replace(config, output=output or config.output)
    if not config.output:
        raise UsageError("output: no folder given; set --output FOLDER or the key 'output'")
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written: {error.strerror}; give another --output") from error
    if there and not {_CHECKPOINTS, _RECORD} & set(there):
        raise UsageError(f"--output {folder}: holds {', '.join(there[:5])}, no training; give a new or empty folder")
    return config
