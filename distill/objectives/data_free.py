"""Data-free distillation: the student is trained from the prior alone, on the row s = 0 of the flow map.

    prediction   || u(z, 0, t) - sg[ u + tamed(g) ] ||^2,    g = v(X_{0,t}(z), t) - u - r t d/dt u
    correction   || X_{0,1}(z) - sg[ X_{0,1}(z) - (fake(x_r, r) - v(x_r, r)) ] ||^2
    fake         || fake(x_r, r) - (alpha'_r X_{0,1}(z) + sigma'_r n) ||^2,    x_r = alpha_r X_{0,1}(z) + sigma_r n

z is noise: the states are the student's own. Prediction alone (`corrected` 0) has the teacher's map as its fixed point,
but asks the teacher at its own errors. The correction is zero exactly when the student's samples have the teacher's
law: `fake` is the velocity of these samples, learned along, and the difference of two velocities is that of two scores.
A share `corrected` of the rows is used for it, weighted so that its size is `balance` times that of the prediction
before `weight`, which acts on the prediction alone, since what depends on the residual would keep `fake` from the mean
that it must learn. `law_of_r`: the law of the noising time r.
Tong et al.: FreeFlow, arXiv 2511.19428.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distill.derivative import Method, stopped
from distill.flow_map import FlowMap, jump
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn, mean_square
from distill.objectives.pieces import Tangent, batch_mean, one_time, rows_of
from distill.objectives.times import TimeLaw, Uniform
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class DataFree(Objective):
    kind = "grid"
    needs_data = False

    times: TimeLaw = field(default_factory=Uniform)
    law_of_r: TimeLaw = field(default_factory=Uniform)
    corrected: float = 0.25
    balance: float = 1.0
    tangent: Tangent = field(default_factory=Tangent)
    derivative: Method = "jvp"

    def __post_init__(self) -> None:
        require(
            self,
            times=one_time(self.times),
            law_of_r=one_time(self.law_of_r),
            corrected=(0 <= self.corrected < 1, "must be in [0, 1)"),
            balance=(0 < self.balance < math.inf, "must be above 0"),
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """See `Objective`."""
        return ("fake",) if self.corrected else ()

    @property
    def terms(self) -> tuple[str, ...]:
        """See `Objective`."""
        return ("loss", "correction", "fake") if self.corrected else ("loss",)

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`. x_s is where sampling starts; x_1 is not used."""
        draw = drawn(batch, path, generator, self.times, step, r=self.tangent.r(step))
        draw = replace(draw, s=torch.zeros_like(draw.s), x_s=path.start(draw.x_0))
        if not self.corrected:
            return draw
        return replace(
            draw,
            corrected=generator.uniform() < self.corrected,
            m=self.law_of_r(generator, step).t,
            fresh=generator.normal(*draw.x_0.shape[1:]).to(draw.x_0.dtype),
        )

    def loss(
        self,
        student: FlowMap,
        target: FlowMap,
        velocity: Velocity | None,
        draw: Draw,
        *,
        fake: Velocity | None = None,
    ) -> Loss:
        """See `Objective`."""
        assert velocity is not None
        if draw.corrected is None:
            return self._prediction(student, velocity, draw)
        assert fake is not None
        here, there = (~draw.corrected).nonzero().flatten(), draw.corrected.nonzero().flatten()
        predicted = self._prediction(student, velocity, rows_of(draw, _some(here))).per_sample[: len(here)]
        parts = self._correction(student, velocity, fake, rows_of(draw, _some(there)))
        corrected, faked = (part[: len(there)] for part in parts)
        # both parts are means over the rows that they concern: sizes, not squares, are balanced
        count = len(draw.s)
        sizes = [batch_mean(torch.zeros(count).to(e).index_copy(0, i, e.sqrt())) for e, i in
                 ((predicted, here), (corrected, there))]  # fmt: skip
        ratio = self.balance * (sizes[0] / (1 - self.corrected)) / (sizes[1] / self.corrected + 1e-8)
        none = torch.zeros(count).to(predicted)
        return Loss(
            none.index_copy(0, here, predicted),
            {
                "correction": none.index_copy(0, there, ratio * corrected),
                "fake": none.index_copy(0, there, faked),
            },
            plain=("correction", "fake"),
        )

    def _prediction(self, student: FlowMap, velocity: Velocity, draw: Draw) -> Loss:
        z, s, t, cond = draw.x_s, draw.s, draw.t, draw.cond
        u, du = stopped(lambda t: student.mean_velocity(z, s, t, cond), (t,), (torch.ones_like(t),), self.derivative)
        with torch.no_grad():
            v = velocity(jump(z, s, t, u), t, cond)
        g = v - u.detach() - draw.r * expand_like(t, u) * du
        return Loss.squared(self.tangent.residual(u, g), tangent=du)

    def _correction(self, student: FlowMap, velocity: Velocity, fake: Velocity, draw: Draw) -> tuple[Tensor, Tensor]:
        r, fresh = draw.m, draw.fresh
        assert r is not None and fresh is not None
        x_1 = student(draw.x_s, draw.s, torch.ones_like(draw.s), draw.cond)
        sample = x_1.detach()
        x_r = draw.path.point(fresh, sample, r)
        fake_v = fake(x_r, r, draw.cond)
        with torch.no_grad():
            e = fake_v - velocity(x_r, r, draw.cond)
        return mean_square(x_1 - (sample - e)), mean_square(fake_v - draw.path.conditional_velocity(fresh, sample, r))


def _some(index: Tensor) -> Tensor:
    """At least one row: not every network takes a batch without any."""
    return index if len(index) else torch.zeros(1).to(index)
