"""Numbers of samples of several sources: one number says which source and which of its samples."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

_BITS = 48  # of a sample's number; those above are the number of the source
N = TypeVar("N", int, Tensor)


def packed(source: int, number: int) -> int:
    """The number, among those of all sources, of a source's sample."""
    return source << _BITS | number


def unpacked(number: N) -> tuple[N, N]:
    """The source, and the number there: what `packed` put together."""
    return number >> _BITS, number & ((1 << _BITS) - 1)
