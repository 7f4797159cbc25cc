"""What shards are built from: samples by number, in a fixed order, each as the members it will have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distill.data.manifest import Field

Members = dict[str, bytes]


class Source(Protocol):
    """Samples 0 .. n - 1 with the same fields."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """What every sample has."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """What the manifest says of their origin, in plain JSON."""
        ...

    @property
    def samples(self) -> int:
        """How many there are."""
        ...

    @property
    def digest(self) -> str:
        """Changes when the samples do."""
        ...

    def sample(self, number: int) -> tuple[str, Members]:
        """Key and members by ending. Raises DataError."""
        ...


@dataclass(frozen=True)
class Options:
    """How images are prepared. size: the shorter side is scaled to it, then the centre is cut out; None: as they are.
    split: which part of a source that has several. seed: of the order that the samples get; None: as they come.
    labels: a file of labels beside arrays. unpickle: turn pickled members into safetensors and JSON. classes: how many
    there are, where the last ones may not occur."""

    size: int | None = None
    split: str = "train"
    seed: int | None = None
    labels: Path | None = None
    unpickle: bool = False
    classes: int | None = None
