"""What shards are built from: digits, image folders, idx, npy and npz files, webdatasets. See `open_source`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from distill.data.manifest import IMAGES, DataError
from distill.data.sources.arrays import arrays, digits, idx_arrays, idx_files
from distill.data.sources.base import Options, Source
from distill.data.sources.folders import ImageFolder, visible
from distill.data.sources.tars import Webdataset


def open_source(name: str, options: Options) -> Source:
    """The source that a name or path means. Raises DataError, also for options that it does not take."""
    path = Path(name).expanduser()
    if options.size is not None and options.size < 1:
        raise DataError(f"the size of images must be at least 1, got {options.size}")
    if options.seed is not None and options.seed < 0:
        raise DataError(f"the seed must be at least 0, got {options.seed}")
    if name == "digits" and not path.exists():
        _takes(name, options)
        return digits()
    if not path.exists():
        raise DataError(f"unknown source {name!r}: no such file or folder, and the only name is known: digits")
    if tars := sorted(path.glob("*.tar")) if path.is_dir() else [path] * (path.suffix == ".tar"):
        _takes(name, options, "size", "seed", "unpickle")
        return Webdataset(tars, options)
    if path.suffix in (".npy", ".npz"):
        _takes(name, options, "size", "seed", *["labels"] * (path.suffix == ".npy"))
        return arrays(path, options)
    _takes(name, options, "size", "seed")
    idx = idx_files(path, options.split)
    if idx is not None:
        return idx_arrays(*idx, options)
    if path.is_dir():
        return ImageFolder(path, options)
    raise DataError(f"{path}: not a source; take a folder of images or tars, idx files, .npy, .npz or .tar")


def _takes(name: str, options: Options, *allowed: str) -> None:
    for option in ("size", "seed", "labels", "unpickle"):
        if getattr(options, option) != getattr(Options(), option) and option not in allowed:
            raise DataError(f"{name}: --{option} does nothing for this source; leave it out")


def mark(name: str, split: str) -> str | None:
    """Tells a source from another of the same name in a moment: a digest of the names and sizes of the files that are
    read of it, and of how a hundred of them begin. None for one that is not there, or is no file."""
    path = Path(name).expanduser()
    if not path.exists():
        return None
    files = [path]
    if path.is_dir() and not (files := sorted(path.glob("*.tar"))):
        idx = idx_files(path, split)
        files = [file for file in idx if file] if idx else visible(path)
        files = [file for file in files if idx or file.suffix[1:].lower() in (*IMAGES, "txt")]
    every = max(len(files) // 100, 1)
    found = hashlib.sha256()
    for number, file in enumerate(files):
        found.update(json.dumps([file.relative_to(path).as_posix(), file.stat().st_size]).encode())
        if number % every == 0:
            with file.open("rb") as stream:
                found.update(stream.read(1 << 16))
    return found.hexdigest()[:16]
