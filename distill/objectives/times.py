"""Laws of the times (s, t) that an objective is trained on, in our time (0 noise, 1 data).

Three shapes: `one` (s = t), `two` (s <= t, of which a share `diagonal` has s = t, where u(x, s, s) = v(x, s): the END
is collapsed onto the start, t := s, or the time is drawn on its own, as its authors do), and `next` (t is the neighbour
of s on a grid, for discrete consistency). Published laws in noise time tau, or in sigma_hat = sigma / alpha, are turned
into ours: tau = 1 - t, sigma_hat = sigma_data (1 - t) / t on the linear path, where `sigma_data` is the deviation that
the published networks scale data to (0.5) over that of the data here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from distill.rows import Rows
from teachers.fields import require


class Times(NamedTuple):
    """Start s and end t, each ``[b]`` float64 in [0, 1] with s <= t."""

    s: Tensor
    t: Tensor


class TimeLaw(ABC):
    """A law of (s, t); a frozen dataclass whose fields are the recipe's keys."""

    shape: ClassVar[Literal["one", "two", "next"]] = "two"

    @abstractmethod
    def __call__(self, rows: Rows, step: int = 0) -> Times:
        """Times for each of the rows; `step` is there for what is scheduled."""

    @property
    def two_times(self) -> bool:
        """Whether s < t ever comes: what a flow map needs."""
        return self.shape == "two" and getattr(self, "diagonal", 0.0) < 1

    @property
    def has_diagonal(self) -> bool:
        """Whether a share of the rows has s = t."""
        return getattr(self, "diagonal", 0.0) > 0


def _collapsed(s: Tensor, t: Tensor, diagonal: float, rows: Rows) -> Times:
    return Times(s, torch.where(rows.uniform() < diagonal, s, t))


def _logistic(rows: Rows, mean: float, std: float) -> Tensor:
    """sigmoid(N(mean, std)): a logit-normal number in (0, 1)."""
    return torch.sigmoid(mean + std * rows.normal().double())


def _share(value: float) -> tuple[bool, str]:
    return 0 <= value <= 1, "must be in [0, 1]"


def _finite(value: float) -> tuple[bool, str]:
    return math.isfinite(value), "must be finite"


def _positive(value: float) -> tuple[bool, str]:
    return 0 < value < math.inf, "must be above 0 and finite"


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeLaw):
    """s = t ~ U(0, 1)."""

    shape = "one"

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        t = rows.uniform()
        return Times(t, t)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeLaw):
    """s = t = 1 - sigmoid(N(mean, std)). Stable Diffusion 3, arXiv 2403.03206: 0, 1."""

    shape = "one"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        require(self, mean=_finite(self.mean), std=_positive(self.std))

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        t = 1 - _logistic(rows, self.mean, self.std)
        return Times(t, t)


@dataclass(frozen=True, kw_only=True)
class EDMLogNormal(TimeLaw):
    """s = t with ln sigma_hat ~ N(mean, std), t = 1 / (1 + sigma_hat / sigma_data). EDM, arXiv 2206.00364: -1.2, 1.2,
    0.5; sCM, arXiv 2410.11081: -1, 1.4."""

    shape = "one"
    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require(self, mean=_finite(self.mean), std=_positive(self.std), sigma_data=_positive(self.sigma_data))

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        t = _from_sigma((self.mean + self.std * rows.normal().double()).exp(), self.sigma_data)
        return Times(t, t)


@dataclass(frozen=True, kw_only=True)
class Shifted(TimeLaw):
    """s = t = 1 - tau, tau = shift u / (1 + (shift - 1) u), u ~ U(0, 1): to the noise. arXiv 2403.03206; video: 5."""

    shape = "one"
    shift: float = 3.0

    def __post_init__(self) -> None:
        require(self, shift=_positive(self.shift))

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        u = rows.uniform()
        t = (1 - u) / (1 + (self.shift - 1) * u)
        return Times(t, t)


@dataclass(frozen=True, kw_only=True)
class UniformTriangle(TimeLaw):
    """Two U(0, 1), sorted: uniform on s <= t; mean gap 1/3. Rows of the diagonal stay at the first, U(0, 1), as in
    self-distillation (arXiv 2505.18825). `noise` is the share of rows whose start is then moved to the noise, s := 0,
    where sampling begins (0 in the papers)."""

    diagonal: float = 0.25
    noise: float = 0.0

    def __post_init__(self) -> None:
        require(self, diagonal=_share(self.diagonal), noise=_share(self.noise))

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        first, second = rows.uniform(), rows.uniform()
        second = torch.where(rows.uniform() < self.diagonal, first, second)
        s, t = torch.minimum(first, second), torch.maximum(first, second)
        return Times(torch.where(rows.uniform() < self.noise, 0.0, s), t)

    @property
    def two_times(self) -> bool:
        """See `TimeLaw`."""
        return self.diagonal < 1 or self.noise > 0

    @property
    def has_diagonal(self) -> bool:
        """See `TimeLaw`. Rows that are moved to the noise keep their end."""
        return self.diagonal > 0 and self.noise < 1


@dataclass(frozen=True, kw_only=True)
class LogitNormalSorted(TimeLaw):
    """Two 1 - sigmoid(N(mean, std)), sorted. MeanFlow, arXiv 2505.13447: mean -0.4, std 1, diagonal 0.75."""

    mean: float = -0.4
    std: float = 1.0
    diagonal: float = 0.75

    def __post_init__(self) -> None:
        require(self, mean=_finite(self.mean), std=_positive(self.std), diagonal=_share(self.diagonal))

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        a, b = (1 - _logistic(rows, self.mean, self.std) for _ in range(2))
        return _collapsed(torch.minimum(a, b), torch.maximum(a, b), self.diagonal, rows)


@dataclass(frozen=True, kw_only=True)
class LogitNormalIndependent(TimeLaw):
    """tau_s ~ LN(start_mean, std), tau_t = min(tau_s, LN(end_mean, std)): starts anywhere, ends near the data. Where
    the minimum is tau_s the row is on the diagonal (6.6 % more). The second version of MeanFlow's CIFAR recipe."""

    start_mean: float = -0.6
    end_mean: float = -4.0
    std: float = 1.6
    diagonal: float = 0.25

    def __post_init__(self) -> None:
        require(
            self,
            start_mean=_finite(self.start_mean),
            end_mean=_finite(self.end_mean),
            std=_positive(self.std),
            diagonal=_share(self.diagonal),
        )

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        s = 1 - _logistic(rows, self.start_mean, self.std)
        return _collapsed(s, torch.maximum(s, 1 - _logistic(rows, self.end_mean, self.std)), self.diagonal, rows)


@dataclass(frozen=True, kw_only=True)
class GapUniform(TimeLaw):
    """Gap d = sigmoid(N(mean, std)), start uniform given it, s ~ U(0, 1 - d). Align Your Flow, arXiv 2506.14603."""

    mean: float = -0.8
    std: float = 1.0
    diagonal: float = 0.0

    def __post_init__(self) -> None:
        require(self, mean=_finite(self.mean), std=_positive(self.std), diagonal=_share(self.diagonal))

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        gap = _logistic(rows, self.mean, self.std)
        s = rows.uniform() * (1 - gap)
        return _collapsed(s, s + gap, self.diagonal, rows)


@dataclass(frozen=True, kw_only=True)
class GapTruncated(TimeLaw):
    """The same gap d; the END's noise time 1 - t is LN(end_mean, end_std) cut off at 1 - d, and s = t - d. Rows of the
    diagonal are drawn on their own, 1 - t ~ LN(end_mean, end_std). Terminal velocity matching, arXiv 2511.19797."""

    mean: float = -0.8
    std: float = 1.0
    end_mean: float = -0.4
    end_std: float = 1.0
    diagonal: float = 0.0

    def __post_init__(self) -> None:
        require(
            self,
            mean=_finite(self.mean),
            std=_positive(self.std),
            end_mean=_finite(self.end_mean),
            end_std=_positive(self.end_std),
            diagonal=_share(self.diagonal),
        )

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        gap = _logistic(rows, self.mean, self.std)
        room = torch.special.ndtr((torch.logit(1 - gap) - self.end_mean) / self.end_std)
        quantile = torch.special.ndtri((rows.uniform() * room).clamp_min(1e-300))
        t = 1 - torch.sigmoid(self.end_mean + self.end_std * quantile)
        on = rows.uniform() < self.diagonal
        own = 1 - _logistic(rows, self.end_mean, self.end_std)
        return Times(torch.where(on, own, (t - gap).clamp_min(0)), torch.where(on, own, t))


@dataclass(frozen=True, kw_only=True)
class DecoupledSorted(TimeLaw):
    """Two noise times LN(first_mean, 1) and LN(second_mean, 1), sorted; rows of the diagonal are drawn on their own,
    LN(0, 1). Decoupled MeanFlow, arXiv 2510.24474: half of its loss is flow matching."""

    first_mean: float = 0.4
    second_mean: float = -1.2
    diagonal: float = 0.5

    def __post_init__(self) -> None:
        require(
            self,
            first_mean=_finite(self.first_mean),
            second_mean=_finite(self.second_mean),
            diagonal=_share(self.diagonal),
        )

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        a, b, own = (1 - _logistic(rows, mean, 1.0) for mean in (self.first_mean, self.second_mean, 0.0))
        on = rows.uniform() < self.diagonal
        return Times(torch.where(on, own, torch.minimum(a, b)), torch.where(on, own, torch.maximum(a, b)))


@dataclass(frozen=True, kw_only=True)
class Dyadic(TimeLaw):
    """Gaps 1, 1/2, ..., 2 / finest, each as likely, s a multiple of the gap. Rows of the diagonal have s uniform on
    the grid 0, 1 / finest, .... Shortcut models, arXiv 2410.12557: finest 128, diagonal 7/8."""

    finest: int = 128
    diagonal: float = 0.75

    def __post_init__(self) -> None:
        power = self.finest >= 2 and self.finest & (self.finest - 1) == 0
        require(self, finest=(power, "must be a power of two, at least 2"), diagonal=_share(self.diagonal))

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        level = (rows.uniform() * math.log2(self.finest)).floor()
        gap, u = 2.0**-level, rows.uniform()
        s, on = (u / gap).floor() * gap, rows.uniform() < self.diagonal
        s = torch.where(on, (u * self.finest).floor() / self.finest, s)
        return Times(s, torch.where(on, s, s + gap))


@dataclass(frozen=True, kw_only=True)
class Grid(TimeLaw):
    """Neighbours s, t of a grid from `first` intervals to `final`, reached after `over` steps.

    density: each interval as likely (`uniform`), or as it is under ln sigma_hat ~ N(mean, std) (`lognormal`, improved
    consistency training: -1.1, 2).
    growth: `constant`, `sqrt` (consistency training, arXiv 2303.01469) or `double` (improved, arXiv 2310.14189).
    curve: `uniform` in t from 0 to 1, or `karras`: sigma_hat from sigma_max to sigma_min with exponent rho, 7, as
    t = 1 / (1 + sigma_hat / sigma_data), whose last point is moved onto t = 1.
    """

    shape = "next"
    first: int = 2
    final: int = 128
    over: int = 1000
    growth: Literal["constant", "sqrt", "double"] = "double"
    curve: Literal["uniform", "karras"] = "uniform"
    density: Literal["uniform", "lognormal"] = "uniform"
    mean: float = -1.1
    std: float = 2.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require(
            self,
            first=(self.first >= 1, "must be at least 1"),
            final=(self.final >= self.first, f"must be at least first, {self.first}"),
            over=(self.over >= 1, "must be at least 1"),
            mean=_finite(self.mean),
            std=_positive(self.std),
            sigma_min=_positive(self.sigma_min),
            sigma_max=(self.sigma_min < self.sigma_max < math.inf, "must be above sigma_min and finite"),
            sigma_data=_positive(self.sigma_data),
        )

    def intervals(self, step: int) -> int:
        """How many intervals the grid has at a training step."""
        if self.growth == "constant":
            return self.final
        if self.growth == "sqrt":
            share = min(step / self.over, 1.0)
            n = math.ceil(math.sqrt(share * ((self.final + 1) ** 2 - self.first**2) + self.first**2) - 1)
            return min(max(n, 1), self.final)
        stage = max(self.over // (int(math.log2(self.final // self.first)) + 1), 1)
        return min(self.first * 2 ** min(step // stage, 62), self.final)

    def grid(self, step: int) -> Tensor:
        """The grid's times, ``[intervals + 1]``, increasing."""
        u = torch.linspace(0, 1, self.intervals(step) + 1, dtype=torch.float64)
        if self.curve == "uniform":
            return u
        high, low = self.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        t = _from_sigma((high + u * (low - high)) ** 7, self.sigma_data)
        t[-1] = 1.0
        return t

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        u = rows.uniform()
        grid = self.grid(step).to(u.device)
        if self.density == "uniform":
            index = (u * (len(grid) - 1)).long()
        else:
            noise = torch.log(self.sigma_data * (1 - grid) / grid)
            if self.curve == "karras":
                noise[-1] = math.log(self.sigma_min)  # that was moved onto t = 1, and what is beyond it stays out
            share = torch.special.ndtr((self.mean - noise) / self.std)  # of noise beyond each point
            level = share[0] + u * (share[-1] - share[0])
            index = torch.searchsorted(share, level, right=True).clamp(1, len(grid) - 1) - 1
        return Times(grid[index], grid[index + 1])


@dataclass(frozen=True, kw_only=True)
class EasyConsistency(TimeLaw):
    """ln sigma_hat ~ N(mean, std) and its neighbour sigma_hat' = sigma_hat max(0, 1 - q^-(stage + 1)
    (1 + 8 sigmoid(-sigma_hat))), stage = step // stage_steps: first the data itself, then ever closer. ECT,
    arXiv 2406.14548: -1.1, 2, q 2, sigma_data 0.5."""

    shape = "next"
    mean: float = -1.1
    std: float = 2.0
    q: float = 2.0
    stage_steps: int = 250
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require(
            self,
            mean=_finite(self.mean),
            std=_positive(self.std),
            q=(1 < self.q < math.inf, "must be above 1 and finite"),
            stage_steps=(self.stage_steps >= 1, "must be at least 1"),
            sigma_data=_positive(self.sigma_data),
        )

    def __call__(self, rows: Rows, step: int = 0) -> Times:
        sigma = (self.mean + self.std * rows.normal().double()).exp()
        # beyond 40 halvings s and t would be the same number
        shrink = max(self.q ** -(step // self.stage_steps + 1.0), 1e-12) * (1 + 8 * torch.sigmoid(-sigma))
        following = sigma * (1 - shrink).clamp_min(0)
        return Times(_from_sigma(sigma, self.sigma_data), _from_sigma(following, self.sigma_data))


def _from_sigma(sigma_hat: Tensor, sigma_data: float) -> Tensor:
    """t of sigma_hat = sigma_data (1 - t) / t."""
    return 1 / (1 + sigma_hat / sigma_data)


TIMES: dict[str, type[TimeLaw]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "edm_lognormal": EDMLogNormal,
    "shifted": Shifted,
    "uniform_triangle": UniformTriangle,
    "logitnormal_sorted": LogitNormalSorted,
    "logitnormal_indep_v1": LogitNormalIndependent,
    "gap_uniform": GapUniform,
    "gap_truncated": GapTruncated,
    "dmf": DecoupledSorted,
    "dyadic": Dyadic,
    "grid": Grid,
    "ect": EasyConsistency,
}
