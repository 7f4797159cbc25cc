"""What training and evaluation need of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from distill.objectives.base import Batch
from teachers.space import DataSpace


class Reader(Protocol):
    """What training and evaluation need of data."""

    space: DataSpace

    @property
    def digest(self) -> str:
        """Identifies the data."""
        ...

    def batches(self, seed: int, batch: int, step: int) -> Iterator[Batch]:
        """The global batches of steps step, step + 1, ... without end: a pure function of (data, seed, step)."""
        ...

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """The real samples to evaluate against ``[n, *shape]``, and labels ``[n]`` where there are classes."""
        ...
