"""The student: it starts exactly at its teacher, is the identity at s = t, and learns its second time at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Exact, compose, gaussian, normal, on_path, uniform
from torch import nn

from distill.flow_map import SUPPORTS, jump
from distill.parameterisation import Endpoint, OneTime, Trig
from distill.student import StudentConfig
from teachers.networks import NETWORKS
from teachers.path import PATHS, Cosine, Linear
from teachers.space import DataSpace
from teachers.velocity import Teacher, data_from_velocity

SPACE = DataSpace((1, 8, 8), 10, (-1.0, 1.0))
NETWORK = {"name": "mlp", "width": 24, "depth": 2}
networks = pytest.mark.parametrize("name", NETWORKS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def teacher(name: str = "mlp", space: DataSpace = SPACE) -> Teacher:
    """A trained-looking network teacher: no weight is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]().build(space)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    network.eval().requires_grad_(False)

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        return network(x, t, cond)

    return Teacher(
        velocity=velocity,
        space=space,
        path=Cosine(),
        network=network,
        network_config={"name": name},
        info={"id": "test"},
    )


def batch(b: int = 16) -> tuple[Any, Any, Any, Any]:
    s = uniform(b, high=0.9, seed=1)
    t = s + uniform(b, seed=2) * (1 - s)
    t[:3] = s[:3]
    return normal(b, *SPACE.shape).float(), s, t, SPACE.cond_for(0, b)


# --- the start


@networks
@dtypes
def test_student_is_its_teacher_bit_for_bit_at_the_start(name: str, dtype: torch.dtype) -> None:
    """u(x, s, t) = v(x, s) for every t, classes and all."""
    given = teacher(name)
    student = StudentConfig().build(given, SPACE, seed=0)
    x, s, t, cond = batch()
    for end in (s, t, torch.ones_like(s)):
        u = student.mean_velocity(x, s.to(dtype), end.to(dtype), cond)
        assert u.dtype == torch.float32
        assert torch.equal(u, given(x, s.to(dtype), cond))
    assert given(x, s.to(dtype), cond).abs().max() > 0.1


FORMS = [
    *(StudentConfig(split=split) for split in (0, 1, 2)),
    *(StudentConfig(parameterisation=p, split=s) for p in (Endpoint(), Trig(sigma_data=0.7)) for s in (None, 1)),
]


@networks
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["flow_map", "shortcut", "grid"])
def test_every_form_starts_at_its_teachers_velocity(name: str, form: StudentConfig, kind: Any) -> None:
    """u(x, s, s) = v(x, s); by depth the blocks that see t differ, a parameterisation converts what is predicted."""
    given = teacher(name)
    student = form.build(given, SPACE, 0, kind).double()
    assert not student.own_output
    given.network.double()
    x, s, t, cond = batch()
    v = given.velocity(x.double(), s, cond)
    torch.testing.assert_close(student.velocity(x.double(), s, cond), v, atol=1e-12, rtol=1e-12)
    assert (student.mean_velocity(x.double(), s, t, cond)[3:] - v[3:]).abs().max() > 1e-6


@networks
@pytest.mark.parametrize("parameterisation", [Endpoint(), Trig(sigma_data=0.7), OneTime(sigma_data=0.7, sigma_min=0.0)])
def test_a_consistency_student_starts_at_its_teachers_denoiser(name: str, parameterisation: Any) -> None:
    """X_{s,1}(x) = E[x_1 | x_s = x]: where all of these send a point whose velocity is known."""
    given = teacher(name)
    student = StudentConfig(parameterisation=parameterisation).build(given, SPACE, 0, "consistency").double()
    given.network.double()
    x, s, _, cond = batch()
    x = x.double()
    end = data_from_velocity(given.path, given.velocity(x, s, cond), x, s)
    torch.testing.assert_close(student(x, s, torch.ones_like(s), cond), end, atol=1e-9, rtol=1e-9)


@networks
def test_last_layer_of_the_gap_alone_is_zero(name: str) -> None:
    given = teacher(name)
    student = StudentConfig().build(given, SPACE, seed=0)
    assert student.gap is not None
    zero = {key for key, value in student.gap.named_parameters() if not value.any()}
    assert zero == {"out.weight", "out.bias"}
    for key, value in student.gap.named_parameters():
        if key not in zero:
            assert torch.equal(value, given.network.time_embedding.get_parameter(key))
            assert value.data_ptr() != given.network.time_embedding.get_parameter(key).data_ptr()


@networks
def test_the_gap_learns_from_the_first_step_on(name: str) -> None:
    """The last layer at step 0, the layers below it after one step; the teacher stays as it was."""
    given = teacher(name)
    before = {k: v.clone() for k, v in given.network.state_dict().items()}
    student = StudentConfig().build(given, SPACE, seed=0)
    assert student.gap is not None
    x, s, t, cond = batch()

    def gradients() -> dict[str, Any]:
        student.zero_grad()
        (student(x, s, t, cond) - x.roll(1, 0)).square().mean().backward()
        return {k: p.grad.abs().max().item() for k, p in student.gap.named_parameters()}

    first = gradients()
    assert first["out.weight"] > 0
    assert first["hidden.weight"] == 0
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert min(gradients().values()) > 0
    at = student.mean_velocity(x, s, s, cond)
    assert not torch.equal(student.mean_velocity(x, s, t, cond)[3:], at[3:])  # the end time is seen now
    assert all(torch.equal(value, before[k]) for k, value in given.network.state_dict().items())
    assert all(p.grad is None for p in given.network.parameters())
    assert not given.network.training
    assert student.network.training
    assert all(p.requires_grad for p in student.parameters())


# --- the map


@networks
@pytest.mark.parametrize("kind", SUPPORTS)
def test_jump_at_equal_times_is_the_identity(name: str, kind: Any) -> None:
    student = StudentConfig().build(teacher(name), SPACE, 0, kind)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, s, t, cond = batch()
    assert torch.equal(student(x, s, s, cond), x)
    assert (student(x, s, t, cond)[3:] - x[3:]).abs().amax((1, 2, 3)).min() > 1e-3


def test_jump_is_the_point_plus_the_gap_times_the_mean_velocity() -> None:
    x, u, s, t = normal(5, 2, 2), normal(5, 2, 2, seed=1), uniform(5), uniform(5, seed=1)
    for i in range(5):
        torch.testing.assert_close(jump(x, s, t, u)[i], x[i] + (t[i] - s[i]) * u[i])
    assert jump(x.float(), s, t, u.float()).dtype == torch.float32


@networks
def test_gap_embedding_is_given_the_gap(name: str) -> None:
    """u(x, s, t) = network(x, s, shift = gap(t - s))."""
    student = StudentConfig().build(teacher(name), SPACE, seed=0)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert student.gap is not None
    x, s, t, cond = batch()
    expected = student.network(x, s, cond, student.gap(t - s))
    assert torch.equal(student.mean_velocity(x, s, t, cond), expected)
    torch.testing.assert_close(student(x, s, t, cond), jump(x, s, t, expected))


@networks
def test_velocity_student_knows_one_time(name: str) -> None:
    student = StudentConfig().build(teacher(name), SPACE, 0, "velocity")
    assert student.gap is None
    assert set(dict(student.named_parameters())) == {
        f"network.{k}" for k, _ in teacher(name).network.named_parameters()
    }
    x, s, t, cond = batch()
    assert torch.equal(student.mean_velocity(x, s, t, cond), student.mean_velocity(x, s, s, cond))
    torch.testing.assert_close(student(x, s, t, cond), jump(x, s, t, student.network(x, s, cond)))


def test_supports() -> None:
    s = torch.tensor([0.0, 0.2, 0.5, 0.6, -0.1, 0.5, 1.0, -0.1, 1.1])
    t = torch.tensor([1.0, 0.7, 0.5, 0.5, 0.5, 1.1, 1.0, -0.1, 1.1])
    both = StudentConfig().build(teacher(), SPACE, seed=0)
    assert both.supports(s, t).tolist() == [True, True, True, False, False, False, True, False, False]
    one = StudentConfig().build(teacher(), SPACE, 0, "velocity")
    assert one.supports(s, t).tolist() == [False, False, True, False, False, False, True, False, False]


@pytest.mark.parametrize("path", PATHS)
def test_composition_of_exact_maps_is_the_exact_map(path: str) -> None:
    law = gaussian(path=path)
    grid = torch.tensor([0.05, 0.2, 0.25, 0.7, 0.9], dtype=torch.float64)
    s, t = grid[:1].expand(32), grid[-1:].expand(32)
    x = on_path(law, s)
    torch.testing.assert_close(compose(Exact(law), x, grid), law.flow_map(x, s, t), atol=1e-12, rtol=0)
    torch.testing.assert_close(compose(Exact(law), x, grid[:1]), x)
    assert (compose(Exact(law), x, grid[:-1]) - law.flow_map(x, s, t)).abs().max() > 0.05


def test_composition_passes_conditioning_to_each_call() -> None:
    seen: list[tuple[float, float, Any]] = []

    class Recorder(Exact):
        def __call__(self, x_s: Any, s: Any, t: Any, cond: Any) -> Any:
            seen.append((float(s[0]), float(t[0]), cond))
            return x_s

    compose(Recorder(gaussian()), normal(2, 3), torch.tensor([0.0, 0.5, 1.0]), {"class": torch.arange(2)})
    assert [entry[:2] for entry in seen] == [(0.0, 0.5), (0.5, 1.0)]
    assert all(entry[2] is not None for entry in seen)


# --- building


def test_random_start_is_a_function_of_the_seed() -> None:
    config = StudentConfig(init="random", network=NETWORKS["mlp"](width=24, depth=2))
    before = torch.random.get_rng_state()
    first, again, other = (config.build(None, SPACE, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    elsewhere = config.build(None, SPACE, 1).state_dict()
    torch.random.set_rng_state(before)
    assert all(torch.equal(first[k], again[k]) and torch.equal(first[k], elsewhere[k]) for k in first)
    assert not torch.equal(first["network.enter.weight"], other["network.enter.weight"])


def test_random_start_takes_what_is_open_from_the_teacher() -> None:
    given = teacher()
    student = StudentConfig(init="random").build(given, SPACE, seed=0)
    assert student.path == Cosine()
    shapes = {k: v.shape for k, v in student.network.state_dict().items()}
    assert shapes == {k: v.shape for k, v in given.network.state_dict().items()}
    assert not torch.equal(student.network.enter.weight, given.network.enter.weight)
    assert StudentConfig(init="random").network_config(given) == NETWORKS["mlp"]()
    own = NETWORKS["mlp"](width=8)
    assert StudentConfig(init="random", network=own).network_config(given) is own


def test_path_is_the_recipes_or_the_teachers_or_linear() -> None:
    network = NETWORKS["mlp"](width=8)
    assert StudentConfig(init="random", network=network).build(None, SPACE, 0).path == Linear()
    assert StudentConfig(init="random", network=network, path="cosine").build(None, SPACE, 0).path == Cosine()
    assert StudentConfig().build(teacher(), SPACE, 0).path == Cosine()


@pytest.mark.parametrize("kind", SUPPORTS)
def test_every_kind_says_what_it_supports(kind: Any) -> None:
    student = StudentConfig().build(teacher(), SPACE, 0, kind, 8)
    assert student.kind == kind and student.finest == 8 and "{" not in student.support
