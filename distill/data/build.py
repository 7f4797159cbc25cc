"""Sources -> shards: plain webdataset tars and a manifest, byte-identical for identical input."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.atomic import atomic_directory
from distill.data.manifest import NAME, DataError, Field, Manifest, Shard, read_manifest
from teachers.adapters.native import sha256

SHARD_SIZE = 100


@dataclass(frozen=True)
class Source:
    """Labelled images: ``[n, c, h, w]`` uint8 in order, classes ``[n]``, and what the manifest says of their origin."""

    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    classes: int
    about: dict[str, str]


def digits() -> Source:
    """scikit-learn's digits: 1,797 grey 8x8 images in 10 classes; values 0..16 are stretched to 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    about = {
        "title": "Optical Recognition of Handwritten Digits, test part, as in sklearn.datasets.load_digits",
        "authors": "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, doi 10.24432/C50P49",
        "licence": "CC-BY-4.0",
        "preparation": "8x8, values 0..16 scaled to 0..255 and rounded, PNG",
    }
    return Source(images, data.target.astype(np.int64), 10, about)


SOURCES: dict[str, Callable[[], Source]] = {"digits": digits}


def build(source: str, folder: Path, shard_size: int = SHARD_SIZE) -> Manifest:
    """Write the shards of a source of `SOURCES` to `folder`, the manifest last; the folder appears whole or not at all.

    A folder that holds the same data already is left as it is. Raises DataError if it holds anything else.
    """
    if source not in SOURCES:
        raise DataError(f"unknown source {source!r}; known: {', '.join(SOURCES)}")
    if shard_size < 1:
        raise DataError(f"shard size must be at least 1, got {shard_size}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _existing(source, folder, shard_size)
    data = SOURCES[source]()
    with atomic_directory(folder) as temporary:
        shards = tuple(_write_shards(data, temporary, source, shard_size))
        image = Field("png", "uint8", data.images.shape[1:])
        fields = {"image": image, "class": Field("cls", "int64", (), data.classes)}
        about = {**data.about, "builder": source}
        manifest = Manifest(source, "train", len(data.images), shards, fields, about)
        (temporary / NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _existing(source: str, folder: Path, shard_size: int) -> Manifest:
    remedy = "nothing was written; choose another folder, or move this one away"
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        raise DataError(f"{folder}: exists and is not a folder of shards ({error}); {remedy}") from None
    if manifest.source.get("builder") != source:
        raise DataError(f"{folder}: already holds the shards of {manifest.name!r}; {remedy}")
    held = manifest.shards[0].samples
    if held != min(shard_size, manifest.samples):
        raise DataError(f"{folder}: already holds {source} in shards of {held} samples, not of {shard_size}; {remedy}")
    return manifest


def _write_shards(data: Source, folder: Path, name: str, shard_size: int) -> Iterator[Shard]:
    import webdataset  # slow to import, and not needed to check a recipe

    for number, first in enumerate(range(0, len(data.images), shard_size)):
        file = folder / f"{name}-{number:06d}.tar"
        stop = min(first + shard_size, len(data.images))
        with file.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for i in range(first, stop):
                label = str(int(data.labels[i])).encode()
                tar.write({"__key__": f"{i:09d}", "png": _png(data.images[i]), "cls": label})
        yield Shard(file.name, file.stat().st_size, stop - first, sha256(file))


def _png(image: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "png")
    return buffer.getvalue()
