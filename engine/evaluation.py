"""Compares small labelled sets by the accuracy of students trained on them; resumable, any number of processes.

Every (set, seed) is one independent result file, taken round-robin by rank; no collective call. A set is
``NAME=KIND:PLACE``; ``{seed}`` in PLACE stands for the seed, so each seed may have a distillation run of its own.

    shards:FOLDER   the shards of a run            random:IPC    random real images, drawn anew for each seed
    bases:RUN       its base images, unrefined     nearest:RUN   the real image nearest to each prototype
"""

from __future__ import annotations

import re
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import imaging, shards, students, workplan
from engine.cluster import StopWatch, World, choose_device
from engine.config import DataConfig
from engine.finishing import open_pool
from engine.prototype_files import read_prototypes
from engine.publish import canonical_json, digest_bytes, publish_json, read_json, replace_bytes
from engine.real_data import RealData, open_data, open_split
from engine.records import UsageError
from engine.run_record import read_record
from engine.settings import IDENTITY, RUNTIME, flatten, key, section
from engine.students import StudentConfig, mean_and_interval

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 images (N, C, S, S), labels (N,)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Everything ``engine/evaluate_student.py`` needs."""

    output: str = key("", "folder for the results (--output)", kind=RUNTIME)
    sets: tuple[str, ...] = key((), "what is compared, each NAME=KIND:PLACE; the first is the reference", kind=RUNTIME)
    seeds: int = key(5, "students of each set", kind=RUNTIME, low=1)
    split: str = key("test", "real split that is scored; choose options on 'validation', read 'test' once")
    image_size: int = key(32, "pixels of a side", low=4)
    channels: int = key(1, "1 grey, 3 RGB", low=1, high=3)
    data: DataConfig = section(DataConfig)
    student: StudentConfig = section(StudentConfig)


def read_shards(folder: Path, image_size: int, channels: int) -> Labelled:
    """Read the images and labels of finished shards; raises UsageError where they are not finished or damaged."""
    sums = folder / shards.SUMS
    if not sums.is_file():
        raise UsageError(f"sets: {folder} holds no {shards.SUMS}; finished shards are needed")
    digests = {line[66:]: line[:64] for line in sums.read_text().splitlines()}
    images, labels = [], []
    for path in sorted(folder.glob("train-*.tar")):
        if digest_bytes(path.read_bytes()) != digests.get(path.name):
            raise UsageError(f"sets: {path} does not match {shards.SUMS}")
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None  # shards hold plain files only
                if member.name.endswith(".cls"):
                    labels.append(int(stream.read()))
                elif not member.name.endswith(".json"):
                    images.append(imaging.fit(imaging.decode(stream.read(), channels), image_size, "resize"))
    return np.stack(images), np.array(labels, np.int64)


def read_bases(run: Path, image_size: int, channels: int) -> Labelled:
    """Read attempt 0 of every slot from a run's pool: what prototypes give without refinement."""
    record = read_record(run)
    pool = open_pool(run, record)
    images, labels = [], []
    for unit in record.units():
        for attempts in pool.read(unit):
            base = attempts[0]
            if base.size:
                data = pool.read_image(unit.index, base.offset, base.size, base.sha256)
                images.append(imaging.fit(imaging.decode(data, channels), image_size, "resize"))
                labels.append(unit.class_index)
    return np.stack(images), np.array(labels, np.int64)


def draw_random(data: RealData, images_per_class: int, seed: int) -> Labelled:
    """Draw real images, the same number of every class, without replacement."""
    parts = []
    for class_index in range(len(data.class_names)):
        stream = workplan.generator(seed, workplan.RANDOM_SUBSET, class_index)
        everything = data.load_class(class_index)
        if images_per_class > len(everything):
            raise UsageError(f"sets: random:{images_per_class} given; class {class_index} has {len(everything)} images")
        parts.append(everything[np.sort(stream.permutation(len(everything))[:images_per_class])])
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), images_per_class)


def read_nearest(data: RealData, run: Path) -> Labelled:
    """Read the real image nearest to each prototype of a run; raises UsageError where the run used other data."""
    record = read_record(run)
    if record.digests["data"] != data.digest:
        raise UsageError(f"sets: {run} was made from other data than data.path; its nearest images are not here")
    images, labels = [], []
    for class_index in range(len(data.class_names)):
        for position in read_prototypes(run / "prototypes", class_index).nearest:
            image = data.read(class_index, int(position))
            if image is not None:
                images.append(image)
                labels.append(class_index)
    return np.stack(images), np.array(labels, np.int64)


class Evaluation:
    """One comparison: its sets, its results so far, and the table."""

    def __init__(self, config: EvaluationConfig, world: World, stop: StopWatch) -> None:
        if not config.output:
            raise UsageError("output: no folder given; set --output FOLDER or the key 'output'")
        self._config, self._world, self._stop = config, world, stop
        self._folder = Path(config.output)
        self._sets = dict(self._parse(text) for text in config.sets)
        if not self._sets:
            raise UsageError("sets: nothing to compare; give a list of NAME=KIND:PLACE")
        self._train = open_data(config.data, "train", config.image_size, config.channels)
        if config.student.threads:
            torch.set_num_threads(config.student.threads)

    def _parse(self, text: str) -> tuple[str, Callable[[int], Labelled]]:
        name, _, rest = text.partition("=")
        kind, _, place = rest.partition(":")
        side, channels = self._config.image_size, self._config.channels
        readers: dict[str, Callable[[int], Labelled]] = {
            "shards": lambda seed: read_shards(Path(place.format(seed=seed)), side, channels),
            "bases": lambda seed: read_bases(Path(place.format(seed=seed)), side, channels),
            "nearest": lambda seed: read_nearest(self._train, Path(place.format(seed=seed))),
            "random": lambda seed: draw_random(self._train, int(place), seed),
        }
        named = re.fullmatch(r"[\w .,()+-]{1,80}", name)
        if kind not in readers or not place or not named or (kind == "random" and not place.isdigit()):
            raise UsageError(f"sets: {text!r} given; allowed: NAME=KIND:PLACE with KIND one of {', '.join(readers)}")
        return name, readers[kind]

    def _path(self, name: str, seed: int) -> Path:
        return self._folder / "results" / f"{name}-seed{seed}.json"

    def run(self) -> dict[str, Any]:
        """Train what is missing of this process's share; the first process then returns the whole comparison."""
        (self._folder / "results").mkdir(parents=True, exist_ok=True)
        work = [(name, seed) for seed in range(self._config.seeds) for name in self._sets]
        device = choose_device("auto", self._world.local_rank)
        test = open_split(self._config.data, self._config.split, self._train)
        self._scored_digest, scored = test.digest, test.load_all()
        if test.skipped and self._world.is_first:
            print(f"{len(test.skipped)} images of split {self._config.split!r} could not be read: {test.skipped[0]}")
        for name, seed in workplan.share(work, self._world.rank, self._world.size):
            self._stop.check()
            self._one(name, seed, scored, device)
        if not self._world.is_first:
            return {}
        self._stop.wait(lambda: all(self._path(*item).exists() for item in work), 0.5)
        return self._collect(test)

    def _one(self, name: str, seed: int, scored: Labelled, device: str) -> None:
        (images, labels), path = self._sets[name](seed), self._path(name, seed)
        identity = self._identity(images, labels)
        if path.exists():
            self._read(name, seed, identity)
            return
        begin = time.perf_counter()
        num_classes = len(self._train.class_names)
        student, normalise = students.train_student(
            self._config.student, images, labels, num_classes=num_classes, seed=seed, device=device
        )
        result = students.accuracy(student, normalise, *scored)
        publish_json(
            path, {"accuracy": result, "identity": identity, "images": len(labels), "name": name, "seed": seed}
        )
        print(f"{name}, seed {seed}: {result:.1%} ({time.perf_counter() - begin:.0f} s)", flush=True)

    def _identity(self, images: np.ndarray, labels: np.ndarray) -> str:
        settings = {**flatten(self._config, (IDENTITY,)), "scored": self._scored_digest}
        return digest_bytes(canonical_json(settings) + images.tobytes() + labels.tobytes())

    def _read(self, name: str, seed: int, identity: str) -> dict[str, Any]:
        path = self._path(name, seed)
        content: dict[str, Any] = read_json(path, "remove it")
        if content.get("identity") != identity:
            raise UsageError(f"{path}: made with other settings or images; remove it or use another --output")
        return content

    def _collect(self, test: RealData) -> dict[str, Any]:
        results = {
            name: [self._read(name, seed, self._identity(*read(seed))) for seed in range(self._config.seeds)]
            for name, read in self._sets.items()
        }
        reference = [entry["accuracy"] for entry in next(iter(results.values()))]
        rows = []
        for name, entries in results.items():
            values = [entry["accuracy"] for entry in entries]
            differences = [mine - other for mine, other in zip(reference, values, strict=True)]
            rows.append(
                {
                    "name": name,
                    "images": entries[0]["images"],
                    "accuracies": values,
                    "mean": mean_and_interval(values)[0],
                    "interval": mean_and_interval(values)[1] if len(values) > 1 else None,
                    "reference_minus_this": mean_and_interval(differences)[0],
                    "difference_interval": mean_and_interval(differences)[1] if len(values) > 1 else None,
                }
            )
        table = {
            "config": flatten(self._config, (IDENTITY,)),
            "rows": rows,
            "scored_images": sum(test.count(index) for index in range(len(test.class_names))),
            "seeds": self._config.seeds,
            "split": self._config.split,
        }
        replace_bytes(self._folder / "table.json", canonical_json(table))
        replace_bytes(self._folder / "table.md", format_table(table).encode())
        return table


def format_table(table: dict[str, Any]) -> str:
    """Return the comparison as a Markdown table; intervals are 95 %, differences are paired by seed."""
    reference = table["rows"][0]["name"]
    lines = [
        f"| set | images | {table['split']} accuracy, % | {reference} minus this, points |",
        "|---|---|---|---|",
    ]
    for row in table["rows"]:
        half = "" if row["interval"] is None else f" ± {100 * row['interval']:.1f}"
        gap = "" if row["difference_interval"] is None else f" ± {100 * row['difference_interval']:.1f}"
        difference = "" if row["name"] == reference else f"{100 * row['reference_minus_this']:+.1f}{gap}"
        lines.append(f"| {row['name']} | {row['images']} | {100 * row['mean']:.1f}{half} | {difference} |")
    return "\n".join(lines) + "\n"
