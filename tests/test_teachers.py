"""Teachers with a closed form: exact velocities, exact flow maps, over both paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LAWS, central, data, gaussian, mixture, normal, on_path, uniform
from torch import Tensor

from teachers.adapters import TEACHERS
from teachers.analytic import Gaussian, Mixture
from teachers.fields import FieldError
from teachers.path import PATHS
from teachers.solvers import rk4

Law = Gaussian | Mixture
ACCURACY = {"gaussian": 1e-12, "mixture": 1e-9}
laws = pytest.mark.parametrize("law", [(name, path) for name in LAWS for path in PATHS], ids="-".join, indirect=True)
close = torch.testing.assert_close


@pytest.fixture
def law(request: pytest.FixtureRequest) -> Law:
    name, path = request.param
    return LAWS[name](path)


def accuracy(law: Law) -> float:
    return ACCURACY["gaussian" if isinstance(law, Gaussian) else "mixture"]


def some_times(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted s < m < t ``[64]``, with a gap between them that a wrong map cannot hide in."""
    s = uniform(64, low=0.02, high=0.3, seed=seed)
    m = uniform(64, low=0.35, high=0.6, seed=seed + 1)
    return s, m, uniform(64, low=0.65, high=0.97, seed=seed + 2)


# --- the exact flow map


@laws
def test_flow_map_at_equal_times_is_the_identity(law: Law) -> None:
    t = uniform(64, seed=5)
    x = on_path(law, t)
    close(law.flow_map(x, t, t), x, atol=accuracy(law) / 100, rtol=0)


@laws
def test_flow_map_follows_the_velocity(law: Law) -> None:
    """Lagrangian: d/dt X_{s,t}(x) = v(X_{s,t}(x), t); also backwards in time."""
    early, _, late = some_times()
    for s, t in ((early, late), (late, early)):
        x = on_path(law, s)
        x_t, moved = torch.func.jvp(lambda end, x=x, s=s: law.flow_map(x, s, end), (t,), (torch.ones_like(t),))
        close(moved, law.velocity(x_t, t), atol=accuracy(law), rtol=0)
        assert (moved - law.velocity(x, t)).abs().max() > 0.1  # the twin: asked at the start


@laws
def test_flow_map_is_constant_along_trajectories(law: Law) -> None:
    """Eulerian: d/ds X_{s,t}(x) + (v . grad) X_{s,t}(x) = 0."""
    s, _, t = some_times()
    x = on_path(law, s)
    tangents = (law.velocity(x, s), torch.ones_like(s))
    still = torch.func.jvp(lambda x, s: law.flow_map(x, s, t), (x, s), tangents)[1]
    close(still, torch.zeros_like(still), atol=accuracy(law), rtol=0)
    wrong = torch.func.jvp(lambda x, s: law.flow_map(x, s, t), (x, s), (1.01 * tangents[0], tangents[1]))[1]
    assert wrong.abs().max() > 1e-3


@laws
def test_flow_maps_compose_and_invert(law: Law) -> None:
    s, m, t = some_times()
    x = on_path(law, s)
    x_t = law.flow_map(x, s, t)
    close(law.flow_map(law.flow_map(x, s, m), m, t), x_t, atol=accuracy(law), rtol=0)
    close(law.flow_map(x_t, t, s), x, atol=accuracy(law), rtol=0)
    assert (x_t - x).abs().max() > 0.1


@laws
def test_flow_map_is_what_a_fine_grid_arrives_at(law: Law) -> None:
    grid = torch.linspace(0.1, 0.95, 401, dtype=torch.float64)
    s, t = grid[:1].expand(64), grid[-1:].expand(64)
    x = on_path(law, s)
    close(law.flow_map(x, s, t), rk4(law.velocity, x, grid), atol=1e-8, rtol=0)


@laws
def test_flow_map_carries_noise_to_data(law: Law) -> None:
    """X_{0,1} of noise whose sample moments are exact, or of all its quantiles, has the moments of the law."""
    zero, one = torch.zeros(4000, dtype=torch.float64), torch.ones(4000, dtype=torch.float64)
    if isinstance(law, Gaussian):
        z = normal(4000, 3)
        z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
        x = law.flow_map(z, zero, one)
        close(x.mean(0), torch.tensor(law.mean, dtype=torch.float64), atol=1e-10, rtol=0)
        close(torch.cov(x.T), torch.tensor(law.covariance, dtype=torch.float64), atol=1e-10, rtol=0)
    else:
        z = torch.special.ndtri((torch.arange(4000).double() + 0.5) / 4000)
        x = law.flow_map(z[:, None].expand(-1, 2), zero, one)
        weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (law.weights, law.means, law.stds))
        mean = (weights * means).sum(1)
        variance = (weights * (means**2 + stds**2)).sum(1) - mean**2
        close(x.mean(0), mean, atol=1e-3, rtol=0)
        close(x.var(0), variance, atol=3e-3, rtol=0)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("path", PATHS)
def test_gaussian_flow_carries_the_marginal_at_s_to_that_at_t(path: str, d: int) -> None:
    """An affine map A x + b with A C_s A^T = C_t and A m_s + b = m_t, for covariances of any size."""
    law = gaussian(d, path, seed=10 * d + 4)
    s, t = torch.tensor([0.15], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)

    def at(x: Tensor) -> Tensor:
        return law.flow_map(x[None], s, t)[0]

    mean, covariance = (torch.tensor(v, dtype=torch.float64) for v in (law.mean, law.covariance))
    c_s, c_t = PATHS[path]()(s), PATHS[path]()(t)
    spread_s, spread_t = (c.alpha**2 * covariance + c.sigma**2 * torch.eye(d).double() for c in (c_s, c_t))
    slope = torch.func.jacfwd(at)(c_s.alpha * mean)
    close(slope @ spread_s @ slope.T, spread_t, atol=1e-13, rtol=0)
    close(at(c_s.alpha * mean), c_t.alpha * mean, atol=1e-13, rtol=0)
    assert (slope @ slope.T - spread_t).abs().max() > 1e-3


@laws
def test_mixture_and_gaussian_maps_keep_probability(law: Law) -> None:
    """p_s(x) = p_t(X(x)) |det grad X|, with the marginal density of the path by its own formula."""
    s, _, t = some_times()
    x = on_path(law, s)
    x_t = law.flow_map(x, s, t)
    slope = torch.func.vmap(torch.func.jacfwd(lambda x, s, t: law.flow_map(x[None], s[None], t[None])[0]))(x, s, t)
    left, right = log_density(law, x, s), log_density(law, x_t, t) + torch.linalg.slogdet(slope).logabsdet
    close(left, right, atol=1e-8, rtol=0)
    assert (left - log_density(law, x_t, t)).abs().max() > 0.1


def log_density(law: Law, x: Tensor, t: Tensor) -> Tensor:
    """log p_t(x) ``[b]``, written apart from the law's own code."""
    c = PATHS[law.path]()(t)
    if isinstance(law, Gaussian):
        mean, covariance = (torch.tensor(v, dtype=torch.float64) for v in (law.mean, law.covariance))
        spread = c.alpha[:, None, None] ** 2 * covariance + c.sigma[:, None, None] ** 2 * torch.eye(len(mean)).double()
        return torch.distributions.MultivariateNormal(c.alpha[:, None] * mean, spread).log_prob(x)
    weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (law.weights, law.means, law.stds))
    alpha, sigma = c.alpha[:, None, None], c.sigma[:, None, None]
    parts = torch.distributions.Normal(alpha * means, (alpha**2 * stds**2 + sigma**2).sqrt()).log_prob(x[..., None])
    return torch.logsumexp(parts + weights.log(), -1).sum(-1)


@laws
def test_velocity_is_that_of_the_marginals(law: Law) -> None:
    """v = (alpha'/alpha) x + (sigma delta / alpha) grad log p_t: the score by autograd of the density."""
    t = some_times()[1]
    x = on_path(law, t).requires_grad_()
    (score,) = torch.autograd.grad(log_density(law, x, t).sum(), x)
    c = PATHS[law.path]()(t)
    expected = (c.d_alpha / c.alpha)[:, None] * x + (c.sigma * c.delta / c.alpha)[:, None] * score
    close(law.velocity(x, t), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS)
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


@pytest.mark.parametrize("path", PATHS)
def test_gaussian_mean_velocity_is_the_chord_and_smooth_on_the_diagonal(path: str) -> None:
    law = gaussian(3, path)
    s, _, t = some_times()
    x = on_path(law, s)
    chord = (law.flow_map(x, s, t) - x) / (t - s)[:, None]
    close(law.mean_velocity(x, s, t), chord, atol=1e-13, rtol=0)
    close(law.mean_velocity(x, s, s), law.velocity(x, s), atol=1e-14, rtol=0)

    def u(end: Tensor) -> Tensor:
        return law.mean_velocity(x, s, end)

    slope = torch.func.jvp(u, (s,), (torch.ones_like(s),))[1]
    close(slope, central(u, s), atol=1e-8, rtol=0)


@laws
def test_float64_times_leave_float32_points_float32(law: Law) -> None:
    s, _, t = some_times()
    x = on_path(law, s)
    v, x_t = law.velocity(x.float(), s), law.flow_map(x.float(), s, t)
    assert v.dtype == x_t.dtype == torch.float32
    close(v.double(), law.velocity(x, s), atol=1e-4, rtol=0)
    close(x_t.double(), law.flow_map(x, s, t), atol=1e-4, rtol=0)


@laws
def test_data_follow_the_law(law: Law) -> None:
    from scipy import stats

    x = data(law, 4000)
    one = torch.ones(1, dtype=torch.float64)
    for row in range(x.shape[1]):
        if isinstance(law, Gaussian):
            cdf = stats.norm(law.mean[row], law.covariance[row][row] ** 0.5).cdf
        else:
            parts = list(zip(law.weights[row], law.means[row], law.stds[row], strict=True))
            cdf = lambda v, parts=parts: sum(w * stats.norm(m, d).cdf(v) for w, m, d in parts)  # noqa: E731
        assert stats.kstest(x[:, row].numpy(), cdf).pvalue > 1e-3
        assert stats.kstest(x[:, row].numpy() + 0.2, cdf).pvalue < 1e-3
    if isinstance(law, Gaussian):
        correlation = np.corrcoef(x.numpy().T)
        wanted = np.array(law.covariance) / np.sqrt(np.outer(np.diag(law.covariance), np.diag(law.covariance)))
        assert np.abs(correlation - wanted).max() < 0.06
    teacher = law.load()
    assert teacher.space.shape == (x.shape[1],)
    assert teacher.path.name == law.path
    v = teacher(x, one.expand(len(x)) / 2, None)
    close(v, law.velocity(x, one.expand(len(x)) / 2))


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


def test_the_table_has_the_analytic_teachers() -> None:
    assert TEACHERS["gaussian"] is Gaussian
    assert TEACHERS["mixture"] is Mixture
