"""Pickled members -> safetensors and JSON, without running anything: numbers, texts, arrays and tensors alone."""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
import torch

from teachers.pickles import loads

PICKLES = ("pth", "pt", "pyd", "pkl", "pickle")
"""Endings of pickles, which can run code when they are read."""


def unpickled(ending: str, content: bytes) -> dict[str, bytes]:
    """The same values as a safetensors member (tensors, arrays) and a JSON member (the rest), by ending.

    Raises ValueError for a pickle that holds anything else.
    """
    try:
        value = loads(content)
    except ValueError as error:
        raise ValueError(f"cannot be converted: {error}") from None
    name = ending.rpartition(".")[0]
    held = value if isinstance(value, dict) else {name or "x": value}
    tensors, rest = {}, {}
    for key, part in held.items():
        if isinstance(part, torch.Tensor) and not part.is_complex():
            tensors[str(key)] = part.contiguous().clone()
        else:
            rest[str(key)] = part
    prefix = f"{name}." if name else ""
    found = {f"{prefix}safetensors": safetensors.torch.save(tensors)} if tensors else {}
    if rest:
        found[f"{prefix}json"] = _json(rest if isinstance(value, dict) else value)
    return found


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be converted: {error}") from None
