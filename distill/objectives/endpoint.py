"""Regression on pairs (x_0, G(x_0)) of noise and sample, where G is any deterministic generator.

`Endpoint`, knowledge distillation:     L = E || X_{0,1}(x_0) - G(x_0) ||^2
`Reflow`, a straighter velocity:        L = E || u(x_t, t, t) - (alpha'_t G(x_0) + sigma'_t x_0) ||^2

`pairs`: a batch that brings x_0 along is taken as it is; otherwise G is `steps` of `solver` with the teacher, or its
own `generator`, for `own`. The fixed point of reflow is not the teacher's velocity, but has the same end points.
Luhman, Luhman, arXiv 2101.02388; Liu, Gong, Liu: rectified flow, arXiv 2209.03003.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from distill.flow_map import FlowMap
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.pieces import one_time
from distill.objectives.times import TimeLaw, Uniform
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path
from teachers.solvers import SOLVERS
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Where G(x_0) comes from when a batch does not bring it."""

    solver: Literal["euler", "heun", "midpoint", "rk4", "own"] = "midpoint"
    steps: int = 16

    def __post_init__(self) -> None:
        require(self, steps=(self.steps >= 1, "must be at least 1"))

    @torch.no_grad()
    def __call__(self, velocity: Velocity | None, draw: Draw) -> Tensor:
        """G(x_0) ``[b, *dims]``. Raises ValueError without a generator."""
        if draw.paired:
            return draw.x_1
        if self.solver == "own":
            generator = getattr(velocity, "generator", None)
            if generator is None:
                raise ValueError("pairs.solver is own, but this teacher has no generator: name a solver, e.g. midpoint")
            made: Tensor = generator(draw.x_0, draw.cond)
            return made
        if velocity is None:
            raise ValueError("pairs need a teacher that makes them, or data that brings x_0 along")
        grid = torch.linspace(0, 1, self.steps + 1, dtype=draw.s.dtype, device=draw.s.device)
        return SOLVERS[self.solver](velocity, draw.path.start(draw.x_0), grid, draw.cond)


@dataclass(frozen=True, kw_only=True)
class Endpoint(Objective):
    kind = "grid"
    needs_data = False

    pairs: Pairs = field(default_factory=Pairs)

    @property
    def needs_velocity(self) -> bool:
        """See `Objective`."""
        return self.pairs.solver != "own"

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`. The times are always (0, 1)."""
        draw = drawn(batch, path, generator, Uniform(), step)
        zero = torch.zeros_like(draw.s)
        return replace(draw, s=zero, t=zero + 1, x_s=path.start(draw.x_0))

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        return Loss.squared(student(draw.x_s, draw.s, draw.t, draw.cond) - self.pairs(velocity, draw))


@dataclass(frozen=True, kw_only=True)
class Reflow(Objective):
    kind = "velocity"
    needs_data = False

    times: TimeLaw = field(default_factory=Uniform)
    pairs: Pairs = field(default_factory=Pairs)

    def __post_init__(self) -> None:
        require(
            self,
            times=one_time(self.times),
        )

    @property
    def needs_velocity(self) -> bool:
        """See `Objective`."""
        return self.pairs.solver != "own"

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_1, t = self.pairs(velocity, draw), draw.t
        x_t = draw.path.point(draw.x_0, x_1, t)
        return Loss.squared(
            student.mean_velocity(x_t, t, t, draw.cond) - draw.path.conditional_velocity(draw.x_0, x_1, t)
        )
