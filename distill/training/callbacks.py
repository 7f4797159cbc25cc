"""What is seen of training: metrics, the progress bar and pictures; and stopping when asked to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distill.student import Student
from distill.training.checkpoint import Checkpoints
from distill.training.datamodule import DistillData
from distill.training.logger import GuardedWandb
from distill.training.module import DistillModule
from distill.training.stops import Signals

DrawSamples = Callable[[Student, Path], None]
"""Writes a picture of what a student makes of fixed noise to a file."""


class Metrics(pl.Callback):
    """Sends the last step's metrics, the speed and the share of time spent on waiting for data to the loggers every
    `every` steps, and keeps them in `last`."""

    def __init__(self, every: int, batch: int, data: DistillData) -> None:
        self.last: dict[str, float] = {}
        self._every, self._batch, self._data = every, batch, data
        self._mark = (0, 0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        waited = self._data.loader.waited if self._data.loader else 0.0
        self._mark = (trainer.global_step, time.perf_counter(), waited)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Log when due."""
        step = trainer.global_step
        if step % self._every and step != trainer.max_steps:
            return
        assert isinstance(module, DistillModule)
        loader = self._data.loader
        assert loader is not None
        now = time.perf_counter()
        seconds = now - self._mark[1]
        speed = (step - self._mark[0]) * self._batch / seconds
        waiting = (loader.waited - self._mark[2]) / seconds
        self._mark = (step, now, loader.waited)
        self.last = {name: float(value) for name, value in module.metrics.items()}
        self.last |= {"images_per_second": speed, "waiting_for_data": waiting}
        if loader.skipped:
            self.last["skipped"] = len(loader.skipped)
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step)


class Bar(pl.Callback):
    """A rich progress bar: images/s, time left, loss, gradient norm; ten plain lines where there is no terminal."""

    def __init__(self, metrics: Metrics, console: Console) -> None:
        self._metrics, self._console = metrics, console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[shown]}"),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = TaskID(0)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Show the bar."""
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step, shown="")
        self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Advance it."""
        step, last = trainer.global_step, self._metrics.last
        shown = ""
        if last:
            speed, loss, norm = last["images_per_second"], last["loss"], last.get("grad_norm", 0.0)
            shown = f"{speed:,.0f} images/s  loss {loss:.4f}  grad norm {norm:.3f}"
        self._progress.update(self._task, completed=step, shown=shown)
        if not self._console.is_terminal and (step % max(int(trainer.max_steps) // 10, 1) == 0):
            self._console.print(f"step {step}/{trainer.max_steps}  {shown}")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


class Pictures(pl.Callback):
    """samples/step-*.png at the start, every `every` steps and at the end; wandb gets them too."""

    def __init__(self, folder: Path, every: int, draw: DrawSamples) -> None:
        self._folder, self._every, self._draw = folder, every, draw

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The student before its first step."""
        self._picture(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Draw when due."""
        if trainer.global_step % self._every == 0 or trainer.global_step == trainer.max_steps:
            self._picture(trainer, module)

    def _picture(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DistillModule)
        file = self._folder / f"step-{trainer.global_step:08d}.png"
        if file.exists():  # a resumed run starts where the picture was drawn
            return
        self._folder.mkdir(exist_ok=True)
        self._draw(module.averaged_student, file)
        for logger in trainer.loggers:
            if isinstance(logger, GuardedWandb):
                logger.log_image(file, trainer.global_step)


class StopWhenAsked(pl.Callback):
    """At the first step boundary after a signal: a checkpoint, then `Stopped`."""

    def __init__(self, signals: Signals, checkpoints: Checkpoints) -> None:
        self._signals, self._checkpoints = signals, checkpoints

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning has just taken SIGTERM: take it back."""
        self._signals.install()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Stop if asked to."""
        if self._signals.pending is not None:
            self._checkpoints.save(trainer, module)
            self._signals.raise_pending()
