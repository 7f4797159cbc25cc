"""What all backbones share: blocks conditioned on time and class, where an end time enters, and a modulated norm."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from teachers.networks.embeddings import TimeEmbedding
from teachers.space import Cond


class Network(nn.Module, ABC):
    """x, t, cond -> a vector of x's shape. A subclass has `blocks`, each called as block(h, embedding).

    ``null_class``: class ids go up to `classes` itself, which means "no class" (Ho and Salimans, arXiv 2207.12598).
    """

    blocks: nn.ModuleList

    def __init__(self, classes: int | None, width: int, frequencies: int, highest: float, null_class: bool) -> None:
        super().__init__()
        self.classes = classes
        self.time_embedding = TimeEmbedding(width, frequencies, highest)
        self.class_embedding = None if classes is None else nn.Embedding(classes + null_class, width)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond,
        shift: Tensor | None = None,
        end: Tensor | None = None,
        split: int = 0,
    ) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]`` float32 or float64, ``cond["class"]: int64 [b]`` -> ``[b, *shape]``.

        ``shift: [b, width]`` is added to the time embedding: where a student's second time enters. With ``end: [b]``
        the blocks from number `split` on, and what leaves, see that time instead of t, through the same embedding
        (decoupled MeanFlow: Lee, Yu and Shin, arXiv 2510.24474); at end = t the output is that without it, bit for bit.
        Raises ValueError for a split outside of [0, depth], and for classes that are missing or, on a CPU, unknown.
        """
        if not 0 <= split <= self.depth:
            raise ValueError(f"split must be in [0, {self.depth}], the number of blocks, got {split}")
        early = self._embedding(t, cond, shift)
        late = early if end is None else self._embedding(end, cond, shift)
        h = self._enter(x)
        for number, block in enumerate(self.blocks):
            h = block(h, early if number < split else late)
        return self._leave(h, late)

    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        embedding: Tensor = self.time_embedding(t)
        if shift is not None:
            embedding = embedding + shift
        if self.class_embedding is not None:
            if cond is None or "class" not in cond:
                raise ValueError(f"this network is conditioned on {self.classes} classes: pass cond={{'class': ...}}")
            embedding = embedding + self._of_class(self.class_embedding, cond["class"])
        return nn.functional.silu(embedding)

    def _of_class(self, table: nn.Embedding, label: Tensor) -> Tensor:
        try:
            return table(label)
        except IndexError:  # asking before would make a GPU wait
            raise ValueError(f"classes must be in [0, {table.num_embeddings - 1}]") from None

    @abstractmethod
    def _enter(self, x: Tensor) -> Tensor:
        """``[b, *shape]`` -> h, what the blocks work on: ``[b, width]`` or ``[b, tokens, width]``."""

    @abstractmethod
    def _leave(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h after the last block and the embedding ``[b, width]`` -> ``[b, *shape]``."""


def rms_norm(x: Tensor) -> Tensor:
    """x over the root of its mean square in the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm whose affine parameters are the modulation. All ``[b, ..., width]`` up to broadcasting."""
    # written out: the forward-mode derivative of torch's own runs through Python and took a quarter of a training step
    return rms_norm(x - x.mean(-1, keepdim=True)) * (1 + scale) + shift


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, its weight and bias set to zero in place."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
