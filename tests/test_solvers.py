"""Solvers: their order against an exact map, their calls, and the way back; over all of SOLVERS."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers import gaussian, on_path
from torch import Tensor

from teachers.solvers import SOLVERS, STAGES, uniform_grid

close = torch.testing.assert_close


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_have_their_order_against_an_exact_map(name: str) -> None:
    """Halving the step divides the error by 2^order."""
    order = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}[name]
    law = gaussian(3, "cosine")
    x, ends = on_path(law, torch.zeros(32).double()), (torch.zeros(32).double(), torch.ones(32).double())
    exact = law.flow_map(x, *ends)
    errors = [(SOLVERS[name](law.velocity, x, uniform_grid(n)) - exact).square().mean().sqrt() for n in (16, 32, 64)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", SOLVERS)
def test_stages_count_the_calls(name: str) -> None:
    calls: list[Tensor] = []

    def counted(x: Tensor, t: Tensor, cond: object) -> Tensor:
        assert cond == "passed on"
        assert t.shape == (4,)
        calls.append(t)
        return x * 0

    SOLVERS[name](counted, torch.zeros(4, 2), uniform_grid(5), "passed on")
    assert len(calls) == 5 * STAGES[name]
    assert min(map(float, (t.min() for t in calls))) == 0
    last = {"euler": 0.8, "heun": 1.0, "midpoint": 0.9, "rk4": 1.0}[name]  # at 1 a network's velocity is not the limit
    assert max(map(float, (t.max() for t in calls))) == pytest.approx(last)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_go_back_and_keep_the_dtype(name: str) -> None:
    law = gaussian(2)
    x = on_path(law, torch.full((16,), 0.2).double())
    grid = torch.linspace(0.2, 0.8, 65, dtype=torch.float64)
    there = SOLVERS[name](law.velocity, x, grid)
    close(SOLVERS[name](law.velocity, there, grid.flip(0)), x, atol=0.1 if name == "euler" else 1e-3, rtol=0)
    assert (there - x).abs().max() > 0.1
    assert SOLVERS[name](law.velocity, x.float(), grid).dtype == torch.float32


def test_uniform_grid_runs_from_zero_to_one() -> None:
    grid = uniform_grid(7)
    assert grid.dtype == torch.float64
    close(grid, torch.arange(8, dtype=torch.float64) / 7)
    assert set(SOLVERS) == set(STAGES)
