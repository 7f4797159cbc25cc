"""Eulerian map distillation, the transport equation: X_{s,t} does not change when its start moves with the velocity.

    d/ds X_{s,t}(x_s) + (v . grad) X_{s,t}(x_s) = 0,  in mean velocities  u = v + (t - s) D u,   D = d/ds + v . grad
    L = E_{s <= t} || u(x_s, s, t) - sg[ u + tamed(g) ] ||^2,   g = v - u + r (t - s) D u

Zero for all (s, t) exactly when X is the flow map of v (at r = 1). One forward-mode derivative along (v, 1) in (x, s).
`source` says whose v it is: the teacher's (EMD; without taming the MeanFlow of a teacher), or that of the student or
its slow copy at s = t (ESD), tied to the teacher or the data by the diagonal rows of `times`.
`gradient` says what is differentiated: `stop` u alone, as above; `full` all of d/ds X + (v . grad) X; `partial` only
d/ds X in it, the spatial derivative is stopped.
Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507 (EMD), 2505.18825 (ESD); Sabour, Fidler, Kreis: Align your flow, arXiv
2506.14603 (AYF-EMD: normalised tangent, warm-up to r = 0.99); Geng et al., arXiv 2505.13447 (MeanFlow).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distill.derivative import Method, derivative, stopped
from distill.flow_map import FlowMap
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.pieces import Source, Tangent, heard, two_times, velocity_at
from distill.objectives.times import TimeLaw, UniformTriangle
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Eulerian(Objective):
    times: TimeLaw = field(default_factory=UniformTriangle)
    source: Source = "teacher"
    gradient: Literal["stop", "partial", "full"] = "stop"
    tangent: Tangent = field(default_factory=Tangent)
    decay: float = 0.99
    derivative: Method = "jvp"

    def __post_init__(self) -> None:
        tame = self.gradient == "stop" or self.tangent == Tangent()
        require(
            self,
            times=two_times(self.times, self.source),
            weight=heard(self.weight, self.source != "teacher"),
            tangent=(tame, "acts on gradient stop alone: leave it out, or set objective.gradient to stop"),
            decay=(0 <= self.decay < 1, "must be in [0, 1)"),
        )

    @property
    def needs_teacher(self) -> bool:
        """See `Objective`."""
        return self.source == "teacher"

    def target_decay(self, step: int) -> float | None:
        """See `Objective`."""
        return self.decay if self.source == "target" else None

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        return drawn(batch, path, generator, self.times, step, r=self.tangent.r(step))

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        x_s, s, gap = draw.x_s, draw.s, expand_like(draw.t - draw.s, draw.x_s)
        v, one = velocity_at(self.source, student, target, velocity, draw, x_s, s), torch.ones_like(s)

        def along(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return student.mean_velocity(x, s, t, draw.cond)

        if self.gradient == "stop":
            u, du = stopped(along, (x_s, s, draw.t), (v, one, None), self.derivative)
            g = v - u.detach() + draw.r * gap * du
            return Loss.squared(self.tangent.residual(u, g), tangent=du)
        if self.gradient == "full":
            u, du = derivative(along, (x_s, s, draw.t), (v, one, None), self.derivative)
            return Loss.squared(v - u + gap * du, tangent=du)
        u, du_ds = derivative(along, (x_s, s, draw.t), (None, one, None), self.derivative)
        with torch.no_grad():
            _, du_dx = derivative(along, (x_s, s, draw.t), (v, None, None), self.derivative)
        return Loss.squared(v - u + gap * (du_ds + du_dx), tangent=du_ds + du_dx)
