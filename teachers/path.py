"""Probability paths: x_t = alpha(t) x_1 + sigma(t) x_0. The one place that says t = 0 is noise and t = 1 is data.

x_0 is standard normal noise, x_1 data, independent of each other. Schedules: Albergo, Vanden-Eijnden, arXiv 2209.15571
(interpolants); linear: Lipman et al., arXiv 2210.02747; cosine (GVP, TrigFlow): Ma et al., arXiv 2401.08740; vp: Song
et al., arXiv 2011.13456; linear_vp: Lipman et al., arXiv 2412.06264; ve (EDM): Karras et al., arXiv 2206.00364.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from teachers.fields import require


def expand_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """``coefficient: [b]`` as ``[b, 1, ..., 1]`` beside ``x: [b, *dims]``, cast to x's dtype (the last step, so that
    times may be float64 while x keeps its dtype)."""
    return coefficient.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their time derivatives at t; each has the shape and dtype of t.

    `sigma_d_sigma` is sigma sigma', half the derivative of the variance: finite also where sigma' is not.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    sigma_d_sigma: Tensor

    @property
    def norm(self) -> Tensor:
        """sqrt(alpha^2 + sigma^2)."""
        return (self.alpha**2 + self.sigma**2).sqrt()

    @property
    def angle(self) -> Tensor:
        """phi = atan2(sigma, alpha), the noise level apart from any scale: it falls from at most pi/2 to at least 0."""
        return torch.atan2(self.sigma, self.alpha)

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

    @abstractmethod
    def time_at(self, angle: Tensor) -> Tensor:
        """The t with ``path(t).angle == angle`` (in [0, pi/2], any shape). Outside of [0, 1] for an angle that the path
        does not reach."""

    def start(self, x_0: Tensor) -> Tensor:
        """The point at t = 0 that sampling starts from: sigma(0) x_0, bit for bit x_0 where sigma(0) = 1.

        ``[b, *dims]``. Where alpha(0) is not 0 (6.6e-3 for vp, 1 beside a sigma of 80 for ve) it is neglected, as
        everyone does.
        """
        return expand_like(self(torch.zeros(1, dtype=torch.float64, device=x_0.device)).sigma, x_0) * x_0

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
        return Coefficients(t, 1 - t, one, -one, t - 1)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t - s)
        return one, -one

    def time_at(self, angle: Tensor) -> Tensor:
        return 1 / (1 + torch.tan(angle))


@dataclass(frozen=True)
class LinearFrom(Path):
    """The linear path without its noisiest part, alpha = first + (1 - first) t, sigma = 1 - alpha: of networks that
    know noise up to some level only. std: of the normal noise that sampling starts from, at t = 0."""

    name = "linear_from"
    first: float
    std: float

    def __post_init__(self) -> None:
        require(
            self,
            first=(0 < self.first < 1, "must be in (0, 1)"),
            std=(0 < self.std < math.inf, "must be above 0 and finite"),
        )

    def __call__(self, t: Tensor) -> Coefficients:
        rate, sigma = 1 - self.first, (1 - self.first) * (1 - t)
        slope = torch.full_like(t, rate)
        return Coefficients(1 - sigma, sigma, slope, -slope, -rate * sigma)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.full_like(t - s, 1 - self.first)
        return slope, -slope

    def time_at(self, angle: Tensor) -> Tensor:
        return (1 / (1 + torch.tan(angle)) - self.first) / (1 - self.first)

    def start(self, x_0: Tensor) -> Tensor:
        return self.std * x_0


@dataclass(frozen=True)
class Cosine(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): alpha^2 + sigma^2 = 1."""

    name = "cosine"

    def __call__(self, t: Tensor) -> Coefficients:
        angle, rate = t * (math.pi / 2), math.pi / 2
        alpha, sigma = torch.sin(angle), torch.cos(angle)
        return Coefficients(alpha, sigma, rate * sigma, -rate * alpha, -rate * alpha * sigma)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # sin B - sin A = 2 cos((A + B) / 2) sin((B - A) / 2), and torch.sinc(x) = sin(pi x) / (pi x)
        middle, chord = (s + t) * (math.pi / 4), (math.pi / 2) * torch.sinc((t - s) / 4)
        return torch.cos(middle) * chord, -torch.sin(middle) * chord

    def time_at(self, angle: Tensor) -> Tensor:
        return 1 - angle * (2 / math.pi)


@dataclass(frozen=True)
class VP(Path):
    """alpha = exp(-(beta_1 - beta_0) (1 - t)^2 / 4 - beta_0 (1 - t) / 2), alpha^2 + sigma^2 = 1: the diffusion whose
    rate goes from beta_1 at the noise to beta_0 at the data.

    alpha(0) = 6.6e-3, not 0. sigma' is infinite at t = 1: what needs it (`d_sigma`, `delta`, `secants` at s = t, and
    derivatives of `sigma`) asks for times below 1.
    """

    name = "vp"
    beta_0: float = 0.1
    beta_1: float = 20.0

    def __post_init__(self) -> None:
        positive = "must be above 0 and finite"
        require(self, beta_0=(0 < self.beta_0 < math.inf, positive), beta_1=(0 < self.beta_1 < math.inf, positive))

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -(1 - t) * ((1 - t) * (self.beta_1 - self.beta_0) / 4 + self.beta_0 / 2)

    def __call__(self, t: Tensor) -> Coefficients:
        log_alpha = self._log_alpha(t)
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        d_alpha = alpha * ((1 - t) * (self.beta_1 - self.beta_0) + self.beta_0) / 2
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma, -alpha * d_alpha)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # e^B - e^A = 2 e^((A + B) / 2) sinh((B - A) / 2), and B - A is (t - s) times:
        slope = (2 - s - t) * (self.beta_1 - self.beta_0) / 4 + self.beta_0 / 2
        middle = torch.exp((self._log_alpha(s) + self._log_alpha(t)) / 2)
        alpha = middle * slope * _sinhc((t - s) * slope / 2)
        c_s, c_t = self(s), self(t)
        return alpha, -alpha * (c_s.alpha + c_t.alpha) / (c_s.sigma + c_t.sigma)

    def time_at(self, angle: Tensor) -> Tensor:
        # the root of a quadratic in 1 - t, written without the difference that cancels near the data
        depth = -torch.log(torch.cos(angle))  # -log alpha
        half = self.beta_0 / 2
        return 1 - 2 * depth / (half + torch.sqrt(half**2 + (self.beta_1 - self.beta_0) * depth))


def _sinhc(z: Tensor) -> Tensor:
    """sinh(z) / z, smooth at 0: the product of cosh(z / 2^k) over k >= 1, which 27 factors end to rounding."""
    halvings = 2 ** torch.arange(1, 28, dtype=z.dtype, device=z.device)
    return torch.cosh(z[..., None] / halvings).prod(-1)


@dataclass(frozen=True)
class LinearVP(Path):
    """alpha = t, sigma = sqrt(1 - t^2): alpha^2 + sigma^2 = 1.

    sigma' is infinite at t = 1: what needs it (see `VP`) asks for times below 1.
    """

    name = "linear_vp"

    def __call__(self, t: Tensor) -> Coefficients:
        sigma = torch.sqrt((1 - t) * (1 + t))
        return Coefficients(t, sigma, torch.ones_like(t), -t / sigma, -t)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t - s), -(s + t) / (self(s).sigma + self(t).sigma)

    def time_at(self, angle: Tensor) -> Tensor:
        return torch.cos(angle)


@dataclass(frozen=True)
class VE(Path):
    """alpha = 1, sigma = ((1 - t) sigma_max^(1/rho) + t sigma_min^(1/rho))^rho: noise of EDM's levels, equal steps of t
    being its sampling grid. Points at t = 0 have the size of sigma_max; sigma(1) = sigma_min, not 0.
    """

    name = "ve"
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    rho: int = 7

    def __post_init__(self) -> None:
        require(
            self,
            sigma_max=(self.sigma_min < self.sigma_max < math.inf, "must be above sigma_min and finite"),
            sigma_min=(self.sigma_min > 0, "must be above 0"),
            rho=(self.rho >= 1, "must be at least 1"),
        )

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def _root(self, t: Tensor) -> Tensor:
        """sigma^(1/rho), linear in t."""
        high, low = self._ends
        return (1 - t) * high + t * low

    def __call__(self, t: Tensor) -> Coefficients:
        high, low = self._ends
        root = self._root(t)
        sigma, d_sigma = root**self.rho, self.rho * (low - high) * root ** (self.rho - 1)
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), d_sigma, sigma * d_sigma)

    def secants(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # b^n - a^n = (b - a) (b^(n-1) + b^(n-2) a + ... + a^(n-1))
        high, low = self._ends
        a, b = self._root(s), self._root(t)
        terms = torch.stack([a**k * b ** (self.rho - 1 - k) for k in range(self.rho)])
        return torch.zeros_like(t - s), (low - high) * terms.sum(0)

    def time_at(self, angle: Tensor) -> Tensor:
        high, low = self._ends
        return (torch.tan(angle) ** (1 / self.rho) - high) / (low - high)


PathName = Literal["linear", "cosine", "vp", "linear_vp", "ve"]
"""The keys of PATHS, for fields of recipes."""
PATHS: dict[str, type[Path]] = {"linear": Linear, "cosine": Cosine, "vp": VP, "linear_vp": LinearVP, "ve": VE}


def to_plain(path: Path) -> str | dict[str, Any]:
    """`path` for JSON: its name, with its numbers where they are not the usual ones."""
    usual = PATHS.get(path.name)
    return path.name if usual and path == usual() else {"name": path.name, **asdict(cast(Any, path))}


def from_plain(value: str | Mapping[str, Any]) -> Path:
    """The inverse of `to_plain`. Raises ValueError for what is no path."""
    known: dict[str, type[Path]] = {**PATHS, "linear_from": LinearFrom}
    name, numbers = (value, {}) if isinstance(value, str) else (value.get("name"), {**value})
    numbers.pop("name", None)
    if name not in known:
        raise ValueError(f"the path {name!r} is none of {', '.join(known)}")
    try:
        return known[name](**numbers)
    except TypeError as error:
        raise ValueError(f"the path {dict(value)!r} cannot be built: {error}") from None  # type: ignore[arg-type]
