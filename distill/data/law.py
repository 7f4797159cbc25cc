"""Data drawn from an analytic teacher's own law: first runs and tests without any file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from distill.data.manifest import DataError
from distill.objectives.base import Batch
from distill.rows import Rows
from teachers.fields import require
from teachers.space import Cond
from teachers.velocity import Teacher


@dataclass(frozen=True, kw_only=True)
class TeacherLaw:
    """Data drawn from an analytic teacher's own law.
    samples: how many are drawn to evaluate against."""

    samples: int = 10_000

    def __post_init__(self) -> None:
        require(self, samples=(self.samples >= 4, "must be at least 4"))

    def open(self, teacher: Teacher | None) -> LawReader:
        """The reader. Raises DataError if the teacher is not analytic."""
        if teacher is None or teacher.data is None:
            raise DataError("data.name teacher_law needs an analytic teacher (gaussian, mixture); name shards instead")
        return LawReader(teacher, self.samples)


class LawReader:
    """Fresh samples of an analytic teacher's law, a pure function of (seed, step, row)."""

    def __init__(self, teacher: Teacher, samples: int) -> None:
        assert teacher.data is not None
        self.space = teacher.space
        self._draw = teacher.data
        self._samples = samples
        self.digest = f"law {teacher.info['digest']}, {samples} samples"

    def _rows(self, rows: Rows) -> Tensor:
        return self._draw(rows.normal(*self.space.shape), rows.uniform(*self.space.shape))

    def batches(self, seed: int, batch: int, step: int, rows: range | None = None) -> Iterator[Batch]:
        """See `distill.data.base.Reader`."""
        rows = range(batch) if rows is None else rows
        while True:
            keys = tuple(f"{step}/{row}" for row in rows)
            yield Batch(self._rows(Rows(seed, "law", step, rows.start, len(rows))), None, keys, rows.start)
            step += 1

    def cond_for(self, first: int, count: int) -> Cond:
        """See `distill.data.base.Reader`."""
        return self.space.cond_for(first, count)

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """See `distill.data.base.Reader`."""
        return self._rows(Rows(0, "law, to evaluate against", 0, 0, self._samples)), None
