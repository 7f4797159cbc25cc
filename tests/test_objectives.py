"""Objectives vanish on the teacher's own flow map and on nothing else; over all of OBJECTIVES.

The laws have exact maps, so the loss at the truth is rounding alone. Every property has its twin: a wrong student,
whose loss is clearly above zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAWS, Changed, Exact, Wave, central, data, gaussian, gaussian_mixture, normal
from scipy import stats
from scipy.special import roots_jacobi
from torch import Tensor, nn

from distill.flow_map import SUPPORTS, FlowMap
from distill.objectives import OBJECTIVES
from distill.objectives.alpha_flow import AlphaFlow
from distill.objectives.base import Batch, Draw, Loss, Objective
from distill.objectives.consistency import Consistency, ConsistencyTrajectory, ContinuousConsistency
from distill.objectives.data_free import DataFree
from distill.objectives.endpoint import Endpoint, Pairs, Reflow
from distill.objectives.eulerian import Eulerian
from distill.objectives.flow_matching import FlowMatching
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.pieces import Tangent
from distill.objectives.progressive import Progressive
from distill.objectives.semigroup import Semigroup
from distill.objectives.shortcut import Shortcut
from distill.objectives.times import Dyadic, GapUniform, Grid, UniformTriangle
from distill.objectives.weights import Weight
from distill.rows import Rows
from distill.student import Student
from teachers.analytic import Gaussian, Mixture
from teachers.fields import FieldError
from teachers.gaussian_mixture import GaussianMixture
from teachers.networks import NETWORKS
from teachers.path import PATHS, Linear, Path, expand_like
from teachers.solvers import euler, rk4
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

Law = Gaussian | Mixture | GaussianMixture
ROWS = 256
close = torch.testing.assert_close


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective as it is drawn at a training step. sees: the least loss (rms) of a clearly wrong student."""

    objective: Objective
    step: int = 0
    sees: float = 1e-3


# every objective of the table with its defaults, but where these are exact up to a solver, or in the limit alone
CASES = {name: Case(cls()) for name, cls in OBJECTIVES.items()}
CASES["alpha_flow"] = Case(AlphaFlow(end=1), step=9)
CASES["consistency"] = Case(Consistency(solver="rk4", times=Grid(first=512, final=512)), sees=1e-5)
CASES["consistency_trajectory"] = Case(ConsistencyTrajectory(solver="rk4", substeps=64))
CASES["endpoint"] = Case(Endpoint(pairs=Pairs(solver="own")))
CASES["progressive"] = Case(Progressive(), step=300, sees=1e-4)
for source in ("teacher", "student", "target"):
    for gradient in ("convex", "full", "stop"):
        CASES[f"lagrangian {source} {gradient}"] = Case(Lagrangian(source=source, gradient=gradient))
    for gradient in ("stop", "partial", "full"):
        CASES[f"eulerian {source} {gradient}"] = Case(Eulerian(source=source, gradient=gradient))
tame = Tangent(normalise=True)
CASES |= {
    "ayf": Case(Eulerian(tangent=tame, times=GapUniform())),
    "lagrangian tame": Case(Lagrangian(gradient="stop", tangent=tame)),
    "scm": Case(ContinuousConsistency(form="scm", tangent=tame)),
    "rcm": Case(ContinuousConsistency(form="rcm", sigma_data=1.7)),
    "mean_flow student": Case(MeanFlow(direction="student")),
    "mean_flow tame": Case(MeanFlow(tangent=tame)),
    "data_free tame": Case(DataFree(corrected=0.0, tangent=tame)),
    "mean_flow head": Case(MeanFlow(direction="head")),
    "alpha_flow own": Case(AlphaFlow(step="own", end=500), step=250),
    "semigroup uniform": Case(Semigroup(middle="uniform", decay=0.9)),
    "semigroup stages": Case(Semigroup(stages=4, stage_steps=10), step=25),
    "data_free prediction": Case(DataFree(corrected=0.0)),
}
OTHER_FIXED_POINT = {"reflow"}
EXACT = [name for name in CASES if name not in OTHER_FIXED_POINT]
objectives = pytest.mark.parametrize("name", CASES)
exact = pytest.mark.parametrize("name", EXACT)
# where velocities grow without bound at t = 1 (vp, linear_vp) solvers lose their order, and maps to t = 1 a derivative
BOUNDED = {"consistency", "consistency_trajectory"}
LAW_OF = {f"{n}-{path}": LAWS[n](path) for n in LAWS for path in ("linear", "cosine")}
LAW_OF |= {f"gaussian-{path}": gaussian(path=path) for path in ("vp", "linear_vp", "ve")}


def _goes_together(name: str, law: Law) -> bool:
    if law.path in ("linear", "cosine"):
        return True
    if law.path == "ve":  # whose solver steps are of another size
        return name not in BOUNDED
    ends = CASES[name].objective.kind in ("consistency", "grid")
    return name not in BOUNDED and not (law.path == "linear_vp" and ends)


exact_laws = pytest.mark.parametrize(
    ("name", "law"),
    [pytest.param(n, v, id=f"{n}-{k}") for n in EXACT for k, v in LAW_OF.items() if _goes_together(n, v)],
)


def drawn(name: str, law: Law, dtype: torch.dtype = torch.float64, rows: int = ROWS, seed: int = 0) -> Draw:
    batch = Batch(data(law, rows, seed).to(dtype), None, tuple(map(str, range(rows))))
    case = CASES[name]
    draw = case.objective.draw(batch, PATHS[law.path](), Rows(seed, "test", 0, 0, rows), case.step)
    if law.path == "linear_vp":  # its velocity is infinite at t = 1
        draw = dataclasses.replace(draw, t=draw.t.clamp(max=0.999))
    return draw


def size(law: Law) -> float:
    """Of points and velocities."""
    return 80.0 if law.path == "ve" else 1.0


def loss(name: str, student: FlowMap, law: Law, draw: Draw) -> Loss:
    networks = dict.fromkeys(CASES[name].objective.networks, law.velocity)
    return CASES[name].objective.loss(student, student, law.load(), draw, **networks)


def wrong(loss: Loss) -> float:
    """What must vanish: all but the loss of a fake velocity, which is learned from samples."""
    return sum(v for k, v in loss.summands.items() if k != "fake").mean().sqrt().item()


def rms(loss: Loss) -> float:
    return loss.per_sample.mean().sqrt().item()


# --- zero at the truth, and only there


@exact_laws
def test_loss_vanishes_at_the_exact_map(name: str, law: Law) -> None:
    result = loss(name, Exact(law), law, drawn(name, law))
    assert result.per_sample.shape == (ROWS,)
    assert result.per_sample.dtype == torch.float64
    assert wrong(result) < (1e-10 if isinstance(law, Gaussian) else 1e-8) * size(law)


@exact_laws
def test_loss_vanishes_in_single_precision(name: str, law: Law) -> None:
    result = loss(name, Exact(law), law, drawn(name, law, torch.float32))
    assert result.per_sample.dtype == torch.float32
    assert wrong(result) < (1e-4 if isinstance(law, Gaussian) else 1e-3) * size(law)


TWINS: dict[str, Callable[[Law], FlowMap]] = {
    "perturbed": lambda law: perturbed(law, 0.1),
    "identity": lambda law: Changed(Exact(law), lambda u, x, s, t: 0 * u),
    "scaled": lambda law: Changed(Exact(law), lambda u, x, s, t: 1.1 * u),
    "reversed": lambda law: Changed(Exact(law), lambda u, x, s, t: -u),
    "another teacher": lambda law: Exact(Gaussian(mean=(0.5,) * dim(law), covariance=eye(dim(law)), path=law.path)),
}


def dim(law: Law) -> int:
    return law.load().space.shape[0]


def eye(d: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(i == j) for j in range(d)) for i in range(d))


def perturbed(law: Law, size: float | Tensor) -> Changed:
    wave = Wave(dim(law))
    return Changed(Exact(law), lambda u, x, s, t: u + size * wave(x, s, t))


@exact
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("twin", TWINS)
def test_loss_sees_a_wrong_map(name: str, path: str, twin: str) -> None:
    law = gaussian(path=path)
    found = wrong(loss(name, TWINS[twin](law), law, drawn(name, law)))
    if name == "progressive" and twin in ("identity", "another teacher"):
        assert found < 1e-10  # after its first stage it knows nothing but that steps compose
    else:
        assert found > CASES[name].sees


@exact
def test_off_diagonal_errors_are_seen_where_two_times_are_trained(name: str) -> None:
    """An error (t - s) phi leaves u(x, s, s) = v right: flow matching alone is blind to it, and must say so."""
    law, wave = gaussian(), Wave(3)
    student = Changed(Exact(law), lambda u, x, s, t: u + expand_like(t - s, x) * wave(x, s, t))
    value = wrong(loss(name, student, law, drawn(name, law)))
    if CASES[name].objective.kind == "velocity":
        assert value < 1e-11
    else:
        assert value > CASES[name].sees


@exact
def test_every_row_counts(name: str) -> None:
    """A student wrong for one sample alone has a loss there alone."""
    law, wave, draw = gaussian(), Wave(3), drawn(name, gaussian())
    alone = torch.arange(ROWS) == 17
    truth = loss(name, Exact(law), law, draw).per_sample
    if draw.corrected is None:
        student = Changed(Exact(law), lambda u, x, s, t: u + 0.5 * alone[:, None] * wave(x, s, t))
        per_sample = loss(name, student, law, draw).per_sample
        assert per_sample[17] > CASES[name].sees ** 2
        assert (per_sample - truth)[~alone].abs().max() < 1e-20


@pytest.mark.parametrize("name", ["lagrangian", "eulerian", "semigroup", "mean_flow", "lagrangian student convex"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_loss_vanishes_at_the_integrated_map_of_any_mixture(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = gaussian_mixture(path)
    draw = drawn(name, law, rows=48)
    monkeypatch.setattr("teachers.gaussian_mixture.STEPS", 100)
    assert wrong(loss(name, Exact(law), law, draw)) < 1e-7
    monkeypatch.setattr("teachers.gaussian_mixture.STEPS", 10)
    assert wrong(loss(name, perturbed(law, 0.1), law, draw)) > CASES[name].sees


def test_the_transport_equation_is_the_derivative_of_a_trigonometric_map_of_two_times() -> None:
    """On the cosine path: f = cos(a) y - sin(a) F, a = theta - phi, and
    df/dtheta = -cos(a) (F - dy/dtheta) - sin(a) (y + dF/dtheta), with d/ds = -pi/2 d/dtheta (sCTM)."""
    law, half = gaussian(path="cosine"), torch.pi / 2
    for student, zero in ((Exact(law), True), (perturbed(law, 0.1), False)):
        draw = drawn("eulerian", law)
        draw = dataclasses.replace(draw, s=draw.s * 0.9, t=draw.s * 0.9 + 0.1)
        y, theta, phi = draw.x_s, half * (1 - draw.s), half * (1 - draw.t)
        dy = -law.velocity(y, draw.s) / half

        def direction(y: Tensor, theta: Tensor, student: Any = student, phi: Tensor = phi) -> Tensor:
            a, t = expand_like(theta - phi, y), 1 - phi / half
            return (torch.cos(a) * y - student(y, 1 - theta / half, t, None)) / torch.sin(a)

        f, df = torch.func.jvp(direction, (y, theta), (dy, torch.ones_like(theta)))
        a = expand_like(theta - phi, y)
        residual = -torch.cos(a) * (f - dy) - torch.sin(a) * (y + df)
        found = loss("eulerian", student, law, draw).per_sample
        assert (residual.abs().max() < 1e-10) == zero
        close(found, (half * residual).square().mean(1), atol=1e-20, rtol=1e-9)


# --- gradients


def flow_matching_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """residual = theta phi(x, s, s)"""
    phi = Wave(3)(draw.x_s, draw.s, draw.s)
    return theta * phi * phi


def eulerian_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """residual = theta (phi - (t - s) D phi), and only the first phi is differentiated."""
    wave, v = Wave(3), law.velocity(draw.x_s, draw.s)
    phi, moved = wave(draw.x_s, draw.s, draw.t), wave.along(draw.x_s, draw.s, draw.t, v)
    return theta * (phi - expand_like(draw.t - draw.s, phi) * moved) * phi


def lagrangian_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """residual = v(X*, t) + theta d/dt[(t - s) phi] - v(X* + (t - s) theta phi, t), the last term frozen."""
    wave, gap = Wave(3), expand_like(draw.t - draw.s, draw.x_s)
    phi = wave(draw.x_s, draw.s, draw.t)
    change = phi + gap * wave.d_t(draw.x_s, draw.s, draw.t)
    x_t = law.flow_map(draw.x_s, draw.s, draw.t)
    residual = law.velocity(x_t, draw.t) + theta * change - law.velocity(x_t + gap * theta * phi, draw.t)
    return residual * change


class Hand:
    """u = u* + theta phi, its map and their residuals, written once more."""

    def __init__(self, law: Gaussian, theta: Tensor) -> None:
        self.law, self.theta, self.phi = law, theta, Wave(3)

    def u(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.law.mean_velocity(x, s, t) + self.theta * self.phi(x, s, t)

    def map(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return x + (t - s)[:, None] * self.u(x, s, t)


def two_jumps_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """u_st - [k u_sm + (1 - k) u_mt(X_sm)], the velocity on the diagonal; only u_st is differentiated."""
    h, x, s, t = Hand(law, theta), draw.x_s, draw.s, draw.t
    m = (s + t) / 2 if draw.m is None else draw.m
    k = ((m - s) / torch.where(t > s, t - s, 1.0))[:, None]
    goal = k * h.u(x, s, m) + (1 - k) * h.u(h.map(x, s, m), m, t)
    goal = torch.where((s == t)[:, None], law.velocity(x, s), goal)
    return (h.u(x, s, t) - goal) * h.phi(x, s, t)


def consistency_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """X_s1(x_s) - X_m1(x_m), the true x_m; only the first is differentiated."""
    h, end = Hand(law, theta), torch.ones_like(draw.s)
    residual = h.map(draw.x_s, draw.s, end) - h.map(law.flow_map(draw.x_s, draw.s, draw.m), draw.m, end)
    return residual * (1 - draw.s)[:, None] * h.phi(draw.x_s, draw.s, end)


def trajectory_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """Y_t1(X_st) - Y_t1(Y_mt(x_m)) with the same map Y, through Y's input; and the diagonal."""
    h, x, s, t, m = Hand(law, theta), draw.x_s, draw.s, draw.t, draw.m
    end = torch.ones_like(t)
    goal = h.map(h.map(law.flow_map(x, s, m), m, t), t, end)
    arrived, back = torch.func.vjp(lambda y: h.map(y, t, end), h.map(x, s, t))
    off = back(arrived - goal)[0] * (t - s)[:, None] * h.phi(x, s, t)
    return off + flow_matching_gradient(law, draw, theta)


def data_free_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """u - [v(X_0t(z), t) - t d/dt u] at s = 0; only u is differentiated."""
    h, z, s, t = Hand(law, theta), draw.x_s, draw.s, draw.t
    d_t = central(lambda t: law.mean_velocity(z, s, t), t) + theta * h.phi.d_t(z, s, t)
    return (h.u(z, s, t) - law.velocity(h.map(z, s, t), t) + t[:, None] * d_t) * h.phi(z, s, t)


def endpoint_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    phi = Wave(3)(draw.x_0, draw.s, draw.t)
    return theta * phi * phi


def progressive_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """X_se - X_me(X_sm) over the reach of the data prediction, weighted max(SNR, 1); linear path or cosine."""
    h, x, s, m, e = Hand(law, theta), draw.x_s, draw.s, draw.m, draw.t
    here, there = PATHS[law.path]()(s), PATHS[law.path]()(e)
    weight = (here.alpha / here.sigma).clamp(min=1) ** 2 / (there.alpha - here.alpha * there.sigma / here.sigma) ** 2
    residual = h.map(x, s, e) - h.map(h.map(x, s, m), m, e)
    return weight[:, None] * residual * (e - s)[:, None] * h.phi(x, s, e)


def reflow_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """u(x_t, t, t) - (alpha' G(x_0) + sigma' x_0) at the point between x_0 and G(x_0)."""
    path, zero = PATHS[law.path](), torch.zeros_like(draw.t)
    x_1 = law.flow_map(draw.x_0, zero, zero + 1)
    x_t, h = path.point(draw.x_0, x_1, draw.t), Hand(law, theta)
    residual = h.u(x_t, draw.t, draw.t) - path.conditional_velocity(draw.x_0, x_1, draw.t)
    return residual * h.phi(x_t, draw.t, draw.t)


def transport(h: Hand, draw: Draw, own: bool) -> Tensor:
    """u - [w + (t - s)(d/ds + w . grad) u]; w the teacher's velocity, or off the diagonal u(x, s, s)."""
    x, s, t = draw.x_s, draw.s, draw.t
    w = h.law.velocity(x, s)
    w = torch.where((s < t)[:, None], h.u(x, s, s), w) if own else w
    moved = torch.func.jvp(lambda x, s: h.u(x, s, t), (x, s), (w, torch.ones_like(s)))[1]
    return h.u(x, s, t) - w - (t - s)[:, None] * moved


def improved(h: Hand, draw: Draw, own: bool) -> Tensor:
    """u - (t - s)(d/ds + w . grad) u - v: only the direction w is the student's own (improved MeanFlow)."""
    x, s, t = draw.x_s, draw.s, draw.t
    w = h.u(x, s, s) if own else h.law.velocity(x, s)
    moved = torch.func.jvp(lambda x, s: h.u(x, s, t), (x, s), (w, torch.ones_like(s)))[1]
    return h.u(x, s, t) - (t - s)[:, None] * moved - h.law.velocity(x, s)


def arrival(h: Hand, draw: Draw, own: bool) -> Tensor:
    """d/dt X_st - w(X_st, t)."""
    x, s, t = draw.x_s, draw.s, draw.t
    x_t = h.map(x, s, t)
    w = h.law.velocity(x_t, t)
    w = torch.where((s < t)[:, None], h.u(x_t, t, t), w) if own else w
    return central(lambda t: h.map(x, s, t), t) - w


def stopped_gradient(residual: Any, own: bool, tame: bool = False) -> Callable[[Gaussian, Draw, Tensor], Tensor]:
    """Only u itself is differentiated; tamed, the residual is divided by its rms + 0.1."""

    def gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
        h = Hand(law, theta)
        r = residual(h, draw, own)
        r = r / (r.square().mean(1, keepdim=True).sqrt() + 0.1) if tame else r
        return r * h.phi(draw.x_s, draw.s, draw.t)

    return gradient


def moving_gradient(own: bool) -> Callable[[Gaussian, Draw, Tensor], Tensor]:
    """All of d/dt X_st - w(X_st, t) is differentiated, w through the point and, if its own, itself."""

    def gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
        h, x, s, t = Hand(law, theta), draw.x_s, draw.s, draw.t
        gap, off, r = (t - s)[:, None], (s < t)[:, None], arrival(h, draw, own)
        phi, x_t = h.phi(x, s, t), h.map(x, s, t)
        at = (lambda y: torch.where(off, h.u(y, t, t), law.velocity(y, t))) if own else lambda y: law.velocity(y, t)
        found = r * (phi + gap * h.phi.d_t(x, s, t)) - gap * phi * torch.func.vjp(at, x_t)[1](r)[0]
        return found - off * r * h.phi(x_t, t, t) if own else found

    return gradient


def eulerian_partial_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """Of u - v - (t - s)(d/ds + v . grad) u the spatial derivative is stopped."""
    wave, x, s, t = Wave(3), draw.x_s, draw.s, draw.t
    d_s = wave.along(x, s, t, torch.zeros_like(x))
    return transport(Hand(law, theta), draw, False) * (wave(x, s, t) - (t - s)[:, None] * d_s)


def eulerian_full_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    wave, x, s, t = Wave(3), draw.x_s, draw.s, draw.t
    moved = wave.along(x, s, t, law.velocity(x, s))
    return transport(Hand(law, theta), draw, False) * (wave(x, s, t) - (t - s)[:, None] * moved)


def own_convex_gradient(law: Gaussian, draw: Draw, theta: Tensor) -> Tensor:
    """d/dt X_st - u(X_st, t, t), the second term frozen."""
    h, x, s, t = Hand(law, theta), draw.x_s, draw.s, draw.t
    return arrival(h, draw, True) * (h.phi(x, s, t) + (t - s)[:, None] * h.phi.d_t(x, s, t))


HAND = {
    "eulerian teacher stop": stopped_gradient(transport, own=False),
    "eulerian student stop": stopped_gradient(transport, own=True),
    "eulerian target stop": stopped_gradient(transport, own=True),
    "ayf": stopped_gradient(transport, own=False, tame=True),
    "eulerian teacher partial": eulerian_partial_gradient,
    "eulerian teacher full": eulerian_full_gradient,
    "lagrangian teacher stop": stopped_gradient(arrival, own=False),
    "lagrangian student stop": stopped_gradient(arrival, own=True),
    "lagrangian tame": stopped_gradient(arrival, own=False, tame=True),
    "lagrangian student convex": own_convex_gradient,
    "lagrangian target convex": own_convex_gradient,
    "lagrangian teacher full": moving_gradient(own=False),
    "lagrangian student full": moving_gradient(own=True),
    "mean_flow student": stopped_gradient(improved, own=True),
    "mean_flow tame": stopped_gradient(transport, own=False, tame=True),
    "data_free tame": stopped_gradient(arrival, own=False, tame=True),
    "flow_matching": flow_matching_gradient,
    "eulerian": eulerian_gradient,
    "mean_flow": eulerian_gradient,
    "alpha_flow": eulerian_gradient,
    "continuous_consistency": eulerian_gradient,
    "lagrangian": lagrangian_gradient,
    "semigroup": two_jumps_gradient,
    "semigroup uniform": two_jumps_gradient,
    "semigroup stages": two_jumps_gradient,
    "shortcut": two_jumps_gradient,
    "consistency": consistency_gradient,
    "consistency_trajectory": trajectory_gradient,
    "data_free prediction": data_free_gradient,
    "endpoint": endpoint_gradient,
    "progressive": progressive_gradient,
    "reflow exact": reflow_gradient,
}
CASES["reflow exact"] = Case(Reflow(pairs=Pairs(solver="own")))


def test_every_objective_has_a_gradient_by_hand() -> None:
    assert {type(CASES[name].objective) for name in HAND} == set(OBJECTIVES.values())


@pytest.mark.parametrize("name", HAND)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_gradient_is_the_hand_formula(name: str, path: str) -> None:
    """u = u* + theta phi: d loss / d theta_j = 2 / (b d) sum_b residual_bj d residual_bj / d theta_j."""
    law = gaussian(path=path)
    draw = drawn(name, law)
    theta = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    sum(loss(name, perturbed(law, theta), law, draw).summands.values()).mean().backward()
    expected = 2 / 3 * HAND[name](law, draw, theta.detach()).mean(0)
    close(theta.grad, expected, atol=1e-9 if name == "data_free prediction" else 1e-12, rtol=1e-8)
    assert expected.abs().min() > 1e-8


WARMED = {
    "eulerian": Eulerian,
    "mean_flow": MeanFlow,
    "mean_flow student": partial(MeanFlow, direction="student"),
    "lagrangian": partial(Lagrangian, gradient="stop"),
    "continuous_consistency": ContinuousConsistency,
    "data_free": partial(DataFree, corrected=0.0),
}


@pytest.mark.parametrize("name", WARMED)
def test_warm_up_starts_from_the_velocity_alone(name: str) -> None:
    """At step 0 the residual is u - v, at x_s or where the student arrives; half way it is half of the derivative."""
    law = gaussian()
    objective = WARMED[name](tangent=Tangent(warmup=10, r_max=0.8))
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    student = perturbed(law, 0.1)
    residuals = []
    for step in (0, 5, 10, 99):
        draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), step)
        assert draw.r == pytest.approx({0: 0.0, 5: 0.4}.get(step, 0.8))
        u = student.mean_velocity(draw.x_s, draw.s, draw.t, None)
        arrives = isinstance(objective, (Lagrangian, DataFree))
        x, t = (student(draw.x_s, draw.s, draw.t, None), draw.t) if arrives else (draw.x_s, draw.s)
        probe = torch.zeros_like(u).requires_grad_(True)
        shifted = Changed(student, lambda u, x, s, t, probe=probe: u + torch.where((s == t)[:, None], 0.0, probe))
        result = objective.loss(shifted, shifted, law.load(), draw).per_sample.sum()
        residuals.append(torch.autograd.grad(result, probe)[0] * 3 / 2)
        if step == 0:
            off = (draw.s < draw.t)[:, None]
            close(residuals[0], off * (u - law.velocity(x, t)), atol=1e-12, rtol=1e-10)
    close(residuals[1] - residuals[0], residuals[2] - residuals[1], atol=1e-12, rtol=1e-9)
    assert torch.equal(residuals[2], residuals[3])
    assert (residuals[2] - residuals[0]).abs().max() > 0.01


@exact
def test_gradient_vanishes_at_the_truth(name: str) -> None:
    law = gaussian()
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sum(loss(name, perturbed(law, theta), law, drawn(name, law)).summands.values()).mean().backward()
    assert theta.grad is not None
    assert theta.grad.abs().max() < 1e-10


class Parametrised(nn.Module):
    """The law's velocity and map behind a parameter that a leak would reach."""

    def __init__(self, law: Gaussian) -> None:
        super().__init__()
        self.law, self.scale = law, nn.Parameter(torch.ones((), dtype=torch.float64))

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.scale * self.law.velocity(x, t)

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.scale * self.law.mean_velocity(x, s, t)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x + expand_like(t - s, x) * self.mean_velocity(x, s, t, cond)

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        return s <= t


@objectives
def test_no_gradient_reaches_teacher_or_target(name: str) -> None:
    law = gaussian()
    teacher, target = Parametrised(law), Parametrised(law)
    theta = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    networks = {network: Parametrised(law) for network in CASES[name].objective.networks}
    given = dataclasses.replace(law.load(), velocity=teacher.velocity)
    given_networks = {k: v.velocity for k, v in networks.items()}
    result = CASES[name].objective.loss(perturbed(law, theta), target, given, drawn(name, law), **given_networks)
    terms = [v for k, v in result.summands.items() if k not in networks]  # its own loss trains a further network
    for own in networks:  # and nothing else
        assert torch.autograd.grad(result.terms[own].sum(), theta, allow_unused=True, retain_graph=True) == (None,)
    sum(terms).mean().backward()
    assert teacher.scale.grad is None
    assert target.scale.grad is None
    assert all(network.scale.grad is None for network in networks.values())
    assert theta.grad is not None
    assert theta.grad.abs().min() > 0


@objectives
def test_loss_is_a_function_of_the_draw(name: str) -> None:
    """It never samples: twice the same, whatever the global generator does."""
    law = gaussian()
    draw, student = drawn(name, law), perturbed(law, 0.1)
    first = loss(name, student, law, draw).per_sample
    before = torch.random.get_rng_state()
    torch.rand(3)
    assert torch.equal(loss(name, student, law, draw).per_sample, first)
    torch.random.set_rng_state(before)
    loss(name, student, law, draw)
    assert torch.equal(torch.random.get_rng_state(), before)


@objectives
def test_every_weight_of_a_network_is_trained(name: str) -> None:
    """Through a real student in single precision, class and all: finite gradients, none missing."""
    space = DataSpace((1, 4, 4), 3, (-1.0, 1.0))
    objective, step = CASES[name].objective, CASES[name].step
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {
            part: Student(NETWORKS["mlp"](width=16, depth=1).build(space), space, Linear(), kind)
            for part, kind in {"student": objective.kind, **dict.fromkeys(objective.networks, "velocity")}.items()
        }
        for parameter in (p for part in made.values() for p in part.parameters()):
            nn.init.normal_(parameter, std=0.2)
    student = made.pop("student")
    batch = Batch(normal(32, 1, 4, 4).float(), space.cond_for(0, 32), ("",) * 32)
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, 32), step)

    def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return -x * cond["class"][:, None, None, None]

    given = Teacher(velocity=velocity, space=space, generator=lambda x, cond: 2 * x)
    result = objective.loss(student, student, given, draw, **{k: v.velocity for k, v in made.items()})
    assert result.per_sample.dtype == torch.float32
    sum(result.summands.values()).mean().backward()
    everything = [item for part in (student, *made.values()) for item in part.named_parameters()]
    for key, parameter in everything:
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


DIFFERENTIATED = [name for name, case in CASES.items() if hasattr(case.objective, "derivative")]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_finite_differences_ask_for_times_in_order(name: str) -> None:
    """Of a flow map nothing is known for t < s, nor is it asked on the diagonal; and they say what jvp says."""
    law, draw, gaps = gaussian(), drawn(name, gaussian()), []

    def noted(u: Tensor, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        gaps.append(t - s)
        return u + 0.1 * Wave(3)(x, s, t)

    student, objective = Changed(Exact(law), noted), CASES[name].objective
    networks = dict.fromkeys(objective.networks, law.velocity)
    exact = objective.loss(student, student, law.load(), draw, **networks).summands
    gaps.clear()
    differences = dataclasses.replace(objective, derivative="finite_difference")
    found = differences.loss(student, student, law.load(), draw, **networks).summands
    assert len(gaps) >= 3 and torch.cat(gaps).min() >= 0
    for key, value in found.items():
        close(value, exact[key], atol=1e-5, rtol=1e-5)


# --- flow matching from data


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_flow_matching_from_data_has_zero_mean_gradient_at_the_marginal_velocity(path: str) -> None:
    """E[(v_c - v(x_t)) f(x_t, t)] = 0 for every f, though the residual itself is not small."""
    law, rows = gaussian(path=path), 40_000
    draw = drawn("flow_matching", law, rows=rows)

    def z_scores(scale: float) -> Tensor:
        theta = torch.zeros(rows, 3, 3, dtype=torch.float64, requires_grad=True)

        def change(u: Tensor, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            features = torch.stack([torch.ones_like(x), x, Wave(3)(x, s, t)], -1)
            return scale * u + (theta * features).sum(-1)

        result = FlowMatching().loss(Changed(Exact(law), change), Exact(law), None, draw)
        assert rms(result) > 0.3
        (per_row,) = torch.autograd.grad(result.per_sample.sum(), theta)
        return per_row.mean(0) / per_row.std(0) * rows**0.5

    assert z_scores(1.0).abs().max() < 4.5
    assert z_scores(1.2).abs().max() > 12


def test_flow_matching_from_data_wants_the_conditional_velocity() -> None:
    law = gaussian()
    draw = drawn("flow_matching", law)
    still = Changed(Exact(law), lambda u, x, s, t: 0 * u)
    result = FlowMatching().loss(still, still, None, draw)
    close(result.per_sample, (draw.x_1 - draw.x_0).square().mean(1))


# --- the draw


@dataclasses.dataclass(frozen=True)
class _Everything:
    """Data of rows [first, first + count) of one global batch of 64."""

    law: Law
    path: Path

    def draw(self, name: str, first: int, count: int, seed: int = 5, step: int = 9) -> Draw:
        x_1 = data(self.law, 64)[first : first + count].float()
        batch = Batch(x_1, {"class": torch.arange(first, first + count)}, ("",) * count, first)
        return CASES[name].objective.draw(batch, self.path, Rows(seed, "train", step, first, count), step)


def tensors(draw: Draw) -> dict[str, Tensor]:
    return {f.name: v for f in dataclasses.fields(draw) if isinstance(v := getattr(draw, f.name), Tensor)}


@objectives
@pytest.mark.parametrize("path", PATHS)
def test_a_process_draws_its_rows_of_the_global_draw(name: str, path: str) -> None:
    of = _Everything(gaussian(path=path), PATHS[path]())
    whole, part = tensors(of.draw(name, 0, 64)), tensors(of.draw(name, 8, 16))
    assert len(whole) >= 6
    for field, value in whole.items():
        close(part[field], value[8:24], atol=1e-6 if value.dtype == torch.float32 else 1e-14, rtol=1e-6, msg=field)
    for other in (of.draw(name, 0, 64, seed=6), of.draw(name, 0, 64, step=10)):
        assert not torch.equal(other.x_0, whole["x_0"])
        if not isinstance(CASES[name].objective, (Endpoint, DataFree)):
            assert not torch.equal(other.s, whole["s"])


@objectives
@pytest.mark.parametrize("path", PATHS)
def test_the_draw_is_a_point_of_the_path_and_its_velocity(name: str, path: str) -> None:
    draw = _Everything(gaussian(path=path), PATHS[path]()).draw(name, 0, 64)
    if CASES[name].objective.kind == "grid" and not CASES[name].objective.needs_data:
        assert torch.equal(draw.x_s, PATHS[path]().start(draw.x_0))  # from noise, whatever the data
        return
    if isinstance(CASES[name].objective, Progressive):
        draw = dataclasses.replace(draw, velocity_s=PATHS[path]().conditional_velocity(draw.x_0, draw.x_1, draw.s))
    c = PATHS[path]()(draw.s)
    alpha, sigma, d_alpha, d_sigma = (v[:, None].float() for v in (c.alpha, c.sigma, c.d_alpha, c.d_sigma))
    close(draw.x_s, alpha * draw.x_1 + sigma * draw.x_0)
    close(draw.velocity_s, d_alpha * draw.x_1 + d_sigma * draw.x_0)
    assert draw.x_s.dtype == draw.x_0.dtype == torch.float32
    assert draw.s.dtype == draw.t.dtype == torch.float64
    assert draw.cond is not None
    assert torch.equal(draw.cond["class"], torch.arange(64))


# --- the mean over features


def test_squared_is_the_mean_over_all_features_of_a_sample() -> None:
    residual = normal(5, 2, 3, 4)
    close(Loss.squared(residual).per_sample, residual.square().sum((1, 2, 3)) / 24)


class Doubled:
    """A student acting alike on two copies of its features."""

    def __init__(self, student: FlowMap) -> None:
        self.student = student

    def __call__(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.cat([self.student(half, s, t, cond) for half in x_s.chunk(2, 1)], 1)

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.cat([self.student.mean_velocity(half, s, t, cond) for half in x_s.chunk(2, 1)], 1)

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        return s <= t


@objectives
def test_features_given_twice_leave_the_loss_as_it_is(name: str) -> None:
    law = gaussian()
    draw, student = drawn(name, law), perturbed(law, 0.1)
    twice = dataclasses.replace(draw, **{k: torch.cat([v, v], 1) for k, v in tensors(draw).items() if v.dim() == 2})

    def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.cat([law.velocity(half, t) for half in x.chunk(2, 1)], 1)

    networks = dict.fromkeys(CASES[name].objective.networks, velocity)
    given = Teacher(
        velocity=velocity,
        space=DataSpace((6,)),
        generator=lambda x, cond: torch.cat([law.generate(half) for half in x.chunk(2, 1)], 1),
    )
    doubled = CASES[name].objective.loss(Doubled(student), Doubled(student), given, twice, **networks)
    close(doubled.per_sample, loss(name, student, law, draw).per_sample)


# --- what an objective asks for


@objectives
def test_an_objective_says_what_it_needs(name: str) -> None:
    objective = CASES[name].objective
    assert {type(v) for v in (objective.needs_data, objective.needs_teacher)} == {bool}
    assert objective.kind in SUPPORTS
    draw = drawn(name, gaussian())
    assert ((draw.t > draw.s).any().item()) == (objective.kind != "velocity")
    assert set(loss(name, Exact(gaussian()), gaussian(), draw).summands) == set(objective.terms)
    assert dataclasses.is_dataclass(objective)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.weight = None


def test_the_slow_copy_is_the_one_that_was_asked_for() -> None:
    """None: the student itself makes the target."""
    for build in (Consistency, Shortcut, Semigroup):
        assert build(decay=0.9).target_decay(7) == 0.9
        assert build(decay=0.0).target_decay(7) is None
    for of in (Lagrangian, Eulerian):
        decays = {source: of(source=source, decay=0.9).target_decay(7) for source in ("teacher", "student", "target")}
        assert decays == {"teacher": None, "student": None, "target": 0.9}
    assert ConsistencyTrajectory(decay=0.9).target_decay(7) == 0.9


def test_a_staged_target_is_the_student_as_it_was_when_the_stage_began() -> None:
    """In the last stage too, however long it is; of a semigroup's, as it was when the last `stage_steps` began."""
    for objective, last in ((Progressive(first=8, stage_steps=10), 20), (Semigroup(stages=3, stage_steps=10), 100)):
        moves = [step for step in range(100) if objective.target_decay(step) == 0]
        assert moves == list(range(9, last, 10))
        assert {objective.target_decay(step) for step in range(100)} == {0.0, 1.0}
        assert objective.last_stage == 20
    assert Semigroup(stages=1).last_stage == Semigroup().last_stage == Lagrangian().last_stage == 0


@pytest.mark.parametrize("build", [FlowMatching, MeanFlow, Shortcut])
def test_labels_are_dropped_as_often_as_asked_for(build: Any) -> None:
    law, rows = gaussian(), 4000
    cond = {"class": torch.arange(rows) % 3}
    batch = Batch(data(law, rows), cond, ("",) * rows, null={"class": torch.tensor(3)})
    draw = build(drop=0.3).draw(batch, Linear(), Rows(0, "test", 0, 0, rows), 0)
    assert draw.dropped is not None and draw.cond is not None
    assert draw.dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (draw.cond["class"][draw.dropped] == 3).all()
    assert torch.equal(draw.cond["class"][~draw.dropped], cond["class"][~draw.dropped])
    assert torch.equal(build().draw(batch, Linear(), Rows(0, "test", 0, 0, rows), 0).cond["class"], cond["class"])
    with pytest.raises(ValueError, match=r"objective\.drop"):
        build(drop=0.3).draw(dataclasses.replace(batch, cond=None), Linear(), Rows(0, "test", 0, 0, rows), 0)


@objectives
def test_middle_times_lie_between(name: str) -> None:
    draw = drawn(name, gaussian())
    if draw.m is not None and draw.fresh is None:  # where noise is drawn too, m is the time of that
        assert (draw.s <= draw.m).all() and (draw.m <= draw.t).all()
        assert (draw.s < draw.m).any()


def test_the_smallest_step_of_a_shortcut_goes_forward() -> None:
    law = gaussian()
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    times = Dyadic(finest=8, diagonal=0.5)
    for anchor, smallest in (("zero", {0.0, 0.25, 0.5, 1.0}), ("smallest", {0.125, 0.25, 0.5, 1.0})):
        objective = Shortcut(anchor=anchor, times=times)
        draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), 0)
        assert set((draw.t - draw.s).tolist()) == smallest
        assert draw.t.max() <= 1


@pytest.mark.parametrize("middle", ["half", "uniform"])
def test_jumps_are_cut_where_the_middle_says(middle: Any) -> None:
    law = gaussian()
    batch = Batch(data(law, 2000), None, ("",) * 2000)
    objective = Semigroup(middle=middle, times=UniformTriangle(diagonal=0.1))
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, 2000), 0)
    assert draw.m is not None
    off = draw.s < draw.t
    share = ((draw.m - draw.s) / (draw.t - draw.s))[off].numpy()
    if middle == "half":
        assert np.allclose(share, 0.5)
    else:
        assert stats.kstest(share, "uniform").pvalue > 1e-3


def test_time_law_is_the_objectives_own_field() -> None:
    law = gaussian()
    batch = Batch(data(law, 64), None, ("",) * 64)
    draw = Lagrangian(times=UniformTriangle(diagonal=0.999)).draw(batch, Linear(), Rows(0, "test", 0, 0, 64), 0)
    assert (draw.s == draw.t).double().mean() > 0.9


# --- what the losses cannot see


def wrong_flow(law: Gaussian) -> Exact:
    """The exact map of another velocity."""
    return Exact(Gaussian(mean=(0.5, 0.1, -0.3), covariance=eye(3), path=law.path))


@pytest.mark.parametrize(
    "name",
    ["semigroup", "semigroup uniform", "shortcut", "lagrangian student convex", "eulerian student stop"],
)
def test_only_the_diagonal_tells_a_wrong_velocitys_own_map(name: str) -> None:
    law, draw = gaussian(), drawn(name, gaussian())
    per_sample = loss(name, wrong_flow(law), law, draw).per_sample
    diagonal = draw.s == draw.t
    assert 20 < diagonal.sum() < ROWS
    assert per_sample[~diagonal].max() < 1e-20
    assert per_sample[diagonal].mean() > 0.01


@pytest.mark.parametrize("name", ["semigroup", "semigroup uniform", "shortcut"])
def test_only_the_diagonal_tells_a_constant_velocity(name: str) -> None:
    law, draw = gaussian(), drawn(name, gaussian())
    student = Changed(Exact(law), lambda u, x, s, t: torch.full_like(u, 0.7))
    per_sample = loss(name, student, law, draw).per_sample
    diagonal = draw.s == draw.t
    assert per_sample[~diagonal].max() < 1e-20
    assert per_sample[diagonal].mean() > 0.01


@pytest.mark.parametrize(
    "build",
    [
        Semigroup,
        Shortcut,
        partial(AlphaFlow, step="own"),
        partial(Lagrangian, source="student"),
        partial(Eulerian, source="target"),
    ],
)
def test_a_weight_that_mutes_the_diagonal_is_refused_where_nothing_else_ties_the_map(build: Any) -> None:
    build(weight=Weight(gap=-0.5))
    with pytest.raises(FieldError, match="weight must not grow with the gap"):
        build(weight=Weight(gap=1.0))


@pytest.mark.parametrize("build", [Semigroup, partial(AlphaFlow, step="own"), partial(Lagrangian, source="student")])
def test_a_law_that_leaves_no_diagonal_is_refused_where_nothing_else_ties_the_map(build: Any) -> None:
    build(times=UniformTriangle(diagonal=0.5, noise=0.9))
    for times in (UniformTriangle(diagonal=0.5, noise=1.0), UniformTriangle(diagonal=0.0)):
        with pytest.raises(FieldError, match=r"a noise below 1.*ties source \w+ down"):
            build(times=times)
    Lagrangian(times=UniformTriangle(diagonal=0.5, noise=1.0))  # a teacher ties it everywhere


def test_consistency_sees_the_maps_to_the_end_alone() -> None:
    law, wave = gaussian(), Wave(3)
    student = Changed(Exact(law), lambda u, x, s, t: u + expand_like(1 - t, x) * wave(x, s, t))
    for name in ("continuous_consistency", "scm", "consistency"):
        assert wrong(loss(name, student, law, drawn(name, law))) < 1e-10
    assert wrong(loss("eulerian", student, law, drawn("eulerian", law))) > 1e-2


@pytest.mark.parametrize("solver", ["midpoint", "data"])
def test_the_target_of_the_last_step_is_its_end(solver: Any) -> None:
    """Nothing is asked at (1, 1), where what a network says of the data, or a path, gives no velocity."""
    law, objective = gaussian(), Consistency(solver=solver, times=Grid(first=4, final=4))
    draw = objective.draw(Batch(data(law, ROWS), None, ("",) * ROWS), Linear(), Rows(0, "test", 0, 0, ROWS), 0)
    singular = Changed(Exact(law), lambda u, x, s, t: u / expand_like(torch.where(s < 1, 1.0, 0.0), u))
    found = objective.loss(singular, singular, law.load(), draw).per_sample
    assert draw.m is not None and 20 < (draw.m == 1).sum() < ROWS
    assert torch.equal(found, objective.loss(Exact(law), Exact(law), law.load(), draw).per_sample)
    assert found.isfinite().all()


def test_data_free_sees_the_maps_from_noise_alone() -> None:
    law, wave = gaussian(), Wave(3)
    student = Changed(Exact(law), lambda u, x, s, t: u + expand_like(s, x) * wave(x, s, t))
    assert wrong(loss("data_free", student, law, drawn("data_free", law))) < 1e-10
    assert wrong(loss("lagrangian", student, law, drawn("lagrangian", law))) > 1e-2


def test_endpoint_sees_the_map_from_noise_to_data_alone() -> None:
    law, wave = gaussian(), Wave(3)
    student = Changed(Exact(law), lambda u, x, s, t: u + expand_like(s + (1 - t), x) * wave(x, s, t))
    assert wrong(loss("endpoint", student, law, drawn("endpoint", law))) < 1e-10
    assert wrong(loss("data_free prediction", student, law, drawn("data_free prediction", law))) > 1e-2
    assert wrong(loss("continuous_consistency", student, law, drawn("continuous_consistency", law))) > 1e-2


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_fixed_point_of_reflow_is_another_velocity_with_the_same_ends(path: str) -> None:
    """x_t = alpha (mu + Sigma^(1/2) z) + sigma z says what z was: v_ref = alpha' x_1 + sigma' z is its function."""
    law, schedule = gaussian(path=path), PATHS[path]()
    mean, spread = (torch.tensor(v, dtype=torch.float64) for v in (law.mean, law.covariance))
    values, basis = torch.linalg.eigh(spread)
    root = values.sqrt()

    def reference(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        c = schedule(t)
        alpha, sigma, d_alpha, d_sigma = (v[:, None] for v in (c.alpha, c.sigma, c.d_alpha, c.d_sigma))
        z = ((x - alpha * mean) @ basis) / (alpha * root + sigma)
        return d_alpha * mean + (d_alpha * root + d_sigma) * z @ basis.T

    student = Changed(Exact(law), lambda u, x, s, t: reference(x, t))
    draw = drawn("reflow exact", law)
    assert wrong(loss("reflow exact", student, law, draw)) < 1e-12
    assert wrong(loss("reflow exact", Exact(law), law, draw)) > 0.1
    z, zero = normal(64, 3), torch.zeros(64, dtype=torch.float64)
    end = rk4(reference, z, torch.linspace(0, 1, 101, dtype=torch.float64))
    close(end, law.flow_map(z, zero, zero + 1), atol=1e-7, rtol=0)


# --- how far from the truth the approximate ones are


@pytest.mark.parametrize(("solver", "ratio"), [("euler", 4.0), ("heun", 8.0)])
def test_consistency_with_a_solver_has_its_local_order(solver: Any, ratio: float) -> None:
    law, errors = gaussian(), []
    for n in (64, 128):
        objective = Consistency(solver=solver, times=Grid(first=n, final=n))
        batch = Batch(data(law, 4000), None, ("",) * 4000)
        draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, 4000), 0)
        errors.append(rms(objective.loss(Exact(law), Exact(law), law.load(), draw)))
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.06)


@pytest.mark.parametrize(("r", "bias"), [(0.5, 0.02), (0.9, 0.01), (0.99, 1e-3)])
def test_a_constant_share_of_the_tangent_has_a_biased_fixed_point(r: float, bias: float) -> None:
    """u_r = int_0^1 v(X_{s,t-(t-s)p^r}) dp solves the equation with share r, and is not the map."""
    law = gaussian()
    objective = Eulerian(tangent=Tangent(r_max=r))
    draw = dataclasses.replace(drawn("eulerian", law), r=r)
    # p^r is not smooth at 0: integrate over q = p^r, dp = q^(1/r - 1) / r dq, that power of q being Jacobi's weight
    nodes, weights = (torch.from_numpy(v) for v in roots_jacobi(40, 0, 1 / r - 1))
    q, weights = (nodes + 1) / 2, weights / weights.sum()

    def blended(u: Tensor, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        parts = [w * law.velocity(law.flow_map(x, s, t - (t - s) * k), t - (t - s) * k)
                 for k, w in zip(q, weights, strict=True)]  # fmt: skip
        return torch.stack(parts).sum(0)

    student = Changed(Exact(law), blended)
    assert rms(objective.loss(student, student, law.load(), draw)) < 1e-9
    assert rms(objective.loss(Exact(law), Exact(law), law.load(), draw)) > bias


def test_the_first_stage_of_a_progressive_map_is_two_euler_steps_of_the_teacher() -> None:
    law, objective = gaussian(), Semigroup(stages=3, stage_steps=10, times=UniformTriangle(diagonal=0.0))
    assert objective.needs_teacher and not Semigroup().needs_teacher
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), 9)
    assert draw.m is not None and (draw.t - draw.s).max() < 0.25
    end = euler(law.velocity, draw.x_s, torch.stack([draw.s, draw.m, draw.t]), None)
    u = (end - draw.x_s) / expand_like(draw.t - draw.s, end)
    student = wrong_flow(law)
    found = objective.loss(student, student, law.load(), draw).per_sample
    close(found, (student.mean_velocity(draw.x_s, draw.s, draw.t, None) - u).square().mean(1))


def test_gaps_double_from_stage_to_stage_and_stay_whole_after_the_last() -> None:
    law, objective = gaussian(), Semigroup(stages=3, stage_steps=10, times=UniformTriangle(diagonal=0.0))
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    draws = [objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), step) for step in (0, 9, 10, 29, 1000)]
    assert [draw.stage for draw in draws] == [0, 0, 1, 2, 2]
    plain = Lagrangian(times=objective.times).draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), 0)
    whole = plain.t - plain.s
    for draw, share in zip(draws, (0.25, 0.25, 0.5, 1, 1), strict=True):
        close(draw.t - draw.s, share * whole)
        close(draw.s / (1 - share * whole), plain.s / (1 - whole))
        close(draw.x_s, Linear().point(draw.x_0, draw.x_1, draw.s))


def test_a_stage_trains_what_the_next_one_asks_for() -> None:
    """Where the first stage's map is exact for gaps that it drew, and wrong for longer ones, the second's target is
    exact: of each of its two jumps, the first stage has drawn as long ones, as late."""
    objective, rows = Semigroup(stages=3, stage_steps=10, times=UniformTriangle(diagonal=0.0)), 20_000
    batch = Batch(torch.zeros(rows, 1, dtype=torch.float64), None, ("",) * rows)
    first, second = (objective.draw(batch, Linear(), Rows(0, "test", 0, 0, rows), step) for step in (0, 10))
    assert second.m is not None
    for s, t in ((second.s, second.m), (second.m, second.t)):
        for low in torch.linspace(0, 0.9, 10).tolist():
            drawn, asked = ((low <= start) & (start < low + 0.1) for start in (first.s, s))
            longest = (first.t - first.s)[drawn].max()
            assert longest > 0.9 * (t - s)[asked].max() and drawn.sum() > 0.3 * asked.sum()


def test_progressive_distillation_starts_at_the_teachers_steps_and_halves_their_number() -> None:
    law, objective = gaussian(), Progressive(first=8, stage_steps=10, snr=False)
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    draws = [objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), step) for step in (0, 9, 10, 20, 29, 5000)]
    for draw, gap in zip(draws, (0.25, 0.25, 0.5, 1.0, 1.0, 1.0), strict=True):
        assert draw.m is not None
        close(draw.t - draw.s, torch.full((ROWS,), gap, dtype=torch.float64))
        close(draw.m - draw.s, draw.t - draw.m)
        assert (draw.s / gap % 1 == 0).all() and set((draw.s / gap).tolist()) == set(range(round(1 / gap)))
    student, first = wrong_flow(law), draws[0]
    assert first.m is not None
    end = euler(law.velocity, first.x_s, torch.stack([first.s, first.m, first.t]), None)
    residual = student(first.x_s, first.s, first.t, None) - end
    close(objective.loss(student, student, law.load(), first).per_sample, residual.square().mean(1))


@pytest.mark.parametrize(("solver", "calls"), [("euler", 5), ("heun", 10), ("midpoint", 10), ("rk4", 20)])
def test_pairs_take_the_solvers_steps_from_noise_to_data(solver: Any, calls: int) -> None:
    law, seen = gaussian(), []

    def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(float(t[0]))
        return law.velocity(x, t)

    objective = Endpoint(pairs=Pairs(solver=solver, steps=5))
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), 0)
    objective.loss(perturbed(law, 0.1), Exact(law), dataclasses.replace(law.load(), velocity=velocity), draw)
    assert len(seen) == calls and min(seen) == 0
    assert max(seen) == pytest.approx({"euler": 0.8, "midpoint": 0.9}.get(solver, 1.0))


@pytest.mark.parametrize("solver", ["heun", "own"])
def test_pairs_that_a_batch_brings_are_taken_as_they_are(solver: Any) -> None:
    """Whatever made them, and whatever the teacher would."""
    law, x_0, x_1 = gaussian(), normal(ROWS, 3, seed=8), normal(ROWS, 3, seed=9)
    batch = Batch(x_1, None, ("",) * ROWS, x_0=x_0)
    student, pairs, zero = perturbed(law, 0.1), Pairs(solver=solver), torch.zeros(ROWS, dtype=torch.float64)
    for teacher in (law.load(), None):
        objectives = Endpoint(pairs=pairs), Reflow(pairs=pairs)
        draws = [objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), 0) for objective in objectives]
        one, many = (o.loss(student, student, teacher, d).per_sample for o, d in zip(objectives, draws, strict=True))
        close(one, (student(x_0, zero, zero + 1, None) - x_1).square().mean(1))
        t = draws[1].t
        x_t = t[:, None] * x_1 + (1 - t)[:, None] * x_0
        close(many, (student.mean_velocity(x_t, t, t, None) - (x_1 - x_0)).square().mean(1))
    alone = Endpoint().draw(dataclasses.replace(batch, x_0=None), Linear(), Rows(0, "test", 0, 0, ROWS), 0)
    with pytest.raises(ValueError, match="pairs need a teacher"):
        Endpoint().loss(student, student, None, alone)
    bare = dataclasses.replace(law.load(), generator=None)
    with pytest.raises(ValueError, match="no generator: name a solver"):
        Endpoint(pairs=Pairs(solver="own")).loss(student, student, bare, alone)


@pytest.mark.parametrize("balance", [1.0, 0.3])
def test_the_correction_is_balanced_with_the_prediction(balance: float) -> None:
    """balance E|prediction| / E|correction| times the squared difference of the velocities at the noised sample."""
    law, objective = gaussian(), DataFree(balance=balance, corrected=0.25)
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, ROWS), 0)
    theta = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    student, other = perturbed(law, theta), wrong_flow(law).law
    found = objective.loss(student, student, law.load(), draw, fake=lambda x, t, cond: other.velocity(x, t))
    on, zero, r = draw.corrected, draw.s, draw.m
    assert on is not None and r is not None and draw.fresh is not None
    with torch.no_grad():
        x_1 = student(draw.x_s, zero, zero + 1, None)
        x_r = Linear().point(draw.fresh, x_1, r)
        fake, true = other.velocity(x_r, r), law.velocity(x_r, r)
        sizes = found.per_sample[~on].sqrt().sum() / 0.75, (fake - true).square().mean(1)[on].sqrt().sum() / 0.25
        share = on[:, None] * balance * sizes[0] / sizes[1]
        phi = Wave(3)(draw.x_s, zero, zero + 1)
    close(found.terms["correction"], (share * (fake - true).square()).mean(1), atol=1e-12, rtol=1e-6)
    close(found.terms["fake"], (on[:, None] * (fake - (x_1 - draw.fresh)).square()).mean(1))
    assert not found.per_sample[on].any()
    # down its gradient samples move against what their own velocity has beyond the teacher's
    (gradient,) = torch.autograd.grad(found.terms["correction"].sum(), theta)
    close(gradient, (share * 2 / 3 * (fake - true) * phi).sum(0), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_no_network_is_asked_for_a_batch_without_rows(all_of_them: bool) -> None:
    """By chance no row of a small batch is corrected, or every one; the other part then has no share in the loss."""
    law, objective, rows = gaussian(), DataFree(corrected=0.25), 3
    batch = Batch(data(law, rows), None, ("",) * rows)
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, rows), 0)
    draw = dataclasses.replace(draw, corrected=torch.full((rows,), all_of_them))
    student = perturbed(law, torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True))
    asked = []

    def fake(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        asked.append(len(x))
        return 2 * law.velocity(x, t)

    found = objective.loss(student, student, law.load(), draw, fake=fake)
    assert asked == [rows if all_of_them else 1]
    assert bool(found.per_sample.any()) != all_of_them
    assert bool(found.terms["fake"].any()) == all_of_them


def test_consistency_weighs_by_the_step_in_time_or_in_noise() -> None:
    law, rows = gaussian(), Rows(0, "test", 0, 0, ROWS)
    batch = Batch(data(law, ROWS), None, ("",) * ROWS)
    for gap_in in ("time", "sigma"):
        objective = Consistency(gap_in=gap_in, times=Grid(first=20, final=20, curve="karras"))
        draw = objective.draw(batch, Linear(), rows, 0)
        assert draw.m is not None
        noise = [(1 - t) / t for t in (draw.s, draw.m)]  # sigma / alpha on the linear path
        gap = objective.loss(Exact(law), Exact(law), law.load(), draw).gap
        assert gap is not None and (gap > 0).all()
        close(gap, draw.m - draw.s if gap_in == "time" else noise[0] - noise[1], atol=1e-9, rtol=1e-9)


def test_alpha_falls_along_a_sigmoid_from_one_to_zero() -> None:
    objective = AlphaFlow(start=100, end=300, sharpness=25.0, snap=5e-3)
    assert [objective.alpha(step) for step in (0, 100, 155, 200, 245, 300, 10_000)] == pytest.approx(
        [1, 1, 1, 0.5, 0, 0, 0], abs=1e-12
    )  # within 5e-3 of the ends it is at them
    for step, share in ((160, -0.2), (225, 0.125), (240, 0.2)):
        assert objective.alpha(step) == pytest.approx(1 / (1 + np.exp(25 * share)))
    assert 0 < AlphaFlow(start=100, end=300, snap=1e-3).alpha(245) < 5e-3


def test_alpha_flow_by_the_given_velocity_is_biased_in_proportion_to_alpha() -> None:
    law, found = gaussian(), {}
    for alpha in (0.1, 0.01):
        draw = dataclasses.replace(drawn("alpha_flow", law), alpha=alpha)
        found[alpha] = rms(AlphaFlow().loss(Exact(law), Exact(law), law.load(), draw)) / alpha**0.5
    assert found[0.1] / found[0.01] == pytest.approx(10, rel=0.3)
    assert found[0.1] > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 0.01, 1e-4])
def test_alpha_flow_by_its_own_step_is_not_biased(alpha: float) -> None:
    law, objective = gaussian(), AlphaFlow(step="own")
    draw = dataclasses.replace(drawn("alpha_flow own", law), alpha=alpha)
    for student, zero in ((Exact(law), True), (perturbed(law, 0.1), False)):
        # the residual is alpha times the transport equation's
        found = rms(objective.loss(student, student, law.load(), draw)) / alpha**0.5
        assert found < 1e-10 if zero else found > 1e-2


def test_shortcut_anchored_at_its_smallest_step_is_biased() -> None:
    law, found = gaussian(), []
    for finest in (64, 128):
        objective = Shortcut(anchor="smallest", times=Dyadic(finest=finest))
        batch = Batch(data(law, 2000), None, ("",) * 2000)
        draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, 2000), 0)
        found.append(rms(objective.loss(Exact(law), Exact(law), law.load(), draw)))
    assert found[0] / found[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("objective", [MeanFlow(source="data"), ContinuousConsistency(source="data")])
def test_from_data_only_the_mean_gradient_vanishes(objective: Any) -> None:
    law, rows = gaussian(), 40_000
    batch = Batch(data(law, rows), None, ("",) * rows)
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, rows), 0)

    def z_scores(scale: float) -> Tensor:
        theta = torch.zeros(rows, 3, dtype=torch.float64, requires_grad=True)
        student = Changed(Exact(law), lambda u, x, s, t: scale * u + theta * Wave(3)(x, s, t))
        result = objective.loss(student, student, None, draw)
        assert rms(result) > 0.3
        (per_row,) = torch.autograd.grad(result.per_sample.sum(), theta)
        return per_row.mean(0) / per_row.std(0) * rows**0.5

    assert z_scores(1.0).abs().max() < 4.5
    assert z_scores(1.3).abs().max() > 8


def test_correction_vanishes_exactly_when_the_laws_agree() -> None:
    """Whatever the coupling: noise turned around gives the same law; samples 1.1 times as far out do not."""
    law = gaussian()
    draw = drawn("data_free", law)
    turned = Changed(Exact(law), lambda u, x, s, t: law.mean_velocity(-x, s, t) - 2 * x / expand_like(t, x))
    correction = loss("data_free", turned, law, draw).terms["correction"]
    assert correction.max() < 1e-20
    mean, spread = law.mean, torch.tensor(law.covariance, dtype=torch.float64)
    wider = Gaussian(mean=mean, covariance=tuple(map(tuple, (1.21 * spread).tolist())))
    objective = DataFree()
    off = objective.loss(Exact(wider), Exact(wider), law.load(), draw, fake=wider.velocity)
    assert off.terms["correction"][draw.corrected].mean() > 1e-3
