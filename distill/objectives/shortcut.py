"""Shortcut models: a step is what two half steps make, and the smallest is the velocity.

    L = E || u(x_s, s, s + 2d) - sg[ (b_1 + b_2) / 2 ] ||^2 + E || u(x_s, s, s + d_0) - w ||^2
    b_1 = u(x_s, s, s + d),    b_2 = u(x_s + d b_1, s + d, s + 2d)

on the gaps of the law `dyadic`, whose diagonal rows are the second term; w is the teacher's velocity, or the pair's
without a teacher. `anchor` says where the velocity belongs: `zero`, d_0 = 0, so that the flow map is the fixed point,
as far as the network is smooth in the gap: no row trains 1 / finest, it lies between 0 and 2 / finest; or `smallest`,
d_0 = 1 / finest as published, whose fixed point is Euler's method with that step.
Frans et al.: One step diffusion via shortcut models, arXiv 2410.12557.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from distill.flow_map import FlowMap, jump
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.guidance import drop_labels
from distill.objectives.pieces import given_velocity, heard
from distill.objectives.times import Dyadic, TimeLaw
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Shortcut(Objective):
    kind = "shortcut"
    needs_teacher = False

    times: TimeLaw = field(default_factory=Dyadic)
    anchor: Literal["zero", "smallest"] = "zero"
    decay: float = 0.999
    drop: float = 0.0

    def __post_init__(self) -> None:
        tied = isinstance(self.times, Dyadic) and 0 < self.times.diagonal < 1
        require(
            self,
            times=(tied, "must be the law dyadic, with a diagonal in (0, 1): its rows alone know the velocity"),
            weight=heard(self.weight, self.anchor == "zero"),
            decay=(0 <= self.decay < 1, "must be in [0, 1)"),
            drop=(0 <= self.drop < 1, "must be in [0, 1)"),
        )

    @property
    def finest(self) -> int:
        """See `Objective`."""
        assert isinstance(self.times, Dyadic)
        return self.times.finest

    def target_decay(self, step: int) -> float | None:
        """See `Objective`."""
        return self.decay or None

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        draw = drop_labels(drawn(batch, path, generator, self.times, step), self.drop, generator)
        if self.anchor == "smallest":
            draw = replace(draw, t=torch.where(draw.s == draw.t, draw.s + 1 / self.finest, draw.t))
        return draw

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, t, cond = draw.x_s, draw.s, draw.t, draw.cond
        with torch.no_grad():
            m = (s + t) / 2
            b_1 = target.mean_velocity(x_s, s, m, cond)
            b_2 = target.mean_velocity(jump(x_s, s, m, b_1), m, t, cond)
            smallest = (t - s < 1.5 / self.finest).reshape(-1, *[1] * (x_s.dim() - 1))
            goal = torch.where(smallest, given_velocity(velocity, draw), (b_1 + b_2) / 2)
        return Loss.squared(student.mean_velocity(x_s, s, t, cond) - goal)
