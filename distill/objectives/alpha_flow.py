"""alpha-flow: from trajectory flow matching (alpha = 1) to MeanFlow (alpha -> 0), without a derivative on the way.

    m = s + alpha (t - s),   x_m = x_s + (m - s) v
    L = E 1/alpha || u(x_s, s, t) - sg[ alpha v + (1 - alpha) u(x_m, m, t) ] ||^2,    L = E || u(x_s, s, s) - v ||^2

`step` says how x_m is reached: by the `given` velocity w (of `source`: the teacher, or the data's pair), biased for
alpha > 0, or by the student's `own` u(x_s, s, m), which is not (and is shortcut training at alpha = 1/2). alpha falls
along 1 - sigmoid(sharpness (k - (start + end) / 2) / (end - start)) and is set to 1 or 0 within `snap` of them; at 0
the loss is MeanFlow's. Zhang et al.: AlphaFlow, arXiv 2510.20771.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from distill.derivative import Method, stopped
from distill.flow_map import FlowMap, jump
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.pieces import Given, given_velocity, heard, same_time, two_times
from distill.objectives.times import LogitNormalSorted, TimeLaw
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class AlphaFlow(Objective):
    times: TimeLaw = field(default_factory=LogitNormalSorted)
    source: Given = "teacher"
    step: Literal["given", "own"] = "given"
    start: int = 0
    end: int = 1000
    sharpness: float = 25.0
    snap: float = 5e-3
    derivative: Method = "jvp"

    def __post_init__(self) -> None:
        # alone, a map that drives itself is tied to nothing
        require(
            self,
            times=two_times(self.times, "teacher" if self.step == "given" else "own"),
            weight=heard(self.weight, self.step != "given"),
            end=(self.end > self.start >= 0, "must be above start, and start at least 0"),
            sharpness=(0 < self.sharpness < math.inf, "must be above 0"),
            snap=(0 < self.snap < 0.5, "must be in (0, 0.5)"),
        )

    @property
    def needs_teacher(self) -> bool:
        """See `Objective`."""
        return self.source == "teacher"

    def alpha(self, step: int) -> float:
        """alpha at a training step."""
        k = (step - (self.start + self.end) / 2) / (self.end - self.start)
        alpha = 1 / (1 + math.exp(min(self.sharpness * k, 700)))
        return 0.0 if alpha < self.snap else 1.0 if alpha > 1 - self.snap else alpha

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        return drawn(batch, path, generator, self.times, step, alpha=self.alpha(step))

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, t, cond, alpha = draw.x_s, draw.s, draw.t, draw.cond, draw.alpha
        w = given_velocity(velocity if self.source == "teacher" else None, draw)
        if alpha == 0:
            u, du = stopped(
                lambda x, s, t: student.mean_velocity(x, s, t, cond),
                (x_s, s, t),
                (w, torch.ones_like(s), None),
                self.derivative,
            )
            return Loss.squared(u - (w + expand_like(t - s, u) * du), tangent=du)
        with torch.no_grad():
            m = s + alpha * (t - s)
            v = w
            if self.step == "own":
                v = torch.where(same_time(draw), w, student.mean_velocity(x_s, s, m, cond))
            goal = alpha * v + (1 - alpha) * student.mean_velocity(jump(x_s, s, m, v), m, t, cond)
            goal = torch.where(same_time(draw), w, goal)
        scale = torch.full_like(s, 1 / alpha).masked_fill(s == t, 1.0)
        found = Loss.squared((student.mean_velocity(x_s, s, t, cond) - goal) * expand_like(scale.sqrt(), goal))
        return replace(found, scale=scale)  # adaptive as released: alpha / (|e|^2 + c), and 1 / (|e|^2 + c) at s = t
