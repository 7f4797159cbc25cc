"""Eulerian map distillation, the transport equation: X_{s,t} does not change when its start moves with the teacher.

    d/ds X_{s,t}(x_s) + (v . grad) X_{s,t}(x_s) = 0,  in mean velocities  u = v + (t - s) (d/ds u + (v . grad) u)
    L = E_{s <= t} || u(x_s, s, t) - sg[ v(x_s, s) + (t - s) (d/ds u + (v . grad) u) ] ||^2

Zero for all (s, t) exactly when X is the teacher's flow map. One forward-mode derivative along (v, 1) in (x, s), under
the stop-gradient; at s = t it is flow matching to the teacher.
Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507 (EMD); this form: Geng et al., MeanFlow, arXiv 2505.13447.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.flow_map import FlowMap
from distill.objectives.base import Draw, Loss, Objective
from distill.objectives.times import TimeLaw, UniformTriangle
from teachers.path import expand_like
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Eulerian(Objective):
    times: TimeLaw = field(default_factory=UniformTriangle)

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        del target  # nothing is bootstrapped
        assert velocity is not None
        with torch.no_grad():
            v = velocity(draw.x_s, draw.s, draw.cond)

        def along(x: Tensor, s: Tensor) -> Tensor:
            return student.mean_velocity(x, s, draw.t, draw.cond)

        u, du = torch.func.jvp(along, (draw.x_s, draw.s), (v, torch.ones_like(draw.s)))  # type: ignore[misc]
        u_target = v + expand_like(draw.t - draw.s, v) * du.detach()
        return Loss.squared(u - u_target)
