"""Pickled members -> safetensors and JSON, without running anything: numbers, texts, arrays and tensors alone."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import numpy as np
import safetensors.torch
import torch

PICKLES = ("pth", "pt", "pyd", "pkl", "pickle")
"""Endings of pickles, which can run code when they are read."""


class _Restricted(pickle.Unpickler):
    """Builds numpy arrays and numbers; every other name in the pickle is refused, so nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that arrays are made of."""
        multiarray = ("numpy.core.multiarray", "numpy._core.multiarray")
        if module in multiarray and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return np._core.numeric._frombuffer  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise ValueError(
            f"asks for {module}.{name}, which is never called; only numbers, texts, arrays and tensors are"
        )


def unpickled(ending: str, content: bytes) -> dict[str, bytes]:
    """The same values as a safetensors member (tensors, arrays) and a JSON member (the rest), by ending.

    Raises ValueError for a pickle that holds anything else.
    """
    kind = ending.rpartition(".")[2]
    try:
        if kind in ("pth", "pt"):
            value = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        else:
            value = _Restricted(io.BytesIO(content)).load()
    except ValueError as error:
        raise ValueError(f"cannot be converted: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"cannot be converted: {str(error).splitlines()[0] if str(error) else error!r}") from None
    name = ending.rpartition(".")[0]
    held = value if isinstance(value, dict) else {name or "x": value}
    tensors, rest = {}, {}
    for key, part in held.items():
        if isinstance(part, (np.ndarray, np.generic)) and part.dtype.kind in "biuf":
            tensors[str(key)] = torch.from_numpy(np.array(part))
        elif isinstance(part, torch.Tensor):
            tensors[str(key)] = part.detach().contiguous()
        else:
            rest[str(key)] = part
    prefix = f"{name}." if name else ""
    found = {f"{prefix}safetensors": safetensors.torch.save(tensors)} if tensors else {}
    if rest:
        try:
            found[f"{prefix}json"] = json.dumps(rest if isinstance(value, dict) else value).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot be converted: {error}") from None
    return found
