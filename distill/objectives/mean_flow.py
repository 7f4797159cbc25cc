"""MeanFlow: the transport equation driven by a velocity that is given row by row, not asked of a teacher at x.

    L = E_{s <= t} || u(x_s, s, t) - sg[ u + tamed(g) ] ||^2
    g = w - u + r (t - s) D u,    D = d/ds + direction . grad

untamed and at r = 1 (`tangent`) the target is w + (t - s) D u, as published. w is the teacher's velocity (`source`
teacher), or the conditional velocity of the pair, guided by the student's own (`source` data; `OwnGuidance`).
`direction` is the tangent of the derivative:
    given     w itself: MeanFlow. From data its noise enters the derivative, the residual is zero only in the mean
    student   u(x_s, s, s): improved MeanFlow, V = u - (t - s) sg D u is compared with w, whose noise is all there is
    head      a velocity network trained along, || head(x_s, s) - w ||^2: improved MeanFlow as published
Geng et al., arXiv 2505.13447; improved: arXiv 2512.02012. A share `drop` of the labels is replaced by "none".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill.derivative import Method, stopped
from distill.flow_map import FlowMap
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.guidance import OwnGuidance, drop_labels
from distill.objectives.pieces import Given, Tangent, given_velocity, two_times
from distill.objectives.times import LogitNormalSorted, TimeLaw
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.space import Cond
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class MeanFlow(Objective):
    times: TimeLaw = field(default_factory=LogitNormalSorted)
    source: Given = "teacher"
    direction: Literal["given", "student", "head"] = "given"
    guidance: OwnGuidance = field(default_factory=OwnGuidance)
    tangent: Tangent = field(default_factory=Tangent)
    drop: float = 0.0
    derivative: Method = "jvp"

    def __post_init__(self) -> None:
        of_data = self.source == "data" or self.guidance == OwnGuidance()
        require(
            self,
            times=two_times(self.times),
            guidance=(of_data, "is for source data alone: a teacher is guided by the recipe's section guidance"),
            drop=(0 <= self.drop < 1, "must be in [0, 1)"),
        )

    @property
    def needs_teacher(self) -> bool:
        """See `Objective`."""
        return self.source == "teacher"

    @property
    def networks(self) -> tuple[str, ...]:
        """See `Objective`."""
        return ("head",) if self.direction == "head" else ()

    @property
    def terms(self) -> tuple[str, ...]:
        """See `Objective`."""
        return ("loss", *self.networks)

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        draw = drawn(batch, path, generator, self.times, step, r=self.tangent.r(step))
        return drop_labels(draw, self.drop, generator)

    def loss(
        self,
        student: FlowMap,
        target: FlowMap,
        velocity: Velocity | None,
        draw: Draw,
        *,
        head: Velocity | None = None,
    ) -> Loss:
        """See `Objective`."""
        x_s, s = draw.x_s, draw.s

        def own(cond: Cond) -> Tensor:
            return student.mean_velocity(x_s, s, s, cond) if head is None else head(x_s, s, cond)

        w = given_velocity(velocity, draw) if self.source == "teacher" else self.guidance.velocity(own, draw)
        with torch.no_grad():
            direction = w if self.direction == "given" else own(draw.cond)
        u, du = stopped(
            lambda x, s, t: student.mean_velocity(x, s, t, draw.cond),
            (x_s, s, draw.t),
            (direction, torch.ones_like(s), None),
            self.derivative,
        )
        g = w - u.detach() + draw.r * expand_like(draw.t - s, u) * du
        residual = self.tangent.residual(u, g)
        terms = {} if head is None else {"head": own(draw.cond) - w}
        return Loss.squared(residual, tangent=du, **terms)
