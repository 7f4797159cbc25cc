"""Paths x_t = alpha x_1 + sigma x_0 and what a velocity says about the point it is given at; over all of PATHS."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import central, gaussian, normal, on_path, uniform
from torch import Tensor

from teachers import velocity as convert
from teachers.path import PATHS, Path, expand_like

paths = pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=list(PATHS))
TIMES = uniform(64, low=0.02, high=0.98)


def test_the_table_names_each_path_as_the_path_names_itself() -> None:
    assert {"linear", "cosine"} <= set(PATHS)
    assert all(cls.name == name for name, cls in PATHS.items())


@paths
def test_noise_at_zero_and_data_at_one(path: Path) -> None:
    c = path(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(c.alpha, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(c.sigma, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-15, rtol=0)
    x_0, x_1 = normal(2, 3), normal(2, 3, seed=1)
    ends = path.point(x_0, x_1, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.stack([x_0[0], x_1[1]]), atol=1e-15, rtol=1e-15)


@paths
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_derivatives(path: Path, name: str) -> None:
    stated = getattr(path(TIMES), f"d_{name}")
    torch.testing.assert_close(stated, central(lambda t: getattr(path(t), name), TIMES), atol=1e-8, rtol=0)
    (exact,) = torch.autograd.functional.jvp(lambda t: getattr(path(t), name), TIMES, torch.ones_like(TIMES))[1:]
    torch.testing.assert_close(stated, exact, atol=1e-14, rtol=0)


@paths
def test_delta_is_the_determinant_and_positive(path: Path) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    c = path(t)
    matrix = torch.stack([torch.stack([c.alpha, c.sigma], -1), torch.stack([c.d_alpha, c.d_sigma], -1)], -2)
    torch.testing.assert_close(c.delta, -torch.linalg.det(matrix), atol=1e-14, rtol=0)
    assert c.delta.min() > 0


def test_schedules_are_the_published_ones() -> None:
    t = TIMES
    torch.testing.assert_close(PATHS["linear"]()(t).delta, torch.ones_like(t))
    torch.testing.assert_close(PATHS["cosine"]()(t).delta, torch.full_like(t, math.pi / 2))
    torch.testing.assert_close(PATHS["linear"]()(t).alpha, t)
    torch.testing.assert_close(PATHS["cosine"]()(t).alpha, torch.sin(t * math.pi / 2))


@paths
@pytest.mark.parametrize("gap", [0.5, 1e-2, 1e-6, -0.01])
def test_secants_are_difference_quotients(path: Path, gap: float) -> None:
    s = uniform(64, low=0.02, high=0.48)
    t = s + gap
    for secant, name in zip(path.secants(s, t), ("alpha", "sigma"), strict=True):
        quotient = (getattr(path(t), name) - getattr(path(s), name)) / (t - s)
        torch.testing.assert_close(secant, quotient, atol=1e-15 / abs(gap) + 1e-13, rtol=0)


@paths
def test_secants_at_equal_times_are_derivatives(path: Path) -> None:
    t = TIMES.clone().requires_grad_()
    for secant, derivative in zip(path.secants(t, t), (path(t).d_alpha, path(t).d_sigma), strict=True):
        torch.testing.assert_close(secant, derivative, atol=1e-14, rtol=0)

    def alpha_secant(end: Tensor) -> Tensor:  # its slope in the end time is alpha'' / 2
        return path.secants(TIMES, end)[0]

    slope = torch.func.jvp(alpha_secant, (TIMES,), (torch.ones_like(TIMES),))[1]
    torch.testing.assert_close(slope, central(lambda u: path(u).d_alpha, TIMES) / 2, atol=1e-8, rtol=0)


@paths
def test_conditional_velocity_is_the_derivative_of_the_point(path: Path) -> None:
    x_0, x_1 = normal(64, 2, 3), normal(64, 2, 3, seed=1)
    moved = central(lambda t: path.point(x_0, x_1, t), TIMES)
    torch.testing.assert_close(path.conditional_velocity(x_0, x_1, TIMES), moved, atol=1e-8, rtol=0)


@paths
@pytest.mark.parametrize("word", ["data", "noise", "score"])
def test_conversions_invert_each_other(path: Path, word: str) -> None:
    x, v = normal(64, 2, 2), normal(64, 2, 2, seed=1)
    there, back = getattr(convert, f"{word}_from_velocity"), getattr(convert, f"velocity_from_{word}")
    torch.testing.assert_close(back(path, there(path, v, x, TIMES), x, TIMES), v, atol=1e-11, rtol=0)


@paths
def test_data_and_noise_rebuild_point_and_velocity(path: Path) -> None:
    x, v = normal(64, 3), normal(64, 3, seed=1)
    x_1, x_0 = convert.data_from_velocity(path, v, x, TIMES), convert.noise_from_velocity(path, v, x, TIMES)
    torch.testing.assert_close(path.point(x_0, x_1, TIMES), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(path.conditional_velocity(x_0, x_1, TIMES), v, atol=1e-12, rtol=0)


@paths
def test_conversions_agree_with_the_gaussian_posterior(path: Path) -> None:
    """D = mu + alpha Sigma C^-1 (x - alpha mu), E = sigma C^-1 (x - alpha mu), score = -C^-1 (x - alpha mu)."""
    law = gaussian(3, path.name)
    x, c = on_path(law, TIMES), path(TIMES)
    mean, covariance = (torch.tensor(v, dtype=torch.float64) for v in (law.mean, law.covariance))
    alpha, sigma = expand_like(c.alpha, x), expand_like(c.sigma, x)
    spread = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(3, dtype=torch.float64)
    whitened = torch.linalg.solve(spread, x - alpha * mean)
    v = law.velocity(x, TIMES)
    expected = {"data": mean + alpha * whitened @ covariance, "noise": sigma * whitened, "score": -whitened}
    for word, value in expected.items():
        got = getattr(convert, f"{word}_from_velocity")(path, v, x, TIMES)
        torch.testing.assert_close(got, value, atol=1e-11, rtol=0)
        assert (got - 1.01 * value).abs().max() > 1e-3  # the twin: one percent off is seen
        torch.testing.assert_close(
            getattr(convert, f"velocity_from_{word}")(path, value, x, TIMES), v, atol=1e-11, rtol=0
        )


@paths
def test_float64_times_leave_float32_points_float32(path: Path) -> None:
    x_0, x_1 = normal(64, 3).float(), normal(64, 3, seed=1).float()
    point, v = path.point(x_0, x_1, TIMES), path.conditional_velocity(x_0, x_1, TIMES)
    assert point.dtype == v.dtype == torch.float32
    for word in ("data", "noise", "score"):
        there = getattr(convert, f"{word}_from_velocity")(path, v, point, TIMES)
        assert there.dtype == torch.float32
        assert getattr(convert, f"velocity_from_{word}")(path, there, point, TIMES).dtype == torch.float32
    # cast last: the coefficients keep float64 accuracy until they meet x
    exact = path.point(x_0.double(), x_1.double(), TIMES)
    torch.testing.assert_close(point.double(), exact, atol=1e-6, rtol=0)


def test_expand_like_broadcasts_over_the_batch_alone() -> None:
    scale = torch.arange(3.0, dtype=torch.float64)
    x = torch.ones(3, 2, 3, 3)
    assert torch.equal((expand_like(scale, x) * x)[:, 1, 2, 0], torch.tensor([0.0, 1.0, 2.0]))
    assert expand_like(scale, x).shape == (3, 1, 1, 1)
