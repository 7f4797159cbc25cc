"""Distances between samples, as pure functions of tensors. All arithmetic in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.rows import Rows


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of features ``a: [n, d]``, ``b: [m, d]``; n, m >= 2.

    The squared 2-Wasserstein distance of the fitted Gaussians. Heusel et al., arXiv 1706.08500. Biased upwards by about
    C (1/n + 1/m): see `frechet_floor`.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max(float(gap + cov_a.trace() + cov_b.trace() - 2 * cross), 0.0)


def frechet_floor(features: Tensor, size: int, seed: int = 0, splits: int = 20) -> tuple[float, float]:
    """Real data against real data: (the Frechet distance of disjoint halves, what it implies at the sizes in use).

    ``features: [m, d]`` of real data. The first is the mean over random splits into two halves. The bias of two samples
    of one law is proportional to 1/n + 1/m, so the second scales it from m/2 against m/2 to `size` against m: what
    `size` perfect, independent samples would score against this reference.
    """
    m = len(features)
    half = m // 2
    measured = 0.0
    for split in range(splits):
        order = Rows(seed, "floor", split, 0, m).uniform().argsort()
        measured += frechet_distance(features[order[:half]], features[order[half : 2 * half]]) / splits
    return measured, measured * (1 / size + 1 / m) / (2 / half)


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
