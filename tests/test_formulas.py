"""Every objective once more from its formula: on each path, for a law of any covariances, with a target of its own.

Nothing is shared but the draw: schedules are differentiated, the teacher's velocity comes from the posterior mean,
derivatives by reverse mode. Student, target and further networks are different networks, so that one in the place of
another is seen, and the teacher is always there, also where the data's velocity is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import normal
from torch import Tensor

from distill.objectives.alpha_flow import AlphaFlow
from distill.objectives.base import Batch, Draw, Objective
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
from distill.rows import Rows
from teachers.gaussian_mixture import GaussianMixture
from teachers.path import PATHS

ROWS, D = 24, 3
ONE = torch.ones(ROWS, dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = normal(3, D, seed=1)
ROOTS = 0.6 * normal(3, D, D, seed=2)
COVARIANCES = ROOTS @ ROOTS.mT + 0.3 * torch.eye(D)


# --- schedules and the teacher

SCHEDULES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "linear": lambda t: (t, 1 - t),
    "cosine": lambda t: (torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)),
    "linear_vp": lambda t: (t, (1 - t**2).sqrt()),
    "vp": lambda t: (alpha := torch.exp(-(19.9 * (1 - t) ** 2 / 4 + (1 - t) * 0.1 / 2)), (1 - alpha**2).sqrt()),
    "ve": lambda t: (torch.ones_like(t), ((1 - t) * 80 ** (1 / 7) + t * 0.002 ** (1 / 7)) ** 7),
}
FINITE = ("linear", "cosine")  # at t = 1, and steps of another size than those of ve
SMOOTH = (*FINITE, "vp", "linear_vp")


def coefficients(path: str, t: Tensor) -> tuple[Tensor, ...]:
    """alpha, sigma and their derivatives, ``[b, 1]`` each."""
    values, rates = torch.func.jvp(SCHEDULES[path], (t,), (torch.ones_like(t),))
    return tuple(v.detach()[:, None] for v in (*values, *rates))


def velocity(path: str, x: Tensor, t: Tensor) -> Tensor:
    """alpha' E[x_1 | x] + sigma' E[x_0 | x], the posterior means by Bayes."""
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
    means, logs = [], []
    for weight, mean, spread in zip(WEIGHTS, MEANS, COVARIANCES, strict=True):
        covariance = alpha[..., None] ** 2 * spread + sigma[..., None] ** 2 * torch.eye(D)
        apart = x - alpha * mean
        solved = torch.linalg.solve(covariance, apart)
        means.append(d_alpha * (mean + alpha * solved @ spread) + d_sigma * sigma * solved)
        logs.append(weight.log() - (apart * solved).sum(1) / 2 - torch.logdet(covariance) / 2)
    return (torch.softmax(torch.stack(logs, 1), 1)[..., None] * torch.stack(means, 1)).sum(1)


class Net:
    """A small map u(x, s, t)."""

    def __init__(self, seed: int) -> None:
        self.weights = [0.5 * normal(*shape, seed=seed + k) for k, shape in enumerate([(8, D + 2), (D, 8)])]
        for weight in self.weights:
            weight.requires_grad_(True)

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: object = None) -> Tensor:
        first, second = self.weights
        return torch.tanh(torch.cat([x, s[:, None], t[:, None]], 1) @ first.T) @ second.T

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return x + (t - s)[:, None] * self.mean_velocity(x, s, t)

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        return s <= t


@dataclass(frozen=True)
class Given:
    """What a formula is made of."""

    path: str
    draw: Draw
    student: Net
    target: Net
    head: Net

    def v(self, x: Tensor, t: Tensor) -> Tensor:
        return velocity(self.path, x, t)

    def of_pair(self, t: Tensor, x_0: Tensor, x_1: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and its velocity."""
        alpha, sigma, d_alpha, d_sigma = coefficients(self.path, t)
        return alpha * x_1 + sigma * x_0, d_alpha * x_1 + d_sigma * x_0

    @property
    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.draw.x_s, self.draw.s, self.draw.t

    @property
    def on(self) -> Tensor:
        """The diagonal ``[b, 1]``."""
        return (self.draw.s == self.draw.t)[:, None]


Formula = Callable[[Given], Tensor]


def along(f: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Tensor:
    """The derivative of f, with a gradient."""
    return torch.autograd.functional.jvp(f, point, direction, create_graph=True)[1]


def squares(x: Tensor) -> Tensor:
    return x.square().sum(1) / D


def to(u: Tensor, g: Tensor, tame: bool = False) -> Tensor:
    """|| u - sg[u + g] ||^2"""
    g = g / (squares(g).sqrt()[:, None] + 0.1) if tame else g
    return squares(u - (u + g).detach())


# --- the formulas


def eulerian(source: str, gradient: str, r: float = 1.0, tame: bool = False) -> Formula:
    def formula(of: Given) -> Tensor:
        x, s, t = of.start
        v = of.v(x, s)
        if source != "teacher":
            v = torch.where(of.on, v, (of.student if source == "student" else of.target).mean_velocity(x, s, s))
        v = v.detach()
        if gradient == "full":
            return squares(along(lambda x, s: of.student(x, s, t), (x, s), (v, ONE)))
        if gradient == "partial":
            in_time = along(lambda s: of.student(x, s, t), (s,), (ONE,))
            return squares(in_time + along(lambda x: of.student(x, s, t), (x,), (v,)).detach())
        u, du = (
            of.student.mean_velocity(x, s, t),
            along(lambda x, s: of.student.mean_velocity(x, s, t), (x, s), (v, ONE)),
        )
        return to(u, v - u + r * (t - s)[:, None] * du, tame)

    return formula


def lagrangian(source: str, gradient: str, r: float = 1.0, tame: bool = False) -> Formula:
    def formula(of: Given) -> Tensor:
        x, s, t = of.start

        def v(y: Tensor) -> Tensor:
            if source == "teacher":
                return of.v(y, t)
            own = (of.student if source == "student" else of.target).mean_velocity(y, t, t)
            return torch.where(of.on, of.v(x, s), own)

        x_t = of.student(x, s, t)
        if gradient == "stop":
            u = of.student.mean_velocity(x, s, t)
            du = along(lambda t: of.student.mean_velocity(x, s, t), (t,), (ONE,))
            return to(u, v(x_t) - u - r * (t - s)[:, None] * du, tame)
        moved = along(lambda t: of.student(x, s, t), (t,), (ONE,))
        return squares(moved - (v(x_t) if gradient == "full" else v(x_t).detach()))

    return formula


def mean_flow(source: str, direction: str, r: float = 1.0, tame: bool = False) -> Formula:
    """In noise time tau > rho: v - (tau - rho) du / dtau."""

    def formula(of: Given) -> Tensor:
        x, tau, rho = of.draw.x_s, 1 - of.draw.s, 1 - of.draw.t
        v = -of.of_pair(1 - tau, of.draw.x_0, of.draw.x_1)[1] if source == "data" else -of.v(x, 1 - tau)

        def u(x: Tensor, tau: Tensor, rho: Tensor, net: Net = of.student) -> Tensor:
            return -net.mean_velocity(x, 1 - tau, 1 - rho)

        by = {"given": v, "student": u(x, tau, tau), "head": u(x, tau, tau, of.head)}[direction].detach()
        du = along(lambda x, tau: u(x, tau, rho), (x, tau), (by, ONE))
        loss = to(u(x, tau, rho), v - u(x, tau, rho) - r * (tau - rho)[:, None] * du, tame)
        return loss + squares(u(x, tau, tau, of.head) - v) if direction == "head" else loss

    return formula


def alpha_flow(alpha: float, source: str, step: str) -> Formula:
    def formula(of: Given) -> Tensor:
        x, s, t = of.start
        w = of.of_pair(s, of.draw.x_0, of.draw.x_1)[1] if source == "data" else of.v(x, s)
        m = s + alpha * (t - s)
        v = torch.where(of.on, w, of.student.mean_velocity(x, s, m)) if step == "own" else w
        goal = alpha * v + (1 - alpha) * of.student.mean_velocity(x + (m - s)[:, None] * v, m, t)
        goal = torch.where(of.on, w, goal)
        weight = torch.full_like(s, 1 / alpha).masked_fill(of.on.flatten(), 1)
        return squares(of.student.mean_velocity(x, s, t) - goal.detach()) * weight

    return formula


def consistency(solver: str) -> Formula:
    def formula(of: Given) -> Tensor:
        x, s, m = of.draw.x_s, of.draw.s, of.draw.m
        assert m is not None
        h, slope = (m - s)[:, None], of.v(x, s)
        x_m = x + h * slope
        if solver == "heun":
            x_m = x + h / 2 * (slope + of.v(x_m, m))
        if solver == "midpoint":
            x_m = x + h * of.v(x + h / 2 * slope, (s + m) / 2)
        if solver == "data":
            x_m = of.of_pair(m, of.draw.x_0, of.draw.x_1)[0]
        return squares(of.student(x, s, ONE) - of.target(x_m, m, ONE).detach())

    return formula


def at_once(source: str, r: float, tame: bool) -> Formula:
    def formula(of: Given) -> Tensor:
        x, s = of.draw.x_s, of.draw.s
        w = of.of_pair(s, of.draw.x_0, of.draw.x_1)[1] if source == "data" else of.v(x, s)
        u = of.student.mean_velocity(x, s, ONE)
        du = along(lambda x, s: of.student.mean_velocity(x, s, ONE), (x, s), (w, ONE))
        return to(u, w - u + r * (1 - s)[:, None] * du, tame)

    return formula


def trigonometric(form: str, source: str, std: float, r: float) -> Formula:
    """With y = cos(theta) x / alpha and F such that cos(q) y - std sin(q) F is the end there, q = theta - phi."""

    def formula(of: Given) -> Tensor:
        x, s = of.draw.x_s, of.draw.s

        def angle(s: Tensor) -> Tensor:
            alpha, sigma = SCHEDULES[of.path](s)
            return torch.atan2(sigma, std * alpha)

        def scaled(x: Tensor, s: Tensor) -> Tensor:
            return (torch.cos(angle(s)) / SCHEDULES[of.path](s)[0])[:, None] * x

        last = angle(ONE)[:, None]

        def output(x: Tensor, s: Tensor) -> Tensor:
            end, q = of.student(x, s, ONE) * torch.cos(last), angle(s)[:, None] - last  # alpha = 1 at the end
            return (torch.cos(q) * scaled(x, s) - end) / torch.sin(q) / std

        v = of.of_pair(s, of.draw.x_0, of.draw.x_1)[1] if source == "data" else of.v(x, s)
        rate = along(angle, (s,), (ONE,))[:, None]
        y, dy = scaled(x, s), along(scaled, (x, s), (v, ONE)) / rate
        f, df = output(x, s), along(output, (x, s), (v, ONE)) / rate
        q, cos = angle(s)[:, None] - last, torch.cos(angle(s))[:, None]
        if form == "scm":
            g = -cos * torch.cos(q) * (std * f - dy) - r * cos * torch.sin(q) * (y + std * df)
        else:
            rest = r * cos * torch.sin(q) * y + cos * torch.sin(q) * std * df
            g = -cos * (1 - r**2 * torch.sin(q) ** 2).sqrt() * (std * f - dy) - rest
        return to(f, g, tame=True)

    return formula


def trajectory(substeps: int, diagonal: float) -> Formula:
    def formula(of: Given) -> Tensor:
        (x, s, t), m = of.start, of.draw.m
        assert m is not None
        x_m, h = x, ((m - s) / substeps)[:, None]
        for k in range(substeps):
            a = s + k * (m - s) / substeps
            x_m = x_m + h * of.v(x_m + h / 2 * of.v(x_m, a), a + (m - s) / substeps / 2)
        goal = of.target(of.target(x_m, m, t), t, ONE).detach()
        frozen = Net(0)
        frozen.weights = [weight.detach() for weight in of.target.weights]
        at_start = squares(of.student.mean_velocity(x, s, s) - of.v(x, s))
        return squares(frozen(of.student(x, s, t), t, ONE) - goal) + diagonal * at_start

    return formula


def two_jumps(of: Given) -> Tensor:
    """The mean velocity of the way through m."""
    (x, s, t), m = of.start, of.draw.m
    assert m is not None
    way = (of.target(of.target(x, s, m), m, t) - x) / torch.where(of.on, 1.0, (t - s)[:, None])
    return squares(of.student.mean_velocity(x, s, t) - torch.where(of.on, of.v(x, s), way).detach())


def shortcut(of: Given) -> Tensor:
    """Of a finest step of 1/8."""
    x, s, t = of.start
    d = (t - s) / 2
    first = of.target.mean_velocity(x, s, s + d)
    second = of.target.mean_velocity(x + d[:, None] * first, s + d, t)
    goal = torch.where((t - s < 0.2)[:, None], of.v(x, s), (first + second) / 2)
    return squares(of.student.mean_velocity(x, s, t) - goal.detach())


def progressive(of: Given) -> Tensor:
    """max(SNR, 1) times the error of the data prediction x of z_e = alpha_e x + sigma_e / sigma_s (z_s - alpha_s x)."""
    (x, s, e), m = of.start, of.draw.m
    assert m is not None
    if of.draw.stage == 0:
        goal = x + (m - s)[:, None] * of.v(x, s)
        goal = goal + (e - m)[:, None] * of.v(goal, m)
    else:
        goal = of.target(of.target(x, s, m), m, e)
    (alpha, sigma), (alpha_e, sigma_e) = (coefficients(of.path, time)[:2] for time in (s, e))

    def predicted(z: Tensor) -> Tensor:
        return (z - sigma_e / sigma * x) / (alpha_e - alpha * sigma_e / sigma)

    snr = torch.maximum((alpha / sigma) ** 2, torch.ones_like(alpha))[:, 0]
    return snr * squares(predicted(of.student(x, s, e)) - predicted(goal).detach())


def generated(of: Given, steps: int = 4) -> tuple[Tensor, Tensor]:
    """Where Euler's method starts and ends."""
    z = x = SCHEDULES[of.path](0 * ONE)[1][:, None] * of.draw.x_0
    for k in range(steps):
        x = x + of.v(x, k / steps * ONE) / steps
    return z, x


def endpoint(of: Given) -> Tensor:
    z, end = generated(of)
    return squares(of.student(z, 0 * ONE, ONE) - end)


def reflow(of: Given) -> Tensor:
    x_t, v = of.of_pair(of.draw.t, of.draw.x_0, generated(of)[1])
    return squares(of.student.mean_velocity(x_t, of.draw.t, of.draw.t) - v)


def flow_matching(of: Given) -> Tensor:
    return squares(of.student.mean_velocity(of.draw.x_s, of.draw.s, of.draw.s) - of.v(of.draw.x_s, of.draw.s))


# --- the table

PACE = Tangent(warmup=10, normalise=True)
CASES: dict[str, tuple[Objective, Formula, tuple[str, ...], int]] = {}
"""name -> objective, formula, paths and training step."""


def case(name: str, objective: Objective, formula: Formula, paths: tuple[str, ...] = SMOOTH, step: int = 0) -> None:
    CASES[name] = objective, formula, paths, step


case("flow_matching", FlowMatching(), flow_matching)
for source in ("teacher", "student", "target"):
    for gradient in ("stop", "partial", "full"):
        case(f"eulerian {source} {gradient}", Eulerian(source=source, gradient=gradient), eulerian(source, gradient))
    for gradient in ("stop", "convex", "full"):
        name, objective = f"lagrangian {source} {gradient}", Lagrangian(source=source, gradient=gradient)
        case(name, objective, lagrangian(source, gradient))
case("ayf", Eulerian(tangent=PACE, times=GapUniform()), eulerian("teacher", "stop", 0.5, True), step=5)
case("lagrangian tame", Lagrangian(gradient="stop", tangent=PACE), lagrangian("teacher", "stop", 0.3, True), step=3)
for source in ("teacher", "data"):
    for direction in ("given", "student", "head"):
        name, objective = f"mean_flow {source} {direction}", MeanFlow(source=source, direction=direction)
        case(name, objective, mean_flow(source, direction))
    tame = ContinuousConsistency(source=source, tangent=PACE)
    case(f"continuous {source}", tame, at_once(source, 0.3, True), step=3)
    for form in ("scm", "rcm"):
        objective = ContinuousConsistency(source=source, form=form, tangent=PACE, sigma_data=0.7)
        case(f"{form} {source}", objective, trigonometric(form, source, 0.7, 0.3), tuple(SCHEDULES), 3)
    falling = AlphaFlow(source=source, end=500)
    case(f"alpha_flow {source}", falling, alpha_flow(falling.alpha(270), source, "given"), step=270)
case("mean_flow tame", MeanFlow(source="data", tangent=PACE), mean_flow("data", "given", 0.3, True), step=3)
case("mean_flow start", MeanFlow(tangent=Tangent(warmup=10)), mean_flow("teacher", "given", 0.0))
case("alpha_flow own", AlphaFlow(step="own", end=500), alpha_flow(0.5, "teacher", "own"), step=250)
case("alpha_flow end", AlphaFlow(source="data", end=1), mean_flow("data", "given"), step=9)
for solver in ("euler", "heun", "midpoint", "data"):
    coarse = Grid(first=12, final=12, growth="constant")
    case(f"consistency {solver}", Consistency(solver=solver, decay=0.9, times=coarse), consistency(solver), FINITE)
case("consistency_trajectory", ConsistencyTrajectory(substeps=3, diagonal=0.7), trajectory(3, 0.7), FINITE)
case("semigroup half", Semigroup(decay=0.9), two_jumps)
case("semigroup uniform", Semigroup(decay=0.9, middle="uniform"), two_jumps)
case("semigroup stages", Semigroup(stages=3, stage_steps=10, times=UniformTriangle(diagonal=0.1)), two_jumps, step=15)
eighths = Dyadic(finest=8, diagonal=0.5)
case("shortcut zero", Shortcut(times=eighths), shortcut)
case("shortcut smallest", Shortcut(times=eighths, anchor="smallest"), shortcut, FINITE)
case("data_free", DataFree(corrected=0.0, tangent=PACE), lagrangian("teacher", "stop", 0.3, True), step=3)
case("progressive first", Progressive(first=8), progressive, FINITE)
case("progressive", Progressive(first=8), progressive, (*FINITE, "linear_vp"), step=260)
case("endpoint", Endpoint(pairs=Pairs(solver="euler", steps=4)), endpoint)
case("reflow", Reflow(pairs=Pairs(solver="euler", steps=4)), reflow)


def given(name: str, path: str) -> Given:
    objective, _, _, step = CASES[name]
    batch = Batch(1.2 * normal(ROWS, D, seed=5), None, ("",) * ROWS)
    draw = objective.draw(batch, PATHS[path](), Rows(3, "test", step, 0, ROWS), step)
    if path in ("vp", "linear_vp") and objective.kind == "flow_map":  # velocities are infinite at t = 1
        draw = replace(draw, t=torch.maximum(draw.s, draw.t.clamp(max=0.995)))
    return Given(path, draw, Net(10), Net(20), Net(30))


def loss(name: str, of: Given, target: Net) -> Tensor:
    objective = CASES[name][0]
    law = GaussianMixture(
        weights=tuple(WEIGHTS.tolist()),
        means=tuple(map(tuple, MEANS.tolist())),
        covariances=tuple(tuple(map(tuple, rows)) for rows in COVARIANCES.tolist()),
        path=of.path,
    )
    networks = {name: lambda x, t, cond: of.head.mean_velocity(x, t, t) for name in objective.networks}
    return sum(objective.loss(of.student, target, law.load(), of.draw, **networks).summands.values())


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, case in CASES.items() for path in case[2]])
def test_value_and_gradient_are_those_of_the_formula(name: str, path: str) -> None:
    of = given(name, path)
    objective, formula, _, _ = CASES[name]
    found, expected = loss(name, of, of.target), formula(of)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    trained = [*of.student.weights, *(of.head.weights if objective.networks else [])]
    ours, theirs = (torch.autograd.grad(value.mean(), trained, retain_graph=True) for value in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
        assert other.abs().max() > 1e-4
    leaked = torch.autograd.grad(found.mean(), of.target.weights, allow_unused=True)
    assert leaked == (None, None)
    if objective.target_decay(0) is not None and "first" not in name:
        assert (loss(name, of, of.student) - expected).abs().max() > 1e-3  # the twin: the student in the target's place
