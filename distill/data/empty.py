"""Batches of a job without data: conditioning alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.objectives.base import Batch
from distill.rows import Rows
from teachers.space import Cond, DataSpace


class NoData:
    """Uniform classes where the teacher has them; x_1 is all zeros, its shape is what counts. A `Reader`."""

    digest = "none"

    def __init__(self, space: DataSpace) -> None:
        self.space = space

    def batches(self, seed: int, batch: int, step: int, rows: range | None = None) -> Iterator[Batch]:
        """See `distill.data.base.Reader`."""
        rows = range(batch) if rows is None else rows
        while True:
            cond = None
            if self.space.classes is not None:
                uniform = Rows(seed, "classes", step, rows.start, len(rows)).uniform()
                cond = {"class": (uniform * self.space.classes).long()}
            keys = tuple(f"{step}/{row}" for row in rows)
            yield Batch(torch.zeros(len(rows), *self.space.shape), cond, keys, rows.start, null=self.space.null)
            step += 1

    def cond_for(self, first: int, count: int) -> Cond:
        """See `distill.data.base.Reader`."""
        return self.space.cond_for(first, count)

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """There is nothing to evaluate against: not to be called."""
        raise AssertionError("a job without data is evaluated against its teacher")
