"""Consistency: every point of a trajectory is sent to the same end, X_{s,1}(x_s) = X_{m,1}(x_m).

`Consistency` (discrete), with neighbours s < m of the law `times` (a `grid`, or `ect`):

    L = E || X_{s,1}(x_s) - sg X_{m,1}(x_m) ||^2

x_m is one step of `solver` with the teacher (consistency distillation, CD), or for `data` the point of the same pair
(x_0, x_1) at m (consistency training, CT; easy consistency tuning, ECT); at m = 1 it is itself the target. `decay`: of
the slow copy that makes the target, 0 for the student itself. Song et al., arXiv 2303.01469; Song, Dhariwal,
2310.14189; Geng et al., 2406.14548.

`ContinuousConsistency`, the limit m -> s (`source` teacher: sCD, data: sCT):

    L = E || u(x_s, s, 1) - sg[ u + tamed(g) ] ||^2,   g = v - u + r (1 - s) D u     (form `velocity`, any path)

or in the angle theta = atan2(sigma, sigma_d alpha), y = (cos theta / alpha) x, with F such that
X_{s,1} = cos theta y - sin theta sigma_d F:

    L = E || F - sg[ F + tamed(g) ] ||^2
    g = -cos^2 theta (sigma_d F - dy/dtheta) - r cos theta sin theta (y + sigma_d dF/dtheta)           (form `scm`)
    the same with cos theta sqrt(1 - r^2 sin^2 theta) first, and r on y alone                          (form `rcm`)

where all but the first cos theta is of theta - phi on a path that ends with some noise, at the angle phi.
Lu, Song: sCM, arXiv 2410.11081; Zheng et al.: rCM, arXiv 2510.08431.

`ConsistencyTrajectory` (CTM without its discriminator), s <= m <= t, target Y, teacher steps x_m from x_s:

    L = E || Y_{t,1}(X_{s,t}(x_s)) - sg Y_{t,1}(Y_{m,t}(x_m)) ||^2 + diagonal E || u(x_s, s, s) - w ||^2

Kim et al., arXiv 2310.02279.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from distill.derivative import Method, stopped
from distill.flow_map import FlowMap
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn, mean_square
from distill.objectives.pieces import Given, Tangent, given_velocity, one_time, through_input, two_times
from distill.objectives.times import Grid, TimeLaw, Uniform, UniformTriangle
from distill.parameterisation import Trig
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.solvers import SOLVERS
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """`weight.gap` acts on m - s, or with `gap_in` sigma on the difference of sigma / alpha, as published."""

    kind = "consistency"

    times: TimeLaw = field(default_factory=Grid)
    solver: Literal["euler", "heun", "midpoint", "rk4", "data"] = "midpoint"
    decay: float = 0.0
    gap_in: Literal["time", "sigma"] = "time"

    def __post_init__(self) -> None:
        require(
            self,
            times=(self.times.shape == "next", "must draw neighbours: grid or ect"),
            decay=(0 <= self.decay < 1, "must be in [0, 1)"),
        )

    @property
    def needs_teacher(self) -> bool:
        """See `Objective`."""
        return self.solver != "data"

    def target_decay(self, step: int) -> float | None:
        """See `Objective`."""
        return self.decay or None

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        draw = drawn(batch, path, generator, self.times, step)
        m = draw.t
        return replace(draw, t=torch.ones_like(m), m=m, x_m=path.point(draw.x_0, draw.x_1, m))

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, m, x_m, t, cond = draw.x_s, draw.s, draw.m, draw.x_m, draw.t, draw.cond
        assert m is not None and x_m is not None
        with torch.no_grad():
            if self.solver != "data":
                assert velocity is not None
                x_m = SOLVERS[self.solver](velocity, x_s, torch.stack([s, m]), cond)
            # X_{1,1} need not come out as the identity: where a velocity is infinite it is 0 times that
            last = (m == 1).reshape(-1, *[1] * (x_m.dim() - 1))
            end = torch.where(last, x_m, target(x_m, m, t, cond))
        here, there = draw.path(s), draw.path(m)
        gap = m - s if self.gap_in == "time" else here.sigma / here.alpha - there.sigma / there.alpha
        return replace(Loss.squared(student(x_s, s, t, cond) - end), gap=gap)


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency(Objective):
    """sigma_data: the standard deviation of the data, for the angle of `scm` and `rcm`."""

    kind = "consistency"

    times: TimeLaw = field(default_factory=Uniform)
    source: Given = "teacher"
    form: Literal["velocity", "scm", "rcm"] = "velocity"
    tangent: Tangent = field(default_factory=Tangent)
    sigma_data: float = 1.0
    derivative: Method = "jvp"

    def __post_init__(self) -> None:
        require(
            self,
            times=one_time(self.times),
            sigma_data=(0 < self.sigma_data < math.inf, "must be above 0"),
        )

    @property
    def needs_teacher(self) -> bool:
        """See `Objective`."""
        return self.source == "teacher"

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        draw = drawn(batch, path, generator, self.times, step, r=self.tangent.r(step))
        return replace(draw, t=torch.ones_like(draw.t))

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, r = draw.x_s, draw.s, draw.r
        v, one = given_velocity(velocity if self.source == "teacher" else None, draw), torch.ones_like(s)

        def mean_velocity(x: Tensor, s: Tensor) -> Tensor:
            return student.mean_velocity(x, s, draw.t, draw.cond)

        if self.form == "velocity":
            u, du = stopped(mean_velocity, (x_s, s), (v, one), self.derivative)
            g = v - u.detach() + r * expand_like(draw.t - s, u) * du
            return Loss.squared(self.tangent.residual(u, g), tangent=du)

        trig = Trig(sigma_data=self.sigma_data)

        def output(x: Tensor, s: Tensor) -> Tensor:  # sigma_d F; F of TrigFlow is minus that of `Trig`
            return -self.sigma_data * trig.output(draw.path, mean_velocity(x, s), x, s, draw.t)

        def angle(t: Tensor) -> tuple[Tensor, Tensor]:
            c, norm = draw.path(t), trig.norm(draw.path, t)
            return expand_like(self.sigma_data * c.alpha / norm, x_s), expand_like(c.sigma / norm, x_s)

        norm, (cos_s, sin_s), (cos_t, sin_t) = trig.norm(draw.path, s), angle(s), angle(draw.t)
        cos, sin = cos_s * cos_t + sin_s * sin_t, sin_s * cos_t - cos_s * sin_t  # of theta - phi
        rate = expand_like(-self.sigma_data * draw.path(s).delta / norm**2, x_s)  # d theta / ds
        y, dy = self.sigma_data * x_s / expand_like(norm, x_s), -self.sigma_data * trig.output(draw.path, v, x_s, s, s)
        scaled_f, df_ds = stopped(output, (x_s, s), (v, one), self.derivative)
        apart, df = scaled_f.detach() - dy, df_ds / rate
        if self.form == "scm":
            g = cos_s * (-cos * apart - r * sin * (y + df))
        else:
            g = cos_s * (-(1 - r**2 * sin**2).sqrt() * apart - sin * (r * y + df))
        f = scaled_f / self.sigma_data
        return Loss.squared(self.tangent.residual(f, g), tangent=df)


@dataclass(frozen=True, kw_only=True)
class ConsistencyTrajectory(Objective):
    """substeps: teacher steps of `solver` from s to the middle time m, uniform between s and t; decay: of the target;
    diagonal: the weight of the flow-matching term."""

    times: TimeLaw = field(default_factory=lambda: UniformTriangle(diagonal=0.0))
    solver: Literal["euler", "heun", "midpoint", "rk4"] = "midpoint"
    substeps: int = 2
    decay: float = 0.999
    diagonal: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            times=two_times(self.times),
            substeps=(self.substeps >= 1, "must be at least 1"),
            decay=(0 < self.decay < 1, "must be in (0, 1): the outer map is a slow copy"),
            diagonal=(0 <= self.diagonal < math.inf, "must be at least 0"),
        )

    @property
    def terms(self) -> tuple[str, ...]:
        """See `Objective`."""
        return ("loss", "diagonal")

    def target_decay(self, step: int) -> float | None:
        """See `Objective`."""
        return self.decay

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        draw = drawn(batch, path, generator, self.times, step)
        return replace(draw, m=draw.s + generator.uniform() * (draw.t - draw.s))

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, m, t, cond = draw.x_s, draw.s, draw.m, draw.t, draw.cond
        assert velocity is not None and m is not None
        end = torch.ones_like(t)
        estimate = through_input(lambda x: target(x, t, end, cond), student(x_s, s, t, cond))
        with torch.no_grad():
            share = torch.linspace(0, 1, self.substeps + 1, dtype=s.dtype, device=s.device)[:, None]
            x_m = SOLVERS[self.solver](velocity, x_s, s + share * (m - s), cond)
            goal = target(target(x_m, m, t, cond), t, end, cond)
            w = velocity(x_s, s, cond)
        at_once = student.mean_velocity(x_s, s, s, cond) - w
        return Loss(mean_square(estimate - goal), {"diagonal": self.diagonal * mean_square(at_once)})
