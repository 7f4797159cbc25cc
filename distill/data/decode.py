"""Members -> values, by a fixed table: no pickle is ever read, and sizes are checked before memory is taken."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from distill.data.manifest import IMAGES, Field

MEMBER_BYTES = 1 << 28
PIXELS = 1 << 26
ELEMENTS = 1 << 28
"""Limits, checked before memory is taken."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_INTEGER = re.compile(rb"\s*-?[0-9]{1,18}\s*")


def decode(name: str, field: Field, content: bytes) -> Any:
    """The value of the field `name`: a tensor of the field's dtype and shape, an int (class), a text or JSON.

    Raises ValueError that says what is wrong with the content.
    """
    ending = field.member.rpartition(".")[2]
    if ending in IMAGES:
        return _image(field, content)
    if ending == "cls":
        return _class(field, content)
    if ending == "safetensors":
        return _tensor(name, field, content)
    return _PLAIN[ending](field, content)


def open_image(content: bytes | io.BufferedReader) -> Image.Image:
    """An image of which nothing but the header is read yet. Raises ValueError if it is none, or too large."""
    try:
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"is not an image ({_words(error)})") from None
    if image.width * image.height > PIXELS:
        raise ValueError(f"is an image of {image.width}x{image.height}, at most {PIXELS} pixels are read")
    return image


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    """``[c, h, w]`` uint8 of an opened image. Raises ValueError if it is damaged."""
    try:
        array = np.asarray(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"is not an image ({_words(error)})") from None
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _words(error: BaseException) -> str:
    return "no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _image(field: Field, content: bytes) -> Tensor:
    image = open_image(content)
    shape = (len(image.getbands()), image.height, image.width)
    if shape != field.shape or image.mode not in ("L", "RGB"):
        raise ValueError(f"is {image.mode} {list(shape)}, the manifest says uint8 {list(field.shape)}")
    return torch.from_numpy(np.array(pixels(image)))


def _class(field: Field, content: bytes) -> int:
    value = int(content) if _INTEGER.fullmatch(content) else -1
    if field.classes is not None and not 0 <= value < field.classes:
        raise ValueError(f"must be an integer in [0, {field.classes - 1}], got {content[:40]!r}")
    return value


def _tensor(name: str, field: Field, content: bytes) -> Tensor:
    try:
        held = safetensors.torch.load(content)  # checks that the header and the bytes agree
    except (safetensors.SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch has not
        raise ValueError(f"is not a safetensors file ({error})") from None
    if name not in held:
        raise ValueError(f"holds no tensor {name!r} (there is: {', '.join(held) or 'none'})")
    value = held[name]
    _agree(str(value.dtype).removeprefix("torch."), tuple(value.shape), field)
    return value


def _npy(field: Field, content: bytes) -> Tensor:
    return torch.from_numpy(array(content, lambda dtype, shape: _agree(str(dtype), shape, field)))


def array(
    content: bytes, check: Callable[[np.dtype[Any], tuple[int, ...]], object], limit: int = ELEMENTS
) -> np.ndarray[Any, Any]:
    """The array of an npy file in this machine's byte order, after `check` has seen its dtype and shape. Raises
    ValueError."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError, SyntaxError, RecursionError, TypeError) as error:
        raise ValueError(f"is not an npy file ({error})") from None
    if dtype.hasobject:
        raise ValueError("is an npy file of pickled objects, which are not read")
    native = dtype.newbyteorder("=")
    check(native, shape)
    count = int(np.prod(shape, dtype=object))
    if count > limit:
        raise ValueError(f"has {count} elements, at most {limit} are read")
    if len(content) - file.tell() != count * dtype.itemsize:
        raise ValueError(f"has {len(content) - file.tell()} bytes of data, its shape {list(shape)} needs "
                         f"{count * dtype.itemsize}")  # fmt: skip
    flat = np.frombuffer(content, dtype, count, file.tell())
    return np.array(flat.reshape(shape, order="F" if fortran else "C"), native, order="C")


def _agree(dtype: str, shape: tuple[int, ...], field: Field) -> None:
    if (dtype, shape) != (field.dtype, field.shape):
        raise ValueError(f"is {dtype} {list(shape)}, the manifest says {field.dtype} {list(field.shape)}")


def _text(field: Field, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error})") from None


def _json(field: Field, content: bytes) -> Any:
    try:
        return json.loads(_text(field, content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None


_PLAIN: dict[str, Callable[[Field, bytes], Any]] = {"npy": _npy, "txt": _text, "json": _json}
