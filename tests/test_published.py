"""Losses and their gradients are those of the papers: each is written down again in the paper's own convention.

The papers' times run from data to noise, as tau = 1 - t, as sigma = sigma_t / alpha_t or as the angle atan(sigma /
sigma_data); most add squares up where we average. Both sides get the same draw and the same network, derivatives are
taken by another method (reverse mode twice), and every formula has twins with one planted error, which must disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import normal, uniform
from torch import Tensor, nn

from distill.flow_map import FlowMap
from distill.objectives.alpha_flow import AlphaFlow
from distill.objectives.base import Batch, Draw, Loss, Objective
from distill.objectives.consistency import Consistency, ContinuousConsistency
from distill.objectives.guidance import OwnGuidance
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.pieces import Tangent
from distill.objectives.shortcut import Shortcut
from distill.objectives.times import Dyadic, EasyConsistency, EDMLogNormal, GapTruncated, Grid, LogitNormalSorted
from distill.objectives.weights import LogVariance, Weight
from distill.parameterisation import OneTime, Trig
from distill.rows import Rows
from distill.student import Student
from teachers.networks import NETWORKS
from teachers.path import PATHS, VE, Linear, Path
from teachers.space import Cond, DataSpace

SHAPE, D, ROWS = (1, 2, 3), 6, 32
CLASSES = 3  # the class id of "none"


@dataclass(frozen=True)
class Case:
    """value ours = published, and for all parameters gradient grad(ours) = grad(published)."""

    networks: nn.ModuleList
    ours: Callable[[], Tensor]
    published: Callable[[str], Tensor]
    """The published loss; an argument other than "" is the error to plant."""
    value: float = 1.0
    gradient: float = 1.0


CASES: dict[str, tuple[Callable[[], Case], tuple[str, ...]]] = {}
"""name -> the case, and the errors that can be planted in it."""


def network(seed: int, kind: str = "flow_map", path: Path | None = None, classes: int | None = None, **more) -> Student:
    space = DataSpace(SHAPE, classes)
    backbone = NETWORKS["mlp"](width=16, depth=1, null_class=classes is not None).build(space)
    student = Student(backbone, space, path or Linear(), kind, **more).double()
    for offset, parameter in enumerate(student.parameters()):
        parameter.data = 0.3 * normal(*parameter.shape, seed=100 * seed + offset)
    return student


def drawn(
    objective: Objective, path: Path | None = None, step: int = 0, scale: float = 1.0, classes: int | None = None
) -> Draw:
    cond, null = None, None
    if classes:
        cond, null = {"class": torch.arange(ROWS) % classes}, {"class": torch.tensor(classes)}
    batch = Batch(scale * normal(ROWS, *SHAPE, seed=3), cond, ("",) * ROWS, null=null)
    return objective.draw(batch, path or Linear(), Rows(0, "test", step, 0, ROWS), step)


def weighted(objective: Objective, loss: Loss, draw: Draw, log_variance: LogVariance | None = None) -> Tensor:
    gap = draw.t - draw.s if loss.gap is None else loss.gap
    learned = {} if log_variance is None else log_variance(draw.s, draw.t)
    return torch.stack([objective.weight(v, gap, learned.get(k), loss.scale) for k, v in loss.summands.items()]).sum(0)


def rows(coefficient: Tensor) -> Tensor:
    return coefficient.reshape(-1, 1, 1, 1)


def along(f: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Tensor, ...], keep: bool) -> Tensor:
    """The derivative of f, by reverse mode twice; `keep`: with a gradient to the network."""
    return torch.autograd.functional.jvp(f, point, direction, create_graph=keep)[1]


def stopped(x: Tensor, unless: bool) -> Tensor:
    return x if unless else x.detach()


def squares(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


# --- MeanFlow, arXiv 2505.13447, algorithm 1: t is noise time, r < t

SCHEDULES: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "linear": lambda t: (1 - t, t, -torch.ones_like(t), torch.ones_like(t)),
    "cosine": lambda t: (
        torch.cos(math.pi / 2 * t),
        torch.sin(math.pi / 2 * t),
        -math.pi / 2 * torch.sin(math.pi / 2 * t),
        math.pi / 2 * torch.cos(math.pi / 2 * t),
    ),
}


def noised(draw: Draw, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """z_t = a x + b e and dz_t/dt in noise time."""
    a, b, da, db = map(rows, SCHEDULES[path](t))
    return a * draw.x_1 + b * draw.x_0, da * draw.x_1 + db * draw.x_0


def average_velocity(student: Student, wrong: str) -> Callable[..., Tensor]:
    """u(z, r, t) with z_r = z_t - (t - r) u."""

    def u(z: Tensor, r: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if wrong == "swapped time":
            r, t = t, r
        return -student.mean_velocity(z, 1 - t, 1 - r, None if label is None else {"class": label})

    return u


def mean_flow(power: float, path: str = "linear") -> Case:
    c = 5.0
    objective = MeanFlow(
        source="data", times=LogitNormalSorted(diagonal=0.4), weight=Weight(power=power, c=c / D)
    )  # c for the mean of squares is c / D for their sum
    student = network(0, path=PATHS[path]())
    draw = drawn(objective, PATHS[path]())

    def published(wrong: str) -> Tensor:
        t, r = 1 - draw.s, 1 - draw.t
        z, v = noised(draw, t, path)
        u = average_velocity(student, wrong)
        du = along(lambda z, t: u(z, r, t), (z, t), (v, torch.ones_like(t)), wrong == "no stop")
        sign = -1 if wrong == "sign" else 1
        error = squares(u(z, r, t) - stopped(v - sign * rows(t - r) * du, wrong == "no stop"))
        constant = c / D if wrong == "constant" else c
        return (error / (error.detach() + constant) ** power).mean()

    scale = D ** (1 - power)
    return Case(
        nn.ModuleList([student]),
        lambda: weighted(objective, objective.loss(student, student, None, draw), draw).mean(),
        published,
        scale,
        scale,
    )


MISTAKES = ("sign", "no stop", "swapped time")
CASES["MeanFlow, p = 0"] = lambda: mean_flow(0.0), MISTAKES
CASES["MeanFlow, p = 1/2"] = lambda: mean_flow(0.5), (*MISTAKES, "constant")
CASES["MeanFlow, p = 1"] = lambda: mean_flow(1.0), (*MISTAKES, "constant")
CASES["MeanFlow, cosine"] = lambda: mean_flow(1.0, "cosine"), MISTAKES


def guided_mean_flow(omega: float, kappa: float) -> Case:
    """v is replaced by omega v + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | none), section 4.2."""
    latest = 0.75
    objective = MeanFlow(
        source="data",
        times=LogitNormalSorted(diagonal=0.4),
        guidance=OwnGuidance(scale=omega / (1 - kappa), mix=kappa, interval=(1 - latest, 1.0)),
        drop=0.3,
    )
    student = network(0, classes=CLASSES)
    draw = drawn(objective, classes=CLASSES)

    def published(wrong: str) -> Tensor:
        t, r = 1 - draw.s, 1 - draw.t
        z, v = noised(draw, t)
        assert draw.dropped is not None
        none = torch.full((ROWS,), CLASSES)
        label = torch.where(draw.dropped, none, torch.arange(ROWS) % CLASSES)
        u = average_velocity(student, wrong)
        with torch.no_grad():
            with_label, without = u(z, t, t, label), u(z, t, t, none)
        if wrong == "labels":
            with_label, without = without, with_label
        mixed = omega * v + kappa * with_label + (1 - omega - kappa) * without
        unguided = t > latest if wrong == "dropped" else draw.dropped | (t > latest)
        v = torch.where(rows(unguided), v, mixed)
        du = along(lambda z, t: u(z, r, t, label), (z, t), (v, torch.ones_like(t)), wrong == "no stop")
        sign = -1 if wrong == "sign" else 1
        target = stopped(v - sign * rows(t - r) * du, wrong == "no stop")
        return squares(u(z, r, t, label) - target).mean()

    return Case(
        nn.ModuleList([student]),
        lambda: objective.loss(student, student, None, draw).per_sample.mean(),
        published,
        D,
        D,
    )


CASES["MeanFlow, guided"] = lambda: guided_mean_flow(0.5, 0.75), (*MISTAKES, "labels", "dropped")


def test_guidance_is_in_double_precision() -> None:
    compare(guided_mean_flow(0.2, 0.92))


# --- improved MeanFlow, arXiv 2512.02012: V = u + (t - r) sg du/dt along the predicted velocity, || V - v ||^2


def improved(head: bool, omega: float = 1.0) -> Case:
    c, power = 5.0, 1.0
    objective = MeanFlow(
        source="data",
        direction="head" if head else "student",
        times=LogitNormalSorted(diagonal=0.4),
        guidance=OwnGuidance(scale=omega, interval=(0.2, 0.9) if omega > 1 else (0.0, 1.0)),
        weight=Weight(power=power, c=c / D),
    )
    student, other = network(0, classes=CLASSES), network(1, "velocity", classes=CLASSES)
    draw = drawn(objective, classes=CLASSES)

    def ours() -> Tensor:
        more = {"head": other.velocity} if head else {}
        return weighted(objective, objective.loss(student, student, None, draw, **more), draw).mean()

    def published(wrong: str) -> Tensor:
        t, r = 1 - draw.s, 1 - draw.t
        z, v = noised(draw, t)
        label, none = torch.arange(ROWS) % CLASSES, torch.full((ROWS,), CLASSES)
        u = average_velocity(student, wrong)

        def predicted(label: Tensor) -> Tensor:
            return -other.mean_velocity(z, 1 - t, 1 - t, {"class": label}) if head else u(z, t, t, label)

        inside = (t >= 0.1) & (t <= 0.8)
        guided = v + (1 - 1 / omega) * (predicted(label) - predicted(none)).detach()
        target = torch.where(rows(inside), guided, v)
        direction = target if wrong == "tangent" else predicted(label).detach()
        du = along(lambda z, t: u(z, r, t, label), (z, t), (direction, torch.ones_like(t)), wrong == "no stop")
        sign = -1 if wrong == "sign" else 1
        compound = u(z, r, t, label) + sign * rows(t - r) * stopped(du, wrong == "no stop")
        errors = [squares(compound - target)] + [squares(predicted(label) - target)] * head
        return torch.stack([e / (e.detach() + c) ** power for e in errors]).sum(0).mean()

    return Case(nn.ModuleList([student, other] if head else [student]), ours, published)


CASES["improved MeanFlow, head"] = lambda: improved(True), (*MISTAKES, "tangent")
CASES["improved MeanFlow, guided"] = lambda: improved(True, 3.0), (*MISTAKES, "tangent")
CASES["improved MeanFlow, no head"] = lambda: improved(False), (*MISTAKES, "tangent")


# --- alpha-flow, arXiv 2510.20771: noise time t, r < t, and s = alpha r + (1 - alpha) t between them


def alpha_flow(alpha: float, c: float | None = None) -> Case:
    """c: of the released weight: alpha / (|error|^2 + c), 1 / (|error|^2 + c) of rows with r = t, in place of 1 / alpha
    and 1, where the error is that of flow matching."""
    weight = Weight() if c is None else Weight(power=1.0, c=c / D)
    objective = AlphaFlow(source="data", times=LogitNormalSorted(diagonal=0.4), weight=weight)
    student = network(0)
    draw = replace(drawn(objective), alpha=alpha)

    def published(wrong: str) -> Tensor:
        t, r = 1 - draw.s, 1 - draw.t
        z, v = noised(draw, t)
        s = alpha * r + (1 - alpha) * t
        u = average_velocity(student, wrong)
        sign = -1 if wrong == "sign" else 1
        target = alpha * v + (1 - alpha) * u(z - sign * rows(t - s) * v, r, s)
        target = torch.where(rows(r == t), v, target)
        error = squares(u(z, r, t) - stopped(target, wrong == "no stop"))
        share = torch.full_like(t, alpha).masked_fill(r == t, 1.0)
        return (error / share if c is None else error * share / (error.detach() + c)).mean()

    scale = D if c is None else 1
    return Case(
        nn.ModuleList([student]),
        lambda: weighted(objective, objective.loss(student, student, None, draw), draw).mean(),
        published,
        scale,
        scale,
    )


CASES["alpha-flow, alpha = 0.05, weighted"] = lambda: alpha_flow(0.05, 5.0), MISTAKES
CASES["alpha-flow, alpha = 0.5"] = lambda: alpha_flow(0.5), MISTAKES
CASES["alpha-flow, alpha = 0.05"] = lambda: alpha_flow(0.05), MISTAKES


# --- sCM, arXiv 2410.11081, and rCM, arXiv 2510.08431: TrigFlow, y = cos(theta) x + sin(theta) z, z of std sigma_data


@dataclass(frozen=True)
class TrigFlow:
    """A point of one of our paths in TrigFlow's coordinates, where D = cos(theta) y - sin(theta) sigma_data F."""

    path: str
    sigma_data: float

    def angle(self, s: Tensor) -> Tensor:
        sigma = (1 - s) / s if self.path == "linear" else 1 / torch.tan(math.pi / 2 * s)
        return torch.atan(sigma / self.sigma_data)

    def ours(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(x, s): alpha / cos(theta) times y, and the time of that angle."""
        sigma = self.sigma_data * torch.tan(theta)
        if self.path == "linear":
            s = alpha = 1 / (1 + sigma)
        else:
            s = 1 - 2 / math.pi * torch.atan(sigma)
            alpha = torch.sin(math.pi / 2 * s)
        return rows(alpha / torch.cos(theta)) * y, s

    def output(self, end: Tensor, y: Tensor, theta: Tensor) -> Tensor:
        """F of where y is sent."""
        return (rows(torch.cos(theta)) * y - end) / (self.sigma_data * rows(torch.sin(theta)))

    def denoised(self, v: Tensor, x: Tensor, s: Tensor) -> Tensor:
        """E[x_1 | x_s] of our velocity: x + (1 - s) v, or sin x + (2 / pi) cos v."""
        if self.path == "linear":
            return x + rows(1 - s) * v
        return rows(torch.sin(math.pi / 2 * s)) * x + 2 / math.pi * rows(torch.cos(math.pi / 2 * s)) * v


def continuous(form: str, source: str, path: str, sigma_data: float, step: int) -> Case:
    """Warm-up over 10 steps. sCM divides g by its rms + c and learns a log-variance; rCM by its norm + c."""
    c, scm = 0.1, form == "scm"
    objective = ContinuousConsistency(
        times=EDMLogNormal(mean=-1.0, std=1.4, sigma_data=1.0),
        source=source,
        form=form,
        sigma_data=sigma_data,
        tangent=Tangent(warmup=10, normalise=True, c=c if scm else c / D**0.5),
        weight=Weight(learned="gaussian" if scm else "none"),
    )
    own = PATHS[path]()
    student = network(0, "consistency", own, parameterisation=Trig(sigma_data=sigma_data), own_output=True)
    teacher = network(1, "velocity", own)
    log_variance = LogVariance(("loss",), 0).double()
    for offset, parameter in enumerate(log_variance.parameters()):
        parameter.data = 0.3 * normal(*parameter.shape, seed=900 + offset)
    draw = drawn(objective, own, step, sigma_data)

    def ours() -> Tensor:
        velocity = teacher.velocity if source == "teacher" else None
        loss = objective.loss(student, student, velocity, draw)
        return weighted(objective, loss, draw, log_variance if scm else None).mean()

    def published(wrong: str) -> Tensor:
        trig, r = TrigFlow(path, sigma_data), 1.0 if wrong == "warm-up" else min(1.0, step / 10)
        theta = trig.angle(draw.s)
        z = sigma_data * draw.x_0
        cos, sin = rows(torch.cos(theta)), rows(torch.sin(theta))
        y, dy = cos * draw.x_1 + sin * z, cos * z - sin * draw.x_1
        if source == "teacher":
            x, s = trig.ours(y, theta)
            dy = (sigma_data * trig.output(trig.denoised(teacher.velocity(x, s), x, s), y, theta)).detach()

        def output(y: Tensor, theta: Tensor) -> Tensor:
            x, s = trig.ours(y, theta)
            return trig.output(student(x, s, torch.ones_like(s)), y, theta)

        keep = wrong == "no stop"
        f = output(y, theta)
        df = along(output, (y, theta), (dy, torch.ones_like(theta)), keep)
        if wrong == "swapped time":
            cos, sin = sin, cos
        sign = -1 if wrong == "sign" else 1
        held, known = stopped(f, keep), 1.0 if wrong == "sigma_data" else sigma_data
        if scm:
            g = -(cos**2) * (known * held - dy) - sign * r * cos * sin * (y + known * df)
            g = g / (rows(squares(g).div(D).sqrt()) + c)
        else:
            g = -cos * (1 - r**2 * sin**2).sqrt() * (held - dy) - sign * cos * sin * (r * y + df)
            g = g / (rows(squares(g).sqrt()) + c)
        error = squares(f - stopped(held + g, keep))
        if not scm:
            return error.mean()
        w = -log_variance(draw.s, torch.ones_like(draw.s))["loss"]
        return (w.exp() / D * error - w).mean()

    return Case(nn.ModuleList([student, teacher, *[log_variance] * scm]), ours, published, 1.0, 1.0 if scm else D**0.5)


TRIG = (*MISTAKES, "warm-up")
CASES["sCD, r = 0.3"] = lambda: continuous("scm", "teacher", "linear", 0.5, 3), (*TRIG, "sigma_data")
CASES["sCD, r = 1, cosine"] = lambda: continuous("scm", "teacher", "cosine", 0.5, 20), (*MISTAKES, "sigma_data")
CASES["sCT, r = 0.6"] = lambda: continuous("scm", "data", "linear", 0.5, 6), (*TRIG, "sigma_data")
CASES["rCM, r = 0.3"] = lambda: continuous("rcm", "teacher", "linear", 1.0, 3), TRIG
CASES["rCM, r = 1, cosine"] = lambda: continuous("rcm", "teacher", "cosine", 1.0, 10), MISTAKES


# --- consistency distillation, arXiv 2303.01469, in EDM's convention, 2206.00364: x + sigma e, sigma from 80 to 0.002

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, LEVELS = 0.5, 0.002, 80.0, 40


def karras(index: Tensor) -> Tensor:
    high, low = SIGMA_MAX ** (1 / 7), SIGMA_MIN ** (1 / 7)
    return (high + index / (LEVELS - 1) * (low - high)) ** 7


def edm(net: nn.Module, time: Callable[[Tensor], Tensor], sigma_min: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser c_skip x + c_out net(c_in x, time), the identity at sigma_min (EDM's own: 0)."""

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        skip = SIGMA_DATA**2 / ((sigma - sigma_min) ** 2 + SIGMA_DATA**2)
        out = SIGMA_DATA * (sigma - sigma_min) / (sigma**2 + SIGMA_DATA**2).sqrt()
        scaled = x / rows((sigma**2 + SIGMA_DATA**2).sqrt())
        return rows(skip) * x + rows(out) * net(scaled, time(sigma), None)

    return f


def heun_distillation() -> Case:
    """On VE with sigma linear in time (rho 1), where a step of time is a step of sigma. Data of std sigma_data."""
    path = VE(sigma_max=SIGMA_MAX, sigma_min=SIGMA_MIN, rho=1)
    objective = Consistency(solver="heun", decay=0.95)
    student, slow = (
        network(i, "consistency", path, parameterisation=OneTime(sigma_data=SIGMA_DATA), own_output=True)
        for i in range(2)
    )
    teacher = network(2, "velocity", path)

    def time(sigma: Tensor) -> Tensor:
        return (SIGMA_MAX - sigma) / (SIGMA_MAX - SIGMA_MIN)

    index = (uniform(ROWS, seed=5) * (LEVELS - 1)).floor()
    index[:2] = torch.tensor([0, LEVELS - 2])
    x_1, x_0 = SIGMA_DATA * normal(ROWS, *SHAPE, seed=3), normal(ROWS, *SHAPE, seed=4)
    s, m = time(karras(index)), time(karras(index + 1))
    draw = Draw(
        path=path, x_0=x_0, x_1=x_1, s=s, t=torch.ones_like(s), x_s=path.point(x_0, x_1, s),
        velocity_s=path.conditional_velocity(x_0, x_1, s), cond=None, m=m, x_m=path.point(x_0, x_1, m),
    )  # fmt: skip
    denoise = edm(teacher.network, time, 0.0)

    def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        sigma = SIGMA_MAX + t * (SIGMA_MIN - SIGMA_MAX)
        return (SIGMA_MIN - SIGMA_MAX) * (x - denoise(x, sigma)) / rows(sigma)

    def published(wrong: str) -> Tensor:
        sigma, following = karras(index), karras(index + 1)
        x = x_1 + rows(sigma) * x_0
        slope = (x - denoise(x, sigma)) / rows(sigma)
        step = rows(following - sigma) * (-1 if wrong == "sign" else 1)
        euler = x + step * slope
        there = (
            euler
            if wrong == "euler"
            else x + step / 2 * (slope + (euler - denoise(euler, following)) / rows(following))
        )
        target = edm((student if wrong == "own target" else slow).network, time, SIGMA_MIN)
        goal = target(there, sigma if wrong == "swapped time" else following)
        error = edm(student.network, time, SIGMA_MIN)(x, sigma) - stopped(goal, wrong == "no stop")
        return squares(error).mean() / D

    return Case(
        nn.ModuleList([student, slow, teacher]),
        lambda: objective.loss(student, slow, velocity, draw).per_sample.mean(),
        published,
    )


CASES["CD, Heun"] = heun_distillation, (*MISTAKES, "own target")


def scaled_time(sigma: Tensor) -> Tensor:
    """Of a level sigma for data of std sigma_data, on the linear path of the data divided by sigma_data."""
    return 1 / (1 + sigma / SIGMA_DATA)


def consistency(objective: Consistency, sigma_min: float) -> tuple[Student, Student, Student, Draw, Tensor, Tensor]:
    """Student, slow copy, teacher, draw and the two levels: data of std 1 stands for published data of sigma_data."""
    one = OneTime(sigma_data=1.0, sigma_min=sigma_min / SIGMA_DATA)
    student, slow = (network(i, "consistency", parameterisation=one, own_output=True) for i in range(2))
    draw = drawn(objective)
    assert draw.m is not None
    sigma, following = (SIGMA_DATA * (1 - t) / t for t in (draw.s, draw.m))
    return student, slow, network(2, "velocity"), draw, sigma, following


def neighbours(solver: str) -> Case:
    """Karras levels on the linear path: a step of Euler is the same in sigma (DDIM). At level 0 the target is the
    point itself."""
    grid = Grid(first=LEVELS - 1, final=LEVELS - 1, curve="karras", growth="constant", sigma_data=SIGMA_DATA)
    objective = Consistency(times=grid, solver=solver, decay=0.95)
    student, slow, teacher, draw, sigma, following = consistency(objective, SIGMA_MIN)
    denoise = edm(teacher.network, scaled_time, 0.0)

    def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(D - x) / (1 - t), of the data divided by sigma_data."""
        return (denoise(SIGMA_DATA * x / rows(t), SIGMA_DATA * (1 - t) / t) / SIGMA_DATA - x) / rows(1 - t)

    def published(wrong: str) -> Tensor:
        x_1 = SIGMA_DATA * draw.x_1
        x = x_1 + rows(sigma) * draw.x_0
        slope = draw.x_0 if solver == "data" else (x - denoise(x, sigma)) / rows(sigma)
        there = x + rows(following - sigma) * slope * (-1 if wrong == "sign" else 1)
        target = edm((student if wrong == "own target" else slow).network, scaled_time, SIGMA_MIN)
        goal = target(there, sigma if wrong == "swapped time" else following)
        goal = torch.where(rows(following > 1e-12), goal, there)
        error = edm(student.network, scaled_time, SIGMA_MIN)(x, sigma) - stopped(goal, wrong == "no stop")
        return squares(error).mean() / D

    return Case(
        nn.ModuleList([student, slow, teacher]),
        lambda: objective.loss(student, slow, None if solver == "data" else velocity, draw).per_sample.mean(),
        published,
        SIGMA_DATA**2,
        SIGMA_DATA**2,
    )


CASES["CD, Euler, linear path"] = lambda: neighbours("euler"), (*MISTAKES, "own target")
CASES["CT, linear path"] = lambda: neighbours("data"), (*MISTAKES, "own target")


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_grid_is_that_of_karras(sigma_data: float) -> None:
    """In sigma, but for the last level, which is the data itself; and equal steps of ve are its levels."""
    grid = Grid(first=LEVELS - 1, final=LEVELS - 1, curve="karras", growth="constant", sigma_data=sigma_data).grid(0)
    sigma = sigma_data * (1 - grid) / grid
    expected = karras(torch.arange(LEVELS).double())
    torch.testing.assert_close(sigma[:-1], expected[:-1], rtol=1e-12, atol=0)
    assert sigma[-1] == 0
    equal = Grid(first=LEVELS - 1, final=LEVELS - 1, growth="constant").grid(0)
    torch.testing.assert_close(VE()(equal).sigma, expected, rtol=1e-12, atol=0)


# --- easy consistency tuning, arXiv 2406.14548: sigma and its neighbour from one draw, || . || over their difference


def easy(stage: int, c: float | None = None) -> Case:
    """Published: (sqrt(|| D - D' ||^2 + c^2) - c) / (sigma - sigma'), with the gradient of || . ||^2 over
    2 sqrt(|| . ||^2 + c^2), which is ours but for 2 / sqrt(D); so is the value at c = 0. Data and levels are both
    divided by sigma_data, which cancels. Without c: the mean of squares."""
    weight = Weight() if c is None else Weight(power=0.5, c=(c / SIGMA_DATA) ** 2 / D, gap=-1.0)
    objective = Consistency(times=EasyConsistency(stage_steps=1), solver="data", gap_in="sigma", weight=weight)
    student = consistency(objective, 0.0)[0]
    draw = drawn(objective, step=stage)

    def published(wrong: str) -> Tensor:
        again = Rows(0, "test", stage, 0, ROWS)
        noise, normals = again.normal(*SHAPE).double(), again.normal().double()
        sigma = (2.0 * normals - 1.1).exp()
        ratio = 1 - 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(sigma if wrong == "sign" else -sigma))
        following = (sigma * ratio).clamp_min(0)
        y = SIGMA_DATA * draw.x_1
        net = edm(student.network, scaled_time, 0.0)
        at = sigma if wrong == "swapped time" else following
        goal = torch.where(rows(following > 0), net(y + rows(following) * noise, at), y)
        error = squares(net(y + rows(sigma) * noise, sigma) - stopped(goal, wrong == "no stop"))
        if c is None:
            return error.mean() / D
        return (((error + c**2).sqrt() - c) / (sigma - following)).mean()

    value, gradient = (SIGMA_DATA**2, SIGMA_DATA**2) if c is None else (D**0.5, D**0.5 / 2)
    return Case(
        nn.ModuleList([student]),
        lambda: weighted(objective, objective.loss(student, student, None, draw), draw).mean(),
        published,
        value,
        gradient,
    )


CASES["ECT, stage 1, squared"] = lambda: easy(1), MISTAKES
CASES["ECT, stage 4, squared"] = lambda: easy(4), MISTAKES


@pytest.mark.parametrize("stage", [1, 4])
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_easy_consistency_weights(stage: int, c: float) -> None:
    value, gradient = errors(easy(stage, c))
    assert gradient < 1e-10
    assert c > 0 or value < 1e-11


# --- shortcut models, arXiv 2410.12557, in our direction of time: s(x, t, d) steps from t to t + d


def shortcut(anchor: str) -> Case:
    finest = 8
    objective = Shortcut(times=Dyadic(finest=finest, diagonal=0.5), anchor=anchor)
    student, slow = (network(i, "shortcut", finest=finest) for i in range(2))
    draw = drawn(objective)

    def published(wrong: str) -> Tensor:
        def step(net: Student, x: Tensor, t: Tensor, d: Tensor) -> Tensor:
            return net.mean_velocity(x, t + d, t) if wrong == "swapped time" else net.mean_velocity(x, t, t + d)

        t, twice = draw.s, draw.t - draw.s
        base = twice < 1.5 / finest
        x = rows(1 - t) * draw.x_0 + rows(t) * draw.x_1
        slow_net = student if wrong == "own target" else slow
        d = twice / 2
        first = step(slow_net, x, t, d)
        second = step(slow_net, x + (-1 if wrong == "sign" else 1) * rows(d) * first, t + d, d)
        two_steps = first + second if wrong == "sum" else (first + second) / 2
        goal = torch.where(rows(base), draw.x_1 - draw.x_0, stopped(two_steps, wrong == "no stop"))
        return squares(step(student, x, t, twice) - goal).mean() / D

    return Case(
        nn.ModuleList([student, slow]), lambda: objective.loss(student, slow, None, draw).per_sample.mean(), published
    )


CASES["shortcut, d = 0"] = lambda: shortcut("zero"), (*MISTAKES, "own target", "sum")
CASES["shortcut, d = 1 / 8"] = lambda: shortcut("smallest"), (*MISTAKES, "own target", "sum")


# --- terminal velocity matching, arXiv 2511.19797: noise time t > s, f(x, t, s) = x + (s - t) F(x, t, s)


def terminal_velocity() -> Case:
    """Published: || d/ds f - F_slow(f, s, s) ||^2 + || F(x_s', s', s') - v ||^2 for every pair; ours has rows of the
    one or of the other kind, here twice as many."""
    objective = Lagrangian(source="target", times=GapTruncated(diagonal=0.5))
    student, slow = network(0), network(1)
    off = replace(objective, times=GapTruncated(diagonal=1e-9))
    draw, other = drawn(off), uniform(ROWS, low=0.02, high=0.98, seed=6)
    assert (draw.s < draw.t).all()

    def ours() -> Tensor:
        s, t = torch.cat([draw.s, other]), torch.cat([draw.t, other])
        x_0, x_1 = (torch.cat([x, x]) for x in (draw.x_0, draw.x_1))
        both = replace(
            draw, x_0=x_0, x_1=x_1, s=s, t=t, x_s=draw.path.point(x_0, x_1, s),
            velocity_s=draw.path.conditional_velocity(x_0, x_1, s),
        )  # fmt: skip
        return objective.loss(student, slow, None, both).per_sample.mean()

    def published(wrong: str) -> Tensor:
        t, s, alone = 1 - draw.s, 1 - draw.t, 1 - other

        def f(net: FlowMap, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            if wrong == "swapped time":
                t, s = s, t
            return -net.mean_velocity(x, 1 - t, 1 - s, None)

        x, _ = noised(draw, t)
        x_alone, v = noised(draw, alone)
        sign = -1 if wrong == "sign" else 1
        derivative = along(
            lambda s: x + sign * rows(s - t) * f(student, x, t, s), (s,), (torch.ones_like(s),), wrong != "stop"
        )
        arrived = x + rows(s - t) * f(student, x, t, s)
        goal = stopped(f(slow, stopped(arrived, wrong == "no stop"), s, s), wrong == "no stop")
        matched = squares(f(student, x_alone, alone, alone) - v)
        return (squares(derivative - goal) + matched).mean() / D

    return Case(nn.ModuleList([student, slow]), ours, published, 2.0, 2.0)


CASES["TVM"] = terminal_velocity, (*MISTAKES, "stop")


# --- the comparison


def gradients(value: Tensor, networks: nn.ModuleList) -> Tensor:
    """All of them in a row; zero where there is none."""
    parameters = list(networks.parameters())
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
    )


def errors(case: Case, wrong: str = "") -> tuple[float, float]:
    """Of the value and of the gradient, beside the published ones."""
    ours, published = case.ours(), case.published(wrong)
    value = abs(case.value * ours.item() / published.item() - 1)
    expected = gradients(published, case.networks)
    gradient = (case.gradient * gradients(ours, case.networks) - expected).abs().max() / expected.abs().max()
    return value, gradient.item()


def compare(case: Case) -> None:
    value, gradient = errors(case)
    assert value < 1e-11
    assert gradient < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_published_formula(name: str) -> None:
    case = CASES[name][0]()
    compare(case)
    trained = case.networks[0]
    assert isinstance(trained, Student)
    for key, gradient in zip(
        dict(trained.named_parameters()), torch.autograd.grad(case.ours(), list(trained.parameters())), strict=True
    ):
        assert gradient.abs().max() > 1e-6, key


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, (_, planted) in CASES.items() for wrong in planted]
)
def test_a_planted_error_disagrees(name: str, wrong: str) -> None:
    value, gradient = errors(CASES[name][0](), wrong)
    assert gradient > 1e-3
    if "stop" not in wrong:
        assert value > 1e-4
