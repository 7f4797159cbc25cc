"""The training step as Lightning sees it: draw, loss, mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from itertools import chain, compress
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.guidance import Guidance
from distill.lora import copied
from distill.objectives.base import Batch, Draw, Loss, Objective
from distill.objectives.weights import LogVariance, Weight
from distill.parallel import patient, world
from distill.rows import Rows
from distill.student import Student
from distill.training.config import TrainerConfig
from distill.training.diagnostics import Seen
from distill.training.ema import averaged
from distill.training.guard import Guard
from distill.training.optimizer import grouped, make_optimizer
from distill.training.precision import mixed
from distill.training.recompute import recompute
from distill.training.sharding import idle, local, number, shard
from teachers.space import cond_on
from teachers.velocity import Teacher


class DistillModule(pl.LightningModule):
    """Student, EMA and optimizer, and what the objective asks for: a slow copy that gives targets, further networks, a
    learned log-variance. The frozen teacher is held outside the module tree: it is neither trained, nor saved, nor
    switched to train mode. `metrics` holds the last step's scalars as tensors, of this process.

    share_teacher: whether the teacher is sharded too where the student is."""

    def __init__(
        self,
        student: Student,
        objective: Objective,
        teacher: Teacher | None,
        config: TrainerConfig,
        seed: int,
        identity: Mapping[str, str],
        networks: Mapping[str, Student] | None = None,
        guidance: Guidance | None = None,
        guard: Guard | None = None,
        share_teacher: bool = False,
    ) -> None:
        super().__init__()
        if config.recompute:
            for trained in (student, *(networks or {}).values()):
                recompute(trained.network)
        self.student = student
        self.ema = averaged(student, config.ema)
        self.networks = nn.ModuleDict(networks or {})
        own = objective.target_decay(0) is not None
        self.target = copied(student).requires_grad_(False) if own else None
        self.log_variance = LogVariance(objective.terms, seed) if objective.weight.learned != "none" else None
        self.metrics: dict[str, Tensor | float] = {}
        self.rows: Seen | None = None  # of the last part of a step
        self._objective = objective
        self._guidance = guidance
        self._teacher = (teacher,)  # a tuple, so that torch does not register the network
        self._config = config
        self._seed = seed
        self._identity = dict(identity)
        self.guard = guard or Guard(0, print)
        self._share_teacher = share_teacher
        self._parts = 0  # of the step, so far
        self._idle: list[nn.Parameter] | None = None

    def configure_model(self) -> None:
        """Under FSDP2, shard what is trained, what follows it, and the teacher."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        patient(timedelta(seconds=self._config.timeout), mesh.get_group())
        copies = (self.averaged_student, *([self.target] if self.target is not None else []))
        for student in (self.student, *copies, *map(_student, self.networks.values())):
            for part in student.children():
                shard(part, mesh)
        if self.log_variance is not None:
            shard(self.log_variance, mesh)
        if self._teacher[0] is not None and self._share_teacher:
            for part in self._teacher[0].modules():
                shard(part, mesh)

    @property
    def averaged_student(self) -> Student:
        """The student with the averaged weights."""
        return cast(Student, self.ema.module)

    def on_fit_start(self) -> None:
        """The teacher follows the student to its device."""
        if self._teacher[0] is not None:
            self._teacher[0].to(self.device)

    def on_train_start(self) -> None:
        """All have read what they go on from: from here on, a process that others wait for long is lost."""
        patient(timedelta(seconds=self._config.timeout))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches are frozen: a copy on the device."""
        x_0 = None if batch.x_0 is None else batch.x_0.to(device)
        return replace(batch, x_1=batch.x_1.to(device), x_0=x_0, cond=cond_on(batch.cond, device))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a part of this process's rows. Randomness is that of (seed, step, global row)."""
        step = self.global_step
        where = (step, batch.first, len(batch.x_1), self.device)
        if self._guidance is not None:
            cond = self._guidance.condition(batch.cond, Rows(self._seed, "guidance", *where))
            batch = replace(batch, cond=cond)
        draw = self._objective.draw(batch, self.student.path, Rows(self._seed, "train", *where), step)
        networks = {name: _student(network).velocity for name, network in self.networks.items()}
        target = self.student if self.target is None else self.target
        with mixed(self._config.precision, self.device):
            loss = cast(Any, self._objective).loss(self.student, target, self._teacher[0], draw, **networks)
        loss.check(len(batch.x_1))
        per_row = self._weighted(loss, draw)
        value = per_row.mean()
        self.guard.saw(per_row, batch.keys)
        self._note(loss, value)
        self.rows = Seen(draw.s if self.student.kind == "velocity" else draw.t - draw.s, loss)
        return self._reaching_all(value)

    def _reaching_all(self, value: Tensor) -> Tensor:
        """DDP waits for a gradient of every weight: those that the loss does not depend on, as seen at the first step,
        get one of zeros. (Having DDP look for them at each step costs a tenth of a small one.)"""
        if world() == 1 or self.device_mesh is not None:
            return value
        if self._idle is None:
            self._idle = idle(value, self._parameters_trained())
        return value + sum(0 * p.sum() for p in self._idle)

    def _note(self, loss: Loss, value: Tensor) -> None:
        """Adds a part's share to the step's metrics."""
        if self._parts == 0:
            self.metrics = {}
        self._parts = (self._parts + 1) % self._config.accumulate
        found = {name: v.detach().mean() for name, v in loss.summands.items()}
        if self._objective.weight != Weight():
            found["weighted"] = value.detach()
        for name, v in found.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + v / self._config.accumulate

    def _weighted(self, loss: Loss, draw: Draw) -> Tensor:
        gap = draw.t - draw.s if loss.gap is None else loss.gap
        learned = {} if self.log_variance is None else self.log_variance(draw.s, draw.t)
        weight = self._objective.weight
        return torch.stack(
            [
                v if name in loss.plain else weight(v, gap, learned.get(name), loss.scale)
                for name, v in loss.summands.items()
            ]
        ).sum(0)

    def configure_optimizers(self) -> Optimizer:
        """The learning rate is set before each step, as a function of the step alone."""
        return make_optimizer(self.trained, self._config)

    def _parameters_trained(self) -> list[nn.Parameter]:
        """In the optimizer's order."""
        return list(chain(*grouped(self.trained, self._config)))

    @property
    def trained(self) -> list[nn.Module]:
        """The student first, then what is trained along with it."""
        return [self.student, *self.networks.values(), *([self.log_variance] if self.log_variance else [])]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Gradients, then the step if the guard lets it pass: clip, set the learning rate, step and average; then move
        the target, whose stages end at their steps, made or left out. Raises Diverged."""
        assert optimizer_closure is not None
        optimizer_closure()
        for parameter in self._idle or ():
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None  # as in one process
        step = self.global_step
        lr = self._config.lr * self._config.lr_factor(step)
        norms = [number(torch.nn.utils.clip_grad_norm_(part.parameters(), self._config.clip)) for part in self.trained]
        self.metrics |= {"grad_norm": norms[0], "lr": lr}
        if self.guard.passes(step, norms):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            self.ema.update_parameters(self.student)
        if self.target is not None:
            self._move_target(step)

    def _move_target(self, step: int) -> None:
        decay = self._objective.target_decay(step)
        assert self.target is not None and decay is not None
        if decay < 1:
            with torch.no_grad():
                own = [p.requires_grad for p in self.student.parameters()]
                slow = local(compress(self.target.parameters(), own))
                fast = local(compress(self.student.parameters(), own))
                torch._foreach_lerp_(slow, fast, 1 - decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the weights belong to: digests of recipe, teacher and data."""
        checkpoint["identity"] = self._identity
        checkpoint["guard"] = self.guard.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reads what this process needs of a checkpoint: whole tensors, or the rows of its shards."""
        self.guard.restore(checkpoint.get("guard", self.guard.state()))
        own = self.state_dict()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v.like(own[k]) if k in own else v.whole() for k, v in state.items()}
        for optimizer in checkpoint["optimizer_states"]:
            trained = self._parameters_trained()
            for index, moments in optimizer["state"].items():  # of those that had a gradient
                for name, stored in moments.items():
                    moments[name] = stored.whole() if name == "step" else stored.like(trained[index])


def _student(network: nn.Module) -> Student:
    return cast(Student, network)
