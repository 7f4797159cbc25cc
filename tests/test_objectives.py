"""Objectives vanish on the teacher's own flow map and on nothing else; over all of OBJECTIVES.

The laws have exact maps, so the loss at the truth is rounding alone. Every property has its twin: a wrong student,
whose loss is clearly above zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import LAWS, Changed, Exact, Wave, data, gaussian, normal
from torch import Tensor, nn

from distill.flow_map import FlowMap
from distill.objectives import OBJECTIVES
from distill.objectives.base import Batch, Draw, Loss
from distill.objectives.flow_matching import FlowMatching
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.times import UniformTriangle
from distill.rows import Rows
from distill.student import Student
from teachers.analytic import Gaussian, Mixture
from teachers.networks import NETWORKS
from teachers.path import PATHS, Linear, Path, expand_like
from teachers.space import Cond, DataSpace

Law = Gaussian | Mixture
ROWS = 256
objectives = pytest.mark.parametrize("name", OBJECTIVES)
laws = pytest.mark.parametrize(
    "law", [LAWS[n](p) for n in LAWS for p in PATHS], ids=[f"{n}-{p}" for n in LAWS for p in PATHS]
)
close = torch.testing.assert_close


def drawn(name: str, law: Law, dtype: torch.dtype = torch.float64, rows: int = ROWS, seed: int = 0) -> Draw:
    batch = Batch(data(law, rows, seed).to(dtype), None, tuple(map(str, range(rows))))
    return OBJECTIVES[name]().draw(batch, PATHS[law.path](), Rows(seed, "test", 0, 0, rows), 0)


def loss(name: str, student: FlowMap, law: Law, draw: Draw) -> Loss:
    return OBJECTIVES[name]().loss(student, student, law.load(), draw)


def rms(loss: Loss) -> float:
    return loss.per_sample.mean().sqrt().item()


# --- zero at the truth, and only there


@objectives
@laws
def test_loss_vanishes_at_the_exact_map(name: str, law: Law) -> None:
    per_sample = loss(name, Exact(law), law, drawn(name, law)).per_sample
    assert per_sample.shape == (ROWS,)
    assert per_sample.dtype == torch.float64
    assert per_sample.max().sqrt() < (1e-11 if isinstance(law, Gaussian) else 1e-9)


@objectives
@laws
def test_loss_vanishes_in_single_precision(name: str, law: Law) -> None:
    result = loss(name, Exact(law), law, drawn(name, law, torch.float32))
    assert result.per_sample.dtype == torch.float32
    assert rms(result) < 1e-4


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


@objectives
@laws
@pytest.mark.parametrize("twin", TWINS)
def test_loss_sees_a_wrong_map(name: str, law: Law, twin: str) -> None:
    assert rms(loss(name, TWINS[twin](law), law, drawn(name, law))) > 2e-2


@objectives
def test_off_diagonal_errors_are_seen_where_two_times_are_trained(name: str) -> None:
    """An error (t - s) phi leaves u(x, s, s) = v right: flow matching alone is blind to it, and must say so."""
    law, wave = gaussian(), Wave(3)
    student = Changed(Exact(law), lambda u, x, s, t: u + expand_like(t - s, x) * wave(x, s, t))
    value = rms(loss(name, student, law, drawn(name, law)))
    if OBJECTIVES[name].needs_two_times:
        assert value > 1e-2
    else:
        assert value < 1e-11


@objectives
def test_every_row_counts(name: str) -> None:
    """A student wrong for one sample alone has a loss there alone."""
    law, wave = gaussian(), Wave(3)
    only = torch.zeros(ROWS, 1).double()
    only[17] = 0.5
    student = Changed(Exact(law), lambda u, x, s, t: u + only * wave(x, s, t))
    per_sample = loss(name, student, law, drawn(name, law)).per_sample
    assert per_sample[17] > 1e-4
    assert per_sample[torch.arange(ROWS) != 17].max() < 1e-20


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


HAND = {
    "flow_matching": flow_matching_gradient,
    "eulerian": eulerian_gradient,
    "lagrangian": lagrangian_gradient,
}


@pytest.mark.parametrize("name", HAND)
@pytest.mark.parametrize("path", PATHS)
def test_gradient_is_the_hand_formula(name: str, path: str) -> None:
    """u = u* + theta phi: d loss / d theta_j = 2 / (b d) sum_b residual_bj d residual_bj / d theta_j."""
    law = gaussian(path=path)
    draw = drawn(name, law)
    theta = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    loss(name, perturbed(law, theta), law, draw).per_sample.mean().backward()
    expected = 2 / 3 * HAND[name](law, draw, theta.detach()).mean(0)
    close(theta.grad, expected, atol=1e-13, rtol=0)
    assert expected.abs().min() > 1e-4


@objectives
def test_gradient_vanishes_at_the_truth(name: str) -> None:
    law = gaussian()
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss(name, perturbed(law, theta), law, drawn(name, law)).per_sample.mean().backward()
    assert theta.grad is not None
    assert theta.grad.abs().max() < 1e-13


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
    result = OBJECTIVES[name]().loss(perturbed(law, theta), target, teacher.velocity, drawn(name, law))
    result.per_sample.mean().backward()
    assert teacher.scale.grad is None
    assert target.scale.grad is None
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
    kind = "flow_map" if OBJECTIVES[name].needs_two_times else "velocity"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(NETWORKS["mlp"](width=16, depth=1).build(space), space, Linear(), kind)
        for parameter in student.parameters():
            nn.init.normal_(parameter, std=0.2)
    batch = Batch(normal(32, 1, 4, 4).float(), space.cond_for(0, 32), ("",) * 32)
    objective = OBJECTIVES[name]()
    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, 32), 0)
    result = objective.loss(student, student, lambda x, t, cond: -x * cond["class"][:, None, None, None], draw)
    assert result.per_sample.dtype == torch.float32
    result.per_sample.mean().backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


# --- flow matching from data


@pytest.mark.parametrize("path", PATHS)
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
        return OBJECTIVES[name]().draw(batch, self.path, Rows(seed, "train", step, first, count), step)


def tensors(draw: Draw) -> dict[str, Tensor]:
    return {f.name: v for f in dataclasses.fields(draw) if isinstance(v := getattr(draw, f.name), Tensor)}


@objectives
@pytest.mark.parametrize("path", PATHS)
def test_a_process_draws_its_rows_of_the_global_draw(name: str, path: str) -> None:
    of = _Everything(gaussian(path=path), PATHS[path]())
    whole, part = tensors(of.draw(name, 0, 64)), tensors(of.draw(name, 8, 16))
    assert len(whole) >= 6
    for field, value in whole.items():
        assert torch.equal(part[field], value[8:24]), field
    for other in (of.draw(name, 0, 64, seed=6), of.draw(name, 0, 64, step=10)):
        assert not torch.equal(other.x_0, whole["x_0"])
        assert not torch.equal(other.s, whole["s"])


@objectives
@pytest.mark.parametrize("path", PATHS)
def test_the_draw_is_a_point_of_the_path_and_its_velocity(name: str, path: str) -> None:
    draw = _Everything(gaussian(path=path), PATHS[path]()).draw(name, 0, 64)
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

    doubled = OBJECTIVES[name]().loss(Doubled(student), Doubled(student), velocity, twice)
    close(doubled.per_sample, loss(name, student, law, draw).per_sample)


# --- what an objective asks for


@objectives
def test_an_objective_says_what_it_needs(name: str) -> None:
    objective = OBJECTIVES[name]()
    assert {type(v) for v in (objective.needs_data, objective.needs_teacher, objective.needs_two_times)} == {bool}
    draw = drawn(name, gaussian())
    assert ((draw.t > draw.s).any().item()) == objective.needs_two_times
    assert dataclasses.is_dataclass(objective)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.times = None


def test_time_law_is_the_objectives_own_field() -> None:
    law = gaussian()
    batch = Batch(data(law, 64), None, ("",) * 64)
    draw = Lagrangian(times=UniformTriangle(diagonal=1.0)).draw(batch, Linear(), Rows(0, "test", 0, 0, 64), 0)
    assert torch.equal(draw.s, draw.t)
