"""Lagrangian map distillation: the student moves as the velocity says at the point where the student has arrived.

    L = E_{s <= t} || d/dt X_{s,t}(x_s) - v(X_{s,t}(x_s), t) ||^2

With X_{s,s} = id, zero for all (s, t) exactly when X is the flow map of v. One forward-mode derivative in t, none in x.
`source` says whose v it is:
    teacher   Lagrangian map distillation, LMD
    student   its own u(., t, t): Lagrangian self-distillation, LSD. Any velocity has its map, so the diagonal rows of
              `times`, where v is the teacher's or the data's, must stay
    target    that of a slow copy: terminal velocity matching, TVM
`gradient` says what is differentiated:
    convex    the derivative d/dt X alone: sg v(sg X, t)
    full      v's input X too
    stop      only u in  || u - sg[ v(X, t) - (t - s) d/dt u ] ||^2  (AYF-LMD)
Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507 (LMD), 2505.18825 (LSD); Zhou et al., arXiv 2511.19797 (TVM).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill.derivative import Method, derivative, stopped
from distill.flow_map import FlowMap, jump
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.pieces import (
    Source,
    Tangent,
    given_velocity,
    heard,
    same_time,
    through_input,
    two_times,
    velocity_at,
)
from distill.objectives.times import TimeLaw, UniformTriangle
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Lagrangian(Objective):
    times: TimeLaw = field(default_factory=UniformTriangle)
    source: Source = "teacher"
    gradient: Literal["convex", "full", "stop"] = "convex"
    tangent: Tangent = field(default_factory=Tangent)
    decay: float = 0.99
    derivative: Method = "jvp"

    def __post_init__(self) -> None:
        tame = self.gradient == "stop" or self.tangent == Tangent()
        require(
            self,
            times=two_times(self.times, self.source),
            weight=heard(self.weight, self.source != "teacher"),
            tangent=(tame, "acts on gradient stop alone: leave it out, or set objective.gradient to stop"),
            decay=(0 <= self.decay < 1, "must be in [0, 1)"),
        )

    @property
    def needs_teacher(self) -> bool:
        """See `Objective`."""
        return self.source == "teacher"

    def target_decay(self, step: int) -> float | None:
        """See `Objective`."""
        return self.decay if self.source == "target" else None

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        return drawn(batch, path, generator, self.times, step, r=self.tangent.r(step))

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, t, cond = draw.x_s, draw.s, draw.t, draw.cond
        along = (s, t), (None, torch.ones_like(t)), self.derivative
        if self.gradient == "stop":
            u, du = stopped(lambda s, t: student.mean_velocity(x_s, s, t, cond), *along)
            x_t = jump(x_s, s, t, u.detach())
            v = velocity_at(self.source, student, target, velocity, draw, x_t, t)
            g = v - u.detach() - draw.r * expand_like(t - s, u) * du
            return Loss.squared(self.tangent.residual(u, g), tangent=du)
        x_t, dx_dt = derivative(lambda s, t: student(x_s, s, t, cond), *along)
        if self.gradient == "convex":
            v = velocity_at(self.source, student, target, velocity, draw, x_t.detach(), t)
        else:
            v = self._moving(student, target, velocity, draw, x_t)
        return Loss.squared(dx_dt - v, tangent=dx_dt)

    def _moving(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw, x_t: Tensor) -> Tensor:
        """v at the student's point with a gradient to that point, and to a velocity that is the student's own."""
        t, cond = draw.t, draw.cond
        if self.source == "teacher":
            assert velocity is not None
            return through_input(lambda x: velocity(x, t, cond), x_t)
        if self.source == "target":
            own = through_input(lambda x: target.mean_velocity(x, t, t, cond), x_t)
        else:
            own = student.mean_velocity(x_t, t, t, cond)
        return torch.where(same_time(draw), given_velocity(velocity, draw), own)
