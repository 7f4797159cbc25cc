"""What backbones share: blocks conditioned on time and class, where an end time enters, norms, and what samples fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from threading import RLock
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.space import Cond, DataSpace

L = TypeVar("L", nn.Linear, nn.Conv2d)

LISTS = (nn.ModuleList, nn.ModuleDict)
"""What holds modules and is not called itself."""


class Network(nn.Module, ABC):
    """x, t, cond -> a vector of x's shape. A subclass has `blocks`, each called as block(h, embedding)."""

    blocks: nn.ModuleList

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
        for number in range(self.depth):
            h = self._block(number, h, early if number < split else late, cond)
        return self._leave(h, late)

    def _block(self, number: int, h: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        """h after the block of this number."""
        return self.blocks[number](h, embedding)

    @abstractmethod
    def second_time(self) -> nn.Module:
        """A number ``[b]`` in [0, 1] -> what `forward` takes as shift: 0 at first, by its last layer alone."""

    @abstractmethod
    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        """What modulates the blocks, ``[b, width]``."""

    @abstractmethod
    def _enter(self, x: Tensor) -> Tensor:
        """``[b, *shape]`` -> h, what the blocks work on: ``[b, width]`` or ``[b, tokens, width]``."""

    @abstractmethod
    def _leave(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h after the last block and the embedding ``[b, width]`` -> ``[b, *shape]``."""


_CALLED: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def alone(module: nn.Module) -> RLock:
    """What is held while a module has hooks of one call, which another thread's call of it would meet. Not in the
    module, which can then be copied and pickled; the thread that holds it may call the module again. Activations that
    the backward pass, perhaps in a thread of autograd's, computes again are those of its parts, which do not ask."""
    return _CALLED.setdefault(module, RLock())


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The elements of a network's outermost lists and dictionaries of modules; of lists in them, theirs."""
    for part in network.children():
        if isinstance(network, LISTS) and not isinstance(part, LISTS):
            yield part
        else:
            yield from blocks(part)


def matrices(network: nn.Module) -> Iterator[nn.Parameter]:
    """The trained matrices inside of a network's blocks, each once, without the tables of embeddings."""
    seen = {id(table.weight) for table in network.modules() if isinstance(table, nn.Embedding)}
    for parameter in (p for block in blocks(network) for p in block.parameters()):
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) not in seen:
            seen.add(id(parameter))  # blocks may share it
            yield parameter


def embed(
    time: nn.Module, classes: nn.Embedding | None, t: Tensor, cond: Cond, shift: Tensor | None, count: int | None
) -> Tensor:
    """The sum of the embeddings of time and class and of `shift`, ``[b, width]``. count: of the classes asked for.

    Raises ValueError for classes that are missing or, on a CPU, unknown.
    """
    embedding: Tensor = time(t)
    if shift is not None:
        embedding = embedding + shift
    return embedding if classes is None else embedding + embedded(classes, cond, count)


def embedded(classes: nn.Embedding, cond: Cond, count: int | None) -> Tensor:
    """The embedding of the class, ``[b, width]``. Raises as `embed` does."""
    label = class_of(cond, count)
    try:
        found: Tensor = classes(label)
    except IndexError:  # asking before would make a GPU wait
        raise ValueError(f"classes must be in [0, {classes.num_embeddings - 1}]") from None
    return found


def class_of(cond: Cond, count: int | None) -> Tensor:
    """The field of the classes, int64 ``[b]``. count: of those asked for. Raises ValueError if it is missing."""
    if cond is None or "class" not in cond:
        raise ValueError(f"this network is conditioned on {count} classes: pass cond={{'class': ...}}")
    return cond["class"]


def muted(embedding: nn.Module, last: str) -> nn.Module:
    """A trainable copy of an embedding whose linear layer named `last`, the last one, is zero: it gives 0 and still
    learns at the first step, which it never would with every layer at zero."""
    copy = deepcopy(embedding)
    zeroed(cast(nn.Linear, copy.get_submodule(last)))
    return copy.requires_grad_(True)


def in_its_precision(
    network: nn.Module, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None, **split: Any
) -> Tensor:
    """What a network says, in x's dtype, of what may have another than its weights."""
    dtype = next(network.parameters()).dtype
    if cond is not None:
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
    shift = None if shift is None else shift.to(dtype)
    said: Tensor = network(x.to(dtype), t, cond, shift, **split)
    return said.to(x.dtype)


def rms_norm(x: Tensor) -> Tensor:
    """x over the root of its mean square in the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm whose affine parameters are the modulation. All ``[b, ..., width]`` up to broadcasting."""
    # written out: the forward-mode derivative of torch's own runs through Python and took a quarter of a training step
    return rms_norm(x - x.mean(-1, keepdim=True)) * (1 + scale) + shift


def zeroed(layer: L) -> L:
    """The layer, its weight and bias set to zero in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.Module):
    """``[b, channels, ...]`` normalised in `groups`, then scaled and shifted by channel."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # apart from torch's own scale and shift, whose forward-mode derivative cannot be compiled
        normed = nn.functional.group_norm(x.contiguous(), self.groups, eps=self.eps)
        by_channel = (-1, *[1] * (x.dim() - 2))
        return normed * self.weight.reshape(by_channel) + self.bias.reshape(by_channel)


def require_patches(config: Any, space: DataSpace) -> None:
    """Raises FieldError for samples that are no squares which can be cut into patches, or have no classes."""
    shape = space.shape
    square = len(shape) == 3 and shape[1] == shape[2] and shape[1] % config.patch == 0
    require(
        config,
        patch=(square, f"must divide the side of square samples [channels, n, n], here {list(shape)}"),
        null_class=(space.classes is not None, "is of a network for classes, these samples have none"),
    )


def require_levels(config: Any, space: DataSpace) -> None:
    """Raises FieldError for samples that are no squares which can be halved from level to level, and for a null class
    without classes."""
    shape, factor = space.shape, 2 ** (len(config.widths) - 1)
    square = len(shape) == 3 and shape[1] == shape[2] and shape[1] % factor == 0
    require(
        config,
        widths=(square, f"are {len(config.widths)} levels: samples must be squares [channels, n, n] whose side "
                        f"{factor} divides, here {list(shape)}"),
        null_class=(not config.null_class or space.classes is not None, "needs samples with classes"),
    )  # fmt: skip
