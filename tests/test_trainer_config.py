"""The trainer's schedule and the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import normal
from torch import nn

from distill.evaluation.config import EvaluationConfig
from distill.training.config import TrackingConfig, TrainerConfig
from distill.training.ema import averaged
from teachers.fields import FieldError

# --- averaged weights


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_averages_follow_the_stated_decay(decay: float) -> None:
    """a_0 = w_0, then a <- b a + (1 - b) w with b = min(decay, (1 + n) / (10 + n)) after n updates."""
    student = nn.Linear(3, 2).double()
    model = averaged(student, decay)
    expected = None
    for n in range(40):
        with torch.no_grad():
            student.weight.copy_(normal(2, 3, seed=n))
        model.update_parameters(student)
        b = min(decay, (1 + n) / (10 + n))
        expected = student.weight.detach().clone() if expected is None else b * expected + (1 - b) * student.weight
        torch.testing.assert_close(model.module.weight, expected.detach(), atol=1e-14, rtol=0)
    assert decay == 0 or not torch.allclose(model.module.weight, student.weight)


def test_averages_are_frozen_and_apart_from_the_student() -> None:
    student = nn.Linear(3, 2)
    model = averaged(student, 0.9)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in student.parameters())
    before = model.module.weight.clone()
    with torch.no_grad():
        student.weight += 1
    assert torch.equal(model.module.weight, before)


# --- the learning rate


def test_warm_up_is_linear_and_ends_at_one() -> None:
    config = TrainerConfig(steps=100, warmup=10, schedule="constant")
    assert [config.lr_factor(step) for step in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert {config.lr_factor(step) for step in range(9, 100)} == {1.0}


def test_cosine_falls_from_one_to_nothing() -> None:
    config = TrainerConfig(steps=100, warmup=0)
    assert config.lr_factor(0) == 1
    assert config.lr_factor(50) == pytest.approx(0.5)
    assert config.lr_factor(100) == pytest.approx(0, abs=1e-15)
    assert config.lr_factor(200) == pytest.approx(0, abs=1e-15)
    for step in range(100):
        assert config.lr_factor(step) == pytest.approx(math.cos(math.pi * step / 200) ** 2)
        assert config.lr_factor(step) > config.lr_factor(step + 1)


def test_warm_up_and_cosine_multiply() -> None:
    with_warmup, without = TrainerConfig(steps=100, warmup=20), TrainerConfig(steps=100, warmup=0)
    for step in range(100):
        ramp = min(1, (step + 1) / 20)
        assert with_warmup.lr_factor(step) == pytest.approx(ramp * without.lr_factor(step))
    assert with_warmup.lr_factor(0) > 0  # the first step is not lost


# --- ranges


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (lambda: TrainerConfig(steps=0, warmup=0), {"steps"}),
        (lambda: TrainerConfig(steps=10, warmup=-1, batch=0), {"warmup", "batch"}),
        (lambda: TrainerConfig(steps=500, lr=0), {"lr"}),
        (lambda: TrainerConfig(steps=500, lr=math.inf, weight_decay=-1, clip=0), {"lr", "weight_decay", "clip"}),
        (lambda: TrainerConfig(steps=500, betas=(1.0, 0.5)), {"betas"}),
        (lambda: TrainerConfig(steps=500, ema=1.0, keep=0, checkpoint_every=0), {"ema", "keep", "checkpoint_every"}),
        (lambda: TrainerConfig(steps=500, ema=-0.1), {"ema"}),
        (lambda: TrackingConfig(log_every=0, samples_every=-1, project=""), {"log_every", "samples_every", "project"}),
        (lambda: EvaluationConfig(samples=1, batch=0, reference_steps=0), {"samples", "batch", "reference_steps"}),
        (lambda: EvaluationConfig(steps=(2, 1)), {"steps"}),
        (lambda: EvaluationConfig(steps=(1, 1)), {"steps"}),
        (lambda: EvaluationConfig(steps=(0, 1)), {"steps"}),
        (lambda: EvaluationConfig(steps=()), {"steps"}),
    ],
)
def test_out_of_range_fields_are_named_together(build: Callable[[], object], fields: set[str]) -> None:
    with pytest.raises(FieldError) as error:
        build()
    assert set(error.value.problems) == fields


def test_the_ends_of_the_ranges_are_allowed() -> None:
    TrainerConfig(steps=1, batch=1, warmup=1, ema=0, betas=(0, 0), weight_decay=0, keep=1, checkpoint_every=1)
    TrackingConfig(log_every=1, samples_every=0)
    EvaluationConfig(samples=2, batch=1, steps=(1,), reference_steps=1)
