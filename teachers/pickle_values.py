"""What a pickle's names stand for, as far as they are data: tensors, arrays, containers, numbers. Nothing else.

KNOWN maps a name to the function of ours that makes plain data of the arguments that the pickle gives it. Sizes are
checked against the bytes that are there before anything is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


class NotDataError(ValueError):
    """Something in a pickle that is no data, or data that does not fit together."""


@dataclass(frozen=True)
class Name:
    """A function, a class or a constant of some module: its name alone."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Object:
    """What would have been an object of a class that is not known here: what the pickle says of it, no more.

    state: of its attributes; entries and elements: what it holds if it is a kind of dict or list.
    """

    kind: Name
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.kind}>"


@dataclass(eq=False)
class Storage:
    """Bytes in the file, as a flat run of numbers."""

    data: memoryview
    dtype: torch.dtype

    @cached_property
    def numbers(self) -> Tensor:
        """Flat; one tensor, whatever looks at it."""
        return numbers(self.data, self.dtype)


@dataclass(eq=False)
class Array:
    """A numpy array that has yet to be told its shape, and the tensor that it then is."""

    tensor: Tensor | None = None


@dataclass(eq=False)
class Dtype:
    """Of numpy."""

    code: str
    order: str = "<"


# --- torch

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


def numbers(data: memoryview, dtype: torch.dtype) -> Tensor:
    """All of the bytes as a flat tensor: mapped where they lie where they are aligned to it, else a copy."""
    if len(data) % dtype.itemsize:
        raise NotDataError(f"has {len(data)} bytes for numbers of {dtype.itemsize}")
    if not len(data):
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
    return (flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()).view(dtype)


def _tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any, dtype: torch.dtype | None = None
) -> Tensor:
    if not isinstance(storage, Storage):
        raise NotDataError("has a tensor without numbers")
    flat = storage.numbers if dtype is None else storage.numbers.view(dtype)
    whole = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in whole):
        raise NotDataError(f"has a tensor of the shape {size}, strides {stride}, offset {offset}")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= len(flat) or count > len(flat)):
        raise NotDataError(f"has a tensor of the shape {list(size)} in {len(flat)} numbers")
    return flat.as_strided(size, stride, offset) if count else torch.empty(size, dtype=flat.dtype)


def _tensor_of(storage: Any, offset: int, size: Any, stride: Any, _g: Any, _h: Any, dtype: Name, *_: Any) -> Tensor:
    return _tensor(storage, offset, size, stride, dtype=torch_dtype(dtype))


def torch_dtype(name: Any) -> torch.dtype:
    """Of the name ``torch.float32`` and its like."""
    found = getattr(torch, name.name, None) if isinstance(name, Name) and name.module == "torch" else None
    if not isinstance(found, torch.dtype):
        raise NotDataError(f"has numbers of the type {name}")
    return found


def _first(value: Any, *_: Any) -> Any:
    return value


def _retyped(function: Any, _kind: Any, args: tuple[Any, ...], _state: Any) -> Any:
    """A tensor with attributes, or of a subclass."""
    if function not in (Name("torch._utils", "_rebuild_tensor_v2"), Name("torch._utils", "_rebuild_parameter")):
        raise NotDataError(f"asks to call {function}")
    return KNOWN[function](*args)


# --- numpy

_CODES = set("biufc")


def _dtype(code: Any, *_: Any) -> Dtype:
    if code in (Name("ml_dtypes", "bfloat16"), "bfloat16"):
        return Dtype("bfloat16")
    if not isinstance(code, str) or code.lstrip("<>=|")[:1] not in _CODES or not code.lstrip("<>=|")[1:].isdigit():
        raise NotDataError(f"has an array of {code}; of numbers alone")
    order = code[0] if code[0] in "<>" else "<"
    return Dtype(code.lstrip("<>=|"), order)


def _read(data: Any, dtype: Any) -> Tensor:
    """Bytes of numpy as a flat tensor."""
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin-1")
    if not isinstance(data, (bytes, bytearray, memoryview)) or not isinstance(dtype, Dtype):
        raise NotDataError("has an array of objects; of numbers alone")
    if dtype.code == "bfloat16":
        return numbers(memoryview(data), torch.bfloat16)
    kind = np.dtype(dtype.order + dtype.code)
    if dtype.order == ">":
        data = np.frombuffer(data, kind).astype(kind.newbyteorder("<")).tobytes()
    return numbers(memoryview(data).cast("B"), torch.from_numpy(np.empty(0, np.dtype(dtype.code))).dtype)


def filled(array: Array, shape: Any, dtype: Any, columns_first: Any, data: Any) -> None:
    """Tell an array its shape and numbers."""
    flat = _read(data, dtype)
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise NotDataError(f"has an array of the shape {shape}")
    if math.prod(shape) != len(flat):
        raise NotDataError(f"has an array of the shape {list(shape)} in {len(flat)} numbers")
    axes = tuple(reversed(range(len(shape))))
    array.tensor = flat.view(shape[::-1]).permute(axes) if columns_first else flat.view(shape)


def _array(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
    array = Array()
    filled(array, shape, dtype, order == "F", data)
    return array


def _scalar(dtype: Any, data: Any = None) -> Any:
    flat = _read(data, dtype)
    if len(flat) != 1:
        raise NotDataError(f"has one number in {len(flat)}")
    return flat.item()


def _jax_array(function: Any, args: tuple[Any, ...], state: Any, *_: Any) -> Array:
    array = KNOWN[function](*args) if function in _NEW_ARRAYS else None
    if not isinstance(array, Array):
        raise NotDataError(f"asks to call {function}")
    if state is not None:
        filled(array, *state[1:])
    return array


# --- the rest


def _object(kind: Any, base: Any = None, state: Any = None) -> Object:
    if not isinstance(kind, Name):
        raise NotDataError(f"asks for an object of {kind!r}")
    entries = state if isinstance(state, dict) else {}
    return Object(kind, entries=entries, elements=state if isinstance(state, list) else [])


def _persistent(meta: Any) -> Object:
    """An object of NVIDIA's, which carries the source text of its class; the text is left out."""
    meta = meta.entries if isinstance(meta, Object) else meta
    return Object(Name("persistent", str(meta["class_name"])), state=meta["state"])


def _bytes(text: Any, encoding: str = "utf-8") -> bytes:
    if isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8", "ascii"):
        return text.encode(encoding)
    raise NotDataError(f"asks to encode to {encoding}")


def _bytearray(data: Any = b"", encoding: str = "latin1") -> bytes:
    if isinstance(data, (bytes, memoryview)):
        return bytes(data)
    return _bytes(data, encoding)


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _path(*parts: str) -> str:
    return "/".join(parts)


_NUMPY = ("numpy.core", "numpy._core")
_NEW_ARRAYS = {Name(f"{core}.multiarray", "_reconstruct") for core in _NUMPY} | {
    Name(f"{core}.numeric", "_frombuffer") for core in _NUMPY
}

KNOWN: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor_of,
    Name("torch._utils", "_rebuild_parameter"): _first,
    Name("torch._utils", "_rebuild_parameter_with_state"): _first,
    Name("torch._tensor", "_rebuild_from_type_v2"): _retyped,
    Name("torch", "Size"): _first,
    Name("torch", "device"): _first,
    Name("torch.serialization", "_get_layout"): _first,
    **{Name(f"{core}.multiarray", "_reconstruct"): lambda *_: Array() for core in _NUMPY},
    **{Name(f"{core}.multiarray", "scalar"): _scalar for core in _NUMPY},
    **{Name(f"{core}.numeric", "_frombuffer"): _array for core in _NUMPY},
    Name("numpy", "dtype"): _dtype,
    Name("jax._src.array", "_reconstruct_array"): _jax_array,
    Name("flax.core.frozen_dict", "FrozenDict"): dict,
    Name("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    Name("collections", "OrderedDict"): dict,
    Name("collections", "defaultdict"): _empty_dict,
    Name("copyreg", "_reconstructor"): _object,
    Name("builtins", "set"): set,
    Name("builtins", "frozenset"): frozenset,
    Name("builtins", "complex"): complex,
    Name("builtins", "bytearray"): _bytearray,
    Name("builtins", "bytes"): _bytearray,
    Name("_codecs", "encode"): _bytes,
    **{Name("pathlib", f"{kind}Path"): _path for kind in ("Posix", "PurePosix", "Windows", "PureWindows", "")},
    **{Name("pathlib._local", f"{kind}Path"): _path for kind in ("Posix", "PurePosix", "Windows", "PureWindows", "")},
}
