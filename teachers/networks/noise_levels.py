"""Networks that EDM's code trained or took over: they denoise points x_1 + sigma x_0, dressed in one of four ways.

A point of the linear path is x_t = t (x_1 + sigma x_0) at sigma = (1 - t) / t, and v = (D - x_t) / (1 - t) of the
denoised D. Written so that nothing is infinite at either end, with F the network, S its sigma_data,
s^2 = (1 - t)^2 + S^2 t^2 and r^2 = (1 - t)^2 + t^2:

    edm     v = (S^2 t - (1 - t)) / s^2 x_t + S / s F(x_t / s, ln(sigma) / 4)
    vp      v = (x_t - F(x_t / r, 999 tau)) / t,    1 + sigma^2 = exp(19.9 tau^2 / 2 + 0.1 tau)
    ve      v = (x_t + F(x_t / t, ln(sigma / 2))) / t
    iddpm   v = (x_t - F(x_t / r, 999 - j)) / t,    sigma = u_j, the levels of a cosine schedule

Karras et al., arXiv 2206.00364, table 1; Karras et al., arXiv 2312.02696 (edm). Labels of iddpm lie between those of
its levels where sigma does, so that they have a derivative; its own code takes the nearest level.
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
from teachers.path import expand_like

Form = Literal["edm", "vp", "ve", "iddpm"]
_BETA_D, _BETA_MIN = 19.9, 0.1  # of vp
_LEVELS, _LEAST, _OFFSET = 1000, 0.001, 0.008  # of iddpm
_LOWEST = {"edm": 0.0, "vp": 1e-3, "ve": 0.02, "iddpm": 0.0}
_RATES = {"edm": 2.7, "vp": 999.0, "ve": 9.0, "iddpm": 1000.0}


@dataclass(frozen=True, kw_only=True)
class NoiseLevels(Convention):
    """A denoiser of noise up to `sigma_max`, where sampling starts. form: of its dressing; sigma_data: of edm, the
    standard deviation of its data; sigma_min: the level below which its label stays as it is."""

    form: Form = "edm"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require(
            self,
            form=(self.form in _RATES, f"must be one of {', '.join(_RATES)}"),
            sigma_data=(0 < self.sigma_data < math.inf, "must be above 0 and finite"),
            sigma_min=(self.sigma_min > 0, "must be above 0"),
            sigma_max=(self.sigma_min < self.sigma_max < math.inf, "must be above sigma_min and finite"),
        )

    @property
    def first(self) -> float:
        return 1 / (1 + self.sigma_max)

    @property
    def std(self) -> float:
        # of sigma_max x_0, its point on the linear path: the data beside it is neglected, as its samplers do
        return self.sigma_max / (1 + self.sigma_max)

    @property
    def rate(self) -> float:
        return _RATES[self.form]

    def enter(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        size = {"edm": self._size(t, self.sigma_data), "ve": t}.get(self.form, self._size(t, 1.0))
        sigma = ((1 - t) / t).clamp(max(self.sigma_min, _LOWEST[self.form]), self.sigma_max)
        return x / expand_like(size, x), self._label(sigma)

    def leave(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.form == "edm":
            size = self._size(t, self.sigma_data)
            own = (self.sigma_data**2 * t - (1 - t)) / size**2
            return expand_like(own, x) * x + expand_like(self.sigma_data / size, x) * said
        return (x + said if self.form == "ve" else x - said) / expand_like(t, x)

    @staticmethod
    def _size(t: Tensor, data: float) -> Tensor:
        """Of a point of the linear path, if the data's is `data`."""
        return ((1 - t) ** 2 + (data * t) ** 2).sqrt()

    def _label(self, sigma: Tensor) -> Tensor:
        if self.form == "edm":
            return sigma.log() / 4
        if self.form == "ve":
            return (sigma / 2).log()
        if self.form == "vp":
            depth = torch.log1p(sigma**2)
            return (_LEVELS - 1) * 2 * depth / (_BETA_MIN + (_BETA_MIN**2 + 2 * _BETA_D * depth).sqrt())
        return place(self._levels.to(sigma.device), sigma.log())  # ln u_j falls in j, these rise

    def nearest(self, sigma: float) -> float:
        """The level of iddpm that is nearest to `sigma`: its own samplers know no other."""
        levels = self._levels.exp()
        return levels[(levels - sigma).abs().argmin()].item()

    @cached_property
    def _levels(self) -> Tensor:
        """ln of u_999, ..., u_0: u_(j-1)^2 + 1 = (u_j^2 + 1) / max(a_(j-1) / a_j, 0.001), u_1000 = 0,
        a_j = sin^2(pi j / (2000 1.008))."""
        # in float32, as its code has them: a difference of nearly equal numbers, which is off by 1e-3 at the data
        j = torch.arange(_LEVELS + 1, dtype=torch.float32)
        a = torch.sin(0.5 * math.pi * j / _LEVELS / (_OFFSET + 1)) ** 2
        ratio = (a[:-1] / a[1:]).clamp_min(_LEAST)
        u = [torch.zeros(())]
        for level in range(_LEVELS - 1, -1, -1):
            u.append(((u[-1] ** 2 + 1) / ratio[level] - 1).sqrt())
        return torch.stack(u[1:]).double().log()
