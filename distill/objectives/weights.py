"""Weights of a loss, in order: an adaptive power of the loss itself, a power of the gap, a learned log-variance.

They act on each summand of a `Loss` and each row, outside of the residual, and are the same pieces for every objective.
Adaptive: Geng et al., arXiv 2406.14548 and 2505.13447; learned: Kendall et al., arXiv 1705.07115; EDM2, 2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from teachers.fields import require

_FLOOR = -10.0  # at a perfect fit the learned log-variance would run to -inf


@dataclass(frozen=True, kw_only=True)
class Weight:
    """loss -> loss / sg(loss + c)^power -> gap^`gap` loss -> learned.

    gap: the power of (t - s). power: 0 is the squared error, 1/2 has a gradient of constant norm (pseudo-Huber), 1 (as
    in MeanFlow) one that falls with the error; `c` is per feature, a published constant for sums over d features is
    d times larger. learned: `none`; `gaussian`: e^-lv L + lv; `log`: log(L e^-lv + 0.01) + lv, with lv a small network
    of (s, t) that is trained along.
    """

    gap: float = 0.0
    power: float = 0.0
    c: float = 1e-3
    learned: Literal["none", "gaussian", "log"] = "none"

    def __post_init__(self) -> None:
        require(
            self,
            gap=(math.isfinite(self.gap), "must be finite"),
            power=(0 <= self.power <= 1, "must be in [0, 1]"),
            c=(0 <= self.c < math.inf, "must be at least 0 and finite"),
        )

    def __call__(
        self, loss: Tensor, gap: Tensor, log_variance: Tensor | None = None, scale: Tensor | float = 1.0
    ) -> Tensor:
        """Weighted ``loss: [b]`` of rows whose times are ``gap: [b]`` apart; log_variance ``[b]`` where learned. scale,
        ``[b]``: of a loss that is `scale` times an e^2, for which an adaptive power is of (scale e)^2 and c of e^2."""
        if self.power:
            # the square root's gradient is infinite at 0, where the loss is 0 too
            size = scale * (loss.detach() + scale * self.c)
            loss = loss / size.clamp_min(1e-24).pow(self.power).to(loss.dtype)
        if self.gap:
            # at gap 0 a negative power is infinite
            loss = loss * torch.where(gap > 0, gap, 1e-4).pow(self.gap).to(loss.dtype)
        if self.learned == "none":
            return loss
        assert log_variance is not None
        if self.learned == "gaussian":
            return loss * torch.exp(-log_variance) + log_variance
        return torch.log(loss * torch.exp(-log_variance) + 0.01) + log_variance


class LogVariance(nn.Module):
    """lv(s, t) of each summand, ``[b]`` each, at least -10: a small network that starts at zero. Training owns it."""

    def __init__(self, terms: tuple[str, ...], seed: int) -> None:
        super().__init__()
        self.terms = terms
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(4, 32)
        self.out = nn.Linear(32, len(terms))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, s: Tensor, t: Tensor) -> Mapping[str, Tensor]:
        """``s, t: [b]``."""
        times = torch.stack([s, t], -1) * (math.pi / 2)
        features = torch.cat([times.cos(), times.sin()], -1).to(self.out.weight.dtype)
        lv = self.out(torch.nn.functional.silu(self.hidden(features)))
        # a floor that lets the gradient through from below, so that it can come back up
        lv = lv + (lv.clamp_min(_FLOOR) - lv).detach()
        return dict(zip(self.terms, lv.unbind(-1), strict=True))
