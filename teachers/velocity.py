"""The velocity of a flow, what else it says about a point, and what a teacher is.

Conversions hold on any path (x_t = alpha x_1 + sigma x_0, delta = alpha' sigma - alpha sigma'):
D = E[x_1 | x_t] and E = E[x_0 | x_t] solve {x_t = alpha D + sigma E, v = alpha' D + sigma' E}, and the score is
-E / sigma (Tweedie). Ma et al., arXiv 2401.08740, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from teachers.errors import InputError
from teachers.fields import require
from teachers.path import Linear, Path, expand_like
from teachers.space import Cond, DataSpace, Latent

NO_VELOCITY = (
    "makes samples and has no velocity: regress on its samples (objective endpoint with pairs: {solver: own}), or fit "
    "a velocity by reflow first (objective reflow with pairs: {solver: own}) and take the export of that for a teacher"
)
"""What is said of a teacher that is a generator alone, and the remedy."""


class Velocity(Protocol):
    """dx_t/dt of the probability flow, from noise (t = 0) to data (t = 1)."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """``x_t: [b, *dims]``, ``t: [b]`` in [0, 1] -> velocity ``[b, *dims]``; differentiable in x_t and t."""
        ...


Renorm = Literal["width", "token", "cap", "deviation"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a family guides. channels: the first ones, which guidance acts on while the others stay as conditioned (None:
    all of them). renorm: what of the guided velocity is brought back to the length that it has as conditioned: each
    row of the last axis (width), each square of 2 x 2 with all channels (token), the sample if it is longer (cap), the
    sample about its mean (deviation). open: whether the ends of an interval, but 0, are outside of it."""

    channels: int | None = None
    renorm: Renorm | None = None
    open: bool = False


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen velocity, or a generator of samples alone, together with what has to be known to distil it.

    `network` is the module behind `velocity` where a student can start from it (called as network(x, t, cond, shift),
    see teachers.networks) and `network_config` its entry there. `flow_map(x_s, s, t)` and `data(noise, uniform)` exist
    for analytic teachers alone: the exact map, and data drawn from normal noise and uniforms, both [b, *shape].
    `generator(x_0, cond)` is a deterministic way from standard normal noise ``[b, *shape]`` to samples, other than the
    velocity's ODE; a normalizing flow, a GAN and their like have it and no `velocity`.
    `null` is one row of conditioning, without a batch dimension, that means "none", if the model was trained with it.
    `rule` is its family's rule of guidance; `latent` the map to what it works on, of a teacher of latents.
    `calls` counts network evaluations a call of the velocity, or of the generator where there is none; `parts` are
    further networks behind them.
    `info` holds id, digest and licence, and goes into every export.
    """

    velocity: Velocity | None = None
    space: DataSpace
    path: Path = field(default_factory=Linear)
    network: nn.Module | None = None
    network_config: Mapping[str, Any] | None = None
    flow_map: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    data: Callable[[Tensor, Tensor], Tensor] | None = None
    generator: Callable[[Tensor, Cond], Tensor] | None = None
    null: Mapping[str, Tensor] | None = None
    rule: Rule = Rule()
    latent: Latent | None = None
    calls: int = 1
    parts: tuple[nn.Module, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self,
            velocity=(
                self.velocity is not None or self.generator is not None,
                "must be given, or a generator of samples without it",
            ),
            network=(
                self.network is None or hasattr(self.network, "second_time"),
                "must be of teachers.networks (or None, and the recipe's student starts at random)",
            ),
            network_config=(
                (self.network is None) == (self.network_config is None),
                "must be given together with network: its entry there, e.g. {'name': 'mlp', 'width': 128}",
            ),
        )

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.velocity is None:
            raise InputError(f"teacher {self.info.get('id')} {NO_VELOCITY}")
        v = self.velocity(x_t, t, cond)
        if not isinstance(v, Tensor):
            raise ValueError(
                f"teacher {self.info.get('id')}: its velocity is a {type(v).__name__} at a point {x_t.dtype} "
                f"{list(x_t.shape)}; it must be a tensor of the point's dtype and shape"
            )
        if torch.is_autocast_enabled(x_t.device.type):
            v = v.to(x_t.dtype)  # mixed precision ends here
        if v.shape != x_t.shape or v.dtype != x_t.dtype:
            raise ValueError(
                f"teacher {self.info.get('id')}: its velocity is {v.dtype} {list(v.shape)} at a point {x_t.dtype} "
                f"{list(x_t.shape)}; it must have the point's dtype and shape"
            )
        return v

    def freeze(self) -> None:
        """Its networks in eval mode and without gradients, in place."""
        for part in self.modules():
            part.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move its networks to a device, in place."""
        for part in self.modules():
            if not hasattr(part, "hf_device_map"):  # accelerate has placed it, in parts
                part.to(device)

    def modules(self) -> list[nn.Module]:
        """The networks behind it."""
        return [part for part in (self.network, self.velocity, *self.parts) if isinstance(part, nn.Module)]


def data_from_velocity(path: Path, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """D = E[x_1 | x_t] = (sigma v - sigma' x_t) / delta. All ``[b, *dims]``, ``t: [b]``."""
    c = path(t)
    return expand_like(c.sigma / c.delta, v) * v - expand_like(c.d_sigma / c.delta, v) * x_t


def noise_from_velocity(path: Path, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """E = E[x_0 | x_t] = (alpha' x_t - alpha v) / delta."""
    c = path(t)
    return expand_like(c.d_alpha / c.delta, v) * x_t - expand_like(c.alpha / c.delta, v) * v


def score_from_velocity(path: Path, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x_t) = -E / sigma; t < 1, where sigma > 0."""
    return -noise_from_velocity(path, v, x_t, t) / expand_like(path(t).sigma, v)


def velocity_from_data(path: Path, data: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (sigma' / sigma) x_t + (delta / sigma) D; t < 1, where sigma > 0."""
    c = path(t)
    return expand_like(c.d_sigma / c.sigma, x_t) * x_t + expand_like(c.delta / c.sigma, x_t) * data


def velocity_from_noise(path: Path, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (alpha' / alpha) x_t - (delta / alpha) E; t > 0, where alpha > 0."""
    c = path(t)
    return expand_like(c.d_alpha / c.alpha, x_t) * x_t - expand_like(c.delta / c.alpha, x_t) * noise


def velocity_from_score(path: Path, score: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = (alpha' / alpha) x_t + (sigma delta / alpha) score; t > 0, where alpha > 0."""
    return velocity_from_noise(path, -expand_like(path(t).sigma, x_t) * score, x_t, t)
