"""Tar shards as a recipe names them: built where they are missing, checked, opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from distill.data.build import PLAN, build
from distill.data.fetch import Remote
from distill.data.manifest import NAME, DataError
from distill.data.reader import ShardReader
from distill.data.sources.arrays import idx_files
from distill.data.sources.base import Options
from teachers.fields import require
from teachers.velocity import Teacher


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Tar shards in `path`: a folder, a URL (http, s3, gs, hf), or ``pipe:command {file}``. A local folder that does
    not exist yet is built from `source`: digits, or what else `distill shards build` takes; split: of idx files.

    field: what is trained on; shape, autoencoder: what it must be (latents: both are needed). cond: fields that
    condition, null for the classes if there are any. flip: mirror half of the samples. streams: virtual streams of the
    global order, null for the largest power of two <= min(64, shards); shuffle: samples that a stream mixes at least.
    skip: samples that may be unreadable and are passed over. workers: processes that read ahead.
    """

    path: str
    source: str | None = None
    split: str = "train"
    field: str = "image"
    shape: tuple[int, ...] | None = None
    autoencoder: str | None = None
    cond: tuple[str, ...] | None = None
    flip: bool = False
    streams: int | None = None
    shuffle: int = 1000
    skip: int = 0
    workers: int = 0
    remote: Remote = Remote()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        require(
            self,
            streams=(self.streams is None or self.streams >= 1, "must be at least 1"),
            shuffle=(self.shuffle >= 1, "must be at least 1"),
            skip=(self.skip >= 0, "must be at least 0"),
            workers=(self.workers >= 0, "must be at least 0"),
        )

    def open(self, teacher: Teacher | None) -> ShardReader:
        """The reader, after building what is missing, on all processes of a launch together. Raises DataError."""
        from distill.parallel import everywhere  # slow to import, and not needed to check a recipe

        missing = everywhere(self._to_build)
        if any(missing) and not all(missing):
            raise DataError(f"{self.path}: is there on some of the hosts only; use a folder that all of them see")
        if all(missing):
            assert self.source is not None
            self._check_split()
            build(self.source, Path(self.path).expanduser(), options=Options(split=self.split))
        return ShardReader(self, teacher.latent if teacher else None)

    def check(self) -> ShardReader | None:
        """The reader if the shards are there and look right, None if they will be built. Raises DataError."""
        if self._to_build():
            if self.source != "digits" and not Path(str(self.source)).expanduser().exists():
                raise DataError(f"{self.source}: is not there, and neither are shards in {self.path}", "source")
            self._check_split()
            return None
        reader = ShardReader(self)
        reader.look()
        return reader

    def _check_split(self) -> None:
        """Raises DataError where the source to build from has no such split: all of it would stand for a part."""
        source = str(self.source)
        path = Path(source).expanduser()
        if self.split != "train" and (source == "digits" or idx_files(path, self.split) is None):
            raise DataError(
                f"{source}: only idx files have splits; take the {self.split!r} one as source, and set split to train",
                "split",
            )

    def _to_build(self) -> bool:
        folder = Path(self.path).expanduser()
        if self.source is None or (folder / NAME).exists():
            return False
        return not folder.exists() or (folder / PLAN).exists() or (folder.is_dir() and not any(folder.iterdir()))

    @property
    def training(self) -> Shards:
        """With what does not change the samples set to its default."""
        source = "digits" if self.source == "digits" else None  # others are paths
        return replace(self, path="", source=source, split="train", skip=0, workers=0, remote=Remote())

    def resolved(self, reader: ShardReader) -> Shards:
        """With the number of streams written out."""
        return replace(self, streams=reader.streams)
