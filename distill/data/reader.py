"""Tar shards -> batches: the order of `order`, the checked samples of `samples`, for any part of each global batch."""

from __future__ import annotations

import math
import resource
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.data.expected import check, check_files
from distill.data.kept import Kept
from distill.data.manifest import DataError, Field
from distill.data.order import Order, batch_rows, default_streams, epoch_spans, shards_together
from distill.data.packed import packed
from distill.data.samples import OpenShard, diagnose, open_shard
from distill.data.store import Folder, LocalFolder, RemoteFolder, open_folder
from distill.objectives.base import Batch
from distill.rows import Rows, chosen
from teachers.checkpoints import sha256
from teachers.space import Cond, DataSpace, Latent

if TYPE_CHECKING:
    from distill.data.shards import Shards

_CHECKED_WHOLE = 1 << 28  # bytes of local shards up to which all of them are checked before a job starts
_TOGETHER = 1 << 29  # numbers of samples that are asked for all at once: 2 GiB


@dataclass(frozen=True)
class Accounted:
    """What the books need of a source: its name, its samples, of each epoch the positions where it begins and by which
    it is over, and how many of the source's positions lie before a global position."""

    name: str
    samples: int
    spans: Iterator[tuple[int, int]]
    consumed: Callable[[int], int]


class ShardReader:
    """Training batches and the whole data of a folder of shards. Raises DataError on anything that does not verify, or
    that is more than may be skipped. latent: the map to what the teacher works on, None for the manifest's."""

    def __init__(self, config: Shards, latent: Latent | None = None) -> None:
        self.config, self._latent = config, latent
        self.folder: Folder = open_folder(config.path, config.remote)
        self.manifest = self.folder.manifest()
        check(config, self.folder, self.manifest, self.cond)
        self.space: DataSpace = self.manifest.space(config.field, self.cond)
        self.counts = [shard.samples for shard in self.manifest.shards]
        self._starts = [0, *accumulate(self.counts)]
        self.streams = config.streams or default_streams(len(self.counts))
        if self.streams > len(self.counts):
            raise DataError(
                f"{self.folder}: {self.streams} streams but {len(self.counts)} shards; build more shards, or set "
                f"data.streams to at most {default_streams(len(self.counts))}"
            )
        self.together = shards_together(self.counts, self.streams, config.shuffle)
        if isinstance(self.folder, RemoteFolder):
            self.folder.check_cache(self.manifest.shards, self.streams, self.together)
        self.skipped: dict[int, str] = {}  # number in manifest order -> why
        self._reading = (torch.full((1,), -1), 0)  # number of the sample that is being read, and of the source
        self._in_worker = False
        self._open = lru_cache(min(2 * self.streams * self.together, _openable()))(self._opened)
        self._memory = Kept.of(self.samples, self.fields)

    @property
    def digest(self) -> str:
        """Identifies the data."""
        return self.manifest.digest

    @property
    def samples(self) -> int:
        """How many samples the manifest promises."""
        return self.manifest.samples

    @cached_property
    def fields(self) -> dict[str, Field]:
        """What is read of each sample."""
        config, held = self.config, self.manifest.fields
        wanted = [config.field, *self.cond]
        if config.field == "x_1" and "x_0" in held:
            wanted.append("x_0")
        if config.field == "latent":
            wanted += [name for name in ("latent_std", "latent_flip", "latent_flip_std")
                       if name in held and (config.flip or "flip" not in name)]  # fmt: skip
        return {name: held[name] for name in wanted}

    @property
    def cond(self) -> tuple[str, ...]:
        """The fields that condition."""
        if self.config.cond is not None:
            return self.config.cond
        return ("class",) if "class" in self.manifest.fields else ()

    @property
    def measured(self) -> int:
        """How many samples are measured with at most: those of 2^29 numbers."""
        return max(_TOGETHER // math.prod(self.space.shape), 1)

    @property
    def class_names(self) -> list[str] | None:
        """Of classes 0, 1, ..., where the manifest has them."""
        return self.manifest.source.get("classes")

    def batches(self, seed: int, batch: int, step: int, rows: range | None = None) -> Iterator[Batch]:
        """The global batches of steps step, step + 1, ... without end; of each the `rows`, by default all."""
        rows = range(batch) if rows is None else rows
        fixed = batch % self.streams == 0  # then a row belongs to the same stream in every step
        mine = {p % self.streams for p in batch_rows(0, batch, self.streams)[rows.start : rows.stop]} if fixed else None
        order = Order(self.counts, self.streams, seed, self.together, mine)
        while True:
            positions = batch_rows(step * batch, batch, self.streams)[rows.start : rows.stop]
            yield self.rows(positions, order, Rows(seed, "read", step, rows.start, len(rows)), rows.start)
            step += 1

    def rows(self, positions: Sequence[int], order: Order, rows: Rows, first: int, source: int = 0) -> Batch:
        """The samples at `positions` as rows first, first + 1, ..., with the random numbers of these rows; `source` is
        the number of this reader among several."""
        places = [order.at(position) for position in positions]
        if isinstance(self.folder, RemoteFolder):
            streams = {position % self.streams: position for position in positions}
            now = dict.fromkeys(place.shard for place in places)
            coming = [shard for position in streams.values() for shard in order.coming(position)]
            self.folder.fetch([self.manifest.shards[n] for n in now], [self.manifest.shards[n] for n in coming])
        numbers = [self._starts[place.shard] + place.index for place in places]
        keys, values = self._read(numbers)
        return Batch(
            self._trained(values, rows),
            self._conditioning(values),
            keys,
            first,
            values.get("x_0"),
            self.space.null,
            slots=torch.tensor([packed(source, place.epoch * self.samples + number)
                                for place, number in zip(places, numbers, strict=True)]),
            skipped={packed(source, n): self.skipped[n] for n in numbers if n in self.skipped},
        )  # fmt: skip

    def _conditioning(self, values: Mapping[str, Any]) -> dict[str, Tensor] | None:
        return {n: v.float() if v.is_floating_point() else v for n in self.cond for v in [values[n]]} or None

    def cond_for(self, first: int, count: int) -> Cond:
        """See `distill.data.base.Reader`."""
        if not self.space.embeddings:
            return self.space.cond_for(first, count)
        return self._conditioning(self._read([n % self.samples for n in range(first, first + count)])[1])

    def sources(self, seed: int) -> list[Accounted]:
        """For the books (`distill.data.loader.Books`)."""
        spans = epoch_spans(self.counts, self.streams, seed, self.together)
        return [Accounted(str(self.folder), self.samples, spans, lambda position: position)]

    def follow(self, reading: Tensor, source: int = 0) -> None:
        """In a worker: note in ``reading[0]`` the number of the sample that is being read, so that it is known after a
        crash, and leave pixels as bytes, which are sooner sent."""
        self._reading, self._in_worker = (reading, source), True

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """All samples that can be read, without mirroring, and labels ``[n]``, in manifest order; of data of more than
        2^29 numbers as many as have these, from everywhere."""
        self.read_ahead()
        numbers = [n for n in range(self.samples) if n not in self.skipped]
        numbers = [numbers[n] for n in chosen(self.measured, len(numbers)).tolist()]
        _, values = self._read(numbers)
        return self._trained(values, None), values.get("class")

    def read_ahead(self) -> None:
        """Read every sample of data small enough for it, so that what is wrong shows before a job starts."""
        if self._memory is not None:
            for number in range(self.samples):
                self._sound(number)

    def look(self) -> None:
        """The source, and of every local shard the size, of small data the digest. Raises DataError where they are not
        as promised."""
        check_files(self.config, self.folder, self.manifest)
        if not isinstance(self.folder, LocalFolder) or self.config.skip:
            return
        small = sum(shard.bytes for shard in self.manifest.shards) <= _CHECKED_WHOLE
        for number, shard in enumerate(self.manifest.shards):
            file = self.folder.shard(shard)
            if file.stat().st_size != shard.bytes or (small and sha256(file) != shard.sha256):
                raise DataError(next(diagnose(self.folder, self.manifest, number)))

    # --- one sample

    def _opened(self, number: int) -> OpenShard:
        opened = open_shard(self.folder, self.manifest.shards[number])
        if opened.wrong and not self.config.skip:
            raise DataError(opened.wrong[0])
        return opened

    def place(self, number: int) -> tuple[int, int]:
        """Shard and index of a sample by its number in manifest order."""
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def name(self, number: int) -> str:
        """The sample as messages name it."""
        shard, index = self.place(number)
        return f"{self.folder.where(self.manifest.shards[shard])}, sample {self._open(shard).key(index)}"

    def _sound(self, number: int) -> tuple[int, str, dict[str, Any]]:
        """Number, key and values of a sample; for one that cannot be read and may be skipped, of the next that can."""
        for candidate in chain(range(number, self.samples), range(number)):
            if candidate in self.skipped:
                continue
            if self._memory is not None and (key := self._memory.keys[candidate]) is not None:
                return candidate, key, {}  # its values are taken from there
            shard, index = self.place(candidate)
            self._note(candidate)
            try:
                opened = self._open(shard)
                values = opened.read(index, self.fields)
            except DataError as error:
                self._skip(candidate, str(error))
                continue
            if self._memory is not None:
                self._memory.put(candidate, opened.key(index), values)
            return candidate, opened.key(index), values
        raise DataError(f"{self.folder}: none of the {self.samples} samples can be read; verify the shards")

    def _note(self, number: int) -> None:
        reading, source = self._reading
        reading[0] = packed(source, number)

    def _skip(self, number: int, reason: str) -> None:
        self.skipped[number] = reason
        if len(self.skipped) > self.config.skip:
            raise DataError(too_many(self.config.skip, len(self.skipped), reason))

    # --- many samples

    def _read(self, numbers: Sequence[int]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Keys, and values stacked over the samples."""
        if self._memory is not None:
            held = self._memory.keys
            sound = [number if held[number] is not None else self._sound(number)[0] for number in numbers]
            self._note(sound[-1])
            return self._memory.take(sound)
        read = [self._sound(number) for number in numbers]
        values = {name: _stacked([row[2][name] for row in read]) for name in self.fields}
        return tuple(row[1] for row in read), values

    def _trained(self, values: Mapping[str, Any], rows: Rows | None) -> Tensor:
        """What is trained on: pixels in [-1, 1]; latents drawn by their mean and std, shifted and scaled; mirrored
        where the recipe says so. rows: its random numbers, None for neither noise nor mirrors."""
        x: Tensor = values[self.config.field]
        mirrored = None
        if rows is not None and self.config.flip:
            mirrored = (rows.uniform() < 0.5).view(-1, *[1] * (x.dim() - 1))
        if self.config.field == "latent":
            latent = self.manifest.autoencoder
            assert latent is not None
            std = values.get("latent_std")
            if mirrored is not None:
                x = torch.where(mirrored, values["latent_flip"], x)
                std = None if std is None else torch.where(mirrored, values["latent_flip_std"], std)
            if std is not None and rows is not None:
                x = x + std * rows.normal(*x.shape[1:])
            return (self._latent or Latent.of(latent)).to_latent(x.float())
        x = x if mirrored is None else torch.where(mirrored, x.flip(-1), x)
        if x.dtype == torch.uint8:
            return x if self._in_worker else to_float(x)
        return x.float() if x.is_floating_point() else x

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: what to read, nothing that is open."""
        return {"config": self.config, "latent": self._latent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _openable() -> int:
    """How many shards may be open at once: a quarter of the files that this process may have."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if files == resource.RLIM_INFINITY else max(files // 4, 1)


def too_many(allowed: int, count: int, reason: str) -> str:
    """What to say when more samples cannot be read than may be skipped."""
    return f"{count} samples cannot be read, data.skip allows {allowed}; the last: {reason}" if allowed else reason


def differ(names: list[str] | None, others: list[str] | None) -> str | None:
    """What to say of data whose classes have other names than those of the data trained on; None if all is well. Names
    of the last ones may be missing, where they do not occur."""
    for number, (here, there) in enumerate(zip(names or (), others or (), strict=False)):
        if here != there:
            where = f"class {number} is {there}, in the data trained on {here}"
            return f"{where}: build it from folders of the same classes"
    return None


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _stacked(values: list[Any]) -> Tensor:
    return torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)
