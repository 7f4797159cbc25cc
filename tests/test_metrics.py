"""Distances between samples, against closed forms and other implementations; over simulations where there are none."""

from __future__ import annotations

import pytest
import torch
from helpers import normal, uniform
from scipy import linalg, spatial, stats
from torch import Tensor

from distill.evaluation.metrics import (
    agreement,
    frechet_distance,
    frechet_errors,
    frechet_floor,
    interval,
    kernel_distance,
    kernel_within,
    neighbour_distances,
    precision_recall,
    rmse,
    sliced_wasserstein,
)
from distill.rows import Rows


def with_moments(mean: Tensor, covariance: Tensor, n: int = 50, seed: int = 0) -> Tensor:
    """``[n, d]`` samples whose mean and (unbiased) covariance are exactly these."""
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.T).reshape(len(mean), -1)), z.T, upper=False).T
    return mean + z @ torch.linalg.cholesky(covariance).T


def spd(d: int, seed: int) -> Tensor:
    a = normal(d, d, seed=seed)
    return a @ a.T + 0.1 * torch.eye(d).double()


# --- Frechet distance


def test_frechet_distance_of_commuting_covariances_is_the_closed_form() -> None:
    """|m_a - m_b|^2 + sum (std_a - std_b)^2 along shared axes."""
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    m_a, m_b = normal(3), normal(3, seed=1)
    q = torch.linalg.qr(normal(3, 3, seed=2)).Q
    a = with_moments(m_a, q * std_a**2 @ q.T)
    b = with_moments(m_b, q * std_b**2 @ q.T, n=80, seed=3)
    expected = (m_a - m_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("d", [2, 5, 20])
def test_frechet_distance_is_the_formula_with_a_matrix_square_root(d: int) -> None:
    """tr (C_a C_b)^1/2 by scipy and by torchmetrics, which take the root in other ways."""
    from torchmetrics.image.fid import _compute_fid

    c_a, c_b, m_a, m_b = spd(d, 1), spd(d, 2), normal(d), normal(d, seed=1)
    a, b = with_moments(m_a, c_a, n=60), with_moments(m_b, c_b, n=70, seed=4)
    root = torch.as_tensor(linalg.sqrtm((c_a @ c_b).numpy()).real)
    expected = (m_a - m_b).square().sum() + torch.trace(c_a + c_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(float(_compute_fid(m_a, c_a, m_b, c_b)), rel=1e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(12, 30, 20), (30, 12, 20), (12, 14, 40), (2, 3, 5)])
def test_of_more_features_than_samples_it_is_the_same_formula(n: int, m: int, d: int) -> None:
    a, b = normal(n, d) @ spd(d, 3), normal(m, d, seed=1)
    c_a, c_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(c_a)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root = torch.linalg.eigvalsh(half @ c_b @ half).clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + c_a.trace() + c_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_photographs_as_they_are_have_a_distance() -> None:
    """Of 192,000 features each covariance would take 295 GB."""
    a, b = normal(4, 192_000).float(), normal(6, 192_000, seed=1).float()
    assert frechet_distance(a, b) == pytest.approx(192_000 * (2 + 1 / 4 + 1 / 6), rel=0.02)  # all directions apart


def test_frechet_distance_is_zero_on_itself_symmetric_and_blind_to_rotation() -> None:
    a, b = normal(100, 4), normal(90, 4, seed=1) @ spd(4, 3)
    q, shift = torch.linalg.qr(normal(4, 4, seed=5)).Q, normal(4, seed=6)
    assert frechet_distance(a, a.flip(0)) < 1e-12
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a @ q + shift, b @ q + shift) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * frechet_distance(a, b), rel=1e-10)
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-10)


def test_frechet_distance_of_one_feature_and_of_degenerate_features() -> None:
    a, b = with_moments(torch.zeros(1).double(), torch.eye(1).double()), torch.zeros(10, 1).double() + 2
    assert frechet_distance(a, b) == pytest.approx(4 + 1)
    flat = torch.cat([normal(50, 2), torch.zeros(50, 3).double()], 1)
    assert 0 <= frechet_distance(flat, flat) < 1e-12
    assert isinstance(frechet_distance(a.float(), b.float()), float)


# --- the floor


def test_floor_is_the_mean_distance_of_disjoint_halves() -> None:
    features = normal(101, 3)
    distances = []
    for split in range(5):
        order = Rows(4, "floor", split, 0, 101).uniform().argsort()
        distances.append(frechet_distance(features[order[0:100:2]], features[order[1:100:2]]))
    measured, scaled = frechet_floor(features, size=300, seed=4, splits=5)
    assert measured == pytest.approx(sum(distances) / 5, rel=1e-12)
    assert scaled == pytest.approx(measured * (1 / 300 + 1 / 101) / (1 / 50 + 1 / 50), rel=1e-12)
    assert min(distances) < measured < max(distances)


@pytest.mark.parametrize("size", [100, 2000])
def test_scaled_floor_is_what_fresh_samples_score(size: int) -> None:
    """`size` perfect samples against m real ones, simulated; within the noise of a few draws."""
    m, d = 400, 4
    fresh = [frechet_distance(normal(size, d, seed=2 * i), normal(m, d, seed=2 * i + 1)) for i in range(40)]
    floors = [frechet_floor(normal(m, d, seed=1000 + i), size)[1] for i in range(4)]
    assert sum(floors) / 4 == pytest.approx(sum(fresh) / 40, rel=0.35)


def by_class(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``[n, 3]`` features of five classes far from each other, one class as often as all others together; labels."""
    classes = torch.tensor([0, 1, 0, 2, 0, 3, 0, 4]).repeat(n // 8)
    order = normal(n, 1, seed=seed + 1)[:, 0].argsort()
    far = 6 * normal(5, 3, seed=77)
    return (far[classes] + normal(n, 3, seed=seed))[order], classes[order]


def test_samples_with_the_classes_of_the_data_score_its_floor() -> None:
    """Their shares are no chance: halves that leave them to chance are several times as far apart."""
    fresh = [frechet_distance(by_class(800, 4 * i)[0], by_class(400, 4 * i + 2)[0]) for i in range(40)]
    real, labels = by_class(400, 1000)
    assert frechet_floor(real, 800, labels)[1] == pytest.approx(sum(fresh) / 40, rel=0.35)
    assert frechet_floor(real, 800)[1] > 3 * sum(fresh) / 40


# --- intervals


def test_intervals_cover_the_true_distance() -> None:
    """95 % of the time, above the floor; here in 120 draws of two Gaussians whose distance is known."""
    n, m, d = 300, 200, 2
    shift, covered = torch.tensor([0.6, 0.0]).double(), []
    for trial in range(120):
        a, real = normal(n, d, seed=2 * trial) + shift, normal(m, d, seed=2 * trial + 1)
        bias = (d + d * (d + 1) / 4) * (1 / n + 1 / m)  # of means and covariances, to first order
        low, high = interval(frechet_distance(a, real) + frechet_errors([a], real, 80)[0])
        covered.append(low - bias <= float(shift.square().sum()) <= high - bias)
    assert 0.88 <= sum(covered) / 120 < 1


def test_errors_are_of_pairs_and_of_the_real_samples_too() -> None:
    a, real = normal(200, 3), normal(150, 3, seed=1)
    errors = frechet_errors([a, a + 0.5, a.flip(0)], real, 40, seed=3)
    assert errors.shape == (3, 40)
    assert errors.mean(1).abs().max() < 1e-12
    assert torch.equal(errors, frechet_errors([a, a + 0.5, a.flip(0)], real, 40, seed=3))
    assert not torch.equal(errors, frechet_errors([a, a + 0.5, a.flip(0)], real, 40, seed=4))
    picks = [(Rows(3, f"bootstrap {k}", 7, 0, n).uniform() * n).long() for k, n in enumerate((200, 150))]
    expected = [frechet_distance(x[picks[0]], real[picks[1]]) for x in (a, a + 0.5, a.flip(0))]
    found = errors[:, 7] - errors[:, 0]
    first = [(Rows(3, f"bootstrap {k}", 0, 0, n).uniform() * n).long() for k, n in enumerate((200, 150))]
    before = [frechet_distance(x[first[0]], real[first[1]]) for x in (a, a + 0.5, a.flip(0))]
    assert found.tolist() == pytest.approx([e - b for e, b in zip(expected, before, strict=True)], abs=1e-10)


def test_rows_are_drawn_again_from_their_class() -> None:
    """Errors are then as wide as distances of other samples with the classes in the same shares are."""
    found = [frechet_distance(1.2 * by_class(800, 4 * i)[0], by_class(400, 4 * i + 2)[0]) for i in range(60)]
    (a, asked), (real, labels) = by_class(800, 2000), by_class(400, 3000)
    errors = frechet_errors([1.2 * a], real, 120, (asked, labels))[0]
    assert float(errors.std()) == pytest.approx(float(torch.tensor(found).std()), rel=0.35)
    assert float(frechet_errors([1.2 * a], real, 120)[0].std()) > 2 * float(errors.std())
    one = torch.zeros(800, dtype=torch.long), torch.zeros(400, dtype=torch.long)
    assert torch.equal(frechet_errors([a], real, 3, one), frechet_errors([a], real, 3))


def test_an_interval_is_the_middle() -> None:
    assert interval(torch.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert interval(torch.arange(1001.0), 0.5) == pytest.approx((250.0, 750.0))


# --- kernel distance


@pytest.mark.parametrize(("n", "m", "d"), [(30, 30, 4), (2500, 1300, 3), (2, 5, 1)])
def test_kernel_distance_is_the_unbiased_estimate(n: int, m: int, d: int) -> None:
    """By torchmetrics where sizes are equal, else by its terms one by one."""
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(n, d), 1.5 * normal(m, d, seed=1) + 0.3
    if n == m:
        assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-10)
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    expected = (aa.sum() - aa.trace()) / (n * n - n) + (bb.sum() - bb.trace()) / (m * m - m) - 2 * ab.mean()
    assert kernel_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_kernel_distance_has_no_bias_of_size() -> None:
    found = [kernel_distance(normal(20, 3, seed=2 * i), normal(50, 3, seed=2 * i + 1)) for i in range(400)]
    assert abs(sum(found) / 400) < 3 * torch.tensor(found).std() / 20
    assert min(found) < 0


# --- precision and recall


@pytest.mark.parametrize(("n", "m", "k"), [(40, 60, 3), (1500, 1100, 3), (30, 20, 1), (2, 3, 3)])
def test_precision_and_recall_are_those_of_nearest_neighbours(n: int, m: int, k: int) -> None:
    """By scipy's trees."""
    a, real = normal(n, 3), 1.3 * normal(m, 3, seed=1)

    def share(x: Tensor, by: Tensor) -> float:
        reach = spatial.KDTree(by.numpy()).query(by.numpy(), k=[min(k + 1, len(by))])[0][:, 0]
        return float((spatial.distance.cdist(x.numpy(), by.numpy()) <= reach).any(1).mean())

    assert precision_recall(a, real, k) == pytest.approx((share(a, real), share(real, a)))


def test_what_is_known_of_the_real_ones_changes_nothing() -> None:
    a, real = normal(200, 3), 1.3 * normal(150, 3, seed=1)
    reach, within = neighbour_distances(real, 2), kernel_within(real)
    assert precision_recall(a, real, 2, reach) == precision_recall(a, real, 2)
    assert precision_recall(a, real, 2, 0.5 * reach)[0] < precision_recall(a, real, 2)[0]
    assert kernel_distance(a, real, within) == kernel_distance(a, real)
    assert kernel_distance(a, real, within + 1) == pytest.approx(kernel_distance(a, real) + 1)


def test_precision_and_recall_see_what_is_missing_and_what_is_wrong() -> None:
    real = torch.cat([normal(300, 2), normal(300, 2, seed=1) + 20])
    assert precision_recall(normal(600, 2, seed=2), real) == pytest.approx((0.97, 0.48), abs=0.06)  # a mode is missing
    wrong = torch.cat([real, normal(600, 2, seed=3) - 50])
    assert precision_recall(wrong, real) == pytest.approx((0.5, 1.0))
    assert precision_recall(real, real) == (1.0, 1.0)


# --- sliced Wasserstein


@pytest.mark.parametrize(("n", "m"), [(50, 50), (7, 12), (12, 7), (100, 3), (1, 5), (64, 96)])
def test_in_one_dimension_it_is_the_exact_distance_of_quantile_functions(n: int, m: int) -> None:
    a, b = normal(n, 1), 2 * normal(m, 1, seed=1) + 1
    fine = n * m
    x = a[:, 0].sort().values.repeat_interleave(m)
    y = b[:, 0].sort().values.repeat_interleave(n)
    assert len(x) == len(y) == fine
    expected = (x - y).square().mean().sqrt()
    assert sliced_wasserstein(a, b) == pytest.approx(float(expected), rel=1e-10)
    w_1 = stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert sliced_wasserstein(a, b) >= w_1 - 1e-12


@pytest.mark.parametrize(("n", "m"), [(60, 60), (64, 96), (100, 33)])
def test_it_is_that_of_optimal_transport(n: int, m: int) -> None:
    """By POT, along the same directions."""
    import ot

    a, b = normal(n, 5), 1.5 * normal(m, 5, seed=1) + 0.3
    w = Rows(2, "slices", 0, 0, 40).normal(5).double()
    w = (w / w.norm(dim=1, keepdim=True)).numpy().T
    expected = ot.sliced_wasserstein_distance(a.numpy(), b.numpy(), projections=w, p=2)
    assert sliced_wasserstein(a, b, projections=40, seed=2) == pytest.approx(float(expected), rel=1e-9)


def test_a_shift_counts_by_its_share_of_each_direction() -> None:
    """W2^2 of a shift c along direction w is (c . w)^2, whose mean over directions is |c|^2 / d."""
    a, shift = normal(200, 6), normal(6, seed=1)
    assert sliced_wasserstein(a, a + shift, projections=4000) == pytest.approx(float(shift.norm() / 6**0.5), rel=0.05)
    one = sliced_wasserstein(a, a + shift, projections=1, seed=3)
    w = Rows(3, "slices", 0, 0, 1).normal(6).double()
    assert one == pytest.approx(float((w @ shift).abs() / w.norm()), rel=1e-10)


def test_sliced_wasserstein_is_a_distance_that_scales() -> None:
    a, b = normal(60, 2, 3), uniform(45, 2, 3)
    assert sliced_wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(b, a), rel=1e-12)
    assert sliced_wasserstein(3 * a, 3 * b) == pytest.approx(3 * sliced_wasserstein(a, b), rel=1e-12)
    assert sliced_wasserstein(a, b) != sliced_wasserstein(a, b, seed=1)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b)
    assert sliced_wasserstein(a, torch.cat([a, a])) == pytest.approx(0, abs=1e-12)


# --- pairs


def test_rmse_and_agreement() -> None:
    a, b = normal(10, 2, 2), normal(10, 2, 2, seed=1)
    assert rmse(a, b) == pytest.approx(float(((a - b) ** 2).sum() / 40) ** 0.5)
    assert rmse(a, a) == 0
    assert rmse(a, a + 2) == pytest.approx(2)
    assert agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 0])) == 0.5
    assert agreement(torch.arange(3), torch.arange(3)) == 1
