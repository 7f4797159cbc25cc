"""Networks of other conventions as velocities: what they are given for our point and time, and what they answer.

Ours is the linear path, x_t = t x_1 + (1 - t) x_0, v = x_1 - x_0. On any path x_nat = b x_1 + a x_0 the same noise
level is t = b / (a + b), and the same point x_nat = (a + b) x_t; the network's answer gives both ends, and v is their
difference. As closed forms, with e the noise, y the data, S the score and w the velocity dx_nat/dr that it predicts:

    v = (x_t - e) / t        e = -a S        v = (y - x_t) / (1 - t)
    x_1 = (a w - a' x_nat) / (a b' - a' b),    x_0 = (b' x_nat - b w) / (a b' - a' b)

Networks of diffusions know noise up to a level only, hence times from `first` on: beyond it the label is clamped, never
the formula. Ma et al., arXiv 2401.08740; Salimans and Ho, arXiv 2202.00512; Karras et al., arXiv 2206.00364.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from teachers.fields import require
from teachers.networks.convention import Convention, place
from teachers.networks.noise_levels import NoiseLevels
from teachers.path import PATHS, Path, PathName, expand_like


@dataclass(frozen=True, kw_only=True)
class Flow(Convention):
    """A flow on the path `native`, fed its own time: 0 or 1 where the noise is (`noise_time`), times `scale`.

    prediction: the velocity along its own time, the noise, the data or the score. floor: what 1 - t is at least in the
    velocity (data - x) / (1 - t) of a data prediction. noise_std: of its noise. margin: the part of its own time next
    to the noise that it does not know, above 0 where noise and scores give an infinite velocity at the noise alone.
    shift: its label is the time before the noise 1 - r was shifted to s (1 - r) / (1 + (s - 1) (1 - r)), as CogView4's
    is (Zheng et al., arXiv 2403.05121).
    """

    native: PathName = "linear"
    prediction: Literal["velocity", "noise", "data", "score"] = "velocity"
    noise_time: Literal[0, 1] = 0
    scale: float = 1.0
    floor: float = 0.0
    noise_std: float = 1.0
    margin: float = 0.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        straight = self.native == "linear"
        begins = PATHS[self.native]()(torch.zeros(1)).alpha.item() if self.native in PATHS else 1.0
        infinite = begins == 0 and self.prediction in ("noise", "score")
        require(
            self,
            native=(self.native in PATHS, f"must be one of {', '.join(PATHS)}"),
            prediction=(self.prediction != "data" or straight, "of the data is read on the linear path alone"),
            noise_time=(self.noise_time in (0, 1), "must be 0 or 1"),
            scale=(0 < self.scale < math.inf, "must be above 0 and finite"),
            floor=(0 <= self.floor < 1, "must be in [0, 1)"),
            noise_std=(0 < self.noise_std < math.inf and (straight or self.noise_std == 1),
                       "must be above 0, and 1 but on the linear path"),
            margin=(0 <= self.margin < 0.5 and not (infinite and self.margin == 0),
                    "must be in (0, 0.5), e.g. 1e-3: the velocity is infinite at the noise alone" if infinite
                    else "must be in [0, 0.5)"),
            shift=(0 < self.shift < math.inf, "must be above 0 and finite"),
        )  # fmt: skip

    @cached_property
    def _own(self) -> Path:
        return PATHS[self.native]()

    @cached_property
    def _ends(self) -> tuple[float, float]:
        c = self._own(torch.tensor([self.margin], dtype=torch.float64))
        alpha, sigma = c.alpha.item(), self.noise_std * c.sigma.item()
        return alpha, sigma

    @property
    def first(self) -> float:
        alpha, sigma = self._ends
        return alpha / (alpha + sigma)

    @property
    def std(self) -> float:
        # sampling starts from the noise alone, at an alpha above 0 too; on other paths that is of the point's own size
        alpha, sigma = self._ends
        return (self.noise_std if self.native == "linear" else math.hypot(alpha, sigma)) / (alpha + sigma)

    @property
    def rate(self) -> float:
        return self.scale

    def _time(self, t: Tensor) -> Tensor:
        """Its own time, 0 at the noise."""
        if self.native == "linear":
            return t if self.noise_std == 1 else self.noise_std * t / (1 - t + self.noise_std * t)
        return self._own.time_at(torch.atan2(1 - t, t)).clamp(self.margin, 1)

    def _scaled(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Its own point."""
        if self.native == "linear":
            return x if self.noise_std == 1 else expand_like(r + self.noise_std * (1 - r), x) * x
        return expand_like(self._own(r).norm / (t**2 + (1 - t) ** 2).sqrt(), x) * x

    def enter(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r = self._time(t)
        label = r if self.noise_time == 0 else 1 - r
        if self.shift != 1:
            noise = (1 - r) / (self.shift - (self.shift - 1) * (1 - r))
            label = 1 - noise if self.noise_time == 0 else noise
        return self._scaled(x, t, r), self.scale * label

    def leave(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.prediction in ("noise", "score"):
            noise = said
            if self.prediction == "score":
                noise = -expand_like(self.noise_std * self._own(self._time(t)).sigma, x) * said
            return (x - noise) / expand_like(t, x)
        r = self._time(t)
        own = self._scaled(x, t, r)
        if self.prediction == "data":
            said = (said - own) / expand_like((1 - r).clamp_min(self.floor), x)
        elif self.noise_time == 1:
            said = -said
        if self.native == "linear":
            # x_0 is noise of the size noise_std
            return (
                said
                if self.noise_std == 1
                else (own + expand_like(1 - r, x) * said) - (own - expand_like(r, x) * said) / self.noise_std
            )
        # multiplied by sigma, since sigma' is infinite at the data where sigma vanishes
        c = self._own(r)
        determinant = c.d_alpha * c.sigma**2 - c.alpha * c.sigma_d_sigma
        x_1 = expand_like(c.sigma**2 / determinant, x) * said - expand_like(c.sigma_d_sigma / determinant, x) * own
        x_0 = (
            expand_like(c.sigma * c.d_alpha / determinant, x) * own
            - expand_like(c.sigma * c.alpha / determinant, x) * said
        )
        return x_1 - x_0


@dataclass(frozen=True, kw_only=True)
class FlowToSigmaMin(Convention):
    """A velocity on the path x_1 r + (1 - (1 - sigma_min) r) x_0, which ends at data with noise of sigma_min; Lipman et
    al., arXiv 2210.02747, section 4. Beyond its end, at t = 1 / (1 + sigma_min), it is taken to go on as it ended."""

    sigma_min: float

    def __post_init__(self) -> None:
        require(self, sigma_min=(0 < self.sigma_min < 1, "must be in (0, 1)"))

    @property
    def first(self) -> float:
        return 0.0

    @property
    def std(self) -> float:
        return 1.0

    @property
    def rate(self) -> float:
        return 1.0

    def _time(self, t: Tensor) -> Tensor:
        return (t / (1 - self.sigma_min * t)).clamp_max(1)

    def enter(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r = self._time(t)
        return expand_like(1 + self.sigma_min * r, x) * x, r

    def leave(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        # alpha' sigma - alpha sigma' is 1
        scale = expand_like(1 + self.sigma_min * self._time(t), x)
        return scale * (said - self.sigma_min * x)


@dataclass(frozen=True, kw_only=True)
class Discrete(Convention):
    """A diffusion of K = `steps` noise levels of constant variance, fed k in [0, K - 1], 0 next to the data.

    betas: `linear`, `scaled_linear` (linear square roots) or `cosine` from beta_start to beta_end; zero_snr: rescaled
    so that the last level is noise alone. Between levels ln(sigma / alpha) is taken to be linear in k. prediction: the
    noise, the data, or the velocity alpha e - sigma y.
    """

    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    zero_snr: bool = False
    prediction: Literal["noise", "velocity", "data"] = "noise"

    def __post_init__(self) -> None:
        require(
            self,
            betas=(self.betas in ("linear", "scaled_linear", "cosine"), "must be linear, scaled_linear or cosine"),
            beta_start=(0 < self.beta_start < 1, "must be in (0, 1)"),
            beta_end=(self.beta_start < self.beta_end < 1, "must be in (beta_start, 1)"),
            steps=(self.steps >= 2, "must be at least 2"),
        )

    @cached_property
    def ratios(self) -> Tensor:
        """ln(sigma / alpha) of each level, float64 ``[K]``, rising."""
        k = torch.arange(self.steps, dtype=torch.float64)
        if self.betas == "cosine":
            levels = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            kept = torch.cos((levels + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - kept[1:] / kept[:-1]).clamp_max(0.999)
        else:
            root = 0.5 if self.betas == "scaled_linear" else 1.0
            low, high = self.beta_start**root, self.beta_end**root
            betas = (low + (high - low) * k / (self.steps - 1)) ** (1 / root)
        alpha = torch.cumprod(1 - betas, 0).sqrt()
        if self.zero_snr:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            alpha[-1] = 2.0**-12  # as good as 0, and its logarithm finite
        return 0.5 * (torch.log1p(-(alpha**2)) - torch.log(alpha**2))

    @property
    def first(self) -> float:
        return 1 / (1 + math.exp(self.ratios[-1].item()))

    @property
    def std(self) -> float:
        return math.hypot(self.first, 1 - self.first)

    @property
    def rate(self) -> float:
        return float(self.steps)

    def enter(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x / expand_like(_norm(t), x), place(self.ratios.to(t.device), torch.log1p(-t) - torch.log(t))

    def leave(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "noise":
            return (x - said) / expand_like(t, x)
        if self.prediction == "data":
            return (said - x) / expand_like(1 - t, x)
        norm = _norm(t)
        return expand_like((2 * t - 1) / norm**2, x) * x - said / expand_like(norm, x)


def _norm(t: Tensor) -> Tensor:
    return (t**2 + (1 - t) ** 2).sqrt()


ConventionConfig = NoiseLevels | Flow | FlowToSigmaMin | Discrete
CONVENTIONS: dict[str, type[ConventionConfig]] = {
    "flow": Flow,
    "flow_to_sigma_min": FlowToSigmaMin,
    "discrete": Discrete,
    "noise_levels": NoiseLevels,
}
