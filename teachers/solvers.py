"""Fixed-grid solvers of dx/dt = v(x, t): what a student is measured against.

Each takes `velocity`, a start ``x: [b, *dims]``, a grid of times (increasing or decreasing), ``[n + 1]`` or one a row
``[n + 1, b]``, and `cond`, and returns the point at the grid's end. `STAGES` counts velocity calls a step, so nfe = n *
STAGES[name].
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from teachers.path import expand_like
from teachers.space import Cond
from teachers.velocity import Velocity

Step = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor], Tensor]


def uniform_grid(steps: int, device: torch.device | str = "cpu") -> Tensor:
    """0, 1/steps, ..., 1 in float64."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=device)


def _solve(step: Step, velocity: Velocity, x: Tensor, grid: Tensor, cond: Cond) -> Tensor:
    def v(point: Tensor, t: Tensor) -> Tensor:
        return velocity(point, t.expand(len(point)), cond)

    for s, t in pairwise(grid):
        x = step(v, x, s, t)
    return x


def euler(velocity: Velocity, x: Tensor, grid: Tensor, cond: Cond = None) -> Tensor:
    """First order, one call a step."""
    return _solve(lambda v, x, s, t: x + expand_like(t - s, x) * v(x, s), velocity, x, grid, cond)


def heun(velocity: Velocity, x: Tensor, grid: Tensor, cond: Cond = None) -> Tensor:
    """Second order (explicit trapezoid), two calls a step."""

    def step(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        h = expand_like(t - s, x)
        k_1 = v(x, s)
        return x + h / 2 * (k_1 + v(x + h * k_1, t))

    return _solve(step, velocity, x, grid, cond)


def midpoint(velocity: Velocity, x: Tensor, grid: Tensor, cond: Cond = None) -> Tensor:
    """Second order (explicit midpoint), two calls a step, none at its end: at t = 1, where no noise is left in x, what
    a network says is not the limit of its velocities, and Heun's last step gives half of its noise back."""

    def step(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        h = expand_like(t - s, x)
        return x + h * v(x + h / 2 * v(x, s), (s + t) / 2)

    return _solve(step, velocity, x, grid, cond)


def rk4(velocity: Velocity, x: Tensor, grid: Tensor, cond: Cond = None) -> Tensor:
    """Classical Runge-Kutta, fourth order, four calls a step."""

    def step(v: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        h, m = expand_like(t - s, x), (s + t) / 2
        k_1 = v(x, s)
        k_2 = v(x + h / 2 * k_1, m)
        k_3 = v(x + h / 2 * k_2, m)
        k_4 = v(x + h * k_3, t)
        return x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)

    return _solve(step, velocity, x, grid, cond)


SOLVERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4}
STAGES = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}
