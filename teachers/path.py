"""Probability paths: x_t = alpha(t) x_1 + sigma(t) x_0. The one place that says t = 0 is noise and t = 1 is data.

x_0 is standard normal noise, x_1 data, independent of each other. Schedules: Albergo, Vanden-Eijnden, arXiv 2209.15571
(interpolants); linear: Lipman et al., arXiv 2210.02747; cosine (GVP, TrigFlow): Ma et al., arXiv 2401.08740.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def expand_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """``coefficient: [b]`` as ``[b, 1, ..., 1]`` beside ``x: [b, *dims]``, cast to x's dtype (the last step, so that
    times may be float64 while x keeps its dtype)."""
    return coefficient.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their time derivatives at t; each has the shape and dtype of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def delta(self) -> Tensor:
        """alpha' sigma - alpha sigma' > 0, the determinant of (x_1, x_0) -> (x_t, dx_t/dt)."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


class Path(ABC):
    """A pair of schedules alpha (data) and sigma (noise) on t in [0, 1]."""

    name: str

    @abstractmethod
    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at ``t`` (any shape, floating point, in [0, 1])."""

    @abstractmethod
    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t - alpha_s) / (t - s) and (sigma_t - sigma_s) / (t - s) without cancellation, smooth at s = t."""

    def point(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x_1 + sigma(t) x_0. ``x_0, x_1: [b, *dims]``, ``t: [b]``."""
        c = self(t)
        return expand_like(c.alpha, x_1) * x_1 + expand_like(c.sigma, x_0) * x_0

    def conditional_velocity(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """v_c = alpha'(t) x_1 + sigma'(t) x_0, whose mean given x_t is the marginal velocity. Shapes as `point`."""
        c = self(t)
        return expand_like(c.d_alpha, x_1) * x_1 + expand_like(c.d_sigma, x_0) * x_0


@dataclass(frozen=True)
class Linear(Path):
    """alpha = t, sigma = 1 - t: the straight path of flow matching and rectified flow."""

    name = "linear"

    def __call__(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t - s)
        return one, -one


@dataclass(frozen=True)
class Cosine(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): alpha^2 + sigma^2 = 1."""

    name = "cosine"

    def __call__(self, t: Tensor) -> Coefficients:
        angle, rate = t * (math.pi / 2), math.pi / 2
        alpha, sigma = torch.sin(angle), torch.cos(angle)
        return Coefficients(alpha, sigma, rate * sigma, -rate * alpha)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # sin B - sin A = 2 cos((A + B) / 2) sin((B - A) / 2), and torch.sinc(x) = sin(pi x) / (pi x)
        middle, chord = (s + t) * (math.pi / 4), (math.pi / 2) * torch.sinc((t - s) / 4)
        return torch.cos(middle) * chord, -torch.sin(middle) * chord


PATHS: dict[str, type[Path]] = {"linear": Linear, "cosine": Cosine}
