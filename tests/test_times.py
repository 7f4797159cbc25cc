"""Laws of the times (s, t): their range, their densities, and the share of rows on the diagonal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import erf, logit

from distill.objectives.times import (
    TIMES,
    DecoupledSorted,
    Dyadic,
    EasyConsistency,
    EDMLogNormal,
    GapTruncated,
    GapUniform,
    Grid,
    LogitNormal,
    LogitNormalIndependent,
    LogitNormalSorted,
    Shifted,
    TimeLaw,
    Uniform,
    UniformTriangle,
)
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


Laws = dict[str, tuple[Callable[[float], TimeLaw], Callable[[Array], Array]]]
"""By the share on the diagonal, with the law of a time."""
SORTED: Laws = {
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


@pytest.mark.parametrize("name", [name for name in SORTED if name != "uniform_triangle"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_diagonal_collapses_the_end_of_its_share_of_rows(name: str, share: float) -> None:
    law, cdf = SORTED[name]
    s, t = drawn(law(share))
    assert (s == t).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / COUNT) ** 0.5)
    assert fits(s, lower(cdf))  # the start keeps its law, whichever rows collapse
    if 0 < share < 1:
        assert fits(s[s == t], lower(cdf))
        assert fits(t[s < t], upper(cdf))


OWN: Laws = {
    "uniform_triangle": SORTED["uniform_triangle"],
    "gap_truncated": (lambda share: GapTruncated(diagonal=share), flipped_logit_normal(-0.4, 1.0)),
    "gap_truncated elsewhere": (
        lambda share: GapTruncated(end_mean=0.7, end_std=0.5, diagonal=share),
        flipped_logit_normal(0.7, 0.5),
    ),
    "dmf": (lambda share: DecoupledSorted(diagonal=share), flipped_logit_normal(0.0, 1.0)),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_diagonal_drawn_on_its_own_leaves_the_other_rows_as_they_are(name: str, share: float) -> None:
    law, cdf = OWN[name]
    (s, t), (plain_s, plain_t) = drawn(law(share)), drawn(law(0.0))
    on = s == t
    assert on.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / COUNT) ** 0.5)
    assert fits(s[on], cdf)
    assert not fits(plain_s, cdf)  # the twin: collapsed onto the start
    np.testing.assert_array_equal(s[~on], plain_s[~on])
    np.testing.assert_array_equal(t[~on], plain_t[~on])


def test_mean_gap_of_the_triangle_is_a_third() -> None:
    s, t = drawn(UniformTriangle(diagonal=0.0))
    assert fits(t - s, lambda g: 2 * g - g**2)
    assert (t - s).mean() == pytest.approx(1 / 3, abs=0.01)


def test_defaults_are_the_stated_ones() -> None:
    assert UniformTriangle().diagonal == 0.25
    assert (LogitNormalSorted().mean, LogitNormalSorted().std, LogitNormalSorted().diagonal) == (-0.4, 1.0, 0.75)


# --- the other laws, each against its closed form


def logistic_normal(mean: float, std: float) -> Callable[[Array], Array]:
    """The law of sigmoid(N(mean, std))."""
    return lambda x: stats.norm.cdf(logit(np.asarray(x)), mean, std)


ONE_TIME: dict[str, tuple[TimeLaw, Callable[[Array], Array]]] = {
    "logit_normal": (LogitNormal(mean=0.3, std=0.8), flipped_logit_normal(0.3, 0.8)),
    "edm_lognormal": (EDMLogNormal(), logistic_normal(np.log(0.5) + 1.2, 1.2)),
    "shifted": (Shifted(shift=5.0), lambda t: 1 - (1 - t) / (5 - 4 * (1 - t))),
    "ect": (EasyConsistency(), logistic_normal(0.4069, 2.0)),
}


@pytest.mark.parametrize("name", ONE_TIME)
def test_a_law_of_one_time_has_its_density(name: str) -> None:
    law, cdf = ONE_TIME[name]
    s, t = drawn(law)
    assert fits(s, cdf)
    assert not fits(1 - s, cdf)
    assert (s == t).all() == (law.shape == "one")


# mean gap and P(gap > 1/2), without a diagonal of one's own
GAPS = {
    "uniform_triangle": (0.333, 0.25),
    "logitnormal_sorted": (0.234, 0.085),
    "logitnormal_indep_v1": (0.357, 0.31),
    "gap_uniform": (0.340, 0.21),
    "gap_truncated": (0.340, 0.21),
    "dmf": (0.352, 0.27),
}


@pytest.mark.parametrize("name", GAPS)
def test_gaps_have_their_known_sizes(name: str) -> None:
    s, t = drawn(TIMES[name](diagonal=0.0))
    mean, beyond_half = GAPS[name]
    assert (t - s).mean() == pytest.approx(mean, abs=0.008)
    assert (t - s > 0.5).mean() == pytest.approx(beyond_half, abs=0.012)


def test_every_law_is_tested_against_a_closed_form() -> None:
    assert set(TIMES) == {"uniform", "dyadic", "grid"} | set(ONE_TIME) | set(GAPS)


def test_gap_uniform_draws_gap_then_start() -> None:
    s, t = drawn(GapUniform())
    gap, share = t - s, s / (1 - (t - s))
    assert fits(gap, logistic_normal(-0.8, 1.0))
    assert fits(share, stats.uniform.cdf)
    assert stats.spearmanr(gap, share).pvalue > 1e-3


def test_gap_truncated_cuts_the_ends_law_off() -> None:
    s, t = drawn(GapTruncated())
    gap, end = t - s, logistic_normal(-0.4, 1.0)
    assert fits(gap, logistic_normal(-0.8, 1.0))
    share = end(1 - t) / end(1 - gap)
    assert fits(share, stats.uniform.cdf)
    assert stats.spearmanr(gap, share).pvalue > 1e-3


def test_independent_ends_are_cut_at_the_start() -> None:
    s, t = drawn(LogitNormalIndependent(diagonal=0.0))
    start, end = flipped_logit_normal(-0.6, 1.6), flipped_logit_normal(-4.0, 1.6)
    assert fits(s, start)
    assert stats.kstest(t, lambda x: start(x) * end(x)).pvalue > 1e-3
    assert (s == t).mean() == pytest.approx(0.066, abs=0.006)


def test_decoupled_times_are_of_two_laws() -> None:
    s, t = drawn(DecoupledSorted(diagonal=0.0))
    first, second = flipped_logit_normal(0.4, 1.0), flipped_logit_normal(-1.2, 1.0)
    assert fits(s, lambda x: 1 - (1 - first(x)) * (1 - second(x)))
    assert fits(t, lambda x: first(x) * second(x))


def even(counts: Array) -> bool:
    return bool(stats.chisquare(counts).pvalue > 1e-3)


def test_dyadic_gaps_and_starts_are_each_as_likely() -> None:
    s, t = drawn(Dyadic(finest=32, diagonal=0.25))
    gap, on = t - s, s == t
    assert on.mean() == pytest.approx(0.25, abs=0.013)
    assert even(np.bincount((s[on] * 32).astype(int), minlength=32))
    sizes, counts = np.unique(gap[~on], return_counts=True)
    assert sizes.tolist() == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    assert even(counts)
    for size in sizes[:-1]:
        places = s[gap == size] / size
        assert (places == places.round()).all()
        assert even(np.bincount(places.astype(int), minlength=round(1 / size)))


@pytest.mark.parametrize(
    ("grid", "intervals"),
    [
        (Grid(first=18, final=18, growth="constant"), {0: 18, 999: 18}),
        (Grid(first=2, final=150, over=1000, growth="sqrt"), {0: 1, 500: 106, 1000: 150, 5000: 150}),
        (Grid(first=10, final=1280, over=800_000), {0: 10, 99_999: 10, 100_000: 20, 700_000: 1280, 800_000: 1280}),
    ],
)
def test_grids_grow_as_published(grid: Grid, intervals: dict[int, int]) -> None:
    assert {step: grid.intervals(step) for step in intervals} == intervals
    assert {step: len(grid.grid(step)) - 1 for step in intervals} == intervals


def test_each_interval_of_a_grid_is_as_likely() -> None:
    law = Grid(first=20, final=20)
    s, t = drawn(law)
    assert even(np.bincount((s * 20).round().astype(int), minlength=20))
    assert np.allclose(t - s, 1 / 20)


def test_intervals_may_be_as_likely_as_under_a_lognormal() -> None:
    """p_i ~ erf((ln sigma_{i+1} + 1.1) / (2 sqrt 2)) - erf((ln sigma_i + 1.1) / (2 sqrt 2)), arXiv 2310.14189."""
    law = Grid(first=10, final=40, growth="constant", curve="karras", density="lognormal")
    s, t = drawn(law)
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigma = (high + np.arange(41) / 40 * (low - high)) ** 7
    share = -np.diff(erf((np.log(sigma) + 1.1) / (2 * 2**0.5)))
    starts = 1 / (1 + sigma / 0.5)
    starts[-1] = 1
    index = np.abs(s[:, None] - starts).argmin(1)
    assert np.allclose(s, starts[index]) and np.allclose(t, starts[index + 1])
    counts, expected = np.bincount(index, minlength=40), share / share.sum() * COUNT
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert not even(counts)
    s, t = drawn(Grid(first=5, final=5, density="lognormal"))  # uniform in t: from infinite noise
    assert set(np.round(s * 5)) == {0, 1, 2, 3, 4} and np.allclose(t - s, 0.2)


def test_karras_grid_is_edms() -> None:
    """The 18 noise levels of arXiv 2206.00364 from 80 to 0.002; the last is moved to the data."""
    levels = "80 57.586 40.7856 28.3748 19.3525 12.9106 8.401 5.315 3.2567 1.9232 1.0883 .5853 .2964 .1396 .0599 .0229"
    t = Grid(first=17, final=17, curve="karras").grid(0).numpy()
    assert 0.5 * (1 - t[:16]) / t[:16] == pytest.approx([float(level) for level in levels.split()], rel=2e-3)
    assert t[-1] == 1.0


@pytest.mark.parametrize(("step", "stage"), [(0, 0), (249, 0), (250, 1), (1700, 6)])
def test_easy_consistencys_neighbour(step: int, stage: int) -> None:
    s, t = (v.numpy() for v in EasyConsistency()(Rows(0, "test", 0, 0, COUNT), step))
    sigma, following = 0.5 * (1 - s) / s, 0.5 * (1 - t) / t
    share = 1 - (1 + 8 / (1 + np.exp(sigma))) / 2 ** (stage + 1)
    assert following == pytest.approx(sigma * share.clip(0), abs=1e-9, rel=1e-6)
    if stage == 0:
        assert (t[sigma < 1.94] == 1).all()


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
