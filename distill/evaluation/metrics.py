"""Distances between samples, as pure functions of tensors. All arithmetic in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.rows import Rows


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of features ``a: [n, d]``, ``b: [m, d]``; n, m >= 2.

    The squared 2-Wasserstein distance of the fitted Gaussians. Heusel et al., arXiv 1706.08500. Biased upwards by about
    C (1/n + 1/m): see `frechet_floor`.
    """
    if a.shape[1] > min(len(a), len(b)):
        return _wide_distance(a.double(), b.double())
    [distance] = _distances(_moments(b), [_moments(a)])
    return distance


def _wide_distance(a: Tensor, b: Tensor) -> float:
    """The same of more features than samples, without matrices of features by features: with rows A of a, centred
    and divided by (n - 1)^1/2, and B of b, the eigenvalues of (C_a^1/2 C_b C_a^1/2)^1/2 are the singular values of
    A B^T."""
    gap = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(float(gap + a.square().sum() + b.square().sum() - 2 * cross), 0.0)


WIDEST = 512
"""Features of which covariances are still taken a thousand times in a minute."""

Moments = tuple[Tensor, Tensor]
"""Mean ``[d]`` and covariance ``[d, d]``."""


def _moments(x: Tensor, counts: Tensor | None = None) -> Moments:
    """Of rows ``[n, d]``, each taken as often as ``counts: [n]`` says."""
    x = x.double()
    counts = torch.ones(len(x), dtype=torch.long) if counts is None else counts
    mean = counts.double() @ x / counts.sum()
    return mean, torch.cov(x.T, fweights=counts).reshape(x.shape[1], -1)


def _distances(to: Moments, of: Sequence[Moments]) -> list[float]:
    """Frechet distances of Gaussians."""
    mean, cov = to
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    found = []
    for mean_a, cov_a in of:
        cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp(min=0).sqrt().sum()
        gap = (mean_a - mean).square().sum()
        found.append(max(float(gap + cov_a.trace() + cov.trace() - 2 * cross), 0.0))
    return found


def frechet_floor(
    features: Tensor, size: int, classes: Tensor | None = None, seed: int = 0, splits: int | None = None
) -> tuple[float, float]:
    """Real data against real data: (the Frechet distance of disjoint halves, what it implies at the sizes in use).

    ``features: [m, d]`` of real data. The first is the mean over random splits into two halves (by default 20; 2 of
    more than `WIDEST` features, where one takes long and they differ little), of each of their ``classes: [m]`` too,
    for samples that have the classes in the same shares. The bias of two samples of one law is proportional to
    1/n + 1/m, so the second scales it from m/2 against m/2 to `size` against m: what `size` perfect samples would score
    against this reference. Rough where `size` or m/2 is not above d: then it is not yet in proportion.
    """
    m = len(features)
    half, splits = m // 2, splits or (20 if features.shape[1] <= WIDEST else 2)
    measured = 0.0
    for split in range(splits):
        order = Rows(seed, "floor", split, 0, m).uniform().argsort()
        if classes is not None:
            order = order[classes[order].argsort(stable=True)]
        measured += frechet_distance(features[order[0 : 2 * half : 2]], features[order[1 : 2 * half : 2]]) / splits
    return measured, measured * (1 / size + 1 / m) / (2 / half)


def frechet_errors(
    samples: Sequence[Tensor], real: Tensor, count: int, classes: tuple[Tensor, Tensor] | None = None, seed: int = 0
) -> Tensor:
    """Errors ``[len(samples), count]`` of the Frechet distances of each ``[n, d]`` of `samples` to ``real: [m, d]``.

    By bootstrap (Efron 1979): rows are drawn again with replacement, row i of all samples together, since it is of the
    same noise, and of the real ones too; each from those of its class where ``classes``, ``[n]`` and ``[m]``, had their
    shares before anything was drawn. Centred, because drawing again adds the distance's bias a second time.
    """
    of = classes or (torch.zeros(len(samples[0]), dtype=torch.long), torch.zeros(len(real), dtype=torch.long))
    drawn = []
    for n in range(count):
        again = [_drawn_again(own, Rows(seed, f"bootstrap {k}", n, 0, len(own))) for k, own in enumerate(of)]
        drawn.append(_distances(_moments(real, again[1]), [_moments(x, again[0]) for x in samples]))
    errors = torch.tensor(drawn, dtype=torch.float64).T
    return errors - errors.mean(1, keepdim=True)


def _drawn_again(classes: Tensor, rows: Rows) -> Tensor:
    """How often each row of ``classes: [n]`` is drawn."""
    sizes = torch.bincount(classes)
    ends = sizes.cumsum(0)
    picks = (ends - sizes)[classes] + (rows.uniform() * sizes[classes]).long()
    return torch.bincount(classes.argsort(stable=True)[picks], minlength=len(classes))


def interval(values: Tensor, share: float = 0.95) -> tuple[float, float]:
    """The middle `share` of ``[count]`` values."""
    low, high = torch.quantile(values.double(), torch.tensor([(1 - share) / 2, (1 + share) / 2]).double()).tolist()
    return low, high


def kernel_distance(a: Tensor, b: Tensor, within_b: Tensor | None = None) -> float:
    """KID: the unbiased estimate of the squared maximum mean discrepancy of ``a: [n, d]`` and ``b: [m, d]`` with the
    kernel (x . y / d + 1)^3; n, m >= 2. About 0, also below, for two samples of one law, whatever their sizes.
    within_b: ``kernel_within(b)``, where it is known. Binkowski et al., arXiv 1801.01401."""
    within_b = kernel_within(b) if within_b is None else within_b
    return float(kernel_within(a) + within_b - 2 * _kernel_sum(a.double(), b.double()) / (len(a) * len(b)))


def kernel_within(x: Tensor) -> Tensor:
    """The mean of the kernel over pairs of different rows of ``[n, d]``."""
    x = x.double()
    own = ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()
    return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    products = (part @ y.T for part in (x / x.shape[1]).split(_ROWS))
    return torch.stack([part.add_(1).pow_(3).sum() for part in products]).sum()


_ROWS = 128  # at a time: matrices above 32 MB would be fresh memory each time, which costs more than what is done in it


def precision_recall(a: Tensor, real: Tensor, k: int = 3, reach: Tensor | None = None) -> tuple[float, float]:
    """The share of samples ``a: [n, d]`` that lie among the real ones ``[m, d]``, and of real ones among the samples:
    no further from one of the others than that one's k-th neighbour is. reach: ``neighbour_distances(real, k)``, where
    it is known. Kynkaanniemi et al., arXiv 1904.06991."""
    reach = neighbour_distances(real, k) if reach is None else reach
    return _covered(a, real, reach), _covered(real, a, neighbour_distances(a, k))


def neighbour_distances(x: Tensor, k: int = 3) -> Tensor:
    """Of each row of ``[n, d]`` to its k-th neighbour among the others, or the last where they are fewer; ``[n]``."""
    x = x.double()
    nearest = min(k + 1, len(x))  # the row itself first
    return torch.cat([torch.cdist(part, x).topk(nearest, largest=False).values[:, -1] for part in x.split(_ROWS)])


def _covered(x: Tensor, by: Tensor, reach: Tensor) -> float:
    x, by = x.double(), by.double()
    return float(torch.cat([(torch.cdist(part, by) <= reach).any(1) for part in x.split(_ROWS)]).double().mean())


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of ``a: [n, ...]`` and ``b: [m, ...]``: root of the mean over random directions of
    the exact squared W2 of the projections, n and m may differ. Bonneel et al., 2015."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    directions = Rows(seed, "slices", 0, 0, projections).normal(a.shape[1]).double()
    directions = directions / directions.norm(dim=1, keepdim=True)
    x, y = (a @ directions.T).sort(0).values, (b @ directions.T).sort(0).values
    n, m = len(x), len(y)
    # both quantile functions are constant between the merged levels i/n and j/m, here in whole units of 1/(n m)
    levels = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = torch.diff(levels, prepend=torch.zeros(1, dtype=levels.dtype)).double() / (n * m)
    pairs = x[(levels - 1) // m] - y[(levels - 1) // n]
    return float((widths[:, None] * pairs.square()).sum(0).mean().sqrt())


def rmse(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of paired samples ``a, b: [n, ...]``, a feature."""
    return float((a.double() - b.double()).square().mean().sqrt())


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of equal entries of two vectors of classes ``[n]``."""
    return float((a == b).double().mean())
