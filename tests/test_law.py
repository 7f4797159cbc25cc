"""Data drawn from an analytic teacher's own law."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from helpers import LAWS, gaussian
from scipy import stats

from distill.data.law import TeacherLaw
from distill.data.manifest import DataError
from distill.objectives.base import Batch
from teachers.fields import FieldError
from teachers.path import Linear
from teachers.space import DataSpace
from teachers.velocity import Teacher


@pytest.mark.parametrize("name", LAWS)
def test_batches_are_a_function_of_seed_and_step(name: str) -> None:
    reader = TeacherLaw().open(LAWS[name]("linear").load())

    def batch(seed: int, step: int) -> Batch:
        return next(reader.batches(seed, 50, step))

    third = list(islice(reader.batches(1, 50, 0), 4))[3]
    assert torch.equal(third.x_1, batch(1, 3).x_1)
    assert third.keys == batch(1, 3).keys
    assert third.keys[:2] == ("3/0", "3/1")
    assert not torch.equal(batch(1, 4).x_1, third.x_1)
    assert not torch.equal(batch(2, 3).x_1, third.x_1)
    assert third.x_1.dtype == torch.float32
    assert third.cond is None


def test_samples_have_the_law() -> None:
    law = gaussian(2)
    reader = TeacherLaw(samples=5000).open(law.load())
    x, labels = reader.everything()
    assert labels is None
    assert x.shape == (5000, 2)
    for row in range(2):
        cdf = stats.norm(law.mean[row], law.covariance[row][row] ** 0.5).cdf
        assert stats.kstest(x[:, row].double().numpy(), cdf).pvalue > 1e-3
    assert torch.equal(reader.everything()[0], x)
    assert reader.space == DataSpace((2,))
    assert reader.digest == f"law {law.load().info['digest']}, 5000 samples"


def test_a_teacher_without_a_law_is_refused() -> None:
    nothing = Teacher(velocity=lambda x, t, cond: x, space=DataSpace((2,)), path=Linear())
    for teacher in (None, nothing):
        with pytest.raises(DataError, match=r"teacher_law needs an analytic teacher.*name shards instead"):
            TeacherLaw().open(teacher)
    with pytest.raises(FieldError):
        TeacherLaw(samples=1)
