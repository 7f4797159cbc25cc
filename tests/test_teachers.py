"""Teachers with a closed form: exact velocities, exact flow maps, over all of PATHS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAWS, central, data, gaussian, gaussian_mixture, mixture, near, normal, on_path, uniform
from torch import Tensor

from teachers import gaussian_mixture as integrated
from teachers.adapters import TEACHERS
from teachers.analytic import Gaussian, Law, Mixture
from teachers.families import FAMILIES
from teachers.fields import FieldError
from teachers.gaussian_mixture import GaussianMixture
from teachers.path import PATHS
from teachers.solvers import rk4
from teachers.velocity import score_from_velocity

ALL: dict[str, Callable[[str], Law]] = {**LAWS, "gaussian_mixture": gaussian_mixture}
ACCURACY = {"gaussian": 1e-12, "mixture": 1e-9, "gaussian_mixture": 1e-8}
laws = pytest.mark.parametrize("law", [(name, path) for name in ALL for path in PATHS], ids="-".join, indirect=True)
every_path = pytest.mark.parametrize("path", PATHS)
close = torch.testing.assert_close


@pytest.fixture
def law(request: pytest.FixtureRequest) -> Law:
    name, path = request.param
    return ALL[name](path)


@pytest.fixture
def differentiable(law: Law, monkeypatch: pytest.MonkeyPatch) -> Law:
    """The law, with fewer steps where forward derivatives go through them all."""
    monkeypatch.setattr(integrated, "STEPS", 40)
    return law


def accuracy(law: Law) -> float:
    """Of a flow map with the number of steps in force."""
    return (
        ACCURACY[law.name] * (200 / integrated.STEPS) ** 4 if isinstance(law, GaussianMixture) else ACCURACY[law.name]
    )


def some_times(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted s < m < t ``[64]``, with a gap between them that a wrong map cannot hide in."""
    s = uniform(64, low=0.02, high=0.3, seed=seed)
    m = uniform(64, low=0.35, high=0.6, seed=seed + 1)
    return s, m, uniform(64, low=0.65, high=0.97, seed=seed + 2)


def components(law: Law) -> tuple[Tensor, Tensor, Tensor]:
    """weights ``[K]``, means ``[K, d]`` and covariances ``[K, d, d]`` of any of the laws."""
    if isinstance(law, Gaussian):
        parts: tuple[Any, Any, Any] = ((1.0,), (law.mean,), (law.covariance,))
    elif isinstance(law, GaussianMixture):
        parts = (law.weights, law.means, law.covariances)
    else:
        parts = (product := as_gaussian_mixture(law)).weights, product.means, product.covariances
    weights, means, covariances = (torch.tensor(v, dtype=torch.float64) for v in parts)
    return weights, means, covariances


def as_gaussian_mixture(law: Mixture) -> GaussianMixture:
    """A product of two 1-D mixtures, multiplied out."""
    first, second = (list(zip(*rows, strict=True)) for rows in zip(law.weights, law.means, law.stds, strict=True))
    both = [(a, b) for a in first for b in second]
    return GaussianMixture(
        weights=tuple(a[0] * b[0] for a, b in both),
        means=tuple((a[1], b[1]) for a, b in both),
        covariances=tuple(((a[2] ** 2, 0.0), (0.0, b[2] ** 2)) for a, b in both),
        path=law.path,
    )


def moments(law: Law) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and covariance ``[d, d]`` of the data."""
    weights, means, covariances = components(law)
    mean = weights @ means
    centred = means - mean
    return mean, torch.einsum("k,kde->de", weights, covariances + centred[:, :, None] * centred[:, None])


def marginal(law: Law, t: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``[b, K, d]`` and covariances ``[b, K, d, d]`` of the components at ``t: [b]``."""
    _, means, covariances = components(law)
    c = PATHS[law.path]()(t)
    alpha, sigma = c.alpha[:, None, None], c.sigma[:, None, None, None]
    return alpha * means, alpha[..., None] ** 2 * covariances + sigma**2 * torch.eye(means.shape[1]).double()


def log_density(law: Law, x: Tensor, t: Tensor) -> Tensor:
    """log p_t(x) ``[b]``, written apart from the law's own code."""
    parts = torch.distributions.MultivariateNormal(*marginal(law, t)).log_prob(x[:, None])
    return torch.logsumexp(parts + components(law)[0].log(), -1)


# --- the exact velocity


@laws
def test_velocity_is_that_of_the_marginals(law: Law) -> None:
    """v = (alpha'/alpha) x + (sigma delta / alpha) grad log p_t: the score by autograd of the density."""
    t = uniform(64, low=0.05, high=0.98, seed=4)
    x = on_path(law, t).requires_grad_()
    (score,) = torch.autograd.grad(log_density(law, x, t).sum(), x)
    c = PATHS[law.path]()(t)
    ratio, gain = (c.d_alpha / c.alpha)[:, None], (c.sigma * c.delta / c.alpha)[:, None]
    near(law.velocity(x, t), ratio * x + gain * score, 1e-12)
    assert (law.velocity(x, t) - ratio * x - 1.01 * gain * score).abs().max() > 1e-3  # the twin


@every_path
def test_mixture_velocity_is_the_conditional_expectation(path: str) -> None:
    """E[v_c | x_t = x] by quadrature over the data: x_0 = (x - alpha x_1) / sigma."""
    law = mixture(path)
    nodes = np.linspace(-8, 8, 4001)
    for t_value, x_value in ((0.2, 0.3), (0.5, -0.7), (0.9, 1.1)):
        t = torch.tensor([t_value], dtype=torch.float64)
        alpha, sigma, d_alpha, d_sigma = (
            float(getattr(PATHS[path]()(t), k)) for k in ("alpha", "sigma", "d_alpha", "d_sigma")
        )
        for row in range(2):
            prior = sum(
                w * np.exp(-((nodes - m) ** 2) / (2 * v**2)) / v
                for w, m, v in zip(law.weights[row], law.means[row], law.stds[row], strict=True)
            )
            x_0 = (x_value - alpha * nodes) / sigma
            posterior = prior * np.exp(-(x_0**2) / 2)
            expected = np.sum(posterior * (d_alpha * nodes + d_sigma * x_0)) / np.sum(posterior)
            got = law.velocity(torch.full((1, 2), x_value, dtype=torch.float64), t)[0, row]
            assert float(got) == pytest.approx(expected, abs=1e-10)


@laws
def test_velocity_has_a_value_at_the_data(law: Law) -> None:
    """Also where sigma' is infinite."""
    one = torch.ones(64, dtype=torch.float64)
    x = on_path(law, one)
    near(law.velocity(x, one), law.velocity(x, one - 1e-9), 1e-6)
    assert (law.velocity(x, one) - law.velocity(x, one - 1e-3)).abs().max() > 1e-6


@every_path
def test_a_mixture_of_one_component_is_a_gaussian(path: str) -> None:
    law = gaussian(path=path)
    same = GaussianMixture(weights=(1.0,), means=(law.mean,), covariances=(law.covariance,), path=law.path)
    s, _, t = some_times()
    x = on_path(law, s)
    near(same.velocity(x, s), law.velocity(x, s), 1e-13)
    near(same.flow_map(x, s, t), law.flow_map(x, s, t), 1e-9)
    near(same.flow_map(x, t, s), law.flow_map(x, t, s), 1e-8)
    noise = normal(64, 3)
    close(same.data(noise, uniform(64, 3)), law.data(noise, uniform(64, 3)), atol=1e-13, rtol=0)
    half = GaussianMixture(weights=(0.5, 0.5), means=(law.mean,) * 2, covariances=(law.covariance,) * 2, path=law.path)
    near(half.velocity(x, s), law.velocity(x, s), 1e-13)


@every_path
def test_a_product_of_mixtures_is_a_mixture_of_products(path: str) -> None:
    law = mixture(path)
    same = as_gaussian_mixture(law)
    s, _, t = some_times()
    x = on_path(law, s)
    near(same.velocity(x, s), law.velocity(x, s), 1e-13)
    near(same.flow_map(x, s, t), law.flow_map(x, s, t), 1e-9)
    near(same.mean_velocity(x, s, t), law.mean_velocity(x, s, t), 1e-9)
    near(same.flow_map(law.flow_map(x, s, t), t, s), x, 1e-8)
    assert (gaussian_mixture(path).velocity(x, s) - law.velocity(x, s)).abs().max() > 1e-2


@every_path
def test_an_integrated_map_converges_with_the_fourth_order(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    law = mixture(path)
    s, _, t = some_times()
    x = on_path(law, s)
    errors = []
    for steps in (25, 50, 100):
        monkeypatch.setattr(integrated, "STEPS", steps)
        errors.append((as_gaussian_mixture(law).flow_map(x, s, t) - law.flow_map(x, s, t)).abs().max().item())
    assert 12 < errors[0] / errors[1] < 20
    assert 12 < errors[1] / errors[2] < 20


# --- the exact flow map


@laws
def test_flow_map_at_equal_times_is_the_identity(law: Law) -> None:
    t = uniform(64, seed=5)
    x = on_path(law, t)
    near(law.flow_map(x, t, t), x, 1e-15)


@laws
def test_flow_map_follows_the_velocity(differentiable: Law) -> None:
    """Lagrangian: d/dt X_{s,t}(x) = v(X_{s,t}(x), t); also backwards in time."""
    law = differentiable
    early, _, late = some_times()
    for s, t in ((early, late), (late, early)):
        x = on_path(law, s)
        x_t, moved = torch.func.jvp(lambda end, x=x, s=s: law.flow_map(x, s, end), (t,), (torch.ones_like(t),))
        near(moved, law.velocity(x_t, t), accuracy(law))
        assert (moved - law.velocity(x, t)).abs().max() > 1e-3  # the twin: asked at the start


@laws
def test_flow_map_is_constant_along_trajectories(differentiable: Law) -> None:
    """Eulerian: d/ds X_{s,t}(x) + (v . grad) X_{s,t}(x) = 0."""
    law = differentiable
    s, _, t = some_times()
    x = on_path(law, s)
    tangents = (law.velocity(x, s), torch.ones_like(s))
    still = torch.func.jvp(lambda x, s: law.flow_map(x, s, t), (x, s), tangents)[1]
    near(still, 0.0, accuracy(law))
    wrong = torch.func.jvp(lambda x, s: law.flow_map(x, s, t), (x, s), (1.01 * tangents[0], tangents[1]))[1]
    assert wrong.abs().max() > 1e-3


@laws
def test_flow_maps_compose_and_invert(law: Law) -> None:
    s, m, t = some_times()
    x = on_path(law, s)
    x_t = law.flow_map(x, s, t)
    near(law.flow_map(law.flow_map(x, s, m), m, t), x_t, accuracy(law))
    near(law.flow_map(x_t, t, s), x, accuracy(law))
    assert (x_t - x).abs().max() > 0.1


@laws
def test_flow_map_is_what_a_fine_grid_arrives_at(law: Law) -> None:
    grid = torch.linspace(0.1, 0.95, 401, dtype=torch.float64)
    s, t = grid[:1].expand(64), grid[-1:].expand(64)
    x = on_path(law, s)
    near(law.flow_map(x, s, t), rk4(law.velocity, x, grid), 1e-8)


@laws
def test_flow_map_carries_noise_to_data(law: Law) -> None:
    """X_{0,1} of the points that sampling starts from has the moments of the law, up to what the path neglects of the
    data at t = 0. Gaussian: from noise with exact moments; mixtures: from a low-discrepancy sequence."""
    zero, one = torch.zeros(2048, dtype=torch.float64), torch.ones(2048, dtype=torch.float64)
    mean, covariance = moments(law)
    if isinstance(law, Gaussian):
        z = normal(2048, 3)
        z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    else:
        z = torch.special.ndtri(torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(2048).double())
    path = PATHS[law.path]()
    x = law.flow_map(path.start(z), zero, one)
    first = path(zero[:1])
    tolerance = (1e-10 if isinstance(law, Gaussian) else 5e-3) + 3 * (first.alpha / first.sigma).item()
    close(x.mean(0), mean, atol=tolerance, rtol=0)
    close(torch.cov(x.T), covariance, atol=tolerance, rtol=0)
    wrong = law.flow_map(1.1 * path.start(z), zero, one)
    assert (torch.cov(wrong.T) - covariance).abs().max() > 2 * tolerance


@every_path
@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_gaussian_flow_carries_the_marginal_at_s_to_that_at_t(path: str, d: int) -> None:
    """An affine map A x + b with A C_s A^T = C_t and A m_s + b = m_t, for covariances of any size."""
    law = gaussian(d, path, seed=10 * d + 4)
    s, t = torch.tensor([0.15], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)

    def at(x: Tensor) -> Tensor:
        return law.flow_map(x[None], s, t)[0]

    (mean_s, spread_s), (mean_t, spread_t) = ([v[0, 0] for v in marginal(law, at)] for at in (s, t))
    slope = torch.func.jacfwd(at)(mean_s)
    near(slope @ spread_s @ slope.T, spread_t, 1e-12)
    close(at(mean_s), mean_t, atol=1e-13, rtol=0)
    assert (slope @ slope.T - spread_t).abs().max() > 1e-4


@laws
def test_flow_maps_keep_probability(differentiable: Law) -> None:
    """p_s(x) = p_t(X(x)) |det grad X|, with the marginal density of the path by its own formula."""
    law = differentiable
    s, _, t = some_times()
    x = on_path(law, s)
    x_t = law.flow_map(x, s, t)
    slope = torch.func.vmap(torch.func.jacfwd(lambda x, s, t: law.flow_map(x[None], s[None], t[None])[0]))(x, s, t)
    left, right = log_density(law, x, s), log_density(law, x_t, t) + torch.linalg.slogdet(slope).logabsdet
    close(left, right, atol=max(1e-8, accuracy(law)), rtol=0)
    assert (left - log_density(law, x_t, t)).abs().max() > 0.1


@laws
def test_mean_velocity_is_smooth_on_the_diagonal(differentiable: Law) -> None:
    """u(x, s, t) = v + (t - s) / 2 Dv + ... with Dv = dv/dt + (v . grad) v: its values and derivatives at s = t, and
    its digits where t - s is small."""
    law = differentiable
    t = uniform(64, low=0.05, high=0.9, seed=6)
    x, one = on_path(law, t), torch.ones_like(t)
    v, acceleration = torch.func.jvp(law.velocity, (x, t), (law.velocity(x, t), one))
    near(law.mean_velocity(x, t, t), v, 1e-12)
    at_end = torch.func.jvp(lambda end: law.mean_velocity(x, t, end), (t,), (one,))[1]
    near(at_end, acceleration / 2, 1e-9)
    at_start = torch.func.jvp(lambda x, start: law.mean_velocity(x, start, t), (x, t), (v, one))[1]
    near(at_start, acceleration / 2, 1e-9)
    assert (at_end - acceleration).abs().max() > 1e-2  # the twin
    for gap in (1e-6, 1e-9, -1e-12):
        near(law.mean_velocity(x, t, t + gap), v + gap / 2 * acceleration, 1e-8 if gap == 1e-6 else 1e-11)
    later = t + 0.05
    near(
        torch.func.jvp(lambda end: law.mean_velocity(x, t, end), (later,), (one,))[1],
        central(lambda end: law.mean_velocity(x, t, end), later),
        1e-6,
    )


@every_path
@pytest.mark.parametrize("name", LAWS)
def test_mean_velocity_has_second_derivatives(name: str, path: str) -> None:
    law, (s, _, t) = ALL[name](path), some_times()
    x, one = on_path(law, s), torch.ones_like(t)

    def slope(start: Tensor, end: Tensor) -> Tensor:
        return torch.func.jvp(lambda end: law.mean_velocity(x, start, end), (end,), (one,))[1]

    for start, end in ((s, t), (s, s + 1e-3)):
        twice = torch.func.jvp(lambda end, start=start: slope(start, end), (end,), (one,))[1]
        near(twice, central(lambda end, start=start: slope(start, end), end), 1e-5)
        mixed = torch.func.jvp(lambda start, end=end: slope(start, end), (start,), (one,))[1]
        near(mixed, central(lambda start, end=end: slope(start, end), start), 1e-5)


@laws
def test_float64_times_leave_float32_points_float32(law: Law) -> None:
    s, _, t = some_times()
    x = on_path(law, s)
    v, x_t = law.velocity(x.float(), s), law.flow_map(x.float(), s, t)
    assert v.dtype == x_t.dtype == law.mean_velocity(x.float(), s, t).dtype == torch.float32
    near(v.double(), law.velocity(x, s), 1e-4)
    near(x_t.double(), law.flow_map(x, s, t), 1e-4)


# --- a stochastic flow with the same marginals


@every_path
@pytest.mark.parametrize("noise", ["none", "constant", "sigma", "wave"])
def test_noise_with_the_score_keeps_the_marginals(path: str, noise: str) -> None:
    """dX = [v + g^2 S / 2] dt + g dW: for any g^2 the mean alpha mu and the covariance C = alpha^2 Sigma + sigma^2 I of
    the Gaussian law solve m' = E[drift] and C' = A C + C A^T + g^2 I, where A is the drift's slope."""
    law, schedule, t = gaussian(path=path), PATHS[path](), uniform(16, low=0.05, high=0.95, seed=8)
    g_squared = {
        "none": torch.zeros_like(t),
        "constant": torch.full_like(t, 0.7),
        "sigma": schedule(t).sigma,
        "wave": 1 + torch.sin(9 * t),
    }[noise]

    def drift(x: Tensor, t: Tensor, g_squared: Tensor) -> Tensor:
        x, t = x[None], t[None]
        v = law.velocity(x, t)
        return (v + g_squared / 2 * score_from_velocity(schedule, v, x, t))[0]

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = marginal(law, t)
        return mean[:, 0], spread[:, 0]

    (mean, spread), (d_mean, d_spread) = torch.func.jvp(at, (t,), (torch.ones_like(t),))
    near(torch.func.vmap(drift)(mean, t, g_squared), d_mean, 1e-12)
    slope = torch.func.vmap(torch.func.jacfwd(drift))(mean, t, g_squared)
    lyapunov = slope @ spread + spread @ slope.mT
    near(lyapunov + g_squared[:, None, None] * torch.eye(3).double(), d_spread, 1e-11)
    assert noise == "none" or (lyapunov - d_spread).abs().max() > 0.1  # the twin: the score without the noise


# --- data


@laws
def test_data_follow_the_law(law: Law) -> None:
    from scipy import stats

    x = data(law, 4000)
    weights, means, covariances = components(law)
    for row in range(x.shape[1]):
        parts = list(
            zip(weights.tolist(), means[:, row].tolist(), covariances[:, row, row].sqrt().tolist(), strict=True)
        )
        cdf = lambda v, parts=parts: sum(w * stats.norm(m, d).cdf(v) for w, m, d in parts)  # noqa: E731
        assert stats.kstest(x[:, row].numpy(), cdf).pvalue > 1e-3
        assert stats.kstest(x[:, row].numpy() + 0.2, cdf).pvalue < 1e-3
    _, covariance = moments(law)
    size = covariance.diagonal().sqrt()
    close(torch.corrcoef(x.T), covariance / size / size[:, None], atol=0.06, rtol=0)
    teacher = law.load()
    assert teacher.space.shape == (x.shape[1],)
    assert teacher.path.name == law.path
    assert teacher.info["id"] == law.name
    half = torch.full((len(x),), 0.5, dtype=torch.float64)
    close(teacher(x, half, None), law.velocity(x, half))


# --- constructors


def test_a_law_that_is_none_names_all_its_wrong_fields() -> None:
    with pytest.raises(FieldError) as error:
        Mixture(weights=((0.5, 0.4),), means=((0.0,),), stds=((1.0, -1.0),))
    assert set(error.value.problems) == {"weights", "means", "stds"}
    assert "Mixture.stds" in str(error.value)
    assert "Mixture.weights" in str(error.value)


def test_gaussian_without_a_dimension_is_refused() -> None:
    with pytest.raises(FieldError) as error:
        Gaussian(mean=(), covariance=())
    assert "mean" in error.value.problems


@pytest.mark.parametrize(
    "covariance",
    [
        ((1.0, 0.5), (0.4, 1.0)),
        ((1.0, 2.0), (2.0, 1.0)),
        ((1.0, 0.0),),
        ((1.0, 0.0), (0.0,)),
        ((1.0, 0.0), (0.0, 0.0)),
    ],
    ids=["asymmetric", "indefinite", "one row", "ragged", "singular"],
)
def test_gaussian_refuses_what_is_no_covariance(covariance: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(FieldError) as error:
        Gaussian(mean=(0.0, 0.0), covariance=covariance)
    assert set(error.value.problems) == {"covariance"}
    assert "2 x 2" in str(error.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": ((0.2, 0.7), (0.5, 0.5))}, "weights"),
        ({"weights": ((1.5, -0.5), (0.5, 0.5))}, "weights"),
        ({"means": ((0.0, 1.0),)}, "means"),
        ({"stds": ((1.0, 0.0), (1.0, 1.0))}, "stds"),
    ],
)
def test_mixture_refuses_what_is_no_mixture(change: dict[str, tuple[tuple[float, ...], ...]], field: str) -> None:
    good = {"weights": ((0.5, 0.5),) * 2, "means": ((0.0, 1.0),) * 2, "stds": ((1.0, 1.0),) * 2}
    Mixture(**good)
    with pytest.raises(FieldError) as error:
        Mixture(**{**good, **change})
    assert field in error.value.problems


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": (0.3, 0.6)}, "weights"),
        ({"weights": (1.5, -0.5)}, "weights"),
        ({"weights": (1.0,)}, "means"),
        ({"weights": ()}, "weights"),
        ({"means": ((0.0, 1.0),)}, "means"),
        ({"means": ((0.0, 1.0), (0.0,))}, "means"),
        ({"means": ((0.0, float("nan")), (0.0, 1.0))}, "means"),
        ({"means": ((), ())}, "means"),
        ({"covariances": (((1.0, 0.0), (0.0, 1.0)),)}, "covariances"),
        ({"covariances": (((1.0, 2.0), (2.0, 1.0)),) * 2}, "covariances"),
        ({"covariances": (((1.0,),),) * 2}, "covariances"),
    ],
)
def test_gaussian_mixture_refuses_what_is_no_mixture(change: dict[str, Any], field: str) -> None:
    good: dict[str, Any] = {
        "weights": (0.5, 0.5),
        "means": ((0.0, 1.0),) * 2,
        "covariances": (((1.0, 0.0), (0.0, 1.0)),) * 2,
    }
    GaussianMixture(**good)
    with pytest.raises(FieldError) as error:
        GaussianMixture(**{**good, **change})
    assert field in error.value.problems


def test_the_table_has_the_analytic_teachers() -> None:
    for cls in (Gaussian, Mixture, GaussianMixture):
        assert TEACHERS[cls.name] is cls
    assert set(FAMILIES) == set(TEACHERS)
