"""Teachers in closed form, with their exact flow maps: tests and first runs.

`Gaussian`: every marginal is N(alpha mu, alpha^2 Sigma + sigma^2 I), so the flow is affine.
`Mixture`: independent 1-D Gaussian mixtures, one a dimension; a 1-D flow keeps quantiles, so X_{s,t} = F_t^-1 o F_s.
`teachers.gaussian_mixture` has mixtures with any covariances, whose velocity alone is closed.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from teachers.fields import require
from teachers.path import PATHS, Path, PathName, expand_like
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher


class Law(ABC):
    """A law of data and its flow along a path: a frozen dataclass whose fields are the recipe's keys.

    Points are ``[b, d]``, times ``[b]``; results have the points' dtype. At t = 1 on a path whose sigma' is infinite
    there (see `teachers.path.VP`) all values are finite but mean velocities at s = t and derivatives in time.
    """

    name: ClassVar[str]
    path: PathName

    @property
    @abstractmethod
    def dimension(self) -> int:
        """d."""

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The exact marginal velocity."""

    @abstractmethod
    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """u with X_{s,t}(x_s) = x_s + (t - s) u, smooth at s = t, where u is the velocity."""

    @abstractmethod
    def data(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """Data from standard normal noise and uniforms, both ``[b, d]``."""

    def flow_map(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """X_{s,t}(x_s), as accurate as `mean_velocity`."""
        return x_s + expand_like(t - s, x_s) * self.mean_velocity(x_s, s, t)

    def generate(self, x_0: Tensor, cond: Cond = None) -> Tensor:
        """The exact way from standard normal noise to data, X_{0,1}. ``x_0: [b, d]``."""
        s = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
        return self.flow_map(self.schedule.start(x_0), s, s + 1)

    def load(self) -> Teacher:
        """This law as a `Teacher` of shape [d]."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()
        return Teacher(
            velocity=self.velocity,
            space=DataSpace(shape=(self.dimension,)),
            path=self.schedule,
            flow_map=self.flow_map,
            data=self.data,
            generator=self.generate,
            info={"id": self.name, "digest": digest, "licence": "Apache-2.0"},
        )

    @property
    @abstractmethod
    def _tables(self) -> tuple[Tensor, ...]:
        """Its numbers, float64; made once."""

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """`_tables` in x's dtype, where x is."""
        return tuple(table.to(x) for table in self._tables)

    @cached_property
    def schedule(self) -> Path:
        """The path itself."""
        return PATHS[self.path]()


def is_covariance(rows: Sequence[Sequence[float]], d: int) -> bool:
    """Whether `rows` are a symmetric positive definite d x d matrix."""
    if len(rows) != d or any(len(row) != d for row in rows):
        return False
    matrix = torch.tensor(rows, dtype=torch.float64)
    return bool(matrix.isfinite().all() and torch.equal(matrix, matrix.T) and torch.linalg.eigvalsh(matrix).min() > 0)


def spreads(path: Path, variance: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The std sqrt(alpha^2 variance + sigma^2) of a marginal at s and at t, and (std_t - std_s) / (t - s), smooth at
    s = t. ``s, t`` broadcast with `variance`."""
    c_s, c_t = path(s), path(t)
    d_alpha, d_sigma = path.secants(s, t)
    std_s, std_t = ((c.alpha**2 * variance + c.sigma**2).sqrt() for c in (c_s, c_t))
    d_variance = d_alpha * (c_t.alpha + c_s.alpha) * variance + d_sigma * (c_t.sigma + c_s.sigma)
    return std_s, std_t, d_variance / (std_t + std_s)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Law):
    """N(mean, covariance) through a path. mean: d numbers; covariance: d rows of d, symmetric positive definite."""

    name = "gaussian"
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    path: PathName = "linear"

    def __post_init__(self) -> None:
        d = len(self.mean)
        require(
            self,
            mean=(d >= 1 and all(map(math.isfinite, self.mean)), "must have at least one entry, all of them finite"),
            covariance=(
                d >= 1 and is_covariance(self.covariance, d),
                f"must be a symmetric positive definite {d} x {d} matrix",
            ),
        )

    @property
    def dimension(self) -> int:
        """See `Law`."""
        return len(self.mean)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        eigenvalues, basis = torch.linalg.eigh(torch.tensor(self.covariance, dtype=torch.float64))
        return torch.tensor(self.mean, dtype=torch.float64), eigenvalues, basis

    def velocity(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """See `Law`."""
        mean, eigenvalues, basis = self._parts(x_t)
        c = self.schedule(t[:, None])
        gain = (c.alpha * c.d_alpha * eigenvalues + c.sigma_d_sigma) / (c.alpha**2 * eigenvalues + c.sigma**2)
        alpha, d_alpha, gain = (v.to(x_t) for v in (c.alpha, c.d_alpha, gain))
        return d_alpha * mean + (gain * ((x_t - alpha * mean) @ basis)) @ basis.T

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """See `Law`; exact."""
        mean, eigenvalues, basis = self._parts(x_s)
        s, t = s[:, None], t[:, None]
        std_s, _, d_std = spreads(self.schedule, eigenvalues, s, t)
        alpha, d_alpha, gain = (
            v.to(x_s) for v in (self.schedule(s).alpha, self.schedule.secants(s, t)[0], d_std / std_s)
        )
        return d_alpha * mean + (gain * ((x_s - alpha * mean) @ basis)) @ basis.T

    def data(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """See `Law`: mean + Sigma^(1/2) noise."""
        mean, eigenvalues, basis = self._parts(noise)
        return mean + ((noise @ basis) * eigenvalues.sqrt()) @ basis.T


@dataclass(frozen=True, kw_only=True)
class Mixture(Law):
    """Independent 1-D mixtures: weights, means, stds are d rows (one a dimension) of K components."""

    name = "mixture"
    weights: tuple[tuple[float, ...], ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[tuple[float, ...], ...]
    path: PathName = "linear"

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.weights]
        same = "must have the rows and columns of weights"
        even = len(set(shape)) == 1 and shape[0] >= 1
        positive = all(w > 0 for row in self.weights for w in row)
        require(
            self,
            weights=(
                even and positive and all(abs(sum(row) - 1) < 1e-6 for row in self.weights),
                "must be rows of equal length, each of positive numbers that sum to 1",
            ),
            means=(
                [len(row) for row in self.means] == shape and all(math.isfinite(v) for row in self.means for v in row),
                f"{same} and be finite",
            ),
            stds=(
                [len(row) for row in self.stds] == shape and all(0 < v < math.inf for row in self.stds for v in row),
                f"{same}, be above 0 and finite",
            ),
        )

    @property
    def dimension(self) -> int:
        """See `Law`."""
        return len(self.weights)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        return weights, means, stds

    def _marginal(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised distance and std ``[b, d, K]`` of the marginal at t, in x's dtype."""
        _, means, stds = self._parts(x)
        c = self.schedule(t[:, None, None])
        std = (c.alpha**2 * stds**2 + c.sigma**2).sqrt().to(x)
        return (x[..., None] - c.alpha.to(x) * means) / std, std

    def velocity(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """See `Law`: the components' velocities, weighted by responsibility."""
        weights, means, stds = self._parts(x_t)
        z, std = self._marginal(x_t, t)
        c = self.schedule(t[:, None, None])
        responsibility = torch.softmax(weights.log() - z**2 / 2 - std.log(), dim=-1)
        slope = (c.alpha * c.d_alpha * stds**2 + c.sigma_d_sigma).to(x_t) / std
        return (responsibility * (c.d_alpha.to(x_t) * means + slope * z)).sum(-1)

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """See `Law`. In float64 inside; good to about 1e-9 where the density is not vanishing. A point beyond ~7
        standard deviations of every component has F_s = 0 or 1 and cannot be inverted.

        Bisection finds the root of F_t(x + (t - s) u) = F_s(x). Newton steps on that equation divided by t - s, where
        it neither cancels nor loses its root at s = t, make it exact and give it its derivatives.
        """
        x, gap = x_s.double(), expand_like(t - s, x_s.double())
        weights, means, stds = self._parts(x)
        z, _ = self._marginal(x, s)
        _, std_t, d_std = spreads(self.schedule, stds**2, s[:, None, None], t[:, None, None])
        d_alpha = self.schedule.secants(s, t)[0][:, None, None]
        root = self._quantile((weights * torch.special.ndtr(z)).sum(-1).detach(), t.detach())
        u = torch.where(gap == 0, 0.0, (root - x) / gap).detach()
        for _ in range(2):
            rate = (u[..., None] - d_alpha * means - z * d_std) / std_t  # (z_t - z_s) / (t - s)
            miss = (weights * rate * _mean_density(z, gap[..., None] * rate)).sum(-1)
            u = u - miss / self._density(x + gap * u, t)
        return u.to(x_s.dtype)

    def _density(self, x: Tensor, t: Tensor) -> Tensor:
        z, std = self._marginal(x, t)
        return (self._parts(x)[0] / std * _normal_density(z)).sum(-1)

    def _quantile(self, level: Tensor, t: Tensor) -> Tensor:
        """F_t^-1(level) by bisection. ``level: [b, d]``."""
        weights, means, _ = self._parts(level)
        _, std = self._marginal(level, t)
        reach = (self.schedule(t[:, None, None]).alpha * means.abs() + 12 * std).amax(-1)
        low, high = -reach, reach
        for _ in range(80):
            middle = (low + high) / 2
            below = (weights * torch.special.ndtr(self._marginal(middle, t)[0])).sum(-1) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def data(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """See `Law`: the uniform picks the component."""
        weights, means, stds = self._parts(noise)
        pick = (uniform[..., None] > weights.cumsum(-1)[:, :-1]).sum(-1, keepdim=True)
        mean, std = (torch.gather(v.expand(*noise.shape, -1), -1, pick).squeeze(-1) for v in (means, stds))
        return mean + std * noise


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _mean_density(z: Tensor, step: Tensor) -> Tensor:
    """The mean of the standard normal density between z and z + step, smooth at step = 0."""
    nodes, weights = (torch.as_tensor(v, device=z.device) for v in np.polynomial.legendre.leggauss(8))
    short = step.abs() < 1  # where eight nodes are exact to rounding, and a difference of CDFs might cancel
    inside = z[..., None] + torch.where(short, step, 0.0)[..., None] * (1 + nodes) / 2
    by_nodes = (_normal_density(inside) * weights / 2).sum(-1)
    long = torch.where(short, 1.0, step)
    return torch.where(short, by_nodes, (torch.special.ndtr(z + long) - torch.special.ndtr(z)) / long)
