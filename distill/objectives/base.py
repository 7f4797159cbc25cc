"""The shapes all objectives share: a batch is drawn into a `Draw`, and a `Loss` is a deterministic function of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.flow_map import FlowMap, Kind
from distill.objectives.times import TimeLaw, Uniform
from distill.objectives.weights import Weight
from distill.rows import Rows
from teachers.guidance import SCALE
from teachers.path import Path
from teachers.space import Cond
from teachers.velocity import Velocity


@dataclass(frozen=True)
class Batch:
    """Rows first .. first + b - 1 of a global batch: data ``x_1: [b, *dims]``, conditioning, and the samples' keys.

    ``x_0: [b, *dims]`` is there for pairs (x_0, x_1); otherwise noise is drawn. `null` is one row of conditioning that
    means "none", without the batch dimension, where the data's space has one. slots: int64 ``[b]``, for data with
    epochs: epoch times number of samples, plus the sample's number; skipped: samples newly found unreadable, and why.
    """

    x_1: Tensor
    cond: Cond
    keys: tuple[str, ...]
    first: int = 0
    x_0: Tensor | None = None
    null: Cond = None
    slots: Tensor | None = None
    skipped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Everything random or scheduled of one step. An objective that draws more adds its field here, None by default.

    ``x_0, x_1, x_s, velocity_s: [b, *dims]``, ``s, t: [b]`` float64; x_s is the point of the path at s and
    velocity_s its conditional velocity alpha' x_1 + sigma' x_0 there. paired: whether x_0 and x_1 came together.
    null: the conditioning that means "none", at guidance 1; dropped: bool ``[b]``, the rows whose `cond` is that.
    m: a middle time ``[b]``; x_m: the point of the same pair at m. r: the share of the tangent in force; alpha: that of
    alpha-flow; stage: of a progressive schedule. fresh: more noise; corrected: bool ``[b]``, rows that use it.
    """

    path: Path
    x_0: Tensor
    x_1: Tensor
    s: Tensor
    t: Tensor
    x_s: Tensor
    velocity_s: Tensor
    cond: Cond
    null: Cond = None
    paired: bool = False
    dropped: Tensor | None = None
    m: Tensor | None = None
    x_m: Tensor | None = None
    r: float = 1.0
    alpha: float = 0.0
    stage: int = 0
    fresh: Tensor | None = None
    corrected: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """``per_sample: [b]``, the mean of a squared residual over the feature dimensions, and further summands by name,
    each ``[b]``: all but the `plain` ones are weighted one by one (`Weight`); all are added and logged. gap ``[b]``:
    what a weight takes for t - s where that is something else. scale ``[b]``: what the squared residual was
    multiplied by, where a weight has to know (`Weight`). tangent ``[b]``: the mean square of the derivative that the
    objective takes, if it takes one, to be looked at: it grows before such a student breaks."""

    per_sample: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    gap: Tensor | None = None
    plain: tuple[str, ...] = ()
    scale: Tensor | float = 1.0
    tangent: Tensor | None = None

    @property
    def summands(self) -> dict[str, Tensor]:
        """`per_sample` as "loss", and the terms."""
        return {"loss": self.per_sample, **self.terms}

    def check(self, count: int) -> None:
        """Raises ValueError unless every summand is ``[count]`` and some carry a gradient."""
        for name, value in self.summands.items():
            if value.shape != (count,):
                raise ValueError(f"a loss is per sample: expected [{count}], got {list(value.shape)} for {name}")
        if not any(value.requires_grad for value in self.summands.values()):
            raise ValueError("a loss needs a gradient to the student: requires_grad=False everywhere")

    @staticmethod
    def squared(residual: Tensor, *, tangent: Tensor | None = None, **terms: Tensor) -> Loss:
        """The mean of residual^2 over the features of each sample; `terms` are residuals too. All ``[b, *dims]``."""
        return Loss(
            mean_square(residual),
            {name: mean_square(term) for name, term in terms.items()},
            tangent=None if tangent is None else mean_square(tangent.detach()),
        )


def mean_square(residual: Tensor) -> Tensor:
    """The mean of residual^2 over the features of each sample, ``[b]``."""
    return residual.square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A way to learn a flow map: a frozen dataclass whose fields are the recipe's keys."""

    weight: Weight = field(default_factory=Weight)

    @property
    def kind(self) -> Kind:
        """What a student trained by it can do (see `distill.flow_map.Kind`)."""
        return "flow_map"

    @property
    def finest(self) -> int:
        """The finest grid 1 / finest that a student of kind `grid` or `shortcut` knows."""
        return 1

    @property
    def needs_data(self) -> bool:
        """Whether x_1 is used."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """Whether it cannot do without a teacher's velocity."""
        return True

    @property
    def needs_velocity(self) -> bool:
        """Whether a teacher, where there is one, must have a velocity, and not samples alone."""
        return True

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of further velocities that are trained along: `loss` gets each by its name. Training owns them; they
        start as the student does."""
        return ()

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the summands of the loss: `per_sample` is "loss"."""
        return ("loss",)

    @property
    def last_stage(self) -> int:
        """The first step of the last of its stages: a student that never comes there was not trained on the (s, t) that
        it is made for."""
        return 0

    def target_decay(self, step: int) -> float | None:
        """How much of `target` stays after a step: target <- decay target + (1 - decay) student. None: no copy is
        kept, the target is the student itself."""
        del step
        return None

    def draw(self, batch: Batch, path: Path, generator: Rows, step: int) -> Draw:
        """Noise, times of the law `times` (where there is no such field, one uniform time), and the point at s for each
        row. `step` is there for what is scheduled."""
        return drawn(batch, path, generator, getattr(self, "times", Uniform()), step)

    @abstractmethod
    def loss(self, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw) -> Loss:
        """The loss of each row. `target` is the slow copy of the student, `velocity` the frozen teacher (None where the
        job has none). Never samples; no gradient may reach `target` or `velocity`. What `networks` names is passed as
        further keyword arguments."""


def drawn(batch: Batch, path: Path, rows: Rows, times: TimeLaw, step: int, **more: Any) -> Draw:
    """The draw that most objectives start from: noise, then times, and the point at s."""
    x_1 = batch.x_1
    x_0 = rows.normal(*x_1.shape[1:]).to(x_1.dtype) if batch.x_0 is None else batch.x_0
    s, t = times(rows, step)
    null = None
    if batch.null is not None:
        none = {k: v.to(x_1.device).expand(len(x_1), *v.shape) for k, v in batch.null.items()}
        null = {**(batch.cond or {}), **none}
        if SCALE in null:  # a scale of nothing is nothing: "none" is learned, and asked for, at 1 alone
            null[SCALE] = torch.ones_like(null[SCALE])
    return Draw(
        path=path,
        x_0=x_0,
        x_1=x_1,
        s=s,
        t=t,
        x_s=path.point(x_0, x_1, s),
        velocity_s=path.conditional_velocity(x_0, x_1, s),
        cond=batch.cond,
        null=null,
        paired=batch.x_0 is not None,
        **more,
    )
