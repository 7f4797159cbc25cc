"""The shapes all objectives share: a batch is drawn into a `Draw`, and a `Loss` is a deterministic function of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from distill.flow_map import FlowMap
from distill.objectives.times import TimeLaw
from distill.rows import Rows
from teachers.path import Path
from teachers.space import Cond
from teachers.velocity import Velocity


@dataclass(frozen=True)
class Batch:
    """Rows first .. first + b - 1 of a global batch: data ``x_1: [b, *dims]``, conditioning, and the samples' keys."""

    x_1: Tensor
    cond: Cond
    keys: tuple[str, ...]
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Everything random or scheduled of one step. An objective that draws more adds its field here, None by default.

    ``x_0, x_1, x_s, velocity_s: [b, *dims]``, ``s, t: [b]`` float64; x_s is the point of the path at s and
    velocity_s its conditional velocity alpha' x_1 + sigma' x_0 there.
    """

    x_0: Tensor
    x_1: Tensor
    s: Tensor
    t: Tensor
    x_s: Tensor
    velocity_s: Tensor
    cond: Cond


@dataclass(frozen=True)
class Loss:
    """``per_sample: [b]``, the mean over feature dimensions; `terms` are parts worth logging, each ``[b]``."""

    per_sample: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self, count: int) -> None:
        """Raises ValueError unless per_sample is ``[count]`` and carries a gradient."""
        if self.per_sample.shape != (count,) or not self.per_sample.requires_grad:
            raise ValueError(
                f"a loss is per sample: expected [{count}] with a gradient to the student, got "
                f"{list(self.per_sample.shape)}, requires_grad={self.per_sample.requires_grad}"
            )

    @staticmethod
    def squared(residual: Tensor) -> Loss:
        """The mean of residual^2 over the features of each sample."""
        return Loss(residual.square().flatten(1).mean(1))


class Objective(ABC):
    """A way to learn a flow map: a frozen dataclass whose fields are the recipe's keys."""

    needs_data: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    needs_two_times: ClassVar[bool] = True

    times: TimeLaw

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """Noise, times and the point at s for each row. `step` is there for what is scheduled."""
        del step
        x_0 = generator.normal(*batch.x_1.shape[1:]).to(batch.x_1.dtype)
        s, t = self.times(generator)
        return Draw(
            x_0=x_0,
            x_1=batch.x_1,
            s=s,
            t=t,
            x_s=path.point(x_0, batch.x_1, s),
            velocity_s=path.conditional_velocity(x_0, batch.x_1, s),
            cond=batch.cond,
        )

    @abstractmethod
    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """The loss of each row. `target` is the slow copy of the student, `velocity` the frozen teacher (None where the
        job has none). Never samples; no gradient may reach `target` or `velocity`."""
