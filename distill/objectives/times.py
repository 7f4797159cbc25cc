"""Laws of the times (s, t) that an objective is trained on, in our time (0 noise, 1 data).

`diagonal` is the share of rows whose END time is collapsed onto the start, t := s, where u(x, s, s) = v(x, s).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

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

    @abstractmethod
    def __call__(self, rows: Rows) -> Times:
        """Times for each of the rows."""

    @property
    def two_times(self) -> bool:
        """Whether s < t ever comes: what a flow map needs."""
        return True


def _sorted(a: Tensor, b: Tensor, diagonal: float, rows: Rows) -> Times:
    s, t = torch.minimum(a, b), torch.maximum(a, b)
    return Times(s, torch.where(rows.uniform() < diagonal, s, t))


def _share(diagonal: float) -> tuple[bool, str]:
    return 0 <= diagonal <= 1, "must be in [0, 1]"


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeLaw):
    """s = t ~ U(0, 1): one time, for flow matching."""

    def __call__(self, rows: Rows) -> Times:
        t = rows.uniform()
        return Times(t, t)

    @property
    def two_times(self) -> bool:
        """See `TimeLaw`."""
        return False


@dataclass(frozen=True, kw_only=True)
class UniformTriangle(TimeLaw):
    """Two U(0, 1), sorted: uniform on s <= t; mean gap 1/3. `noise` is the share of rows whose start is then moved to
    the noise, s := 0, where sampling begins (0 in the papers)."""

    diagonal: float = 0.25
    noise: float = 0.0

    def __post_init__(self) -> None:
        require(self, diagonal=_share(self.diagonal), noise=_share(self.noise))

    def __call__(self, rows: Rows) -> Times:
        s, t = _sorted(rows.uniform(), rows.uniform(), self.diagonal, rows)
        return Times(torch.where(rows.uniform() < self.noise, 0.0, s), t)

    @property
    def two_times(self) -> bool:
        """See `TimeLaw`."""
        return self.diagonal < 1 or self.noise > 0


@dataclass(frozen=True, kw_only=True)
class LogitNormalSorted(TimeLaw):
    """Two 1 - sigmoid(N(mean, std)), sorted. MeanFlow, arXiv 2505.13447: mean -0.4, std 1, diagonal 0.75."""

    mean: float = -0.4
    std: float = 1.0
    diagonal: float = 0.75

    def __post_init__(self) -> None:
        require(
            self,
            mean=(math.isfinite(self.mean), "must be finite"),
            std=(0 < self.std < math.inf, "must be above 0 and finite"),
            diagonal=_share(self.diagonal),
        )

    def __call__(self, rows: Rows) -> Times:
        a, b = (1 - torch.sigmoid(self.mean + self.std * rows.normal().double()) for _ in range(2))
        return _sorted(a, b, self.diagonal, rows)

    @property
    def two_times(self) -> bool:
        """See `TimeLaw`."""
        return self.diagonal < 1


TIMES: dict[str, type[TimeLaw]] = {
    "uniform": Uniform,
    "uniform_triangle": UniformTriangle,
    "logitnormal_sorted": LogitNormalSorted,
}
