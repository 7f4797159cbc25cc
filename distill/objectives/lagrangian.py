"""Lagrangian map distillation: the student moves as the teacher says at the point where the student has arrived.

    L = E_{s <= t} || d/dt X_{s,t}(x_s) - sg v(sg X_{s,t}(x_s), t) ||^2

With X_{s,s} = id, zero for all (s, t) exactly when X is the teacher's flow map. One forward-mode derivative in t, none
in x; the gradient goes through the derivative. At s = t it is flow matching to the teacher.
Boffi, Albergo, Vanden-Eijnden: Flow map matching, arXiv 2406.07507 (LMD).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.flow_map import FlowMap
from distill.objectives.base import Draw, Loss, Objective
from distill.objectives.times import TimeLaw, UniformTriangle
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Lagrangian(Objective):
    times: TimeLaw = field(default_factory=UniformTriangle)

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        del target  # nothing is bootstrapped
        assert velocity is not None

        def at(t: Tensor) -> Tensor:
            return student(draw.x_s, draw.s, t, draw.cond)

        x_t, dx_dt = torch.func.jvp(at, (draw.t,), (torch.ones_like(draw.t),))  # type: ignore[misc]
        with torch.no_grad():  # the teacher is asked at the student's point, not differentiated through
            v = velocity(x_t.detach(), draw.t, draw.cond)
        return Loss.squared(dx_dt - v)
