"""Decoded samples of data that are small enough to stay in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.data.manifest import Field

_KEPT = 1 << 30  # bytes of decoded samples up to which a whole data set stays in memory


class Kept:
    """Decoded samples, as many as were read so far, in one tensor a field."""

    def __init__(self, samples: int, fields: Mapping[str, Field]) -> None:
        self._values = {name: torch.empty(samples, *field.shape, dtype=getattr(torch, field.dtype))
                        for name, field in fields.items()}  # fmt: skip
        self.keys: list[str | None] = [None] * samples

    @staticmethod
    def of(samples: int, fields: Mapping[str, Field]) -> Kept | None:
        """Room for so many samples, None if they are too large."""
        sizes = [math.prod(field.shape) * getattr(torch, field.dtype).itemsize for field in fields.values()]
        return Kept(samples, fields) if samples * sum(sizes) <= _KEPT else None

    def put(self, number: int, key: str, values: Mapping[str, Any]) -> None:
        """Keep a sample."""
        for name, value in values.items():
            self._values[name][number] = value
        self.keys[number] = key

    def take(self, numbers: Sequence[int]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The keys of samples that are here, and their values stacked."""
        index = torch.tensor(numbers)
        keys = tuple([self.keys[number] or "" for number in numbers])
        return keys, {name: value.index_select(0, index) for name, value in self._values.items()}
