"""Paths x_t = alpha x_1 + sigma x_0 and what a velocity says about the point it is given at; over all of PATHS."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import central, gaussian, near, normal, on_path, uniform
from torch import Tensor

from teachers import velocity as convert
from teachers.fields import FieldError
from teachers.path import PATHS, VE, VP, Path, PathName, expand_like

paths = pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=list(PATHS))
VARIANTS = {
    **{name: cls() for name, cls in PATHS.items()},
    "vp, fields": VP(beta_0=0.5, beta_1=9.0),
    "vp, flat": VP(beta_0=6.0, beta_1=6.0),
    "ve, fields": VE(sigma_max=12.0, sigma_min=0.05, rho=3),
}
variants = pytest.mark.parametrize("path", VARIANTS.values(), ids=list(VARIANTS))
names = pytest.mark.parametrize("name", ["alpha", "sigma"])
TIMES = uniform(64, low=0.02, high=0.98)
ENDS = {  # alpha and sigma at t = 0, then at t = 1
    "linear": (0.0, 1.0, 1.0, 0.0),
    "cosine": (0.0, 1.0, 1.0, 0.0),
    "vp": (math.exp(-20.1 / 4), math.sqrt(1 - math.exp(-20.1 / 2)), 1.0, 0.0),
    "linear_vp": (0.0, 1.0, 1.0, 0.0),
    "ve": (1.0, 80.0, 1.0, 0.002),
}
STEEP = {"vp", "linear_vp"}  # sigma' is infinite at t = 1


def test_the_table_names_each_path_as_the_path_names_itself() -> None:
    assert all(cls.name == name for name, cls in PATHS.items())
    assert set(PATHS) == set(ENDS) == set(get_args(PathName))


@paths
def test_noise_at_zero_and_data_at_one(path: Path) -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    c = path(t)
    ends = torch.tensor(ENDS[path.name], dtype=torch.float64).reshape(2, 2)
    torch.testing.assert_close(torch.stack([c.alpha, c.sigma], 1), ends, atol=1e-15, rtol=1e-13)
    x_0, x_1 = normal(2, 3), normal(2, 3, seed=1)
    expected = ends[:, :1] * x_1 + ends[:, 1:] * x_0
    torch.testing.assert_close(path.point(x_0, x_1, t), expected, atol=1e-15, rtol=1e-13)
    if path.name != "ve":
        assert (path.point(x_0, x_1, t) - torch.stack([x_0[0], x_1[1]])).abs().max() < 0.02
    assert c.sigma_d_sigma.isfinite().all()
    assert c.d_sigma[1].isinf() == (path.name in STEEP)


@paths
def test_sampling_starts_from_noise_of_the_size_of_the_path(path: Path) -> None:
    for x_0 in (normal(5, 2, 3), normal(5, 2, 3).float()):
        start = path.start(x_0)
        assert start.dtype == x_0.dtype
        if ENDS[path.name][1] == 1.0:
            assert torch.equal(start, x_0)
        else:
            torch.testing.assert_close(start, ENDS[path.name][1] * x_0)
            assert not torch.equal(start, x_0)


@variants
@names
def test_derivatives(path: Path, name: str) -> None:
    stated = getattr(path(TIMES), f"d_{name}")
    near(stated, central(lambda t: getattr(path(t), name), TIMES), 1e-7)
    exact = torch.func.jvp(lambda t: getattr(path(t), name), (TIMES,), (torch.ones_like(TIMES),))[1]
    near(stated, exact, 1e-13)
    assert not stated.any() or (stated - 1.01 * exact).abs().max() > 1e-3  # the twin


@variants
def test_products_of_coefficients(path: Path) -> None:
    """delta, sigma sigma', norm and angle are what their names say; the angle falls at the rate delta / norm^2."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    c = path(t)
    matrix = torch.stack([torch.stack([c.alpha, c.sigma], -1), torch.stack([c.d_alpha, c.d_sigma], -1)], -2)
    near(c.delta, -torch.linalg.det(matrix), 1e-13)
    near(c.sigma_d_sigma, c.sigma * c.d_sigma, 1e-13)
    near(c.norm * torch.cos(c.angle), c.alpha, 1e-14)
    near(c.norm * torch.sin(c.angle), c.sigma, 1e-14)
    assert c.delta.min() > 0
    falling = torch.func.jvp(lambda t: path(t).angle, (t,), (torch.ones_like(t),))[1]
    near(falling, -c.delta / c.norm**2, 1e-12)


def test_sigma_keeps_its_digits_near_the_data() -> None:
    """sigma^2 = 1 - alpha^2 cancels there; by hand, with y = 1 - t, it is y (2 - y) and u - u^2 / 2 + ..."""
    y = 2.0 ** -torch.arange(20, 50, dtype=torch.float64)  # 1 - y is exact
    torch.testing.assert_close(PATHS["linear_vp"]()(1 - y).sigma, (y * (2 - y)).sqrt(), atol=0, rtol=1e-14)
    u = 0.1 * y + 19.9 / 2 * y**2
    torch.testing.assert_close(VP()(1 - y).sigma, (u - u**2 / 2).sqrt(), atol=0, rtol=1e-13)


def test_schedules_are_the_published_ones() -> None:
    t = TIMES
    torch.testing.assert_close(PATHS["linear"]()(t).delta, torch.ones_like(t))
    torch.testing.assert_close(PATHS["linear"]()(t).alpha, t)
    torch.testing.assert_close(PATHS["cosine"]()(t).delta, torch.full_like(t, math.pi / 2))
    torch.testing.assert_close(PATHS["cosine"]()(t).alpha, torch.sin(t * math.pi / 2))
    torch.testing.assert_close(PATHS["linear_vp"]()(t).alpha, t)
    # vp: d alpha / dt = beta alpha / 2 with a rate beta from 20 at the noise to 0.1 at the data
    c = VP()(t)
    torch.testing.assert_close(2 * c.d_alpha / c.alpha, 20 + (0.1 - 20) * t)
    for name in ("cosine", "vp", "linear_vp"):
        c = PATHS[name]()(t)
        torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(t))
    # ve: equation (5) of arXiv 2206.00364 with N = 18, as EDM samples
    grid = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    levels = VE()(torch.linspace(0, 1, 18, dtype=torch.float64)).sigma
    torch.testing.assert_close(levels, torch.tensor(grid, dtype=torch.float64))
    assert levels[1].item() == pytest.approx(57.586, abs=1e-3)


@variants
@names
@pytest.mark.parametrize("gap", [0.5, 1e-2, 1e-6, -0.01])
def test_secants_are_difference_quotients(path: Path, name: str, gap: float) -> None:
    s = uniform(64, low=0.02, high=0.48)
    t = s + gap
    quotient = (getattr(path(t), name) - getattr(path(s), name)) / (t - s)
    near(secant(path, name, s, t), quotient, 1e-15 / abs(gap) + 1e-13)


@variants
@names
@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-8, 1e-12, -1e-3])
def test_secants_keep_their_digits(path: Path, name: str, gap: float) -> None:
    """They are the mean of the derivative between s and t, here by quadrature: to 1e-12 whatever the gap."""
    s = TIMES
    t = s + gap
    nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(20))
    between = s[:, None] + (t - s)[:, None] * (1 + nodes) / 2
    mean = (getattr(path(between), f"d_{name}") * weights / 2).sum(1)
    torch.testing.assert_close(secant(path, name, s, t), mean, atol=0, rtol=1e-12)
    if gap == 1e-12 and mean.unique().numel() > 1:  # the twin: a difference has lost them
        naive = (getattr(path(t), name) - getattr(path(s), name)) / (t - s)
        assert (naive / mean - 1).abs().max() > 1e-6


@variants
@names
def test_secants_are_smooth_at_equal_times(path: Path, name: str) -> None:
    """f' there, with the slope f'' / 2 in either time."""
    derivative = getattr(path(TIMES), f"d_{name}")
    torch.testing.assert_close(secant(path, name, TIMES, TIMES), derivative, atol=0, rtol=1e-13)
    one = (torch.ones_like(TIMES),)
    second = torch.func.jvp(lambda t: getattr(path(t), f"d_{name}"), (TIMES,), one)[1]
    for slope in (
        torch.func.jvp(lambda t: secant(path, name, TIMES, t), (TIMES,), one)[1],
        torch.func.jvp(lambda s: secant(path, name, s, TIMES), (TIMES,), one)[1],
    ):
        near(slope, second / 2, 1e-11)
    t = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad((secant(path, name, TIMES, t) + 0 * t).sum(), t)
    near(slope, second / 2, 1e-11)


def secant(path: Path, name: str, s: Tensor, t: Tensor) -> Tensor:
    return path.secants(s, t)[("alpha", "sigma").index(name)]


@variants
def test_time_at_inverts_the_angle(path: Path) -> None:
    small = torch.logspace(-12, -4, 30, dtype=torch.float64)
    t = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64), small, 1 - small])
    torch.testing.assert_close(path.time_at(path(t).angle), t, atol=1e-12, rtol=0)
    angle = uniform(64, low=0.1, high=1.45)
    torch.testing.assert_close(path(path.time_at(angle)).angle, angle, atol=1e-12, rtol=0)
    for other in VARIANTS.values():  # the twin
        if other != path:
            assert (other.time_at(path(t).angle) - t).abs().max() > 1e-2


@variants
def test_noise_beyond_the_path_lies_beyond_its_times(path: Path) -> None:
    """No noise and no data belong to finite times: within [0, 1] where the path reaches them, outside otherwise."""
    data, noise = path.time_at(torch.tensor([0.0, math.pi / 2], dtype=torch.float64)).tolist()
    c = path(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert data == 1 if c.sigma[1] < 1e-15 else 1 < data < 10
    assert 0 <= noise < 1e-15 if c.alpha[0] / c.sigma[0] == 0 else -1e9 < noise < 0


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: VP(beta_0=0.0), "beta_0"),
        (lambda: VP(beta_1=math.inf), "beta_1"),
        (lambda: VE(sigma_max=0.001), "sigma_max"),
        (lambda: VE(sigma_min=0.0), "sigma_min"),
        (lambda: VE(rho=0), "rho"),
    ],
)
def test_a_path_that_is_none_names_its_field(build: type[Path], field: str) -> None:
    with pytest.raises(FieldError) as error:
        build()
    assert set(error.value.problems) == {field}


@paths
def test_conditional_velocity_is_the_derivative_of_the_point(path: Path) -> None:
    x_0, x_1 = normal(64, 2, 3), normal(64, 2, 3, seed=1)
    moved = central(lambda t: path.point(x_0, x_1, t), TIMES)
    near(path.conditional_velocity(x_0, x_1, TIMES), moved, 1e-7)


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
def test_noise_that_the_score_makes_up_for_keeps_the_law(path: Path) -> None:
    """dx = (v + g^2 S / 2) dt + g dW has the marginals of the path, whatever g: dm/dt and dC/dt of a Gaussian."""
    law = gaussian(3, path.name)
    mean, covariance = (torch.tensor(v, dtype=torch.float64) for v in (law.mean, law.covariance))
    c, noise, eye = path(TIMES), 0.3 + torch.sin(3 * TIMES) ** 2, torch.eye(3, dtype=torch.float64)
    alpha, d_alpha, sigma, g2 = (expand_like(v, eye[None]) for v in (c.alpha, c.d_alpha, c.sigma, noise))
    spread = alpha**2 * covariance + sigma**2 * eye

    def drift(x: Tensor) -> Tensor:
        v = law.velocity(x, TIMES)
        return v + expand_like(noise, x) / 2 * convert.score_from_velocity(path, v, x, TIMES)

    centre = alpha[:, 0] * mean
    slope = torch.stack([drift(centre + e) - drift(centre) for e in eye], -1)  # affine: its columns are differences
    change = slope @ spread + spread @ slope.mT + g2 * eye
    expected = 2 * alpha * d_alpha * covariance + 2 * expand_like(c.sigma_d_sigma, spread) * eye
    near(drift(centre), d_alpha[:, 0] * mean, 1e-10)
    near(change, expected, 1e-9)
    assert (change - g2 * eye - expected).abs().max() > 0.1  # the twin: without the noise


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
    near(point.double(), exact, 1e-6)


def test_expand_like_broadcasts_over_the_batch_alone() -> None:
    scale = torch.arange(3.0, dtype=torch.float64)
    x = torch.ones(3, 2, 3, 3)
    assert torch.equal((expand_like(scale, x) * x)[:, 1, 2, 0], torch.tensor([0.0, 1.0, 2.0]))
    assert expand_like(scale, x).shape == (3, 1, 1, 1)
