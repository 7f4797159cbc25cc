"""What a student's network predicts, and the mean velocity that it makes of it; all convert into each other exactly.

    mean_velocity   u itself
    endpoint        g:  X = (sigma_t / sigma_s) x + (alpha_t - alpha_s sigma_t / sigma_s) g;  g = E[x_1 | x_s] at t = s
    trig            F:  X = (alpha_s alpha_t + sigma_s sigma_t) / N^2 x + (alpha_t sigma_s - alpha_s sigma_t) / N F
    one_time        F:  X_{s,1} = c_skip x / alpha_s + c_out F, for t = 1 alone: consistency models

with X = x + (t - s) u, N^2 = alpha_s^2 + sigma_s^2 (`trig` and `one_time` know a standard deviation of the data, by
which alpha is multiplied). `endpoint` is DDIM, arXiv 2010.02502; `trig` arXiv 2410.11081; `one_time` arXiv 2303.01469,
after EDM, 2206.00364. Coefficients are written with the secants (alpha_t - alpha_s) / (t - s) and (sigma_t - sigma_s) /
(t - s), so that u and its derivatives are exact up to s = t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from teachers.fields import require
from teachers.path import Path, expand_like
from teachers.velocity import data_from_velocity

_TINY = 1e-6  # stands in for a divisor that vanishes at s = 1, where every jump has length 0


class Parameterisation(ABC):
    """An affine relation u = `shift` x + `gain` output, whose coefficients depend on (s, t) and the path."""

    @abstractmethod
    def coefficients(self, path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(shift, gain), each ``[b]`` in the dtype of the times."""

    def mean_velocity(self, path: Path, output: Tensor, x_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """u of the network's output. ``output, x_s: [b, *dims]``, ``s, t: [b]``."""
        shift, gain = self.coefficients(path, s, t)
        return expand_like(shift, x_s) * x_s + expand_like(gain, x_s) * output

    def output(self, path: Path, u: Tensor, x_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """What the network has to say for u: the inverse of `mean_velocity`."""
        shift, gain = self.coefficients(path, s, t)
        return (u - expand_like(shift, x_s) * x_s) / expand_like(gain, x_s)

    def from_velocity(self, path: Path, v: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
        """What the network has to say where all that is known is the velocity at s."""
        return self.output(path, v, x_s, s, s)

    def network_input(self, path: Path, x_s: Tensor, s: Tensor) -> Tensor:
        """The point as the network sees it."""
        return x_s


@dataclass(frozen=True, kw_only=True)
class MeanVelocity(Parameterisation):
    """The network predicts u: bounded everywhere."""

    def coefficients(self, path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t - s), torch.ones_like(t - s)


@dataclass(frozen=True, kw_only=True)
class Endpoint(Parameterisation):
    """The network predicts the end g (linear path: u = (g - x) / (1 - s))."""

    def coefficients(self, path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c, (d_alpha, d_sigma) = path(s), path.secants(s, t)
        shift = d_sigma / c.sigma.clamp_min(_TINY)
        return shift, d_alpha - c.alpha * shift

    def from_velocity(self, path: Path, v: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
        return data_from_velocity(path, v, x_s, s)


@dataclass(frozen=True, kw_only=True)
class Trig(Parameterisation):
    """The network predicts a direction of unit variance, from a point scaled to unit variance.

    sigma_data: the standard deviation of the data.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        require(self, sigma_data=(0 < self.sigma_data < math.inf, "must be above 0"))

    def norm(self, path: Path, s: Tensor) -> Tensor:
        """The standard deviation of x_s, ``[b]``."""
        c = path(s)
        return (c.sigma**2 + (self.sigma_data * c.alpha) ** 2).sqrt()

    def coefficients(self, path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c, (d_alpha, d_sigma) = path(s), path.secants(s, t)
        norm = self.norm(path, s)
        shift = (self.sigma_data**2 * c.alpha * d_alpha + c.sigma * d_sigma) / norm**2
        return shift, self.sigma_data * (c.sigma * d_alpha - c.alpha * d_sigma) / norm

    def network_input(self, path: Path, x_s: Tensor, s: Tensor) -> Tensor:
        return x_s / expand_like(self.norm(path, s), x_s)


@dataclass(frozen=True, kw_only=True)
class OneTime(Parameterisation):
    """Consistency models' own, for t = 1: c_skip, c_out and c_in in sigma_hat = sigma / alpha, identity at sigma_min.

    sigma_data: the standard deviation of the data; sigma_min: the noise at which the data is taken to begin.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        require(
            self,
            sigma_data=(0 < self.sigma_data < math.inf, "must be above 0"),
            sigma_min=(0 <= self.sigma_min < math.inf, "must be at least 0"),
        )

    def coefficients(self, path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c, data = path(s), self.sigma_data
        left = c.sigma - self.sigma_min * c.alpha
        skip = data**2 * c.alpha / (left**2 + (data * c.alpha) ** 2)
        out = data * left / (c.sigma**2 + (data * c.alpha) ** 2).sqrt()
        gap = (1 - s).clamp_min(_TINY)
        return (skip - 1) / gap, out / gap

    def from_velocity(self, path: Path, v: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
        end = data_from_velocity(path, v, x_s, s)
        return self.output(path, (end - x_s) / expand_like((1 - s).clamp_min(_TINY), x_s), x_s, s, torch.ones_like(s))

    def network_input(self, path: Path, x_s: Tensor, s: Tensor) -> Tensor:
        return Trig(sigma_data=self.sigma_data).network_input(path, x_s, s)


PARAMETERISATIONS: dict[str, type[Parameterisation]] = {
    "mean_velocity": MeanVelocity,
    "endpoint": Endpoint,
    "trig": Trig,
    "one_time": OneTime,
}
