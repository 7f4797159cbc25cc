"""Guidance of a model that learns from data by its own velocity, and the dropped labels that make it possible.

    w = scale (1 - mix) v_c + mix u(x, s, s | c) + (1 - scale (1 - mix) - mix) u(x, s, s | none)

has the velocity guided by `scale` as its fixed point: put u(c) = v_scale and E[v_c | x] = v(c). MeanFlow, arXiv
2505.13447 (omega = scale (1 - mix), kappa = mix); improved MeanFlow, arXiv 2512.02012, and decoupled MeanFlow, arXiv
2510.24474, are mix = 1 - 1 / scale, where v_c has coefficient 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.objectives.base import Draw
from distill.rows import Rows
from teachers.fields import require
from teachers.guidance import SCALE, in_interval
from teachers.path import expand_like
from teachers.space import Cond


@dataclass(frozen=True, kw_only=True)
class OwnGuidance:
    """scale: of the guided velocity that is learned, unless the conditioning has one per row; mix: null is 1 - 1 /
    scale; interval: of the times s where it acts."""

    scale: float = 1.0
    mix: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        require(
            self,
            scale=(self.scale >= 1, "must be at least 1 (1 is no guidance)"),
            mix=(self.mix is None or 0 <= self.mix < 1, "must be null or in [0, 1)"),
            interval=(0 <= low < high <= 1, "must be two increasing times in [0, 1]"),
        )

    @torch.no_grad()
    def velocity(self, own: Callable[[Cond], Tensor], draw: Draw) -> Tensor:
        """w at x_s ``[b, *dims]``; `own(cond)` is the model's velocity there. The conditional velocity itself on rows
        without label and outside of the interval."""
        given = (draw.cond or {}).get(SCALE)
        if given is None and self.scale == 1:
            return draw.velocity_s
        scale = torch.full_like(draw.s, self.scale) if given is None else given.to(draw.s)
        scale = torch.where(in_interval(draw.s, draw.cond, self.interval), scale, 1.0)
        if draw.dropped is not None:
            scale = torch.where(draw.dropped, 1.0, scale)
        share = 1 - 1 / scale if self.mix is None else torch.full_like(scale, self.mix)
        mix = torch.where(scale > 1, share, torch.zeros_like(scale))
        v_c, mixed = draw.velocity_s, expand_like(mix, draw.x_s)
        conditional = expand_like(scale * (1 - mix), v_c)
        return conditional * v_c + mixed * own(draw.cond) + (1 - conditional - mixed) * own(draw.null)


def drop_labels(draw: Draw, share: float, rows: Rows) -> Draw:
    """`draw` with a `share` of the rows' conditioning replaced by "none", at guidance 1. Raises ValueError if the data
    has no such conditioning."""
    if share == 0:
        return draw
    if draw.cond is None or draw.null is None:
        raise ValueError("drop is above 0, but the data has no classes to drop: set objective.drop to 0")
    dropped = rows.uniform() < share
    cond = {}
    for name, value in draw.cond.items():
        here = dropped.reshape(-1, *[1] * (value.dim() - 1))
        cond[name] = torch.where(here, draw.null[name], value)
    return replace(draw, cond=cond, dropped=dropped)
