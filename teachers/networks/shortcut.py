"""A SiT as shortcut models use it: told the number of steps instead of their length, and maybe without classes.

Frans et al., arXiv 2410.12557: a step of length 1/n comes with log2 n, up to a finest n which stands for no length.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import muted
from teachers.networks.sit import SiT, SiTConfig, TimestepEmbedder
from teachers.space import Cond, DataSpace


class StepEmbedder(TimestepEmbedder):
    """The length of a step ``[b]`` in [0, 1] -> ``[b, width]``: a `TimestepEmbedder` of log2 of their number, which is
    at most `finest`."""

    def __init__(self, width: int, finest: int) -> None:
        super().__init__(width)
        self.finest = finest

    def forward(self, t: Tensor) -> Tensor:
        # the length is clamped first: at 0 the logarithm's slope is infinite
        return super().forward(-torch.log2(t.clamp(1 / self.finest, 1)))


class Shortcut(nn.Module):
    """x, t, cond -> an image of x's shape, called as a SiT; see `ShortcutConfig` for the arguments."""

    def __init__(self, network: SiT, unconditional: bool, finest: int | None) -> None:
        super().__init__()
        self.network, self.unconditional, self.finest = network, unconditional, finest

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.network.depth

    def second_time(self) -> nn.Module:
        """See `teachers.networks.base.Network`."""
        if self.finest is None:
            return self.network.second_time()
        embedder = deepcopy(self.network.t_embedder)
        steps = StepEmbedder(cast(nn.Linear, embedder.mlp[2]).out_features, self.finest)
        steps.mlp = embedder.mlp
        return muted(steps, "mlp.2")

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None, **split: Any) -> Tensor:
        """See `teachers.networks.base.Network.forward`."""
        if self.unconditional:
            cond = {"class": torch.zeros(len(x), dtype=torch.int64, device=x.device)}
        v: Tensor = self.network(x, t, cond, shift, **split)
        return v


@dataclass(frozen=True, kw_only=True)
class ShortcutConfig:
    """A SiT, which for samples without classes has one that is always taken. finest: null for a second time that is the
    length of a step; or the largest number of steps that it knows, a power of two."""

    network: SiTConfig
    finest: int | None = None

    highest = 1.0
    """Radians a unit time: times are fed as they are."""

    def __post_init__(self) -> None:
        finest = self.finest
        power = finest is None or (finest >= 1 and finest & (finest - 1) == 0)
        require(self, finest=(power, "must be null or a power of two"))

    @property
    def null_class(self) -> bool:
        """Whether the network knows "no class"."""
        return self.network.null_class

    def check(self, space: DataSpace) -> None:
        """Raises FieldError as the network's own does, and for a null class where there are no classes."""
        allowed = space.classes is not None or not self.network.null_class
        require(self.network, null_class=(allowed, "must be false without classes"))
        self.network.check(self._of(space))

    def build(self, space: DataSpace) -> Shortcut:
        """A freshly initialised network for `space`. Raises as `check` does."""
        self.check(space)
        return Shortcut(self.network.build(self._of(space)), space.classes is None, self.finest)

    def _of(self, space: DataSpace) -> DataSpace:
        return space if space.classes is not None else replace(space, classes=1)
