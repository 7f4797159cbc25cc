"""Assembles Lightning's trainer over a run folder, from the start or from the newest good checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console

from distill.data.base import Reader
from distill.guidance import Guidance
from distill.objectives.base import Objective
from distill.student import Student
from distill.training.callbacks import Bar, DrawSamples, Metrics, Pictures, StopWhenAsked
from distill.training.checkpoint import CHECKPOINTS, Checkpoints, DirectoryCheckpoint, newest
from distill.training.config import TrackingConfig, TrainerConfig
from distill.training.datamodule import DistillData
from distill.training.logger import make_loggers
from distill.training.module import DistillModule
from distill.training.stops import Signals
from teachers.velocity import Teacher


def fit(
    folder: Path,
    *,
    student: Student,
    objective: Objective,
    networks: Mapping[str, Student],
    guidance: Guidance | None,
    teacher: Teacher | None,
    reader: Reader,
    workers: int,
    seed: int,
    trainer: TrainerConfig,
    tracking: TrackingConfig,
    identity: Mapping[str, str],
    params: dict[str, Any],
    draw_samples: DrawSamples,
    signals: Signals,
    console: Console,
) -> None:
    """Train `student` to `trainer.steps` in the run `folder`, from its newest checkpoint that verifies if it has one.

    workers: processes that read data ahead. identity: digests of recipe, teacher and data, which a checkpoint must
    share. params: the recipe, for the trackers.
    Raises CheckpointError (a foreign checkpoint), Diverged, Stopped, OSError (a checkpoint cannot be written).
    """
    latest, refused = newest(folder / CHECKPOINTS, identity)
    for reason in refused:
        console.print(f"passed over a checkpoint: {reason}", style="yellow", markup=False, highlight=False)
    step = int(latest.name.removeprefix("step-")) if latest else 0
    if latest:
        console.print(f"continuing from {latest}", markup=False, highlight=False)
    module = DistillModule(student, objective, teacher, trainer, seed, identity, networks, guidance)
    checkpoints = Checkpoints(folder / CHECKPOINTS, trainer.checkpoint_every, trainer.keep)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    data = DistillData(reader, seed, trainer.batch, workers, say)
    metrics = Metrics(tracking.log_every, trainer.batch, data)
    pictures = [Pictures(folder / "samples", tracking.samples_every, draw_samples)] if tracking.samples_every else []
    # the order counts: metrics and pictures of a step are written before its checkpoint, and that before a stop
    callbacks = [metrics, Bar(metrics, console), *pictures, checkpoints, StopWhenAsked(signals, checkpoints)]
    use_gpu = trainer.device == "cuda" or (trainer.device == "auto" and torch.cuda.is_available())
    _quiet()
    with warnings.catch_warnings(), signals.deferred():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        engine = pl.Trainer(
            accelerator="gpu" if use_gpu else "cpu",
            devices=1,
            max_epochs=-1,
            max_steps=trainer.steps,
            logger=make_loggers(folder, tracking, step, params, console),
            callbacks=callbacks,
            plugins=[DirectoryCheckpoint()],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            engine.fit(module, data, ckpt_path=latest)
        except (RuntimeError, OSError, EOFError) as error:  # torch tells of a dead worker wherever this process is
            raise (data.loader and data.loader.explain()) or error from None
    signals.raise_pending()


def _quiet() -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
