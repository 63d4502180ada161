"""The two networks that :mod:`engine.training` trains: the generator and the classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import workplan
from engine.backends import pixel_unet
from engine.detector import Classifier
from engine.networks import LogitsOf, Network
from engine.preprocessing import Preprocessor, plain_preprocessing, write_preprocessing
from engine.real_data import RealData, has_split, open_split
from engine.records import UsageError
from engine.solvers import Schedule
from engine.training import Draws, Task
from engine.training_config import TrainConfig

_EVALUATION_BATCH = 256


def draw_noise(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise (N, *shape) in float32: an image's own, whatever images it is drawn beside."""
    streams = (workplan.generator(int(seed), workplan.TRAINING_NOISE) for seed in seeds)
    return torch.from_numpy(np.stack([stream.standard_normal(tuple(shape), dtype=np.float32) for stream in streams]))


@torch.no_grad()
def validation_loss(task: Task, model: nn.Module, data: RealData) -> dict[str, float]:
    """Return the mean loss of a generator over real images that it was not trained on."""
    stream, total, count = torch.Generator().manual_seed(0), 0.0, 0
    device = next(model.parameters()).device
    for images, labels in data.parts(_EVALUATION_BATCH):
        draws = {**task.draw(len(labels), stream), "dropped": torch.zeros(len(labels), dtype=torch.bool)}
        loss = task.loss(model, torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), draws)
        total, count = total + float(loss) * len(labels), count + len(labels)
    return {"validation_loss": round(total / max(1, count), 5), "validation_images": count}


class GeneratorTask:
    """A class-conditional pixel U-Net with v-prediction (Salimans and Ho 2022, arXiv 2202.00512).

    Loss: mean squared error of v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 at uniform t; ``label_drop`` of the
    labels become the null class, which classifier-free guidance needs.
    """

    def __init__(self, config: TrainConfig, data: RealData) -> None:
        network = config.network
        self._config = config
        self._shape = pixel_unet.PixelModel(data.class_names, network.image_size, network.channels, network.patch)
        torch.manual_seed(config.training.seed)
        self.model = pixel_unet.build_unet(self._shape, network.widths, network.layers)
        self._held_out = open_split(config.data, "validation", data)
        self._alphas = Schedule(pixel_unet.SCHEDULER_CONFIG).stock().alphas_cumprod

    def draw(self, count: int, stream: torch.Generator) -> Draws:
        """Draw the timestep, the seed of the noise and whether the label is dropped, for each image."""
        return {
            "timesteps": torch.randint(0, len(self._alphas), (count,), generator=stream),
            "noise_seeds": torch.randint(0, 2**62, (count,), generator=stream),
            "dropped": torch.rand(count, generator=stream) < self._config.training.label_drop,
        }

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Return the loss of uint8 images (N, C, S, S) and labels (N,)."""
        x0 = pixel_unet.pixels_to_latents(images, self._shape.patch)
        noise = draw_noise(draws["noise_seeds"], x0.shape[1:]).to(x0.device)
        timesteps = draws["timesteps"]
        alpha = self._alphas[timesteps].to(x0.device).view(-1, 1, 1, 1)
        labels = torch.where(draws["dropped"].to(labels.device), len(self._shape.class_names), labels)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        x = x.contiguous(memory_format=torch.channels_last)
        output = model(x, timesteps.to(x0.device), class_labels=labels).sample.float()
        return (output - target).square().mean()

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return the loss on the validation split, without label drop, at fixed noise."""
        return validation_loss(self, model, self._held_out)

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write a folder for the backend ``pixel_unet``."""
        pixel_unet.save(folder, model, self._shape)


def build_classifier(config: TrainConfig, class_names: tuple[str, ...]) -> Any:
    """Build an untrained transformers image classifier of the configured family."""
    from transformers import AutoModelForImageClassification, RegNetConfig, ResNetConfig

    network = config.network
    family: Any = {"resnet": ResNetConfig, "regnet": RegNetConfig}[network.architecture]
    special = {"layer_type": "basic"} if network.architecture == "resnet" else {"layer_type": "x", "groups_width": 32}
    settings = family(
        num_channels=network.channels,
        embedding_size=network.widths[0],
        hidden_sizes=list(network.widths),
        depths=[network.layers] * len(network.widths),
        downsample_in_first_stage=False,
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        **special,
    )
    torch.manual_seed(config.training.seed)
    return AutoModelForImageClassification.from_config(settings)


class ClassifierTask:
    """An image classifier (the detector or the judge), trained with label smoothing 0.05."""

    def __init__(self, config: TrainConfig, data: RealData) -> None:
        network = config.network
        _, first = next(data.batches(0, 1000), (None, None))
        if first is None:
            raise UsageError(f"data.path: class 0 ({data.class_names[0]}) has no readable image")
        pixels = first.astype("float32") / 255.0
        mean = [round(float(m), 4) for m in pixels.mean((0, 2, 3))]
        std = [round(float(s), 4) for s in pixels.std((0, 2, 3))]
        splits = ["validation"] + ["test"] * has_split(config.data, "test")
        self._held_out = {split: open_split(config.data, split, data) for split in splits}
        self._preprocessing = plain_preprocessing(network.input_size or network.image_size, tuple(mean), tuple(std))
        self._preprocessor = Preprocessor(self._preprocessing)
        self.model = build_classifier(config, data.class_names)

    def draw(self, count: int, stream: torch.Generator) -> Draws:
        """Return nothing: the moves of the images are all that chance decides."""
        return {}

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Return the cross-entropy of uint8 images (N, C, S, S) and labels (N,)."""
        logits = model(self._preprocessor.to(images.device)(images)).logits.float()
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy on the validation and, where there is one, the test split, read here only."""
        device = str(next(model.parameters()).device)
        network = Network(LogitsOf(model), self._preprocessing, self._held_out["validation"].class_names, digest="")
        classifier = Classifier(network, batch=_EVALUATION_BATCH, device=device)
        return {
            f"{split}_accuracy": round(classifier.agreement(data.parts()), 4) for split, data in self._held_out.items()
        }

    def save(self, folder: Path, model: Any) -> None:
        """Write a folder that :meth:`Classifier.open` and transformers read."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        model.save_pretrained(folder, safe_serialization=True)
        write_preprocessing(folder, self._preprocessing)


TASKS: dict[str, Callable[[TrainConfig, RealData], Task]] = {"generator": GeneratorTask, "detector": ClassifierTask}
