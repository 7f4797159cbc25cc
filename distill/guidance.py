"""Guidance of a job: of its teacher, and the scales and intervals that its student is conditioned on.

A student that is trained on a range of scales has the scale as an input (Meng et al., arXiv 2210.03142; AYF,
2506.14603) and, with `intervals`, the ends of the interval of times in which it acts (improved MeanFlow, 2512.02012).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from distill.rows import Rows
from teachers.adapters import TeacherConfig
from teachers.fields import require
from teachers.guidance import HIGH, LOW, SCALE, guided
from teachers.path_change import on_path
from teachers.space import Cond
from teachers.velocity import Teacher


@dataclass(frozen=True, kw_only=True)
class GuidanceInput:
    """What a student knows of guidance: scales in [low, high], `scale` and `interval` where none are given; intervals:
    whether it knows the ends of the interval too."""

    low: float
    high: float
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    intervals: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of the conditioning."""
        return (SCALE, LOW, HIGH) if self.intervals else (SCALE,)

    @property
    def usual(self) -> Mapping[str, float]:
        """Their values where none are given."""
        return {SCALE: self.scale, LOW: self.interval[0], HIGH: self.interval[1]}

    @staticmethod
    def of(values: Mapping[str, Any]) -> GuidanceInput:
        """From the JSON of an export."""
        return GuidanceInput(**{**values, "interval": tuple(values["interval"])})


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """scale: of the teacher's guidance (1 is none), by its null condition, or by `weak`, a weaker teacher; interval: of
    the times where it acts. scales: the student is conditioned on the scale, drawn from this range by `law`; intervals:
    and on the interval, its ends drawn from U(0, 1/2) and U(1/2, 1). `scale` and `interval` are then what is used where
    none is asked for, in the evaluation too."""

    scale: float = 2.0
    interval: tuple[float, float] = (0.0, 1.0)
    scales: tuple[float, float] | None = None
    law: Literal["uniform", "log_uniform"] = "uniform"
    intervals: bool = False
    weak: TeacherConfig | None = None

    def __post_init__(self) -> None:
        ends, inside = self.scales, "must be two increasing scales from 1 on, with scale between them"
        require(
            self,
            scale=(1 <= self.scale < float("inf"), "must be at least 1 (1 is no guidance)"),
            interval=(0 <= self.interval[0] < self.interval[1] <= 1, "must be two increasing times in [0, 1]"),
            scales=(ends is None or (1 <= ends[0] <= self.scale <= ends[1] and ends[0] < ends[1]), inside),
            intervals=(not self.intervals or ends is not None, "needs scales: the range the student is conditioned on"),
        )

    def guide(self, teacher: Teacher) -> Teacher:
        """The teacher, guided, on the path that it is given on. Raises InputError if it cannot be."""
        weak = on_path(self.weak.load(), teacher.path) if self.weak else None
        return guided(teacher, self.scale, self.interval, weak)

    @property
    def student_input(self) -> GuidanceInput | None:
        """What the student is conditioned on."""
        if self.scales is None:
            return None
        low, high = self.scales
        return GuidanceInput(low=low, high=high, scale=self.scale, interval=self.interval, intervals=self.intervals)

    def condition(self, cond: Cond, rows: Rows) -> Cond:
        """`cond` with a scale (and an interval) for each of the rows."""
        if self.scales is None:
            return cond
        low, high = self.scales
        u = rows.uniform()
        scale = low + u * (high - low) if self.law == "uniform" else low * torch.exp(u * torch.tensor(high / low).log())
        drawn = {SCALE: scale}
        if self.intervals:
            drawn |= {LOW: rows.uniform() / 2, HIGH: 0.5 + rows.uniform() / 2}
        return {**(cond or {}), **drawn}


def with_guidance(cond: Cond, count: int, device: torch.device, **values: float | None) -> Cond:
    """`cond` with the given guidance fields for `count` rows; None leaves a field out."""
    given = {k: torch.full((count,), v, dtype=torch.float64, device=device) for k, v in values.items() if v is not None}
    return {**(cond or {}), **given} if given else cond
