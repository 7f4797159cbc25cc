"""The semigroup property: a jump is two jumps through a middle time m.

    L = E || u(x_s, s, t) - sg[ k u(x_s, s, m) + (1 - k) u(X_{s,m}(x_s), m, t) ] ||^2,    k = (m - s) / (t - s)

Every velocity has such a map (u = const has loss 0), so diagonal rows of `times` tie it to the teacher's velocity, or
the pair's without a teacher. `middle`: k is 1/2 for `half` (PSD-M), uniform for `uniform` (PSD-U, SplitMeanFlow);
`decay`: of the slow copy that makes the target, 0 for the student itself. With `stages` the map is made progressively,
as in PFMM: in stage k of K gaps are 2^(k + 1 - K) of what `times` draws, starts as far along the room that they leave,
and the target is the student as it was when the stage began, in the first stage two Euler steps of the teacher; a last
stage that is longer takes a new one every `stage_steps`.
Boffi et al., arXiv 2406.07507 (PFMM), 2505.18825 (PSD); Guo et al.: SplitMeanFlow, arXiv 2507.16884.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from distill.flow_map import FlowMap, jump
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.pieces import given_velocity, heard, same_time, two_times
from distill.objectives.times import TimeLaw, Times, UniformTriangle
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Semigroup(Objective):
    times: TimeLaw = field(default_factory=UniformTriangle)
    middle: Literal["half", "uniform"] = "half"
    decay: float = 0.0
    stages: int = 0
    stage_steps: int = 200

    def __post_init__(self) -> None:
        require(
            self,
            times=two_times(self.times, "teacher" if self.stages else "student"),
            weight=heard(self.weight, not self.stages),
            decay=(0 <= self.decay < 1, "must be in [0, 1)"),
            stages=(0 <= self.stages <= 30, "must be in [0, 30], 0 for none"),
            stage_steps=(self.stage_steps >= 1, "must be at least 1"),
        )

    @property
    def needs_teacher(self) -> bool:
        """See `Objective`."""
        return self.stages > 0

    def target_decay(self, step: int) -> float | None:
        """See `Objective`."""
        if self.stages:
            return 0.0 if (step + 1) % self.stage_steps == 0 else 1.0
        return self.decay or None

    @property
    def last_stage(self) -> int:
        """See `Objective`."""
        return max(self.stages - 1, 0) * self.stage_steps

    def stage(self, step: int) -> int:
        """0 for the first, and without stages."""
        return min(step, self.last_stage) // self.stage_steps

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        stage = self.stage(step)
        last = stage + 1 >= self.stages
        times = self.times if last else _Shorter(self.times, 2.0 ** (stage + 1 - self.stages))
        draw = drawn(batch, path, generator, times, step)
        share = 0.5 if self.middle == "half" else generator.uniform()
        return replace(draw, m=draw.s + share * (draw.t - draw.s), stage=stage)

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, m, t, cond = draw.x_s, draw.s, draw.m, draw.t, draw.cond
        assert m is not None
        with torch.no_grad():
            if self.stages and draw.stage == 0:
                assert velocity is not None
                u_sm = velocity(x_s, s, cond)
                u_mt = velocity(jump(x_s, s, m, u_sm), m, cond)
            else:
                u_sm = target.mean_velocity(x_s, s, m, cond)
                u_mt = target.mean_velocity(jump(x_s, s, m, u_sm), m, t, cond)
            share = expand_like((m - s) / torch.where(s == t, 1.0, t - s), x_s)
            goal = torch.where(same_time(draw), given_velocity(velocity, draw), share * u_sm + (1 - share) * u_mt)
        return Loss.squared(student.mean_velocity(x_s, s, t, cond) - goal)


@dataclass(frozen=True)
class _Shorter(TimeLaw):
    """Gaps are `share` of those of `times`, and starts spread over [0, 1 - gap] as they were over the room they had:
    the next stage's second jumps are as long as its first, and go on to t = 1."""

    times: TimeLaw
    share: float

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        s, t = self.times(rows, step)
        gap = self.share * (t - s)
        s = torch.where(t - s < 1, s * (1 - gap) / (1 - (t - s)), s)
        return Times(s, s + gap)
