"""The arguments of a call of an exported student, checked: shapes, fields of the conditioning, scales of guidance."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from distill.guidance import GuidanceInput
from teachers.guidance import SCALE
from teachers.space import Cond, DataSpace


def check_call(space: DataSpace, guidance: GuidanceInput | None, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> None:
    """Raises ValueError for points ``x_s: [b, *shape]``, times ``[b]`` or fields of the conditioning of other shapes,
    and for a guidance that the student does not know."""
    fields = fields_of(cond)
    check_rows(x_s, space.shape, "x_s")
    for name, time in (("s", s), ("t", t)):
        check_rows(time, (), name, len(x_s))
    ranges = {} if guidance is None else {n: (guidance.low, guidance.high) if n == SCALE else (0.0, 1.0)
                                          for n in guidance.names}  # fmt: skip
    shapes = {e.name: e.shape for e in space.embeddings} | dict.fromkeys(("class", *ranges), ())
    for name in fields.keys() & shapes.keys():
        check_rows(fields[name], shapes[name], f"cond[{name!r}]", len(x_s))
    for name in fields.keys() & ranges.keys():
        (low, high), value = ranges[name], fields[name].double()
        if not ((value >= low - 1e-6 * low) & (value <= high + 1e-6 * high)).all():  # float32's rounding
            raise ValueError(f"cond[{name!r}] must be in [{low}, {high}], got {value.tolist()}")


def fields_of(cond: object) -> Mapping[str, Any]:
    """The fields of the conditioning. Raises ValueError for what has none."""
    if cond is not None and not isinstance(cond, Mapping):
        raise ValueError(f"cond must be a mapping of fields, e.g. {{'class': ...}}, got a {type(cond).__name__}")
    return cond or {}


def check_rows(value: object, shape: tuple[int, ...], name: str, rows: int | None = None) -> None:
    """Raises ValueError for what is not a tensor of `rows` of this shape, by default as many as it has."""
    if not isinstance(value, Tensor):
        wanted = "[b" + "".join(f", {size}" for size in shape) + "]"
        raise ValueError(f"{name} must be a tensor {wanted}, one a sample, got a {type(value).__name__}")
    rows = (len(value) if value.dim() else 1) if rows is None else rows
    if value.shape != (rows, *shape):
        raise ValueError(f"{name} must be {[rows, *shape]}, one a sample, got {list(value.shape)}")


def are_numbers(*values: object) -> bool:
    """Whether all are numbers, or tensors of one."""
    return all(isinstance(v, Real) or (isinstance(v, Tensor) and v.numel() == 1) for v in values)
