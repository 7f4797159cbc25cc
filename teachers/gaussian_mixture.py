"""`GaussianMixture`: a mixture with any covariances, whose velocity is closed and whose flow map is integrated.

With C_k = alpha^2 Sigma_k + sigma^2 I and responsibilities g_k proportional to w_k N(x; alpha mu_k, C_k),

    v(x, t) = sum_k g_k [ alpha' mu_k + (alpha alpha' Sigma_k + sigma sigma' I) C_k^-1 (x - alpha mu_k) ]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from teachers.analytic import Law, is_covariance, spreads
from teachers.fields import require
from teachers.path import PathName, expand_like
from teachers.solvers import rk4, uniform_grid
from teachers.space import Cond

STEPS = 200
"""Runge-Kutta steps of a flow map, for an error of about 1e-9; it falls with the fourth power."""


@dataclass(frozen=True, kw_only=True)
class GaussianMixture(Law):
    """weights: K numbers; means: K rows of d; covariances: K symmetric positive definite matrices, d rows of d each."""

    name = "gaussian_mixture"
    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    covariances: tuple[tuple[tuple[float, ...], ...], ...]
    path: PathName = "linear"

    def __post_init__(self) -> None:
        k, d = len(self.weights), len(self.means[0]) if self.means else 0
        require(
            self,
            weights=(
                all(w > 0 for w in self.weights) and abs(sum(self.weights) - 1) < 1e-6,
                "must be positive numbers that sum to 1",
            ),
            means=(
                len(self.means) == k
                and d >= 1
                and all(len(row) == d and all(map(math.isfinite, row)) for row in self.means),
                f"must be {k} rows (one for each of weights) of equal length, all of them finite",
            ),
            covariances=(
                len(self.covariances) == k and d >= 1 and all(is_covariance(rows, d) for rows in self.covariances),
                f"must be {k} symmetric positive definite {d} x {d} matrices",
            ),
        )

    @property
    def dimension(self) -> int:
        """See `Law`."""
        return len(self.means[0])

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weights ``[K]``, means and eigenvalues ``[K, d]``, eigenvectors ``[K, d, d]`` (columns)."""
        eigenvalues, bases = torch.linalg.eigh(torch.tensor(self.covariances, dtype=torch.float64))
        weights, means = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means))
        return weights, means, eigenvalues, bases

    def velocity(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """See `Law`."""
        c = self.schedule(t)
        return self._drift(x_t, c.alpha, c.sigma, c.d_alpha, c.sigma_d_sigma)

    def _drift(self, x: Tensor, alpha: Tensor, sigma: Tensor, d_alpha: Tensor, sigma_d_sigma: Tensor) -> Tensor:
        """v at ``x: [b, d]`` where the path has these coefficients ``[b]``."""
        weights, means, eigenvalues, bases = self._parts(x)
        alpha, sigma, d_alpha, sigma_d_sigma = (k[:, None, None].to(x) for k in (alpha, sigma, d_alpha, sigma_d_sigma))
        variance = alpha.square() * eigenvalues + sigma.square()
        y = torch.einsum("bkd,kde->bke", x[:, None] - alpha * means, bases)
        responsibility = torch.softmax(weights.log() - (y.square() / variance + variance.log()).sum(-1) / 2, dim=-1)
        slope = (alpha * d_alpha * eigenvalues + sigma_d_sigma) / variance
        component = d_alpha * means + torch.einsum("bke,kde->bkd", slope * y, bases)
        return (responsibility[..., None] * component).sum(1)

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """See `Law`. By Runge-Kutta with `STEPS` steps.

        X_{s,t} depends on alpha and sigma at s and at t alone, not on the way between them. So y = x / N, where N is
        sqrt(alpha^2 + sigma^2), is carried along the straight line from (alpha, sigma) / N at s to that at t, gentle
        whatever the path. The unknown is w = (y - y_s) / (t - s) at the share p of the line, from 0: no division.
        """
        gap = t - s
        c, secants = self.schedule(s), self.schedule.secants(s, t)
        norm_s, norm_t, d_norm = spreads(self.schedule, torch.ones_like(s), s, t)
        alpha, sigma = c.alpha / norm_s, c.sigma / norm_s
        d_alpha, d_sigma = (secants[0] - alpha * d_norm) / norm_t, (secants[1] - sigma * d_norm) / norm_t
        y_s = x_s / expand_like(norm_s, x_s)

        def along(w: Tensor, p: Tensor) -> Tensor:
            alpha_p, sigma_p = alpha + p * gap * d_alpha, sigma + p * gap * d_sigma
            return self._drift(y_s + expand_like(gap, y_s) * w, alpha_p, sigma_p, d_alpha, sigma_p * d_sigma)

        w = rk4(lambda w, p, cond: along(w, p), torch.zeros_like(y_s), uniform_grid(STEPS, x_s.device))
        return expand_like(norm_t, x_s) * w + expand_like(d_norm, x_s) * y_s

    def data(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """See `Law`: the first uniform of a row picks its component k, then mu_k + Sigma_k^(1/2) noise."""
        weights, means, eigenvalues, bases = self._parts(noise)
        pick = (uniform[:, :1] > weights.cumsum(0)[:-1]).sum(1)
        y = torch.einsum("bd,bde->be", noise, bases[pick]) * eigenvalues[pick].sqrt()
        return means[pick] + torch.einsum("be,bde->bd", y, bases[pick])
