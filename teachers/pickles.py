"""Pickles read as what they say: nothing in one is ever run, imported or called.

A pickle is a program for a stack machine that calls functions by name. This machine calls none: names that stand for
data (`pickle_values.KNOWN`) become data, classes become records of what is said of them (`Object`), and a call of
anything else is an error that names it. So EDM's files, which hold the source text of their classes, and torch
checkpoints with classes from anywhere give up their tensors without the code that wrote them.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from teachers.errors import CheckpointError
from teachers.pickle_machine import Machine, Source
from teachers.pickle_values import NotDataError

_LEGACY = 0x1950A86A20F9469CFC6C  # what torch files of before 1.6, and tensors in plain pickles, begin with


def read_pickle(path: str | Path) -> Any:
    """What a pickle or a torch checkpoint holds: dicts, lists, tuples, numbers, text, bytes, tensors (arrays too, on
    the CPU, mapped from the file), `Object` for what would have been of a class and `Name` for a name.

    Raises CheckpointError for a pickle that calls anything, or is damaged.
    """
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            view = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
            return _read(view, stream)
    except NotDataError as error:
        raise CheckpointError(f"{file}: {error}; code in a checkpoint is never run: save its state_dict() alone where "
                              "its code is at hand, or ask its authors for safetensors") from None  # fmt: skip
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except _DAMAGED as error:
        raise CheckpointError(f"{file}: cut short, damaged or no pickle ({error}); copy it again") from None


def loads(content: bytes) -> Any:
    """`read_pickle` of bytes. Raises ValueError."""
    try:
        return _read(memoryview(content), io.BytesIO(content))
    except NotDataError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"cut short, damaged or no pickle ({error})") from None


_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError, RuntimeError,
            struct.error, zipfile.BadZipFile)  # fmt: skip


def _read(view: memoryview, stream: BinaryIO) -> Any:
    if bytes(view[:4]) == b"PK\x03\x04":
        return _zipped(view, stream)
    if _is_legacy(view):
        return _legacy(view)
    return Machine(Source(view), nested=_nested).run()


# --- torch's containers


def _zipped(view: memoryview, stream: BinaryIO) -> Any:
    with zipfile.ZipFile(stream) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1 or any("/code/" in name for name in entries):
        raise NotDataError("is a program (TorchScript), or a zip of something else than torch.save writes")

    def entry(name: str) -> memoryview:
        info = entries[roots[0] + name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise NotDataError(f"holds {name} compressed, which torch.save never does")
        name_length, extra = struct.unpack("<HH", view[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + name_length + extra
        return view[start : start + info.file_size]

    if roots[0] + "byteorder" in entries and bytes(entry("byteorder")) != b"little":
        raise NotDataError("holds numbers of a big-endian machine")
    return Machine(Source(entry("data.pkl")), lambda key, *_: entry(f"data/{key}")).run()


def _is_legacy(view: memoryview) -> bool:
    try:
        operations = pickletools.genops(Source(view[:64]))  # type: ignore[arg-type]
        return next(value for operation, value, _ in operations if operation.name not in ("PROTO", "FRAME")) == _LEGACY
    except (ValueError, IndexError, struct.error, StopIteration):
        return False


def _nested(view: memoryview) -> Any:
    if not _is_legacy(view):
        raise NotDataError("holds a tensor in a form that torch does not write")
    return _legacy(view)


def _legacy(view: memoryview) -> Any:
    """A magic number, a version, the machine; the object; the keys of its storages; the storages, each after its
    count of numbers."""
    source = Source(view)
    for _ in range(3):
        Machine(source).run()
    start = source.tell()
    places: dict[str, tuple[int, int]] = {}  # key -> start, bytes

    def sized(key: str, count: int, size: int) -> memoryview:
        places[key] = (count, count * size)
        return view[:0]

    Machine(source, sized, None, dry=True).run()
    keys, at = Machine(source).run(), source.tell()
    for key in keys:
        (count,) = struct.unpack("<q", view[at : at + 8])
        said, size = places[key]
        if count != said:
            raise NotDataError(f"has a storage of {count} numbers where {said} are said")
        places[key] = (at + 8, size)
        at += 8 + size
    return Machine(Source(view, start), lambda key, *_: view[places[key][0] : sum(places[key])]).run()
