"""Pieces that several objectives are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from distill.flow_map import FlowMap
from distill.objectives.base import Draw, mean_square
from distill.objectives.times import TimeLaw
from distill.objectives.weights import Weight
from teachers.fields import require
from teachers.path import expand_like
from teachers.velocity import Velocity


@dataclass(frozen=True, kw_only=True)
class Tangent:
    """The step from the student's own output to its target, g, as sCM and AYF tame it (arXiv 2410.11081, 2506.14603).

    The derivative's share r in g grows linearly from 0 to `r_max` over `warmup` steps; r = 0 is flow matching of every
    (s, t), a constant r < 1 a biased fixed point. With `normalise` g becomes g / (rms(g) + c), the rms over features.
    """

    warmup: int = 0
    r_max: float = 1.0
    normalise: bool = False
    c: float = 0.1

    def __post_init__(self) -> None:
        require(
            self,
            warmup=(self.warmup >= 0, "must be at least 0"),
            r_max=(0 < self.r_max <= 1, "must be in (0, 1]"),
            c=(self.c > 0, "must be above 0"),
        )

    def r(self, step: int) -> float:
        """The share in force at a step."""
        return self.r_max * min(1.0, step / self.warmup) if self.warmup else self.r_max

    def tamed(self, g: Tensor) -> Tensor:
        """``g: [b, *dims]``, normalised if asked for."""
        return g / (expand_like(mean_square(g).sqrt(), g) + self.c) if self.normalise else g

    def residual(self, u: Tensor, g: Tensor) -> Tensor:
        """u - sg[ u + tamed(g) ] of the student's own output u, ``[b, *dims]``."""
        return u - (u.detach() + self.tamed(g))


def same_time(draw: Draw) -> Tensor:
    """bool ``[b, 1, ...]``: the rows of the diagonal, s = t."""
    return (draw.s == draw.t).reshape(-1, *[1] * (draw.x_s.dim() - 1))


Given = Literal["teacher", "data"]
"""Where a velocity at the points of the path comes from: the teacher, or the pair (x_0, x_1)."""


@torch.no_grad()
def given_velocity(velocity: Velocity | None, draw: Draw) -> Tensor:
    """What is known of the velocity at x_s: the teacher's, or without one the conditional velocity of the pair."""
    return draw.velocity_s if velocity is None else velocity(draw.x_s, draw.s, draw.cond)


Source = Literal["teacher", "student", "target"]
"""Whose velocity drives an objective: the teacher's, or u(x, t, t) of the student or of its slow copy."""


@torch.no_grad()
def velocity_at(
    source: Source, student: FlowMap, target: FlowMap, velocity: Velocity | None, draw: Draw, x: Tensor, t: Tensor
) -> Tensor:
    """The source's velocity at x and t, without gradient; on the diagonal s = t what is known of it at x_s, which is
    the only thing that ties a source of one's own to the data or the teacher."""
    if source == "teacher":
        assert velocity is not None
        return velocity(x, t, draw.cond)
    own = (student if source == "student" else target).mean_velocity(x, t, t, draw.cond)
    return torch.where(same_time(draw), given_velocity(velocity, draw), own)


class _ThroughInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Any) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_(True)
            ctx.y = f(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (towards_x,) = torch.autograd.grad(ctx.y, ctx.x, gradient)
        return towards_x, None


def through_input(f: Any, x: Tensor) -> Tensor:
    """f(x) with a gradient to x alone, none to whatever else f is made of."""
    result: Tensor = _ThroughInput.apply(x, f)
    return result


def one_time(times: TimeLaw) -> tuple[bool, str]:
    """For `require`: a law of one time."""
    return times.shape == "one", "must draw one time: uniform, logit_normal, edm_lognormal or shifted"


def two_times(times: TimeLaw, source: str = "teacher") -> tuple[bool, str]:
    """For `require`: a law that a flow map can be trained on. A source of one's own needs a diagonal too."""
    if source == "teacher":
        return times.two_times, "must draw two times s < t: e.g. uniform_triangle, with a diagonal below 1"
    remedy = f"a diagonal above 0 and below 1, and a noise below 1, which alone ties source {source} down"
    return times.two_times and times.has_diagonal, f"must draw two times with {remedy}"


def heard(weight: Weight, diagonal: bool = True) -> tuple[bool, str]:
    """For `require`: where only the `diagonal` ties the map to a velocity, its rows must count."""
    return not diagonal or weight.gap <= 0, "must not grow with the gap: the rows s = t alone know the velocity"


def rows_of(draw: Draw, index: Tensor) -> Draw:
    """The rows ``index: [n]`` of a draw."""

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index]
        return {k: v[index] for k, v in value.items()} if isinstance(value, Mapping) else value

    return replace(draw, **{spec.name: pick(getattr(draw, spec.name)) for spec in fields(draw)})


def batch_mean(x: Tensor) -> Tensor:
    """The mean of ``x: [b]`` over the rows of all processes, without gradient: what scales a loss must not depend on
    how many processes share the batch."""
    total = torch.stack([x.detach().sum(), x.new_tensor(float(len(x)))])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total[0] / total[1]
