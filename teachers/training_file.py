"""What a training checkpoint holds, once it is read: which of its parts are the weights that are meant."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from teachers.errors import CheckpointError

WHOLE = "the file's"
"""Weights that are all that is in a file."""


def chosen(file: Path, held: Any, prefer: Sequence[str]) -> tuple[Mapping[str, Tensor], str, dict[str, Any]]:
    """The weights, what leads to them (`WHOLE` where the file is nothing else), and the plain data that lies beside
    them. prefer: names of what is meant, best first. Raises CheckpointError."""
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{file}: holds a {type(held).__name__}, not weights by name; save a state_dict()")
    about = {str(k): _plain(v) for k, v in held.items() if _is_said(v)}
    if _is_state(held):
        return held, WHOLE, {}
    for name in prefer:
        if inside := _inside(held, name):
            return inside[1], inside[0], about
    raise CheckpointError(_not_chosen(file, held, prefer))


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _inside(held: Mapping[Any, Any], name: str) -> tuple[str, Mapping[str, Tensor]] | None:
    """The weights that a name leads to, at dots into what holds them, and how it does; more dots may be of their
    names."""
    if _is_state(held.get(name)):
        return name, held[name]
    head, _, rest = name.partition(".")
    inner = held.get(head)
    if not rest or not isinstance(inner, Mapping):
        return None
    if _is_state(inner):
        return head, inner
    deeper = _inside(inner, rest)
    return None if deeper is None else (f"{head}.{deeper[0]}", deeper[1])


def _ways(held: Mapping[Any, Any], deep: int = 3) -> list[str]:
    """What leads to weights in it, as `_inside` takes it."""
    ways = [str(key) for key, value in held.items() if _is_state(value)]
    for key, value in held.items():
        if isinstance(value, Mapping) and not _is_state(value) and deep > 1:
            ways += [f"{key}.{way}" for way in _ways(value, deep - 1)]
    return ways


def _not_chosen(file: Path, held: Mapping[Any, Any], prefer: Sequence[str]) -> str:
    if odd := [key for key, value in held.items() if isinstance(value, Tensor) and not isinstance(key, str)]:
        return f"{file}: its tensors are named by {odd[0]!r}, ..., not by words; save the model's state_dict()"
    parts = ", ".join(f"{k} ({type(v).__name__})" for k, v in list(held.items())[:12])
    wanted = f"looked for {', '.join(prefer)}" if prefer else "expected tensors by name"
    ways = ", ".join(_ways(held)[:8])
    remedy = f"name the part with teacher.weights ({ways})" if ways else "save the model's state_dict() alone"
    if _holds_tensors(held):
        remedy += f", or take its weights out: distill teachers convert {file} {file.with_suffix('.safetensors')}"
    return f"{file}: a training checkpoint without the weights that are meant: it holds {parts}; {wanted}; {remedy}"


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, Mapping) and any(map(_holds_tensors, value.values())))


def _is_said(value: Any) -> bool:
    """Whether this is about the weights: a number, a word, arguments, or a configuration of such."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_said(v) for key, v in value.items())
    return all(map(_is_said, value)) if isinstance(value, (list, tuple)) else not isinstance(value, Tensor)


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, argparse.Namespace) else value
