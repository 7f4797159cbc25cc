"""Assembles Lightning's trainer over a run folder, from the start or from the newest good checkpoint."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from distill import parallel
from distill.data.base import Reader
from distill.guidance import Guidance
from distill.objectives.base import Objective
from distill.student import Student
from distill.training.callbacks import (
    AfterSteps,
    Bar,
    Checkpoints,
    DrawSamples,
    Metrics,
    Pictures,
    StopWhenAsked,
)
from distill.training.checkpoint import CHECKPOINTS, newest
from distill.training.config import StrategyName, TrackingConfig, TrainerConfig
from distill.training.datamodule import DistillData
from distill.training.guard import Guard
from distill.training.logger import make_loggers
from distill.training.module import DistillModule
from distill.training.precision import caution
from distill.training.stops import Diverged, Signals
from distill.training.strategy import DirectoryCheckpoint, environment, make_strategy
from teachers.velocity import Teacher


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Training a student to `trainer.steps` in the run `folder`.

    student, networks: make what is trained, before its first step. workers: processes that read data ahead. strategy:
    of several processes. own_teacher: whether the teacher is this training's own, to be sharded with the student.
    identity: digests of recipe, teacher and data, which a checkpoint must share. params: the recipe, for the trackers;
    run_id: the run's name there.
    """

    folder: Path
    student: Callable[[], Student]
    objective: Objective
    networks: Callable[[], Mapping[str, Student]]
    guidance: Guidance | None
    teacher: Teacher | None
    own_teacher: bool
    reader: Reader
    workers: int
    seed: int
    trainer: TrainerConfig
    strategy: StrategyName
    tracking: TrackingConfig
    identity: Mapping[str, str]
    params: dict[str, Any]
    run_id: str | None
    draw_samples: DrawSamples
    signals: Signals
    console: Console

    def __call__(self, latest: Path | None) -> None:
        """Train, from `latest`, the newest checkpoint that verifies, if there is one; after diverging once more.

        Raises CheckpointError (a foreign checkpoint), Diverged, Stopped, OSError (a checkpoint cannot be written), Lost
        (another process is gone). The same on every process.
        """
        if told := caution(self.trainer.precision, parallel.device(self.trainer.device)):
            self._say(f"caution: {told}", style="yellow")
        gone_back_to: Path | None = None
        while True:
            try:
                with parallel.noticing():
                    self._from(latest)
                break
            except Diverged as error:
                latest, _ = parallel.on_main(lambda: newest(self.folder / CHECKPOINTS, self.identity))
                if latest is None or latest == gone_back_to:
                    raise
                gone_back_to = latest
                self._say(f"{error}; going back to {latest}", style="yellow")
        self.signals.raise_pending()
        parallel.patient(parallel.PATIENCE)

    def _from(self, latest: Path | None) -> None:
        parallel.patient(parallel.PATIENCE)  # while a checkpoint is read; `DistillModule` ends it
        step = int(latest.name.removeprefix("step-")) if latest else 0
        if latest:
            self._say(f"continuing from {latest}")
        trainer = self.trainer
        data = DistillData(self.reader, self.seed, trainer.batch, self.workers, self._say, trainer.accumulate)
        _quiet()
        with warnings.catch_warnings(), self.signals.deferred():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of views, that stay as they are
            engine = pl.Trainer(
                accelerator="cpu" if parallel.device(trainer.device).type == "cpu" else "gpu",
                devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
                num_nodes=parallel.world() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
                strategy=make_strategy(self.strategy),
                accumulate_grad_batches=trainer.accumulate,
                max_epochs=-1,
                max_steps=trainer.steps,
                logger=make_loggers(self.folder, self.tracking, step, self.params, self.console, self.run_id)
                if parallel.is_main()
                else False,
                callbacks=self._callbacks(data),
                plugins=[DirectoryCheckpoint(), environment(self.strategy)],
                default_root_dir=self.folder,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            engine._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # they are ours
            engine.fit(self._module(), data, ckpt_path=latest)

    def _module(self) -> DistillModule:
        return DistillModule(
            self.student(),
            self.objective,
            self.teacher,
            self.trainer,
            self.seed,
            self.identity,
            self.networks(),
            self.guidance,
            Guard(self.trainer.skip, partial(self._say, style="yellow")),
            self.own_teacher,
        )

    def _callbacks(self, data: DistillData) -> list[pl.Callback]:
        """In an order that counts: pictures and metrics of a step, then its checkpoint, then a stop."""
        trainer, tracking = self.trainer, self.tracking
        metrics = Metrics(tracking.log_every, trainer.batch, data)
        checkpoints = Checkpoints(self.folder / CHECKPOINTS, trainer.checkpoint_every, trainer.keep, self.identity)
        seen: list[AfterSteps] = [metrics]
        if tracking.samples_every:
            seen.insert(0, Pictures(self.folder / "samples", tracking.samples_every, self.draw_samples, metrics))
        if parallel.is_main():
            seen.append(Bar(metrics, self.console))
        return [*seen, checkpoints, StopWhenAsked(self.signals, checkpoints)]

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _quiet() -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
