"""Flow matching: the velocity is learned from data, or from a teacher, on the diagonal s = t.

    L = E_t || u(x_t, t, t) - w ||^2,    w = alpha' x_1 + sigma' x_0 (data), or v(x_t, t) where there is a teacher

Makes teachers, and the diagonal of every student. Zero attainable only with a teacher: from data the floor is the
variance of w given x_t. Lipman et al.: Flow matching for generative modeling, arXiv 2210.02747.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distill.flow_map import FlowMap
from distill.objectives.base import Draw, Loss, Objective
from distill.objectives.times import TimeLaw, Uniform
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    needs_teacher = False
    needs_two_times = False

    times: TimeLaw = field(default_factory=Uniform)

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        del target  # nothing is bootstrapped
        w = draw.velocity_s
        if velocity is not None:
            with torch.no_grad():
                w = velocity(draw.x_s, draw.s, draw.cond)
        return Loss.squared(student.mean_velocity(draw.x_s, draw.s, draw.s, draw.cond) - w)
