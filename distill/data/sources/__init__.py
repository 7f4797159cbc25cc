"""What shards are built from: digits, image folders, idx, npy and npz files, webdatasets. See `open_source`."""

from __future__ import annotations

from pathlib import Path

from distill.data.manifest import DataError
from distill.data.sources.arrays import arrays, digits, idx_arrays, idx_files
from distill.data.sources.base import Options, Source
from distill.data.sources.folders import ImageFolder
from distill.data.sources.tars import Webdataset


def open_source(name: str, options: Options) -> Source:
    """The source that a name or path means. Raises DataError."""
    path = Path(name)
    if name == "digits" and not path.exists():
        return digits()
    if not path.exists():
        raise DataError(f"unknown source {name!r}: no such file or folder, and the only name is known: digits")
    if path.is_dir() and any(path.glob("*.tar")):
        return Webdataset(sorted(path.glob("*.tar")), options)
    if path.suffix == ".tar":
        return Webdataset([path], options)
    if path.suffix in (".npy", ".npz"):
        return arrays(path, options)
    idx = idx_files(path, options.split)
    if idx is not None:
        return idx_arrays(*idx, options)
    if path.is_dir():
        return ImageFolder(path, options)
    raise DataError(f"{path}: not a source; take a folder of images or tars, idx files, .npy, .npz or .tar")
