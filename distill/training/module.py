"""The training step as Lightning sees it: draw, loss, mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from distill.objectives.base import Batch, Objective
from distill.rows import Rows
from distill.student import Student
from distill.training.config import TrainerConfig
from distill.training.ema import averaged
from distill.training.stops import Diverged
from teachers.velocity import Teacher


class DistillModule(pl.LightningModule):
    """Student, EMA and optimizer. The frozen teacher is held outside the module tree: it is neither trained, nor saved,
    nor switched to train mode. `metrics` holds the last step's scalars as tensors."""

    def __init__(
        self,
        student: Student,
        objective: Objective,
        teacher: Teacher | None,
        config: TrainerConfig,
        seed: int,
        identity: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.student = student
        self.ema = averaged(student, config.ema)
        self.metrics: dict[str, Tensor | float] = {}
        self._objective = objective
        self._teacher = (teacher,)  # a tuple, so that torch does not register the network
        self._config = config
        self._seed = seed
        self._identity = dict(identity)

    @property
    def averaged_student(self) -> Student:
        """The student with the averaged weights."""
        return cast(Student, self.ema.module)

    def on_fit_start(self) -> None:
        """The teacher follows the student to its device."""
        if self._teacher[0] is not None:
            self._teacher[0].to(self.device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches are frozen: a copy on the device."""
        cond = None if batch.cond is None else {k: v.to(device) for k, v in batch.cond.items()}
        return replace(batch, x_1=batch.x_1.to(device), cond=cond)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Randomness is that of (seed, step, global row)."""
        step = self.global_step
        rows = Rows(self._seed, "train", step, batch.first, len(batch.x_1), self.device)
        draw = self._objective.draw(batch, self.student.path, rows, step)
        loss = self._objective.loss(self.student, self.averaged_student, self._teacher[0], draw)
        loss.check(len(batch.x_1))
        value = loss.per_sample.mean()
        if not torch.isfinite(value):
            bad = [batch.keys[i] for i in torch.nonzero(~torch.isfinite(loss.per_sample)).flatten().tolist()[:5]]
            raise Diverged(f"step {step}: the loss is {value.item()} (samples {', '.join(bad)})")
        self.metrics = {"loss": value.detach(), **{k: v.detach().mean() for k, v in loss.terms.items()}}
        return value

    def configure_optimizers(self) -> Optimizer:
        """AdamW; the learning rate is set before each step, as a function of the step alone."""
        config = self._config
        return torch.optim.AdamW(
            self.student.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips to the recipe's norm and keeps the norm before clipping. Raises Diverged before a step into nowhere."""
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._config.clip)
        if not torch.isfinite(norm):
            raise Diverged(f"step {self.global_step}: the gradient norm is {norm.item()}")
        self.metrics["grad_norm"] = norm

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Sets the learning rate, steps, then averages."""
        lr = self._config.lr * self._config.lr_factor(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.metrics["lr"] = lr
        self.ema.update_parameters(self.student)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the weights belong to: digests of recipe, teacher and data."""
        checkpoint["identity"] = self._identity
