"""A residual MLP with adaptive layer norm: flat vectors and small images, minutes on a CPU.

Blocks modulated by the conditioning and gated to zero at the start: adaLN-Zero, Peebles and Xie, arXiv 2212.09748.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import Network, embed, modulated_norm, muted, zeroed
from teachers.networks.embeddings import TimeEmbedding
from teachers.space import Cond, DataSpace


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(width, 3 * width))
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(embedding).chunk(3, dim=-1)
        return x + gate * self.down(nn.functional.silu(self.up(modulated_norm(x, shift, scale))))


class MLP(Network):
    """x, t, cond -> a vector of x's shape; see `MLPConfig` for the arguments and `Network` for the call."""

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int | None,
        width: int,
        depth: int,
        frequencies: int,
        highest: float,
        null_class: bool,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.time_embedding = TimeEmbedding(width, frequencies, highest)
        self.class_embedding = None if classes is None else nn.Embedding(classes + null_class, width)
        self.shape = shape
        features = math.prod(shape)
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.leave_modulation = zeroed(nn.Linear(width, 2 * width))
        self.leave = zeroed(nn.Linear(width, features))

    def second_time(self) -> nn.Module:
        """See `Network`."""
        return muted(self.time_embedding, "out")

    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        embedding = embed(self.time_embedding, self.class_embedding, t, cond, shift, self.classes)
        return nn.functional.silu(embedding)

    def _enter(self, x: Tensor) -> Tensor:
        return self.enter(x.flatten(1))

    def _leave(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = modulated_norm(h, *self.leave_modulation(embedding).chunk(2, dim=-1))
        out: Tensor = self.leave(h)
        return out.unflatten(1, self.shape)


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Width and depth of the residual stream; number and highest of the time frequencies (radians a unit time);
    whether there is a class id for "no class", as classifier-free guidance needs."""

    width: int = 128
    depth: int = 3
    frequencies: int = 16
    highest: float = 4 * math.pi
    null_class: bool = False

    def __post_init__(self) -> None:
        require(
            self,
            width=(self.width >= 1, "must be at least 1"),
            depth=(self.depth >= 1, "must be at least 1"),
            frequencies=(self.frequencies >= 2, "must be at least 2"),
            highest=(math.pi / 4 < self.highest < math.inf, "must be above pi/4, the lowest frequency, and finite"),
        )

    def check(self, space: DataSpace) -> None:
        """Raises FieldError for a null class where there are no classes."""
        require(self, null_class=(not self.null_class or space.classes is not None, "must be false without classes"))

    def build(self, space: DataSpace) -> MLP:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        with torch.device("cpu"):
            return MLP(
                space.shape, space.classes, self.width, self.depth, self.frequencies, self.highest, self.null_class
            )
