"""Flow matching: the velocity is learned from data, or from a teacher, on the diagonal s = t.

    L = E_t || u(x_t, t, t) - w ||^2,    w = alpha' x_1 + sigma' x_0 (data), or v(x_t, t) where there is a teacher

Makes teachers, and the diagonal of every student. Zero attainable only with a teacher: from data the floor is the
variance of w given x_t. Lipman et al.: Flow matching for generative modeling, arXiv 2210.02747. A share `drop` of the
labels is replaced by "none", which is what guidance needs later (Ho and Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.flow_map import FlowMap
from distill.objectives.base import Batch, Draw, Loss, Objective, drawn
from distill.objectives.guidance import drop_labels
from distill.objectives.pieces import given_velocity, one_time
from distill.objectives.times import TimeLaw, Uniform
from distill.rows import Rows
from teachers.fields import require
from teachers.path import Path
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    kind = "velocity"
    needs_teacher = False

    times: TimeLaw = field(default_factory=Uniform)
    drop: float = 0.0

    def __post_init__(self) -> None:
        require(
            self,
            times=one_time(self.times),
            drop=(0 <= self.drop < 1, "must be in [0, 1)"),
        )

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """See `Objective`."""
        return drop_labels(drawn(batch, path, generator, self.times, step), self.drop, generator)

    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """See `Objective`."""
        w = given_velocity(velocity, draw)
        return Loss.squared(student.mean_velocity(draw.x_s, draw.s, draw.s, draw.cond) - w)
