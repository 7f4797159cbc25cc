"""Several folders of shards in fixed shares: each keeps its own order, and every position belongs to one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from distill.data.base import joined
from distill.data.manifest import DataError
from distill.data.order import Order, batch_rows
from distill.data.packed import unpacked
from distill.data.reader import Accounted, ShardReader, differ
from distill.data.shards import Shards
from distill.objectives.base import Batch
from distill.rows import Rows, derived_seed
from teachers.fields import require
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

_PERIOD = 1000  # positions in which every source has exactly its share


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several sources: its shards, and its weight, of which the shares of all are made."""

    shards: Shards
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, weight=(self.weight > 0, "must be above 0"))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources with weights, to a thousandth. workers: processes that read ahead. What one source may skip is
    its own `skip`."""

    sources: tuple[Part, ...]
    workers: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            sources=(len(self.sources) >= 2, "must be at least two"),
            workers=(self.workers >= 0, "must be at least 0"),
        )

    @property
    def skip(self) -> int:
        """Samples that may be unreadable, in all."""
        return sum(part.shards.skip for part in self.sources)

    def open(self, teacher: Teacher | None) -> Mixed:
        """The reader, after building what is missing. Raises DataError."""
        return Mixed(self, [part.shards.open(teacher) for part in self.sources])

    def check(self) -> Mixed | None:
        """The reader if all shards are there and look right, None if some will be built. Raises DataError."""
        readers = []
        for number, part in enumerate(self.sources):
            try:
                readers.append(part.shards.check())
            except DataError as error:
                error.key = ("sources", str(number), "shards", *error.key)
                raise
        found = [reader for reader in readers if reader is not None]
        return Mixed(self, found) if len(found) == len(readers) else None

    @property
    def training(self) -> Mixture:
        """With what does not change the samples set to its default."""
        return replace(
            self, workers=0, sources=tuple(replace(part, shards=part.shards.training) for part in self.sources)
        )

    def resolved(self, reader: Mixed) -> Mixture:
        """With the numbers of streams written out."""
        pairs = zip(self.sources, reader.readers, strict=True)
        return replace(self, sources=tuple(replace(part, shards=part.shards.resolved(r)) for part, r in pairs))


class Mixed:
    """Training batches from several `ShardReader`s. Raises DataError where they do not hold the same kind of data."""

    def __init__(self, config: Mixture, readers: Sequence[ShardReader]) -> None:
        self.config, self.readers = config, readers
        self.space: DataSpace = readers[0].space
        for reader in readers[1:]:
            if reader.space != self.space or reader.cond != readers[0].cond:
                raise DataError(
                    f"{reader.folder}: {reader.space} and conditions {list(reader.cond)}, but {readers[0].folder}: "
                    f"{self.space} and {list(readers[0].cond)}: sources must hold the same kind of data"
                )
            if text := differ(readers[0].class_names, reader.class_names):
                raise DataError(f"{reader.folder}: {text}")
        self.class_names = readers[0].class_names
        self._quotas = _quotas([part.weight for part in config.sources])

    @property
    def digest(self) -> str:
        """Identifies the data."""
        return f"{derived_seed(*(reader.digest for reader in self.readers), *self._quotas):016x}"

    @property
    def streams(self) -> int:
        """Of all sources."""
        return sum(reader.streams for reader in self.readers)

    def batches(self, seed: int, batch: int, step: int, rows: range | None = None) -> Iterator[Batch]:
        """See `distill.data.base.Reader`."""
        orders = [Order(r.counts, r.streams, seed, r.together) for r in self.readers]
        dealt = _Dealt(self._quotas, seed)
        rows = range(batch) if rows is None else rows
        while True:
            before, after = (dealt.consumed(position) for position in (step * batch, (step + 1) * batch))
            flat = [
                (number, position)
                for number, reader in enumerate(self.readers)
                for position in batch_rows(before[number], after[number] - before[number], reader.streams)
            ][rows.start : rows.stop]
            parts, first = [], rows.start
            for number, reader in enumerate(self.readers):
                if positions := [position for source, position in flat if source == number]:
                    mine = Rows(seed, "read", step, first, len(positions))
                    parts.append(reader.rows(positions, orders[number], mine, first, number))
                    first += len(positions)
            yield joined(parts)
            step += 1

    def cond_for(self, first: int, count: int) -> Cond:
        """See `distill.data.base.Reader`: the first source's."""
        return self.readers[0].cond_for(first, count)

    def everything(self) -> tuple[Tensor, Tensor | None]:
        """All samples of all sources, each once, whatever the weights; of a large source some, as of one alone."""
        found = [reader.everything() for reader in self.readers]
        labels = [y for _, y in found if y is not None]
        return torch.cat([x for x, _ in found]), torch.cat(labels) if labels else None

    def read_ahead(self) -> None:
        """See `ShardReader`."""
        for reader in self.readers:
            reader.read_ahead()

    def look(self) -> None:
        """See `ShardReader`."""
        for reader in self.readers:
            reader.look()

    def follow(self, reading: Tensor) -> None:
        """See `ShardReader`."""
        for number, reader in enumerate(self.readers):
            reader.follow(reading, number)

    def name(self, number: int) -> str:
        """See `ShardReader`."""
        source, number = unpacked(number)
        return self.readers[source].name(number)

    def sources(self, seed: int) -> list[Accounted]:
        """See `ShardReader`."""
        dealt, found = _Dealt(self._quotas, seed), []
        for number, reader in enumerate(self.readers):
            (source,) = reader.sources(seed)
            found.append(replace(source, consumed=partial(dealt.consumed_by, number)))
        return found


def _quotas(weights: Sequence[float]) -> list[int]:
    """Positions of each source in a period: the largest remainders are rounded up, and each has at least one."""
    exact = [weight / sum(weights) * _PERIOD for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: quotas[i] - exact[i])
    for i in by_rest[: _PERIOD - sum(quotas)]:
        quotas[i] += 1
    quotas[quotas.index(max(quotas))] += _PERIOD - sum(quotas)
    return quotas


class _Dealt:
    """Which source has which position: in every period each has its quota, in an order of the seed and the period."""

    def __init__(self, quotas: Sequence[int], seed: int) -> None:
        self._quotas, self._seed = quotas, seed
        self._period = lru_cache(4)(self._shuffled)

    def _shuffled(self, number: int) -> Tensor:
        """``[period + 1, sources]``: how many each has had before each position of a period."""
        owners = torch.repeat_interleave(torch.arange(len(self._quotas)), torch.tensor(self._quotas))
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "sources", number))
        owners = owners[torch.randperm(_PERIOD, generator=generator)]
        counted = torch.nn.functional.one_hot(owners, len(self._quotas)).cumsum(0)
        return torch.cat([torch.zeros_like(counted[:1]), counted])

    def consumed(self, position: int) -> list[int]:
        """How many positions before `position` each source has had."""
        number, rest = divmod(position, _PERIOD)
        within: list[int] = self._period(number)[rest].tolist()
        return [number * quota + extra for quota, extra in zip(self._quotas, within, strict=True)]

    def consumed_by(self, source: int, position: int) -> int:
        """How many positions before `position` one source has had."""
        return self.consumed(position)[source]
