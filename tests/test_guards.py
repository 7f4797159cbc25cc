"""What is refused before it can do harm, and that what is measured is what is delivered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import problems
from torch import Tensor

from distill.objectives.base import Loss
from distill.sampling import generate
from distill.student import Student
from teachers import DataSpace, Teacher
from teachers.fields import FieldError
from teachers.networks import MLPConfig
from teachers.path import Linear
from teachers.space import Embedding

IMAGES = DataSpace(shape=(1, 4, 4), classes=3, value_range=(-1.0, 1.0))


def student(kind: Any = "flow_map") -> Student:
    network = MLPConfig(width=8, depth=1).build(IMAGES)
    for value in network.parameters():
        torch.nn.init.normal_(value, std=1.0)
    return Student(network, IMAGES, Linear(), kind).eval().requires_grad_(False)


@pytest.mark.parametrize("wrong", [lambda x: x[:, :1], lambda x: x.double(), lambda x: x.sum(0)])
def test_a_velocity_of_another_shape_or_dtype_is_refused(wrong: Any) -> None:
    teacher = Teacher(velocity=lambda x, t, cond: wrong(x), space=DataSpace(shape=(2,)))
    with pytest.raises(ValueError, match="must have the point's dtype and shape"):
        teacher(torch.zeros(3, 2), torch.zeros(3), None)


@pytest.mark.parametrize(("said", "kind"), [(lambda x: (-x,), "tuple"), (lambda x: (-x).numpy(), "ndarray")])
def test_a_velocity_that_is_no_tensor_is_told(said: Any, kind: str) -> None:
    teacher = Teacher(velocity=lambda x, t, cond: said(x), space=DataSpace(shape=(2,)), info={"id": "mine"})
    with pytest.raises(ValueError, match=rf"teacher mine: its velocity is a {kind} at a point .* must be a tensor"):
        teacher(torch.randn(3, 2), torch.rand(3), None)


def test_a_space_given_as_lists_is_the_same() -> None:
    assert DataSpace([1, 4, 4], 3, [-1.0, 1.0]) == IMAGES  # type: ignore[arg-type]
    assert hash(DataSpace(torch.Size([1, 4, 4]), 3, (-1.0, 1.0))) == hash(IMAGES)
    assert Embedding("text", [3, 4]) == Embedding("text", (3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [2, (), (0,), (2.0,), "ab", None, [[2]]], ids=repr)
def test_a_shape_that_is_none_is_told(shape: Any) -> None:
    with pytest.raises(FieldError, match=r"DataSpace.shape must be sizes of at least 1, as \(2,\)"):
        DataSpace(shape)


@pytest.mark.parametrize("value_range", [1, (0,), (0, 1, 2), (1, 0), ("0", "1")], ids=repr)
def test_a_range_that_is_none_is_told(value_range: Any) -> None:
    with pytest.raises(FieldError, match=r"DataSpace.value_range must be None or \(low, high\)"):
        DataSpace((2,), value_range=value_range)


def test_a_network_comes_with_its_entry() -> None:
    network = MLPConfig(width=8, depth=1).build(IMAGES)
    with pytest.raises(FieldError, match="together with network"):
        Teacher(velocity=network, space=IMAGES, network=network)
    with pytest.raises(FieldError, match=r"teachers\.networks"):
        Teacher(velocity=network, space=IMAGES, network=torch.nn.Linear(1, 1), network_config={"name": "mlp"})


@pytest.mark.parametrize("per_sample", [torch.zeros(()), torch.zeros(3, 2), torch.zeros(2), torch.zeros(3)])
def test_a_loss_is_one_number_a_sample_with_a_gradient(per_sample: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a loss (is per sample|needs a gradient)"):
        Loss(per_sample.requires_grad_(per_sample.shape != (3,))).check(3)
    Loss(torch.zeros(3, requires_grad=True)).check(3)


@pytest.mark.parametrize(
    ("recipe", "overrides", "key"),
    [
        ("toy/lagrangian", ["objective.times.name=uniform"], "objective.times"),
        ("toy/eulerian", ["objective.times.diagonal=1"], "objective.times"),
        ("teachers/digits", ["objective.times.name=uniform_triangle"], "objective.times"),
        ("toy/lagrangian", ["evaluation.features=digits"], "evaluation.features"),
        ("toy/lagrangian", ["name='   '"], "name"),
        ("toy/lagrangian", [f"name={'x' * 201}"], "name"),
        ("toy/lagrangian", ["seed=-1"], "seed"),
        ("toy/lagrangian", ["trainer.threads=0"], "trainer.threads"),
        ("toy/lagrangian", ["teacher.means=[[.nan, 0, 1], [0, 0, 1]]"], "teacher.means"),
    ],
)
def test_what_cannot_work_is_a_problem_of_its_key(recipe: str, overrides: list[str], key: str) -> None:
    (message,) = problems(recipe, *overrides)
    assert f" {key}: " in message


def test_an_anchor_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text("name: a\ntrainer: &a {steps: *a}\n")
    (message,) = problems(file)
    assert "refers to itself" in message


def test_what_is_measured_is_what_is_delivered() -> None:
    model = student()
    delivered = model.sample(7, steps=2, seed=3)
    measured = generate(lambda x_0, cond, fresh: model.generate(x_0, 2, cond), IMAGES, 7, 7, 3).x
    assert torch.equal(delivered, measured)
    assert delivered.abs().max() == 1.0  # something was clamped, or this shows nothing


def test_an_exported_student_refuses_times_it_was_not_made_for() -> None:
    x, zero, one, cond = torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.ones(2), {"class": torch.tensor([0, 1])}
    flow_map, velocity = student(), student("velocity")
    for model in (flow_map, velocity):
        model.config = {"steps": [1]}
    flow_map(x, zero, one, cond)
    velocity.mean_velocity(x, zero, zero, cond)
    with pytest.raises(ValueError, match="made for 0 <= s <= t <= 1"):
        flow_map(x, one, zero, cond)
    with pytest.raises(ValueError, match="made for s = t"):
        velocity(x, zero, one, cond)
    euler = velocity.generate(x, 1, cond)
    assert torch.equal(euler, x + velocity.mean_velocity(x, zero, zero, cond))
