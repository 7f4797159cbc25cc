"""A residual MLP with adaptive layer norm: flat vectors and small images, minutes on a CPU.

Blocks modulated by the conditioning and gated to zero at the start: adaLN-Zero, Peebles and Xie, arXiv 2212.09748.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.embeddings import TimeEmbedding
from teachers.space import Cond, DataSpace


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # layer norm without affine parameters (the modulation is one), written out: the forward-mode derivative of torch's
    # own runs through Python and took a quarter of a training step
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(embedding).chunk(3, dim=-1)
        return x + gate * self.down(nn.functional.silu(self.up(_modulated_norm(x, shift, scale))))


class MLP(nn.Module):
    """x, t, cond -> a vector of x's shape; see `MLPConfig` for the arguments."""

    def __init__(
        self, shape: tuple[int, ...], classes: int | None, width: int, depth: int, frequencies: int, highest: float
    ) -> None:
        super().__init__()
        self.shape = shape
        self.classes = classes
        features = math.prod(shape)
        self.time_embedding = TimeEmbedding(width, frequencies, highest)
        self.class_embedding = None if classes is None else nn.Embedding(classes, width)
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.leave_modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, features)
        for layer in (self.leave_modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]``, ``cond["class"]: int64 [b]`` -> ``[b, *shape]``.

        ``shift: [b, width]`` is added to the time embedding: where a student's second time enters.
        """
        embedding = self.time_embedding(t)
        if shift is not None:
            embedding = embedding + shift
        if self.class_embedding is not None:
            if cond is None or "class" not in cond:
                raise ValueError(f"this network is conditioned on {self.classes} classes: pass cond={{'class': ...}}")
            embedding = embedding + self.class_embedding(cond["class"])
        embedding = nn.functional.silu(embedding)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        h = _modulated_norm(h, *self.leave_modulation(embedding).chunk(2, dim=-1))
        out: Tensor = self.leave(h)
        return out.reshape(x.shape)


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Width and depth of the residual stream; number and highest of the time frequencies (radians a unit time)."""

    width: int = 128
    depth: int = 3
    frequencies: int = 16
    highest: float = 4 * math.pi

    def __post_init__(self) -> None:
        require(
            self,
            width=(self.width >= 1, "must be at least 1"),
            depth=(self.depth >= 1, "must be at least 1"),
            frequencies=(self.frequencies >= 2, "must be at least 2"),
            highest=(math.pi / 4 < self.highest < math.inf, "must be above pi/4, the lowest frequency, and finite"),
        )

    def build(self, space: DataSpace) -> MLP:
        """A freshly initialised network for `space`; draws from torch's global generator."""
        with torch.device("cpu"):
            return MLP(space.shape, space.classes, self.width, self.depth, self.frequencies, self.highest)
