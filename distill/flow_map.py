"""The flow map X_{s,t}: a point at time s goes to where the flow has it at time t, in one call.

X_{s,t}(x) = x + (t - s) u(x, s, t) with the mean velocity u, so X_{s,s} = id by construction and u(x, s, s) is the
velocity. Boffi, Albergo, Vanden-Eijnden: Flow map matching, arXiv 2406.07507.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from torch import Tensor

from teachers.path import expand_like
from teachers.space import Cond


class FlowMap(Protocol):
    """X_{s,t} of some flow. ``x_s: [b, *dims]``, ``s, t: [b]`` in [0, 1]."""

    def __call__(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """X_{s,t}(x_s) ``[b, *dims]``."""
        ...

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """u(x_s, s, t) ``[b, *dims]``."""
        ...

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        """bool ``[b]``: whether this map was made for going from s to t."""
        ...


def jump(x_s: Tensor, s: Tensor, t: Tensor, mean_velocity: Tensor) -> Tensor:
    """X = x_s + (t - s) u."""
    return x_s + expand_like(t - s, x_s) * mean_velocity


def compose(flow_map: FlowMap, x: Tensor, grid: Tensor, cond: Cond = None) -> Tensor:
    """Carry ``x`` through the times ``grid: [n + 1]`` in n calls: X_{t_{n-1},t_n} o ... o X_{t_0,t_1}."""
    for s, t in pairwise(grid):
        b = len(x)
        x = flow_map(x, s.expand(b), t.expand(b), cond)
    return x
