"""Laws of the times (s, t): their range, their densities, and the share of rows on the diagonal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logit

from distill.objectives.times import TIMES, LogitNormalSorted, TimeLaw, Uniform, UniformTriangle
from distill.rows import Rows
from teachers.fields import FieldError

COUNT = 20_000
Array = np.ndarray[tuple[int], np.dtype[np.float64]]


def drawn(law: TimeLaw, seed: int = 0) -> tuple[Array, Array]:
    s, t = law(Rows(seed, "test", 0, 0, COUNT))
    return s.numpy(), t.numpy()


def fits(sample: Array, cdf: Callable[[Array], Array]) -> bool:
    return bool(stats.kstest(sample, cdf).pvalue > 1e-3)


@pytest.mark.parametrize("name", TIMES)
def test_times_are_sorted_float64_in_the_unit_interval(name: str) -> None:
    times = TIMES[name]()(Rows(0, "test", 0, 0, COUNT))
    assert times.s.dtype == times.t.dtype == torch.float64
    assert times.s.shape == times.t.shape == (COUNT,)
    assert (times.s >= 0).all()
    assert (times.s <= times.t).all()
    assert (times.t <= 1).all()


@pytest.mark.parametrize("name", TIMES)
def test_times_are_those_of_the_rows(name: str) -> None:
    law = TIMES[name]()
    whole, part = law(Rows(3, "test", 7, 0, 100)), law(Rows(3, "test", 7, 40, 20))
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[40:60], b, atol=1e-15, rtol=1e-14)  # vector units round by position


def test_uniform_is_one_uniform_time() -> None:
    s, t = drawn(Uniform())
    assert (s == t).all()
    assert fits(s, stats.uniform.cdf)
    assert not fits(s**1.05, stats.uniform.cdf)


def lower(cdf: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The law of the smaller of two independent times."""
    return lambda x: 1 - (1 - cdf(x)) ** 2


def upper(cdf: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: cdf(x) ** 2


def flipped_logit_normal(mean: float, std: float) -> Callable[[Array], Array]:
    """The law of 1 - sigmoid(N(mean, std)): large where sigmoid is small."""
    return lambda x: stats.norm.sf(logit(1 - np.asarray(x)), mean, std)


SORTED: dict[str, tuple[Callable[[float], TimeLaw], Callable[[Array], Array]]] = {
    "uniform_triangle": (lambda share: UniformTriangle(diagonal=share), stats.uniform.cdf),
    "logitnormal_sorted": (lambda share: LogitNormalSorted(diagonal=share), flipped_logit_normal(-0.4, 1.0)),
    "logitnormal_sorted elsewhere": (
        lambda share: LogitNormalSorted(mean=0.7, std=0.5, diagonal=share),
        flipped_logit_normal(0.7, 0.5),
    ),
}


@pytest.mark.parametrize("name", SORTED)
def test_sorted_pairs_have_the_laws_of_minimum_and_maximum(name: str) -> None:
    law, cdf = SORTED[name]
    s, t = drawn(law(0.0))
    assert (s < t).all()
    assert fits(s, lower(cdf))
    assert fits(t, upper(cdf))
    assert not fits(s, cdf)  # the twin: unsorted
    assert not fits(t, lower(cdf))
    # undone by a coin, the pair is two independent draws
    swap = np.random.default_rng(0).random(COUNT) < 0.5
    first, second = np.where(swap, s, t), np.where(swap, t, s)
    assert fits(first, cdf)
    assert stats.spearmanr(first, second).pvalue > 1e-3


@pytest.mark.parametrize("name", SORTED)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_diagonal_collapses_the_end_of_its_share_of_rows(name: str, share: float) -> None:
    law, cdf = SORTED[name]
    s, t = drawn(law(share))
    assert (s == t).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / COUNT) ** 0.5)
    assert fits(s, lower(cdf))  # the start keeps its law, whichever rows collapse
    if 0 < share < 1:
        assert fits(s[s == t], lower(cdf))
        assert fits(t[s < t], upper(cdf))


def test_mean_gap_of_the_triangle_is_a_third() -> None:
    s, t = drawn(UniformTriangle(diagonal=0.0))
    assert fits(t - s, lambda g: 2 * g - g**2)
    assert (t - s).mean() == pytest.approx(1 / 3, abs=0.01)


def test_defaults_are_the_stated_ones() -> None:
    assert UniformTriangle().diagonal == 0.25
    assert (LogitNormalSorted().mean, LogitNormalSorted().std, LogitNormalSorted().diagonal) == (-0.4, 1.0, 0.75)


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (lambda: UniformTriangle(diagonal=-0.1), {"diagonal"}),
        (lambda: UniformTriangle(diagonal=1.1), {"diagonal"}),
        (lambda: UniformTriangle(diagonal=float("nan")), {"diagonal"}),
        (lambda: LogitNormalSorted(std=0.0, diagonal=2.0), {"std", "diagonal"}),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], TimeLaw], fields: set[str]) -> None:
    with pytest.raises(FieldError) as error:
        build()
    assert set(error.value.problems) == fields


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_law_without_finite_parameters_is_refused(field: str, bad: float) -> None:
    """It would make every time NaN, or all of them 0 or 1."""
    with pytest.raises(FieldError) as error:
        LogitNormalSorted(**{field: bad})
    assert set(error.value.problems) == {field}


def test_a_share_of_rows_starts_at_the_noise() -> None:
    rows = lambda: Rows(3, "times", 0, 0, 20_000)  # noqa: E731
    plain, moved = UniformTriangle(diagonal=0.0)(rows()), UniformTriangle(diagonal=0.0, noise=0.3)(rows())
    start = moved.s == 0
    assert start.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(moved.s[~start], plain.s[~start])
    assert torch.equal(moved.t, plain.t)
    assert UniformTriangle(diagonal=1.0, noise=0.1).two_times
    assert not UniformTriangle(diagonal=1.0).two_times
