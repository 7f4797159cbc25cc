"""The training module: what it owns beside the student, and what one step does to each of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from helpers import data, mixture
from torch import Tensor

from distill.objectives.base import Batch, Objective
from distill.objectives.consistency import Consistency, ConsistencyTrajectory
from distill.objectives.data_free import DataFree
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.progressive import Progressive
from distill.objectives.semigroup import Semigroup
from distill.objectives.times import Grid
from distill.objectives.weights import Weight
from distill.rows import Rows
from distill.student import StudentConfig
from distill.training.config import TrainerConfig
from distill.training.guard import Guard
from distill.training.module import DistillModule
from teachers.networks import NETWORKS
from teachers.space import DataSpace

LAW = mixture()
SPACE = DataSpace((2,))
BATCH = Batch(data(LAW, 32).float(), None, tuple(map(str, range(32))))


class Stepped(DistillModule):
    """At a step of one's choice, without a trainer."""

    at = 0

    @property
    def global_step(self) -> int:
        return self.at


def module(objective: Objective, **trainer: Any) -> Stepped:
    config = StudentConfig(init="random", network=NETWORKS["mlp"](width=16, depth=2))

    def build(kind: Any) -> Any:
        return config.build(None, SPACE, 3, kind, objective.finest)

    networks = {name: build("velocity") for name in objective.networks}
    settings = TrainerConfig(steps=100, warmup=0, **{"schedule": "constant", "lr": 1e-2, **trainer})
    found = Stepped(build(objective.kind), objective, LAW.load(), settings, 0, {}, networks)
    for index, parameter in enumerate(found.parameters()):
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(index))
    return found


def step(owner: Stepped, change: Callable[[], Any] = lambda: None) -> Tensor:
    """One training step; `change` acts on the gradients before they are clipped."""
    optimizer: Any = owner.configure_optimizers()
    losses = []

    def closure() -> None:
        losses.append(owner.training_step(BATCH, owner.at))
        losses[0].backward()
        change()

    owner.optimizer_step(0, owner.at, optimizer, closure)
    owner.at += 1
    return losses[0]


def weights(part: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in part.parameters()])


def test_the_target_moves_towards_the_student_by_its_decay() -> None:
    owner = module(ConsistencyTrajectory(decay=0.75))
    assert owner.target is not None and not any(p.requires_grad for p in owner.target.parameters())
    before = weights(owner.target)
    step(owner)
    torch.testing.assert_close(weights(owner.target), 0.75 * before + 0.25 * weights(owner.student))
    assert not torch.equal(weights(owner.target), before)


@pytest.mark.parametrize("objective", [Progressive(first=8, stage_steps=3), Semigroup(stages=3, stage_steps=3)])
def test_a_staged_target_waits_for_the_end_of_its_stage(objective: Objective) -> None:
    owner = module(objective)
    before = weights(owner.target)
    for ends in (False, False, True, False):
        step(owner)
        assert torch.equal(weights(owner.target), weights(owner.student)) == ends
        before = weights(owner.student) if ends else before
        assert torch.equal(weights(owner.target), before)


@pytest.mark.parametrize("objective", [Progressive(first=8, stage_steps=3), Semigroup(stages=3, stage_steps=3)])
def test_a_stage_ends_though_its_last_step_is_left_out(objective: Objective) -> None:
    owner = module(objective)
    owner.guard = Guard(1, lambda text: None)

    def spoil() -> None:
        for parameter in owner.student.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)

    for change in (lambda: None, lambda: None, spoil):
        before, average = weights(owner.student), weights(owner.ema)
        assert not torch.equal(weights(owner.target), before) or owner.at == 0
        step(owner, change)
    assert owner.guard.skipped == 1
    assert torch.equal(weights(owner.student), before) and torch.equal(weights(owner.ema), average)
    assert torch.equal(weights(owner.target), before)  # as the next stage takes it


def test_the_target_makes_the_loss_and_the_student_alone_is_averaged() -> None:
    objective = ConsistencyTrajectory(decay=0.5)
    owner = module(objective, ema=0.9)
    assert owner.target is not None
    for parameter in owner.target.parameters():
        parameter.data.add_(0.5)
    draw = objective.draw(BATCH, owner.student.path, Rows(0, "train", 0, 0, 32), 0)
    teacher = owner._teacher[0]
    by, by_itself = (objective.loss(owner.student, t, teacher, draw) for t in (owner.target, owner.student))
    value = owner.training_step(BATCH, 0)
    torch.testing.assert_close(value, sum(by.summands.values()).mean())
    assert not torch.isclose(value, sum(by_itself.summands.values()).mean())
    step(owner)
    torch.testing.assert_close(weights(owner.ema), weights(owner.student))  # the first is taken whole
    before = weights(owner.ema)
    step(owner)
    moved, towards = weights(owner.ema) - before, weights(owner.student) - before
    assert moved.any()
    torch.testing.assert_close(moved, (moved @ towards / (towards @ towards)) * towards, atol=1e-6, rtol=1e-4)


def test_a_gap_of_the_losss_own_is_what_is_weighed() -> None:
    objective = Consistency(gap_in="sigma", weight=Weight(gap=-1.0), times=Grid(curve="karras", first=20, final=20))
    owner = module(objective)
    draw = objective.draw(BATCH, owner.student.path, Rows(0, "train", 0, 0, 32), 0)
    loss = objective.loss(owner.student, owner.student, owner._teacher[0], draw)
    assert loss.gap is not None
    torch.testing.assert_close(
        owner.training_step(BATCH, 0), (loss.per_sample / loss.gap.clamp_min(1e-4)).mean().float()
    )


def test_an_objective_without_a_target_keeps_no_copy() -> None:
    owner = module(Lagrangian())
    assert owner.target is None and owner.log_variance is None and len(owner.networks) == 0


def test_each_network_is_clipped_on_its_own() -> None:
    owner = module(DataFree(), clip=1.0)
    fake = cast(Any, owner.networks["fake"])

    def grow() -> None:
        for parameter in fake.parameters():
            parameter.grad = torch.full_like(parameter, 1e3)
        for parameter in owner.student.parameters():
            parameter.grad = torch.full_like(parameter, 1e-6)

    step(owner, grow)
    norm = torch.cat([p.grad.flatten() for p in fake.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1.0), atol=1e-4, rtol=0)
    assert all((p.grad == 1e-6).all() for p in owner.student.parameters())  # untouched by the other's size
    total = torch.cat([p.grad.flatten() for p in owner.student.parameters()]).norm()
    torch.testing.assert_close(owner.metrics["grad_norm"], total)


def test_everything_that_is_trained_along_moves_and_the_teacher_is_no_part() -> None:
    owner = module(DataFree(weight=Weight(learned="gaussian")))
    assert owner.log_variance is not None
    parts = [owner.student, owner.networks["fake"], owner.log_variance]
    before = [weights(part) for part in parts]
    step(owner)
    for part, old in zip(parts, before, strict=True):
        assert not torch.equal(weights(part), old)
    names = {name.partition(".")[0] for name in owner.state_dict()}
    assert names == {"student", "ema", "networks", "log_variance"}


def test_the_loss_is_the_mean_of_the_weighted_summands() -> None:
    objective = DataFree(weight=Weight(power=0.5, c=0.1))
    owner = module(objective)
    value = owner.training_step(BATCH, 0)
    plain = module(DataFree())
    summands = plain.training_step(BATCH, 0)
    assert set(owner.metrics) == {"weighted", *objective.terms}
    torch.testing.assert_close(value.detach(), owner.metrics["weighted"])
    torch.testing.assert_close(summands.detach(), sum(plain.metrics[name] for name in objective.terms))
    assert not torch.isclose(value, summands)


def test_plain_summands_are_added_as_they_are() -> None:
    objective = DataFree(weight=Weight(power=1.0, c=0.01))
    owner = module(objective)
    draw = objective.draw(BATCH, owner.student.path, Rows(0, "train", 0, 0, 32), 0)
    fake = cast(Any, owner.networks["fake"])
    loss = objective.loss(owner.student, owner.student, owner._teacher[0], draw, fake=fake.velocity)
    assert set(loss.plain) == set(loss.terms) == {"correction", "fake"}
    expected = loss.per_sample / (loss.per_sample + 0.01) + loss.terms["correction"] + loss.terms["fake"]
    torch.testing.assert_close(owner.training_step(BATCH, 0), expected.mean())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_is_that_of_the_step(schedule: str) -> None:
    owner = module(Lagrangian(), schedule=schedule, lr=1e-3)
    owner.at = 50
    step(owner)
    assert owner.metrics["lr"] == pytest.approx(1e-3 if schedule == "constant" else 0.5e-3)


def test_rows_keep_their_draws_wherever_they_are_computed() -> None:
    """Two halves of a batch, told which global rows they are, have the loss of the whole."""
    owner = module(Lagrangian())
    whole = owner.training_step(BATCH, 0)
    parts = [Batch(BATCH.x_1[k : k + 16], None, BATCH.keys[k : k + 16], first=k) for k in (0, 16)]
    torch.testing.assert_close(torch.stack([owner.training_step(p, 0) for p in parts]).mean(), whole)
