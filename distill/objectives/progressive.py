"""Progressive distillation: one step of the student is two steps of the student of the stage before.

    L = E || X_{s,e}(x_s) - sg X_{m,e}(X_{s,m}(x_s)) ||^2 / (alpha_e - alpha_s sigma_e / sigma_s)^2 max(SNR_s, 1)

on a grid of `first` steps, s a multiple of 2 / first and m the middle; each stage of `stage_steps` training steps
halves the grid, down to one step. The maps on the right are the student as it was when the stage began, in the first
stage Euler steps of the teacher. Divided as above the error is that of the data prediction, weighted by the truncated
SNR (`snr` false leaves both out). Salimans, Ho, arXiv 2202.00512.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from distill.flow_map import FlowMap
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.times import Uniform
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.solvers import euler
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Progressive(Objective):
    """first: steps of the first stage's teacher, a power of two; the last stage's student has one step."""

    kind = "grid"

    first: int = 16
    stage_steps: int = 250
    snr: bool = True

    def __post_init__(self) -> None:
        power = self.first >= 2 and self.first & (self.first - 1) == 0
        require(
            self,
            first=(power, "must be a power of two, at least 2"),
            stage_steps=(self.stage_steps >= 1, "must be at least 1"),
        )

    @property
    def last_stage(self) -> int:
        """See `Objective`."""
        return (self.first.bit_length() - 2) * self.stage_steps

    def stage(self, step: int) -> int:
        """0 for the first."""
        return min(step, self.last_stage) // self.stage_steps

    def target_decay(self, step: int) -> float | None:
        """See `Objective`."""
        return 0.0 if self.stage(step + 1) > self.stage(step) else 1.0

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        draw = drawn(batch, path, generator, Uniform(), step)
        stage = self.stage(step)
        gap = 2 ** (stage + 1) / self.first
        s = (draw.s / gap).floor() * gap
        return replace(draw, s=s, m=s + gap / 2, t=s + gap, x_s=path.point(draw.x_0, draw.x_1, s), stage=stage)

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, m, t, cond = draw.x_s, draw.s, draw.m, draw.t, draw.cond
        assert m is not None and velocity is not None
        with torch.no_grad():
            if draw.stage == 0:
                goal = euler(velocity, x_s, torch.stack([s, m, t]), cond)
            else:
                goal = target(target(x_s, s, m, cond), m, t, cond)
        residual = student(x_s, s, t, cond) - goal
        if not self.snr:
            return Loss.squared(residual)
        here, there = draw.path(s), draw.path(t)
        reach = there.alpha - here.alpha * there.sigma / here.sigma
        scale = (here.alpha / here.sigma).clamp_min(1) / reach
        return Loss.squared(expand_like(scale, x_s) * residual)
