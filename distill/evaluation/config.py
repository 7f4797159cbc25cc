"""How a job is evaluated, apart from the code that does it so that a recipe is checked without that code."""

from __future__ import annotations

from dataclasses import dataclass

from distill.data.shards import Shards
from teachers.fields import require


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """`samples` of teacher and student from the same noise, in fixed batches of `batch`.

    steps: the numbers of student steps (and, beside them, of teacher Euler steps); reference_steps: Euler steps of the
    reference teacher; features: the folder or shipped teacher whose classifier gives features (null: one is trained on
    the job's own labelled images; unlabelled data and plain vectors are compared as they are). data: what is compared
    with, null for what is trained on; bootstrap: times that samples are drawn again for intervals, 0 for none; cache: a
    folder in which the reference teacher's samples stay for other runs of the same teacher and protocol.
    """

    samples: int = 5000
    batch: int = 500
    seed: int = 0
    steps: tuple[int, ...] = (1, 2, 4, 8)
    reference_steps: int = 100
    features: str | None = None
    data: Shards | None = None
    bootstrap: int = 200
    cache: str | None = None

    def __post_init__(self) -> None:
        rising = list(self.steps) == sorted(set(self.steps))
        require(
            self,
            samples=(self.samples >= 2, "must be at least 2"),
            batch=(self.batch >= 1, "must be at least 1"),
            seed=(0 <= self.seed < 2**63, "must be in [0, 2^63)"),
            steps=(bool(self.steps) and min(self.steps) >= 1 and rising, "must be rising numbers of at least 1"),
            reference_steps=(self.reference_steps >= 1, "must be at least 1"),
            data=(self.data is None or isinstance(self.data, Shards), "must have the name shards"),
            bootstrap=(self.bootstrap == 0 or self.bootstrap >= 2, "must be 0 or at least 2"),
        )
