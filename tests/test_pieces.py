"""Pieces that combine with every objective: weights, parameterisations, own guidance, rules of several steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Exact, gaussian, normal, on_path, uniform
from scipy import stats

from distill.flow_map import bridge, check_steps, renoise, supported, travel
from distill.guidance import Guidance
from distill.objectives.base import Batch
from distill.objectives.flow_matching import FlowMatching
from distill.objectives.guidance import OwnGuidance
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.pieces import Tangent
from distill.objectives.weights import LogVariance, Weight
from distill.parameterisation import PARAMETERISATIONS, OneTime
from distill.rows import Rows
from distill.student import Student
from teachers.adapters.native import Native
from teachers.analytic import Gaussian
from teachers.guidance import Guided
from teachers.networks import NETWORKS
from teachers.path import PATHS, Linear, PathName, expand_like
from teachers.path_change import on_path as change_of_path
from teachers.solvers import rk4, uniform_grid
from teachers.space import DataSpace

close = torch.testing.assert_close
TIMES = uniform(64, low=0.05, high=0.5), uniform(64, low=0.55, high=0.95, seed=3)


# --- weights


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_adaptive_gradient_is_the_errors_over_a_power_of_its_square(power: float) -> None:
    e = normal(32, 1).requires_grad_(True)
    Weight(power=power, c=0.0)(e.square().squeeze(1), torch.ones(32)).sum().backward()
    close(e.grad, (2 * e / e.square() ** power).detach())


def test_gap_comes_after_the_adaptive_power() -> None:
    loss, gap = uniform(8, low=0.5, high=2.0), uniform(8, low=0.1, seed=1)
    close(Weight(gap=2.0, power=0.5, c=0.1)(loss, gap), gap**2 * loss / (loss + 0.1).sqrt())
    scale = uniform(8, low=0.5, high=1.5, seed=2)
    weighted = Weight(power=0.75, c=0.1)(scale * loss, gap, None, scale)
    close(weighted, scale * loss / (scale**2 * (loss + 0.1)) ** 0.75)
    near = torch.tensor([1e-9, 1e-4, 0.0], dtype=torch.float64)
    assert Weight(gap=-1.0)(torch.ones(3, dtype=torch.float64), near).tolist() == pytest.approx([1e9, 1e4, 1e4])


def test_learned_log_variance_is_stationary_at_the_log_of_the_loss() -> None:
    loss = uniform(16, low=0.1, high=3.0)
    lv = loss.log().requires_grad_(True)
    Weight(learned="gaussian")(loss, torch.ones(16), lv).sum().backward()
    assert lv.grad.abs().max() < 1e-12


def test_the_logarithm_of_a_loss_is_that_of_decoupled_mean_flow() -> None:
    """log(L e^-lv + 0.01) + lv, arXiv 2510.24474, with L after the power of the gap."""
    loss, gap, lv = uniform(16, low=0.1, high=3.0), uniform(16, low=0.1, seed=1), normal(16, seed=2)
    found = Weight(learned="log", gap=1.0)(loss, gap, lv)
    close(found, (gap * loss * (-lv).exp() + 0.01).log() + lv)


def test_log_variance_has_a_floor_that_it_can_leave() -> None:
    module = LogVariance(("loss", "head"), 0)
    torch.nn.init.constant_(module.out.bias, -30.0)
    lv = module(torch.rand(4), torch.rand(4))
    assert set(lv) == {"loss", "head"} and (lv["loss"] == -10).all()
    lv["loss"].sum().backward()
    assert module.out.bias.grad[0] == 4


def test_tangent_is_warmed_up_and_normalised() -> None:
    tangent = Tangent(warmup=10, r_max=0.9, normalise=True, c=0.5)
    assert [round(tangent.r(step), 3) for step in (0, 5, 10, 99)] == [0.0, 0.45, 0.9, 0.9]
    g = normal(5, 7)
    close(tangent.tamed(g), g / (g.square().mean(1, keepdim=True).sqrt() + 0.5))


# --- parameterisations


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_output_and_mean_velocity_invert_each_other(name: str, path: str) -> None:
    (s, t), p, x, u = TIMES, PARAMETERISATIONS[name](), normal(64, 3), normal(64, 3, seed=1)
    schedule = PATHS[path]()
    close(p.mean_velocity(schedule, p.output(schedule, u, x, s, t), x, s, t), u, atol=1e-7, rtol=1e-9)


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "linear_vp"])
def test_maps_are_those_of_the_papers(path: str) -> None:
    (s, t), x, out, p = TIMES, normal(64, 3), normal(64, 3, seed=1), PATHS[path]()
    a, b = p(s), p(t)
    alpha_s, sigma_s, alpha_t, sigma_t = (k[:, None] for k in (a.alpha, a.sigma, b.alpha, b.sigma))

    def arrived(name: str) -> Any:
        return x + (t - s)[:, None] * PARAMETERISATIONS[name]().mean_velocity(p, out, x, s, t)

    close(arrived("endpoint"), sigma_t / sigma_s * x + (alpha_t - alpha_s * sigma_t / sigma_s) * out)
    n = (alpha_s**2 + sigma_s**2).sqrt()
    turned = (alpha_s * alpha_t + sigma_s * sigma_t) / n**2 * x + (alpha_t * sigma_s - alpha_s * sigma_t) / n * out
    close(arrived("trig"), turned)
    hat, data, low = sigma_s / alpha_s, 0.5, 0.002
    skip, gain = data**2 / ((hat - low) ** 2 + data**2), data * (hat - low) / (hat**2 + data**2).sqrt()
    one = torch.ones_like(t)
    end = x + (1 - s)[:, None] * OneTime().mean_velocity(p, out, x, s, one)
    close(end, skip * x / alpha_s + gain * out)
    close(OneTime().network_input(p, x, s), x / alpha_s / (hat**2 + data**2).sqrt())


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("name", ["mean_velocity", "endpoint", "trig"])
def test_what_a_velocity_says_is_the_velocity_on_the_diagonal(name: str, path: str) -> None:
    s, x, v, p, schedule = TIMES[0], normal(64, 3), normal(64, 3, seed=1), PARAMETERISATIONS[name](), PATHS[path]()
    close(p.mean_velocity(schedule, p.from_velocity(schedule, v, x, s), x, s, s), v, atol=1e-10, rtol=1e-10)


# --- several steps


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("gamma", [0.3, 0.9, 1.0])
def test_a_gamma_step_keeps_the_law(path: str, gamma: float) -> None:
    """Mean and covariance of noised-again points are those of the marginal, and the noise added is gamma sigma."""
    law, p = gaussian(path=path), PATHS[path]()
    mean, spread = torch.tensor(law.mean).double(), torch.tensor(law.covariance).double()
    t = torch.tensor(0.5, dtype=torch.float64)
    t_b = bridge(p, t, gamma)

    def moments(c: Any) -> Any:
        return c.alpha * mean, c.alpha**2 * spread + c.sigma**2 * torch.eye(3)

    def step(x: Any, noise: Any) -> Any:
        return renoise(p, x[None], t_b, t, noise[None])[0]

    zero = torch.zeros(3).double()
    scale, std = step(zero + 1, zero)[0], step(zero, zero + 1)[0]
    (mean_b, cov_b), (mean_t, cov_t) = moments(p(t_b)), moments(p(t))
    close(scale * mean_b, mean_t)
    close(scale**2 * cov_b + std**2 * torch.eye(3), cov_t)
    close(std, gamma * p(t).sigma)


def test_noise_between_steps_keeps_the_law_of_the_data() -> None:
    law = gaussian()
    zero = torch.zeros(20_000).double()
    x = on_path(law, zero)
    grid = torch.tensor([0.0, 0.4, 0.7, 1.0], dtype=torch.float64)
    y = travel(Exact(law), x, grid, None, Linear(), 0.8, lambda k: normal(20_000, 3, seed=50 + k))
    spread = torch.tensor(law.covariance).double()
    assert (y.T.cov() - spread).abs().max() < 0.12
    assert (y - travel(Exact(law), x, grid, None, Linear())).square().mean() > 0.1


def test_each_step_but_the_last_is_noised_again_by_noise_of_its_own() -> None:
    """Also where some noise is left at t = 1, as on ve."""
    law, asked = gaussian(path="ve"), []

    def fresh(k: int) -> Any:
        asked.append(k)
        return normal(8, 3, seed=k)

    x = PATHS["ve"]().start(normal(8, 3))
    travel(Exact(law), x, torch.tensor([0.0, 0.4, 0.7, 1.0], dtype=torch.float64), None, PATHS["ve"](), 0.8, fresh)
    assert asked == [0, 1]


@pytest.mark.parametrize("gamma", [0.5, 0.999])
def test_a_bridge_ends_where_the_path_does(gamma: float) -> None:
    """On ve some noise is left at t = 1: less than that there is none to go to, and the noise added makes up for it."""
    law, p, t = gaussian(path="ve"), PATHS["ve"](), torch.tensor(7 / 8, dtype=torch.float64)
    t_b = bridge(p, t, gamma)
    assert t <= t_b <= 1 and (t_b == 1) == (gamma == 0.999)
    noise = renoise(p, torch.zeros(1, 1).double(), t_b, t, torch.ones(1, 1).double()).square()
    close(noise.squeeze() + p(t_b).sigma ** 2, p(t).sigma ** 2)  # alpha is 1
    x, grid = p.start(normal(8, 3)), torch.tensor([0.0, 7 / 8, 1.0], dtype=torch.float64)
    assert travel(Exact(law), x, grid, None, p, gamma, lambda k: normal(8, 3)).isfinite().all()


def test_a_consistency_student_goes_to_the_data_and_back_to_each_time() -> None:
    space = DataSpace((3,))
    student = Student(NETWORKS["mlp"](width=8, depth=1).build(space), space, Linear(), "consistency").double()
    for index, parameter in enumerate(student.parameters()):
        parameter.data = 0.3 * normal(*parameter.shape, seed=index)
    x_0, zero = normal(8, 3, seed=40), torch.zeros(8, dtype=torch.float64)
    x = x_0
    for k, s in enumerate((0.0, 0.3, 0.8)):
        x = s * x + (1 - s) * normal(8, 3, seed=50 + k) if k else x
        x = student(x, zero + s, zero + 1)
    close(student.generate(x_0, 3, times=(0.3, 0.8), fresh=lambda k: normal(8, 3, seed=51 + k)), x)
    with pytest.raises(ValueError, match="pass fresh"):
        student.generate(x_0, 3)


def test_kinds_support_their_own_times() -> None:
    s = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.3, 0.5, 0.25])
    t = torch.tensor([1.0, 1.0, 0.5, 0.3, 0.3, 0.25, 0.75])
    expected = {
        "flow_map": [True, True, True, True, True, False, True],
        "consistency": [True, True, False, False, False, False, False],
        "shortcut": [True, True, True, False, True, False, False],
        "grid": [False, True, False, False, False, False, False],
        "velocity": [False, False, False, False, True, False, False],
    }
    for kind, allowed in expected.items():
        assert supported(kind, 2 if kind == "grid" else 8, s, t).tolist() == allowed, kind


@pytest.mark.parametrize(("kind", "finest", "steps"), [("grid", 1, 2), ("shortcut", 8, 3), ("shortcut", 8, 16)])
def test_steps_a_student_was_not_made_for_are_refused(kind: Any, finest: int, steps: int) -> None:
    with pytest.raises(ValueError, match="this student"):
        check_steps(kind, finest, steps)
    check_steps(kind, finest, finest)


# --- guidance


def conditional() -> tuple[Gaussian, Gaussian]:
    return gaussian(seed=0), gaussian(seed=20)


@pytest.mark.parametrize("mix", [None, 0.0, 0.4])
def test_the_guided_velocity_is_the_fixed_point_of_own_guidance(mix: float | None) -> None:
    labelled, unlabelled = conditional()
    cond = {"class": torch.zeros(64, dtype=torch.long)}
    batch = Batch(normal(64, 3), cond, ("",) * 64, null={"class": torch.tensor(1)})
    draw = FlowMatching().draw(batch, Linear(), Rows(0, "test", 0, 0, 64), 0)
    v, none = labelled.velocity(draw.x_s, draw.s), unlabelled.velocity(draw.x_s, draw.s)
    draw = type(draw)(**{**vars(draw), "velocity_s": v})  # E[v_c | x]
    guided = none + 2.5 * (v - none)

    def own(c: Any) -> Any:
        return guided if int(c["class"][0]) == 0 else none

    close(OwnGuidance(scale=2.5, mix=mix).velocity(own, draw), guided)
    close(OwnGuidance(scale=2.5, mix=mix, interval=(0.5, 1.0)).velocity(own, draw)[draw.s < 0.5], v[draw.s < 0.5])
    dropped = type(draw)(**{**vars(draw), "dropped": draw.s > 0.3})
    close(OwnGuidance(scale=2.5, mix=mix).velocity(own, dropped)[draw.s > 0.3], v[draw.s > 0.3])


@pytest.mark.parametrize(("mix", "direction"), [(0.4, "given"), (None, "given"), (None, "student"), (None, "head")])
def test_the_guided_flow_map_is_the_fixed_point_of_mean_flow(mix: float | None, direction: Any) -> None:
    """MeanFlow (mix = kappa, scale = omega / (1 - kappa)), improved and decoupled MeanFlow (mix = 1 - 1 / scale), with
    E[v_c | x] in the place of v_c."""
    labelled, unlabelled = conditional()

    def guided(x: Any, t: Any, c: Any) -> Any:
        v, none = labelled.velocity(x, t), unlabelled.velocity(x, t)
        return none + 2.5 * (v - none) if int(c["class"][0]) == 0 else none

    class Map:
        def mean_velocity(self, x: Any, s: Any, t: Any, c: Any) -> Any:
            """w(1), dw/dp = v(x + (t - s) w, s + p (t - s)): no division by the gap."""
            gap = t - s
            along = lambda w, p, _: guided(x + gap[:, None] * w, s + p * gap, c)  # noqa: E731
            return rk4(along, torch.zeros_like(x), uniform_grid(24))

    batch = Batch(
        normal(16, 3), {"class": torch.zeros(16, dtype=torch.long)}, ("",) * 16, null={"class": torch.tensor(1)}
    )

    def found(scale: float) -> float:
        objective = MeanFlow(source="data", direction=direction, guidance=OwnGuidance(scale=scale, mix=mix))
        draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, 16), 0)
        draw = replace(draw, velocity_s=labelled.velocity(draw.x_s, draw.s))
        head = {"head": guided} if objective.networks else {}
        result = objective.loss(Map(), Map(), None, draw, **head)  # type: ignore[arg-type]
        return max(v.max().item() for v in result.summands.values()) ** 0.5

    assert found(2.5) < 1e-5
    assert found(2.3) > 1e-2


def test_guided_teacher_moves_away_from_none_inside_the_interval() -> None:
    labelled, unlabelled = conditional()
    x, t = normal(64, 3), uniform(64, seed=4)

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        return labelled.velocity(x, t) if int(cond["class"][0]) == 0 else unlabelled.velocity(x, t)

    cond = {"class": torch.zeros(64, dtype=torch.long)}
    v, none = labelled.velocity(x, t), unlabelled.velocity(x, t)
    found = Guided(velocity, 2.0, (0.25, 0.75), {"class": torch.tensor(1)})(x, t, cond)
    inside = expand_like((t >= 0.25) & (t <= 0.75), x)
    close(found, v + inside * (v - none))
    scales = uniform(64, low=1.0, high=3.0, seed=5)
    found = Guided(velocity, 2.0, (0.0, 1.0), {"class": torch.tensor(1)})(x, t, {**cond, "guidance": scales})
    close(found, none + scales[:, None] * (v - none))
    weak = Guided(velocity, 2.0, weak=lambda x, t, cond: unlabelled.velocity(x, t))(x, t, cond)
    close(weak, 2 * v - none)
    close(Guided(velocity, 1.0, null={"class": torch.tensor(1)})(x, t, cond), v)


@pytest.mark.parametrize("path", ["cosine", "linear"])
@pytest.mark.parametrize("own", ["linear", "cosine"])
def test_a_weaker_teacher_guides_on_the_teachers_path(own: PathName, path: PathName) -> None:
    """Guidance is linear, so it may come before or after a change of path, wherever the weak one lives."""
    strong = Gaussian(mean=(0.0, 0.5), covariance=((1.0, 0.3), (0.3, 0.5))).load()
    guidance = Guidance(scale=1.7, weak=Gaussian(mean=(0.3, 0.0), covariance=((2.0, 0.0), (0.0, 3.0)), path=own))
    found = guidance.guide(change_of_path(strong, PATHS[path]()))
    x, t = normal(64, 2), uniform(64, low=0.05, high=0.95, seed=4)
    assert found.path == PATHS[path]()
    close(found(x, t, None), change_of_path(guidance.guide(strong), PATHS[path]())(x, t, None))
    assert (found(x, t, None) - change_of_path(strong, PATHS[path]())(x, t, None)).abs().max() > 0.1


def test_a_weaker_teacher_on_another_path_is_frozen_and_moved() -> None:
    teacher = Native(path="digits").load()
    found = Guidance(weak=Native(path="digits")).guide(change_of_path(teacher, PATHS["cosine"]()))
    assert len({id(part) for part in found.modules()}) == 2


def test_a_row_has_its_own_scale_and_interval() -> None:
    """Of a guided teacher, and of a model that guides itself (improved MeanFlow)."""
    labelled, unlabelled = conditional()
    low, high = uniform(64, high=0.5, seed=6), uniform(64, low=0.5, seed=7)
    scales = uniform(64, low=1.0, high=3.0, seed=5)
    cond = {"class": torch.zeros(64, dtype=torch.long), "guidance": scales, "guidance_low": low, "guidance_high": high}
    batch = Batch(normal(64, 3), cond, ("",) * 64, null={"class": torch.tensor(1)})
    draw = FlowMatching().draw(batch, Linear(), Rows(0, "test", 0, 0, 64), 0)
    x, t = draw.x_s, draw.s
    v, none = labelled.velocity(x, t), unlabelled.velocity(x, t)
    inside = (t >= low) & (t <= high)
    assert 10 < inside.sum() < 54
    scale = torch.where(inside, scales, 1.0)[:, None]

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        assert set(cond) == {"class"}  # a teacher knows nothing of guidance
        return labelled.velocity(x, t) if int(cond["class"][0]) == 0 else unlabelled.velocity(x, t)

    close(Guided(velocity, 9.0, (0.0, 0.1), {"class": torch.tensor(1)})(x, t, cond), none + scale * (v - none))
    own = OwnGuidance(interval=(0.0, 0.1)).velocity(lambda c: v if int(c["class"][0]) == 0 else none, draw)
    close(own, draw.velocity_s + (1 - 1 / scale) * (v - none))


@pytest.mark.parametrize("law", ["uniform", "log_uniform"])
def test_scales_and_intervals_are_drawn_by_their_laws(law: Any) -> None:
    rows = Rows(0, "guidance", 0, 0, 20_000)
    label = {"class": torch.arange(20_000) % 3}
    cond = Guidance(scale=2.0, scales=(1.5, 6.0), law=law, intervals=True).condition(label, rows)
    assert cond is not None and torch.equal(cond["class"], label["class"])
    scale = cond["guidance"].numpy()
    share = (scale - 1.5) / 4.5 if law == "uniform" else np.log(scale / 1.5) / np.log(4.0)
    for value in (share, 2 * cond["guidance_low"].numpy(), 2 * cond["guidance_high"].numpy() - 1):
        assert stats.kstest(value, "uniform").pvalue > 1e-3
    assert set(Guidance(scales=(1.0, 3.0)).condition(None, rows) or {}) == {"guidance"}
    assert Guidance().condition(label, rows) is label


def test_a_dropped_row_is_at_scale_one() -> None:
    cond = {"class": torch.zeros(64, dtype=torch.long), "guidance": torch.full((64,), 3.0, dtype=torch.float64)}
    batch = Batch(normal(64, 3), cond, ("",) * 64, null={"class": torch.tensor(1)})
    draw = FlowMatching(drop=0.5).draw(batch, Linear(), Rows(0, "test", 0, 0, 64), 0)
    assert draw.cond is not None and draw.dropped is not None
    assert torch.equal(draw.cond["guidance"] == 1.0, draw.dropped)
    assert 10 < draw.dropped.sum() < 54


def test_none_is_asked_at_the_scale_where_it_is_learned() -> None:
    """Dropped rows are at scale 1: w of a row at another scale must not ask for none there."""
    label = {"class": torch.zeros(64, dtype=torch.long)}
    cond = Guidance(scales=(1.5, 4.0), intervals=True).condition(label, Rows(0, "guidance", 0, 0, 64))
    batch = Batch(normal(64, 3), cond, ("",) * 64, null={"class": torch.tensor(1)})
    objective, asked = MeanFlow(source="data", drop=0.5), []

    class Asked(Exact):
        def mean_velocity(self, x_s: Any, s: Any, t: Any, cond: Any) -> Any:
            asked.append(cond)
            return super().mean_velocity(x_s, s, t, cond)

    draw = objective.draw(batch, Linear(), Rows(0, "test", 0, 0, 64), 0)
    student = Asked(gaussian())
    objective.loss(student, student, None, draw)
    nothing = [c for c in asked if (c["class"] == 1).all()]
    assert len(nothing) == 1 and (nothing[0]["guidance"] == 1).all()
    assert draw.cond is not None and (draw.cond["guidance"] > 1).any()
    for end in ("guidance_low", "guidance_high"):  # which dropped rows keep
        assert torch.equal(nothing[0][end], draw.cond[end])
