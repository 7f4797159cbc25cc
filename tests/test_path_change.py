"""A teacher on another path is the analytic teacher of the same data there; over all pairs of PATHS."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import gaussian, gaussian_mixture, mixture, near, normal, on_path, uniform
from torch import Tensor, nn

from teachers.networks import NETWORKS
from teachers.path import PATHS, VE, VP, Path
from teachers.path_change import on_path as changed
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

PAIRS = [(own, wanted) for own in PATHS for wanted in PATHS if own != wanted]
pairs = pytest.mark.parametrize(("own", "wanted"), PAIRS, ids=[" to ".join(pair) for pair in PAIRS])
ROUNDING = 1e-13


def times_of(path: str, low: float, high: float, seed: int = 0, rows: int = 64) -> Tensor:
    """Times ``[rows]`` whose angles, hence noise levels, are in [low, high]: 0.01 to 1.55 lie on every path."""
    return PATHS[path]().time_at(uniform(rows, low=low, high=high, seed=seed))


def two_times(path: str) -> tuple[Tensor, Tensor]:
    """s < t."""
    return times_of(path, 0.9, 1.55, seed=3), times_of(path, 0.01, 0.7, seed=4)


@pairs
@pytest.mark.parametrize("law", [gaussian, mixture, gaussian_mixture], ids=["gaussian", "mixture", "gaussian_mixture"])
def test_velocity_is_that_of_the_data_on_the_wanted_path(law: type, own: str, wanted: str) -> None:
    moved, there = changed(law(path=own).load(), PATHS[wanted]()), law(path=wanted)
    assert moved.path.name == wanted
    t = times_of(wanted, 0.01, 1.55)
    x = on_path(there, t)
    near(moved(x, t, None), there.velocity(x, t), ROUNDING)
    for twin in (law(path=own), gaussian(x.shape[1], wanted, seed=9)):  # not moved, and of other data
        assert (twin.velocity(x, t) - there.velocity(x, t)).abs().max() > 1e-2


@pairs
@pytest.mark.parametrize(("law", "tolerance"), [(gaussian, ROUNDING), (mixture, 1e-9)], ids=["gaussian", "mixture"])
def test_flow_map_is_that_of_the_data_on_the_wanted_path(law: type, tolerance: float, own: str, wanted: str) -> None:
    moved, there = changed(law(path=own).load(), PATHS[wanted]()), law(path=wanted)
    assert moved.flow_map is not None
    early, late = two_times(wanted)
    for s, t in ((early, late), (late, early)):
        x = on_path(there, s)
        expected = there.flow_map(x, s, t)
        near(moved.flow_map(x, s, t), expected, tolerance)
        assert (law(path=own).flow_map(x, s, t) - expected).abs().max() > 1e-2  # the twin
    near(moved.flow_map(x, s, s), x, 1e-15)


@pairs
def test_flow_map_follows_the_velocity(own: str, wanted: str) -> None:
    """One is the flow of the other, also beyond the noise levels of the teacher's path; derivatives in x, s and t."""
    moved = changed(gaussian(path=own).load(), PATHS[wanted]())
    assert moved.flow_map is not None
    s, t = uniform(64, high=0.4, seed=3), uniform(64, low=0.5, high=0.9999, seed=4)
    s[0] = 0
    x, one = on_path(gaussian(path=wanted), s), torch.ones_like(s)
    x_t, dx_dt = torch.func.jvp(lambda t: moved.flow_map(x, s, t), (t,), (one,))
    near(dx_dt, moved(x_t, t, None), 1e-11)
    assert (dx_dt - 1.01 * moved(x_t, t, None)).abs().max() > 1e-3
    still = torch.func.jvp(lambda x, s: moved.flow_map(x, s, t), (x, s), (moved(x, s, None), one))[1]
    near(still, 0.0, 1e-11)


@pairs
def test_velocity_is_differentiable_in_point_and_time(own: str, wanted: str) -> None:
    moved, there = changed(gaussian(path=own).load(), PATHS[wanted]()), gaussian(path=wanted)
    t = times_of(wanted, 0.05, 1.5)
    x, tangents = on_path(there, t), (normal(64, 3, seed=5), torch.ones_like(t))
    got, expected = (
        torch.func.jvp(lambda x, t, v=v: v(x, t, None), (x, t), tangents)[1] for v in (moved, there.velocity)
    )
    near(got, expected, 1e-11)


@pytest.mark.parametrize("wanted", ["linear", "cosine", "linear_vp"])
@pytest.mark.parametrize("own", PATHS)
def test_sampling_is_unchanged_up_to_the_scale_of_the_ends(own: str, wanted: str) -> None:
    """From pure noise to data is from start to end on the teacher's path too, wherever that starts and ends."""
    law, path = gaussian(path=own), PATHS[wanted]()
    flow_map = changed(law.load(), path).flow_map
    assert flow_map is not None
    zero, one = torch.zeros(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    x_0 = normal(64, 3)
    sample = flow_map(path.start(x_0), zero, one)
    norm_0, norm_1 = PATHS[own]()(zero[:1]).norm, PATHS[own]()(one[:1]).norm  # those of the wanted path are 1
    near(sample, law.flow_map(norm_0 * x_0, zero, one) / norm_1, ROUNDING)
    near(sample, law.flow_map(PATHS[own]().start(x_0), zero, one), 1e-3)  # what sampling there gives
    assert (sample - law.flow_map(norm_0 * x_0, zero, 0.5 * one) / norm_1).abs().max() > 1e-2  # the twin


@pytest.mark.parametrize("wanted", ["linear", "cosine", "ve"])
@pytest.mark.parametrize("own", ["linear", "vp", "linear_vp"])
def test_velocity_has_a_value_at_the_data(own: str, wanted: str) -> None:
    """Also for a teacher on a path whose sigma' is infinite there."""
    moved, there = changed(gaussian(path=own).load(), PATHS[wanted]()), gaussian(path=wanted)
    one = torch.ones(64, dtype=torch.float64)
    x = on_path(there, one)
    near(moved(x, one, None), there.velocity(x, one), 1e-9)
    assert (moved(x, one, None) - there.velocity(x, 0.9 * one)).abs().max() > 1e-3  # the twin


@pytest.mark.parametrize("own", ["vp", "ve"])
def test_beyond_the_noise_of_its_path_a_teacher_is_asked_within_it(own: str) -> None:
    """There a point changes its scale alone: v = (N' / N) x; and the teacher sees times in [0, 1]."""
    asked: list[tuple[Tensor, Tensor]] = []

    def velocity(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        asked.append((x, t))
        return torch.full_like(x, 7.0)

    moved = changed(Teacher(velocity=velocity, space=DataSpace((3,)), path=PATHS[own]()), PATHS["linear"]())
    t = torch.tensor([0.0, 1e-3, 5e-3, 0.5], dtype=torch.float64)
    x, norm = normal(4, 3), (t**2 + (1 - t) ** 2).sqrt()
    scaled = ((2 * t - 1) / norm**2)[:, None] * x
    v = moved(x, t, None)
    near(v[:3], scaled[:3], 1e-14)
    assert (v - scaled)[3].abs().min() > 1e-2  # the twin: within
    ((x_own, r),) = asked
    assert torch.equal(r[:3], torch.zeros(3, dtype=torch.float64))
    assert 0.1 < r[3] < 0.9
    near(x_own / PATHS[own]()(r).norm[:, None], x / norm[:, None], 1e-14)


def test_fields_of_a_path_make_another_path() -> None:
    for own, wanted in ((VP(), VP(beta_1=12.0)), (VE(), VE(sigma_max=60.0, rho=5))):
        teacher = Teacher(velocity=lambda x, t, cond: x, space=DataSpace((3,)), path=own)
        assert changed(teacher, type(own)()) is teacher
        assert changed(teacher, wanted).path == wanted
        x, t = normal(8, 3), uniform(8, low=0.1, high=0.9)
        assert not torch.equal(changed(teacher, wanted)(x, t, None), teacher(x, t, None))


@pairs
def test_there_and_back_is_where_it_was(own: str, wanted: str) -> None:
    teacher = gaussian(path=own).load()
    back = changed(changed(teacher, PATHS[wanted]()), PATHS[own]())
    t = times_of(own, 0.01, 1.55)
    x = on_path(gaussian(path=own), t)
    near(back(x, t, None), teacher(x, t, None), ROUNDING)


# --- what a teacher is besides its velocity


class Labelled(nn.Module):
    """Knows its label and the dtype of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert t.dtype == torch.float64
        assert cond is not None
        return self.scale * x * cond["class"][:, None]


@pytest.mark.parametrize("path", [Path for name, Path in PATHS.items() if name != "linear"])
def test_conditioning_is_passed_on_and_points_keep_their_dtype(path: type[Path]) -> None:
    moved = changed(Teacher(velocity=Labelled(), space=DataSpace((3,), classes=9)), path())
    x, t = normal(8, 3).float(), uniform(8, low=0.1, high=0.9)
    cond = {"class": torch.arange(8)}
    v = moved(x, t.float(), cond)
    assert v.dtype == torch.float32
    steady = moved(x, t, {"class": torch.zeros(8)})
    slope = moved(x, t, {"class": torch.ones(8)}) - steady
    near(moved(x, t, cond), steady + torch.arange(8)[:, None] * slope, 1e-5)
    assert slope.abs().min() > 0
    analytic = changed(gaussian().load(), path())
    assert analytic.flow_map is not None
    assert analytic.flow_map(x, t, t / 2).dtype == torch.float32


def test_the_network_is_no_start_for_a_student_but_is_frozen_and_moved() -> None:
    config = {"name": "mlp", "width": 8, "depth": 1}
    network = NETWORKS["mlp"](width=8, depth=1).build(DataSpace((3,)))
    teacher = Teacher(
        velocity=partial(lambda network, x, t, cond: network(x, t, cond), network),
        space=DataSpace((3,)),
        network=network.train().requires_grad_(True),
        network_config=config,
        info={"id": "mine"},
    )
    moved = changed(teacher, VP())
    assert moved.network is None
    assert moved.network_config is None
    assert moved.info == teacher.info
    assert moved.space == teacher.space
    moved.freeze()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    moved.to(torch.device("meta"))
    assert all(p.is_meta for p in network.parameters())


def test_a_velocity_that_is_a_module_is_frozen_and_moved() -> None:
    velocity = Labelled()
    moved = changed(changed(Teacher(velocity=velocity, space=DataSpace((3,))), VP()), VE())
    moved.freeze()
    assert not velocity.scale.requires_grad
    moved.to(torch.device("meta"))
    assert velocity.scale.is_meta


def test_what_else_is_known_of_a_teacher_stays() -> None:
    law = gaussian().load()
    moved = changed(law, VP())
    assert moved.data == law.data
    assert replace(moved, velocity=law.velocity, path=law.path, flow_map=law.flow_map) == law
    assert changed(replace(law, flow_map=None), VP()).flow_map is None
