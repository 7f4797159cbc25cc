"""Tar shards -> batches, strictly: a shard is trusted only if size, sha256, count and fields are as the manifest says.

webdataset splits the tars into samples; nothing is decoded but the fields of the manifest (png, cls), so no member of
a tar is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from distill.data.build import SOURCES, build
from distill.data.manifest import DataError, Manifest, Shard, read_manifest
from distill.data.order import default_streams, samples_from
from distill.objectives.base import Batch
from teachers.fields import require
from teachers.space import DataSpace
from teachers.velocity import Teacher

_CHECKED_WHOLE = 1 << 28  # bytes of shards up to which their sha256 is checked before a job starts
_CACHED_SHARDS = 256  # decoded shards kept in memory; more than twice the largest number of streams


@dataclass(frozen=True)
class Decoded:
    """A whole shard: keys, images ``[n, c, h, w]`` uint8, labels int64 ``[n]`` or None."""

    keys: tuple[str, ...]
    images: Tensor
    labels: Tensor | None


class ShardReader:
    """Training batches and the whole data of a folder of shards. Raises DataError on anything that does not verify."""

    def __init__(self, folder: Path, streams: int | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.space: DataSpace = self.manifest.space
        self.streams = streams or default_streams(len(self.manifest.shards))
        if self.streams > len(self.manifest.shards):
            raise DataError(
                f"{folder}: {self.streams} streams but {len(self.manifest.shards)} shards; build more shards, or set "
                f"data.streams to at most {default_streams(len(self.manifest.shards))}"
            )
        self._shard = lru_cache(_CACHED_SHARDS)(lambda n: read_shard(folder, self.manifest, self.manifest.shards[n]))

    @property
    def digest(self) -> str:
        """Identifies the data."""
        return self.manifest.digest

    def batches(self, seed: int, batch: int, step: int) -> Iterator[Batch]:
        """The global batches of steps step, step + 1, ... without end."""
        counts = [shard.samples for shard in self.manifest.shards]
        order = samples_from(step * batch, counts, self.streams, seed)
        while True:
            places = [next(order) for _ in range(batch)]
            shards = [self._shard(place.shard) for place in places]
            images = torch.stack([shard.images[p.index] for shard, p in zip(shards, places, strict=True)])
            labels = [
                shard.labels[p.index] for shard, p in zip(shards, places, strict=True) if shard.labels is not None
            ]
            keys = tuple(shard.keys[p.index] for shard, p in zip(shards, places, strict=True))
            yield Batch(
                to_float(images), {"class": torch.stack(labels)} if labels else None, keys, null=self.space.null
            )

    def read_ahead(self) -> None:
        """Decode every shard of data small enough for it, so that what is wrong shows before a job starts."""
        if sum(shard.bytes for shard in self.manifest.shards) <= _CHECKED_WHOLE:
            for number in range(len(self.manifest.shards)):
                self._shard(number)

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """All images ``[n, c, h, w]`` in [-1, 1] and labels ``[n]``, in manifest order."""
        shards = [self._shard(n) for n in range(len(self.manifest.shards))]
        labels = [shard.labels for shard in shards if shard.labels is not None]
        return to_float(torch.cat([shard.images for shard in shards])), torch.cat(labels) if labels else None


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _remedy(folder: Path) -> str:
    return f"see `distill shards verify {folder}`, then restore or rebuild the shards"


def check_shard(folder: Path, shard: Shard, *, digest: bool) -> bytes:
    """The bytes of a shard whose size and, if asked for, sha256 are as the manifest says; empty if not asked for.

    Raises DataError.
    """
    file, remedy = folder / shard.file, _remedy(folder)
    if not file.is_file():
        raise DataError(f"{file}: missing, though the manifest promises it; {remedy}")
    if file.stat().st_size != shard.bytes:
        raise DataError(f"{file}: {file.stat().st_size} bytes, the manifest promises {shard.bytes}; {remedy}")
    if not digest:
        return b""
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise DataError(f"{file}: sha256 differs from the manifest: damaged, or built anew without it; {remedy}")
    return content


def read_shard(folder: Path, manifest: Manifest, shard: Shard) -> Decoded:
    """Read, verify and decode one shard. Raises DataError that names shard, sample and reason."""
    file, remedy = folder / shard.file, _remedy(folder)
    content = check_shard(folder, shard, digest=True)
    os.environ.setdefault("WDS_SECURE", "1")  # a second lock: webdataset would run code in some members
    from webdataset import tariterators  # slow to import, and not needed to check a recipe

    try:
        stream = [{"stream": io.BytesIO(content), "url": str(file)}]
        samples = list(tariterators.group_by_keys(tariterators.tar_file_expander(stream)))
    except Exception as error:  # webdataset wraps whatever tarfile raised
        reason = error.args[0] if error.args else type(error).__name__
        raise DataError(f"{file}: not a readable tar ({reason}); {remedy}") from None
    if len(samples) != shard.samples:
        raise DataError(f"{file}: {len(samples)} samples, the manifest promises {shard.samples}; {remedy}")
    rows = [_decode(sample, manifest, file) for sample in samples]
    keys, images = tuple(str(s["__key__"]) for s in samples), torch.from_numpy(np.stack([row[0] for row in rows]))
    labelled = "class" in manifest.fields
    return Decoded(keys, images, torch.tensor([row[1] for row in rows]) if labelled else None)


def _decode(sample: Mapping[str, Any], manifest: Manifest, file: Path) -> tuple[np.ndarray[Any, Any], int]:
    where = f"{file}, sample {sample['__key__']}"
    for name, field in manifest.fields.items():
        if field.member not in sample:
            raise DataError(f"{where}: no member .{field.member}, which holds the field {name!r}; rebuild the shards")
    image = manifest.fields["image"]
    try:
        pixels = np.asarray(Image.open(io.BytesIO(sample[image.member])))
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: a PNG chunk that is broken
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{where}: .{image.member} is not an image ({reason}); rebuild the shards") from None
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if pixels.shape != image.shape or pixels.dtype != np.uint8:
        raise DataError(f"{where}: image is {pixels.dtype} {pixels.shape}, the manifest says uint8 {image.shape}")
    if "class" not in manifest.fields:
        return pixels, 0
    label, classes = manifest.fields["class"], manifest.fields["class"].classes or 0
    try:
        value = int(sample[label.member])
    except ValueError:
        value = -1
    if not 0 <= value < classes:
        raise DataError(
            f"{where}: .{label.member} must be an integer in [0, {classes - 1}], got {sample[label.member]!r}"
        )
    return pixels, value


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a folder of shards, a line each; empty when all of it holds."""
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems, seen = [], dict[str, str]()
    for shard in manifest.shards:
        try:
            decoded = read_shard(folder, manifest, shard)
        except DataError as error:
            problems.append(str(error))
            continue
        for key in decoded.keys:
            if key in seen:
                problems.append(f"{folder / shard.file}, sample {key}: key also in {seen[key]}; rebuild the shards")
            seen[key] = shard.file
    extra = sorted({p.name for p in folder.glob("*.tar")} - {shard.file for shard in manifest.shards})
    return problems + [f"{folder / name}: not in the manifest; move it away or rebuild the shards" for name in extra]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Tar shards in the folder `path`. If it does not exist yet it is built from `source` (see `distill shards build`).
    streams: virtual streams of the global order; null for the largest power of two <= min(64, shards)."""

    path: str
    source: str | None = None
    streams: int | None = None

    def __post_init__(self) -> None:
        require(
            self,
            source=(self.source is None or self.source in SOURCES, f"must be null or one of {', '.join(SOURCES)}"),
            streams=(self.streams is None or self.streams >= 1, "must be at least 1"),
        )

    def open(self, teacher: Teacher | None) -> ShardReader:
        """The reader, after building what is missing. Raises DataError."""
        folder = Path(self.path)
        if self.source is not None and _is_missing(folder):
            build(self.source, folder)
        return ShardReader(folder, self.streams)

    def check(self) -> ShardReader | None:
        """The reader if the shards are there and look right, None if they will be built. Raises DataError."""
        folder = Path(self.path)
        if self.source is not None and _is_missing(folder):
            return None
        reader = ShardReader(folder, self.streams)
        small = sum(shard.bytes for shard in reader.manifest.shards) <= _CHECKED_WHOLE
        for shard in reader.manifest.shards:
            check_shard(folder, shard, digest=small)
        return reader


def _is_missing(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
