"""What is done after steps: metrics, the progress bar, pictures, checkpoints; and stopping when asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distill import parallel
from distill.student import Student
from distill.training.checkpoint import prune
from distill.training.datamodule import DistillData
from distill.training.diagnostics import by_time
from distill.training.logger import GuardedWandb
from distill.training.module import DistillModule
from distill.training.sharding import local
from distill.training.stops import Diverged, Signals

DrawSamples = Callable[[Student, Path], dict[str, float]]
"""Writes a picture of what a student makes of fixed noise to a file, and measures it. Every process comes to it."""


class AfterSteps(pl.Callback):
    """What is done after each step, the last part of its batch."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell parts from steps."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            assert isinstance(module, DistillModule)
            self.after_step(trainer, module)

    def after_step(self, trainer: pl.Trainer, module: DistillModule) -> None:
        """The step `trainer.global_step` was made, or left out, on every process."""


class Metrics(AfterSteps):
    """Sends the last step's metrics, the mean over the processes, the speed and the share of time spent on waiting for
    data to the loggers every `every` steps, and keeps them in `last`; also at a step for which something is put in
    `extra`, that with them."""

    def __init__(self, every: int, batch: int, data: DistillData) -> None:
        self.last: dict[str, float] = {}
        self.extra: dict[str, float] = {}
        self._every, self._batch, self._data = every, batch, data
        self._mark = (0, 0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        waited = self._data.loader.waited if self._data.loader else 0.0
        self._mark = (trainer.global_step, time.perf_counter(), waited)

    def after_step(self, trainer: pl.Trainer, module: DistillModule) -> None:
        """Log when due."""
        step = trainer.global_step
        if step % self._every and step != trainer.max_steps and not self.extra:
            return
        loader = self._data.loader
        assert loader is not None
        now = time.perf_counter()
        seconds = now - self._mark[1]
        speed = (step - self._mark[0]) * self._batch / seconds
        waiting = (loader.waited - self._mark[2]) / seconds
        self._mark = (step, now, loader.waited)
        found = {name: float(value) for name, value in module.metrics.items()}
        found |= {"waiting_for_data": waiting, "skipped": len(loader.skipped)}
        found = dict(zip(found, parallel.mean([*found.values()]), strict=True))
        skipped = round(found.pop("skipped") * parallel.world())
        self.last = {**found, "images_per_second": speed}
        if skipped:
            self.last["skipped"] = skipped
        if module.guard.skipped:
            self.last["skipped_steps"] = module.guard.skipped
        self._log(trainer, self.last | by_time(module.rows))

    def _log(self, trainer: pl.Trainer, found: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self.extra | found, trainer.global_step)
        self.extra = {}


class Bar(AfterSteps):
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

    def after_step(self, trainer: pl.Trainer, module: DistillModule) -> None:
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


class Pictures(AfterSteps):
    """samples/step-*.png at the start, every `every` steps and at the end; wandb gets them too, and `metrics` what was
    measured on them."""

    def __init__(self, folder: Path, every: int, draw: DrawSamples, metrics: Metrics) -> None:
        self._folder, self._every, self._draw, self._metrics = folder, every, draw, metrics

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The student before its first step."""
        if trainer.global_step == 0:
            assert isinstance(module, DistillModule)
            self._picture(trainer, module)

    def after_step(self, trainer: pl.Trainer, module: DistillModule) -> None:
        """Draw when due."""
        if trainer.global_step % self._every == 0 or trainer.global_step == trainer.max_steps:
            self._picture(trainer, module)

    def _picture(self, trainer: pl.Trainer, module: DistillModule) -> None:
        file = self._folder / f"step-{trainer.global_step:08d}.png"
        measured = self._draw(module.averaged_student, file)
        if trainer.global_step:
            self._metrics.extra = measured
        for logger in trainer.loggers:
            if isinstance(logger, GuardedWandb):
                logger.log_image(file, trainer.global_step)


class Checkpoints(AfterSteps):
    """Saves every `every` steps and at the end, and deletes all but the newest `keep` once the new one is written."""

    def __init__(self, folder: Path, every: int, keep: int, identity: Mapping[str, str]) -> None:
        self._folder, self._every, self._keep, self._identity = folder, every, keep, identity
        self._saved = -1

    def after_step(self, trainer: pl.Trainer, module: DistillModule) -> None:
        """Save when due."""
        if trainer.global_step % self._every == 0 or trainer.global_step == trainer.max_steps:
            module.guard.saves()
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: DistillModule) -> None:
        """Save now, unless no step was made so far, which a start from nothing makes up for. Raises Diverged before
        anything is written if a weight is not finite, or if training ends without a step."""
        step = trainer.global_step
        bad = [name for name, value in module.named_parameters() if not torch.isfinite(*local([value])).all()]
        if parallel.most(bool(bad)):
            names = [name for found in parallel.everywhere(lambda: bad) for name in found]
            raise Diverged(f"step {step}: weights of {names[0]} are not finite")
        if not trainer.optimizers[0].state:
            if step == trainer.max_steps:
                raise Diverged(f"step {step}: not one step was made, every one was left out")
            return
        if self._saved == step:
            return
        path = self._folder / f"step-{step:08d}"
        trainer.save_checkpoint(path)
        self._saved = step
        parallel.on_main(lambda: prune(path, self._keep, self._identity))


class StopWhenAsked(AfterSteps):
    """At the first step boundary after a signal to any process: a checkpoint, then `Stopped`, on all of them."""

    def __init__(self, signals: Signals, checkpoints: Checkpoints) -> None:
        self._signals, self._checkpoints = signals, checkpoints

    def after_step(self, trainer: pl.Trainer, module: DistillModule) -> None:
        """Stop if asked to."""
        if asked := parallel.most(self._signals.pending or 0):
            self._signals.pending = asked
            self._checkpoints.save(trainer, module)
            self._signals.raise_pending()
