"""The flow map X_{s,t}: a point at time s goes to where the flow has it at time t, in one call.

X_{s,t}(x) = x + (t - s) u(x, s, t) with the mean velocity u, so X_{s,s} = id by construction and u(x, s, s) is the
velocity. Boffi, Albergo, Vanden-Eijnden: Flow map matching, arXiv 2406.07507.

Consistency, shortcut and flow-map students are this one thing, made for different (s, t): their `Kind`. How each is
used in several steps is here too: partition, dyadic steps, re-noising, and gamma sampling between the first and last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from teachers.path import Path, expand_like
from teachers.space import Cond

Kind = Literal["flow_map", "shortcut", "consistency", "grid", "velocity"]
"""Which (s, t) a map is made for; see `SUPPORTS`."""
SUPPORTS: dict[str, str] = {
    "flow_map": "0 <= s <= t <= 1",
    "shortcut": "s = t, or t - s = 1/n with n a power of two up to {finest} and s a multiple of it",
    "consistency": "t = 1",
    "grid": "t - s = 1/{finest}, s a multiple of it",
    "velocity": "s = t",
}


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


def supported(kind: Kind, finest: int, s: Tensor, t: Tensor) -> Tensor:
    """bool ``[b]``: whether a map of this kind is made for (s, t). See `SUPPORTS`."""
    inside = (s >= 0) & (s <= t) & (t <= 1)
    if kind == "flow_map":
        return inside
    if kind == "consistency":
        return inside & (t == 1)
    if kind == "velocity":
        return inside & (s == t)
    steps = 1 / (t - s)  # infinite on the diagonal
    whole = inside & ((steps - steps.round()).abs() < 1e-6) & ((s * steps - (s * steps).round()).abs() < 1e-6)
    if kind == "grid":
        return whole & (steps.round() == finest)
    level = torch.log2(steps.round())
    return (inside & (s == t)) | (whole & (level == level.round()) & (steps.round() <= finest))


def steps_refused(kind: Kind, finest: int, steps: int) -> str | None:
    """Why a map of this kind does not go from noise to data in this number of equal steps; None if it does."""
    if steps < 1:
        return f"steps must be at least 1, got {steps}"
    if kind == "grid" and steps != finest:
        return f"this student was made for exactly {finest} step{'s' if finest > 1 else ''}, got {steps}"
    if kind == "shortcut" and (steps & (steps - 1) or steps > finest):
        return f"this student takes a power of two of steps, at most {finest}, got {steps}"
    return None


def check_steps(kind: Kind, finest: int, steps: int) -> None:
    """Raises ValueError for steps that are refused (see `steps_refused`)."""
    if text := steps_refused(kind, finest, steps):
        raise ValueError(text)


Fresh = Callable[[int], Tensor]
"""k -> standard normal noise ``[b, *dims]`` of the k-th re-noising."""


def travel(
    flow_map: FlowMap, x: Tensor, grid: Tensor, cond: Cond, path: Path, gamma: float = 0.0, fresh: Fresh | None = None
) -> Tensor:
    """Carry ``x`` through the times ``grid: [n + 1]`` in n calls.

    gamma = 0 composes X_{t_{n-1},t_n} o ... o X_{t_0,t_1}: the deterministic flow. With gamma > 0 each step but the
    last goes beyond its end t_n to the bridge time t_b, of noise-to-data ratio sqrt(1 - gamma^2) times that at t_n, and
    is noised back (`renoise`): the law at t_n is kept for every gamma, and gamma = 1 goes to the data and back, which
    is how consistency students sample. CTM, arXiv 2310.02279, algorithm 3.
    """
    b, last = len(x), len(grid) - 2
    for k, (s, t) in enumerate(pairwise(grid)):
        if gamma == 0 or k == last:
            x = flow_map(x, s.expand(b), t.expand(b), cond)
            continue
        assert fresh is not None
        middle = bridge(path, t, gamma)
        x = renoise(path, flow_map(x, s.expand(b), middle.expand(b), cond), middle, t, fresh(k))
    return x


def bridge(path: Path, t: Tensor, gamma: float) -> Tensor:
    """The time t_b >= t with sigma_b / alpha_b = sqrt(1 - gamma^2) sigma_t / alpha_t; 1 for gamma = 1, and where a path
    ends with more noise than that."""
    if gamma == 1:
        return torch.ones_like(t)
    c = path(t)
    return path.time_at(torch.atan2(math.sqrt(1 - gamma**2) * c.sigma, c.alpha)).clamp(max=1)


def renoise(path: Path, x_b: Tensor, t_b: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A point at t_b back at t <= t_b: (alpha_t / alpha_b) x_b + sqrt(sigma_t^2 - (alpha_t sigma_b / alpha_b)^2) noise.

    It has the law of x_t if x_b has that of x_{t_b}. Times are scalars or ``[b]``.
    """
    here, there = path(t), path(t_b)
    scale = here.alpha / there.alpha
    std = (here.sigma**2 - (scale * there.sigma) ** 2).clamp_min(0).sqrt()
    return expand_like(scale, x_b) * x_b + expand_like(std, x_b) * noise


def equal_steps(steps: int, times: Sequence[float] | None, device: torch.device | str) -> Tensor:
    """0, 1/steps, ..., 1 in float64, or 0, `times`, 1: the steps - 1 times between. Raises ValueError."""
    if times is None:
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=device)
    grid = torch.tensor([0.0, *times, 1.0], dtype=torch.float64, device=device)
    if len(grid) != steps + 1 or not (grid.diff() > 0).all():
        raise ValueError(f"times must be {steps - 1} increasing numbers between 0 and 1 for {steps} steps, got {times}")
    return grid
