"""The main job, stage by stage: prototypes -> synthesis and refinement -> selection -> shards -> report.

This is the only module that knows all stages. Each stage does what is missing and nothing else, so a
start after an interruption, or beside other processes, needs no special case. Between stages a
process waits by looking at the run folder; no collective call is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine import closing
from engine.cluster import StopWatch, World, spare_threads
from engine.config import RunConfig
from engine.conveyor import Conveyor, PoolWriter
from engine.finishing import Finishing, open_pool, policy_of
from engine.generation import Producer
from engine.image_making import ImageFormat, ImageMaker
from engine.kernels import ran_out_of_memory
from engine.preparation import Models, agree, load_models, make_guidance, make_solver, obey
from engine.prototypes import count_skipped, is_published, make_prototypes, publish_prototypes, read_prototypes
from engine.records import Unit, UsageError
from engine.run_record import RunRecord, run_folder
from engine.synthesis import DenoisingLoop
from engine.telemetry import EventLog, Progress, Stopclock, format_seconds
from engine.workplan import share

# of the loop's thread: work and, from "wait_" on, waiting; then of the threads beside it
_SPANS = ("warm_up", "open", "denoise", "judge", "wait_encode", "wait_publish", "encode", "publish")


class Job:
    """One process's part in one run."""

    def __init__(
        self, folder: Path, config: RunConfig, models: Models, record: RunRecord, world: World, stop: StopWatch
    ) -> None:
        self._folder, self._config, self._models, self._record = folder, config, models, record
        self._world, self._stop = world, stop
        self._units, self._pool = record.units(), open_pool(folder, record)
        self._log = EventLog(folder / "logs", world.rank)
        self.clock = Stopclock()
        self.finishing = Finishing(folder, record, config, world, stop)

    def _progress(self, label: str, total: int, unit: str, done: int) -> Progress:
        every = self._config.runtime.progress_seconds
        return Progress(label, total, unit=unit, enabled=self._world.is_first, every=every, done=done)

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Run one stage and log how long it took."""
        with self.clock.span(name):
            work()
        self._log.write("stage", name=name, seconds=round(self.clock.seconds[name], 3), counts=dict(self.clock.counts))

    def make_prototypes(self) -> None:
        """Step 1: this process's share of the classes, then wait for all."""
        folder, options = self._folder / "prototypes", self._config.prototypes
        folder.mkdir(exist_ok=True)
        classes = range(len(self._record.class_names))
        done = sum(is_published(folder, index) for index in classes)
        progress = self._progress("prototypes", len(classes), "classes", done)
        for class_index in share(classes, self._world.rank, self._world.size):
            self._stop.check()
            if is_published(folder, class_index):
                continue
            made = make_prototypes(
                self._models.backend,
                self._models.data,
                class_index,
                options,
                batch=self._config.generator.vae_batch,
                seed=self._config.seed,
                device=self._models.device,
                between_batches=self._stop.check,
            )
            for line in made.skipped:
                self._log.write("skipped_image", reason=line)
            publish_prototypes(folder, made)
            if progress.is_due():
                progress.show(sum(is_published(folder, index) for index in classes))
        self._stop.wait(lambda: all(is_published(folder, i) for i in classes), self._config.runtime.poll_seconds)
        self._models.data.close()  # the decoding processes have nothing left to do
        progress.show(len(classes), final=True)
        if self._world.is_first:
            skipped = sum(count_skipped(folder, index) for index in classes)
            if skipped:
                print(f"{skipped} real images could not be read; {folder}/class-*.json lists them", flush=True)

    def _producer(self) -> tuple[Producer, DenoisingLoop, ImageMaker]:
        config, models = self._config, self._models
        solver, decisions = make_solver(config, models.backend, models.device), self._record.decisions
        guidance, rows = make_guidance(config), int(decisions["rows"])
        loop = DenoisingLoop(models.backend, models.conditions, solver, guidance, rows=rows, seed=config.seed)
        image_format = ImageFormat(decisions["image_size"], config.output.format, config.output.quality)
        vae_batch = config.generator.vae_batch
        maker = ImageMaker(models.backend, models.detector, image_format, vae_batch=vae_batch, device=models.device)
        if models.device.startswith("cuda") or decisions["compile"]:
            with self.clock.span("warm_up"):  # kernels are loaded and compiled before anything is timed
                loop.warm_up()
                maker.warm_up()
        overlap, threads = config.runtime.overlap, config.runtime.encode_threads or spare_threads(models.device)
        conveyor = Conveyor(maker, self.clock, threads=threads if overlap else 0)
        writer = PoolWriter(self._pool, self.clock, self._note_unit, threaded=overlap)
        policy = policy_of(config, selecting=False)
        return Producer(loop, conveyor, writer, policy, self.clock), loop, maker

    def _note_unit(self, unit: Unit) -> None:
        self._log.write("unit", index=unit.index, class_index=unit.class_index, first_slot=unit.first_slot)

    def synthesize(self) -> None:
        """Steps 2 to 4a: this process's share of the units, then wait for all."""
        missing = self._pool.missing(self._units)
        # shares are cut from the whole plan: what is missing looks different to each process
        mine = self._pool.missing(share(self._units, self._world.rank, self._world.size))
        total = sum(unit.num_slots for unit in self._units)
        progress = self._progress("images", total, "slots", total - sum(unit.num_slots for unit in missing))
        if mine:
            producer, loop, maker = self._producer()

            def between_steps() -> None:
                self._stop.check()
                if progress.is_due():  # counting lists the pool
                    counts = self.clock.counts
                    note = f"{counts['images']} images made, {counts['flagged']} bases flagged"
                    progress.show(total - sum(unit.num_slots for unit in self._pool.missing(missing)), note)

            try:
                with producer:
                    producer.run(iter(mine), self._prototypes_of, between_steps)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                raise self._out_of_memory() from error
            spans = {name: round(self.clock.seconds[name], 3) for name in _SPANS}
            counts = dataclasses.asdict(loop.counts)
            self._log.write("loop", **counts, occupancy=round(loop.counts.occupancy, 4), seconds=spans)
            self._log.write("health", **maker.health)
            for name, count in maker.health.items():
                self.clock.add(name, count)
            self.clock.counts["rows_used"], self.clock.counts["rows_total"] = (
                loop.counts.rows_used,
                loop.counts.rows_total,
            )
        self._stop.wait(lambda: not self._pool.missing(missing), self._config.runtime.poll_seconds)
        progress.show(total, f"{self.clock.counts['images']} images made by this process", final=True)

    def _out_of_memory(self) -> UsageError:
        rows = int(self._record.decisions["rows"])
        return UsageError(
            f"synthesis.rows: {rows} rows do not fit into the memory of {self._models.device}; they are fixed for this "
            f"run, so give synthesis.rows={max(2, rows // 2)} (or auto) and another --output"
        )

    def _prototypes_of(self, unit: Unit) -> np.ndarray:
        prototypes = read_prototypes(self._folder / "prototypes", unit.class_index)
        return prototypes.centroids[unit.first_slot : unit.first_slot + unit.num_slots]

    def write_report(self) -> None:
        """Write the contact sheet and the summary, and print what came out (first process)."""
        if self._world.is_first:
            models = self._models
            inputs = closing.ReportInputs(models.data, models.backend.channels, models.judge)
            report = closing.ClosingReport(self._folder, self._record, self._config, inputs, self.finishing)
            for line in [
                *report.write(),
                *self._own_work(),
                f"shards:        {self.finishing.shards_folder}",
                f"contact sheet: {report.sheet_path}",
            ]:
                print(line, flush=True)

    def _own_work(self) -> list[str]:
        made, counts = self.clock.counts["images"], self.clock.counts
        if not made:
            return []
        seconds = self.clock.seconds["synthesize"] - self.clock.seconds["warm_up"]
        lines = [
            f"this process: {made} images in {format_seconds(seconds)}, {made / seconds:.1f} images/s, "
            f"{counts['rows_used'] / counts['rows_total']:.0%} of the rows at work"
        ]
        if counts["failed"] or counts["decoded_again"]:
            lines.append(
                f"health: {counts['failed']} images failed ({counts['latents_not_finite']} latents and "
                f"{counts['images_not_finite']} images not finite, {counts['flat']} of nearly one colour), "
                f"{counts['decoded_again']} decoded again in float32"
            )
        return lines


def distill(config: RunConfig, world: World, stop: StopWatch) -> None:
    """Run the main job to its end, or raise UsageError or StopRequested."""
    folder = run_folder(config.output.path)
    models = load_models(config, world)
    stop.check()
    record = agree(folder, config, models, world, stop)
    obey(folder, config, models, record)
    job = Job(folder, config, models, record, world, stop)
    if job.finishing.is_finished() and (job.finishing.report_folder / "summary.json").exists():
        if world.is_first:
            print(f"{folder} is complete; nothing to do. Shards: {job.finishing.shards_folder}")
        return
    for name, work in (
        ("prototypes", job.make_prototypes),
        ("synthesize", job.synthesize),
        ("select", job.finishing.select),
        ("finalize", job.finishing.finalize),
        ("report", job.write_report),
    ):
        job.stage(name, work)
