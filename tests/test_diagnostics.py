"""What shows a collapse early: residuals and derivatives by time, and the student beside the teacher on fixed noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import LAWS, TINY, Exact, data, logged

from distill.job import run
from distill.objectives.base import Batch, Loss, Objective, mean_square
from distill.objectives.consistency import ContinuousConsistency
from distill.objectives.eulerian import Eulerian
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.times import UniformTriangle
from distill.rows import Rows
from distill.training.diagnostics import Seen, by_time

OFF = UniformTriangle(diagonal=0.0)  # s < t


def test_squares_are_averaged_in_quarters_of_the_time() -> None:
    time = torch.tensor([0.0, 0.2, 0.5, 0.74, 1.0])
    squares = torch.tensor([1.0, 9.0, 4.0, 16.0, 25.0])
    found = by_time(Seen(time, Loss(squares, tangent=2 * squares)))
    expected = {"0.00-0.25": 5.0, "0.50-0.75": 10.0, "0.75-1.00": 25.0}  # none in the second
    assert found == pytest.approx(
        {f"residual/{name}": math.sqrt(v) for name, v in expected.items()}
        | {f"tangent/{name}": math.sqrt(2 * v) for name, v in expected.items()}
    )
    assert by_time(Seen(time, Loss(squares))).keys() == {f"residual/{name}" for name in expected}
    assert by_time(None) == {}
    assert all(math.isnan(v) for v in by_time(Seen(time[:1], Loss(torch.tensor([torch.nan])))).values())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("objective", [
    Lagrangian(times=OFF),
    Lagrangian(times=OFF, gradient="full"),
    Eulerian(times=OFF),
    Eulerian(times=OFF, gradient="full"),
    Eulerian(times=OFF, gradient="partial"),
    MeanFlow(source="teacher", times=OFF),
    ContinuousConsistency(),
])  # fmt: skip
def test_the_tangent_is_the_derivative(law: str, objective: Objective) -> None:
    """At an exact map d/dt X = v(X, t), and along the path (t - s) du/ds = u - v."""
    exact = LAWS[law]("linear")
    teacher, x_1 = exact.load(), data(exact, 16)
    draw = objective.draw(Batch(x_1, None, ()), teacher.path, Rows(0, "train", 0, 0, 16), 0)
    found = objective.loss(Exact(exact), Exact(exact), teacher, draw).tangent
    assert found is not None
    if isinstance(objective, Lagrangian):
        expected = teacher(exact.flow_map(draw.x_s, draw.s, draw.t), draw.t, None)
    else:
        u = exact.mean_velocity(draw.x_s, draw.s, draw.t)
        expected = (u - teacher(draw.x_s, draw.s, None)) / (draw.t - draw.s)[:, None]
    torch.testing.assert_close(found, mean_square(expected), rtol=1e-5, atol=1e-8)


def test_pictures_are_measured(cwd: Path) -> None:
    overrides = [*TINY, "tracking.samples_every=3", "tracking.log_every=4"]
    rows = {row["step"]: row for row in logged(run("toy/lagrangian", overrides))}
    assert [step for step, row in rows.items() if "rmse_to_teacher" in row] == [3, 6, 9, 12]
    assert [step for step, row in rows.items() if "loss" in row] == [3, 4, 6, 8, 9, 12]
    assert 0 < rows[12]["rmse_to_teacher"] < 10 and rows[12]["rmse_to_teacher"] != rows[3]["rmse_to_teacher"]
