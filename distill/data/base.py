"""Readers of data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from distill.objectives.base import Batch
from teachers.space import Cond, DataSpace


class Reader(Protocol):
    """What training and evaluation need of data."""

    space: DataSpace

    @property
    def digest(self) -> str:
        """Identifies the data."""
        ...

    def batches(self, seed: int, batch: int, step: int, rows: range | None = None) -> Iterator[Batch]:
        """The global batches of steps step, step + 1, ... without end, of each the `rows` (by default all): a pure
        function of (data, seed, step)."""
        ...

    def cond_for(self, first: int, count: int) -> Cond:
        """Conditioning of the samples first .. first + count - 1 that are made to be looked at and measured: the
        classes in turn, or the embeddings of the data's own samples."""
        ...

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """The real samples to evaluate against ``[n, *shape]``, of large data some, and labels ``[n]`` where there are
        classes."""
        ...


def joined(parts: list[Batch]) -> Batch:
    """Neighbouring parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    cond = None if first.cond is None else {k: torch.cat([p.cond[k] for p in parts if p.cond]) for k in first.cond}
    return replace(
        first,
        x_1=torch.cat([part.x_1 for part in parts]),
        cond=cond,
        keys=tuple(key for part in parts for key in part.keys),
        x_0=None if first.x_0 is None else torch.cat([part.x_0 for part in parts if part.x_0 is not None]),
        slots=None if first.slots is None else torch.cat([part.slots for part in parts if part.slots is not None]),
        skipped={number: reason for part in parts for number, reason in part.skipped.items()},
    )


def cut(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts: neighbouring rows, for training (without what the loader's books need)."""
    if parts == 1:
        return [batch]
    size = len(batch.x_1) // parts
    rows = [slice(n * size, (n + 1) * size) for n in range(parts)]
    return [
        replace(
            batch,
            x_1=batch.x_1[part],
            cond=None if batch.cond is None else {k: v[part] for k, v in batch.cond.items()},
            keys=batch.keys[part],
            first=batch.first + part.start,
            x_0=None if batch.x_0 is None else batch.x_0[part],
            slots=None,
            skipped={},
        )
        for part in rows
    ]
