"""The order of training samples: a pure function of (manifest, seed), whoever reads them.

There is a fixed number of virtual streams; position p of training belongs to stream p mod streams. Shards come in an
endless sequence, shuffled anew each epoch and taken `together` at a time; each such group is dealt to the stream that
runs out first. A stream reads its groups one after another, the samples of a group shuffled among each other. So
batches run across epoch ends, nothing is dropped or repeated, a reader that owns whole streams never needs another's
shards, and the position is one integer.

The rows of a global batch stand in the order of their streams: a process that keeps a run of rows keeps whole streams.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Container, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from distill.rows import Rows, derived_seed


class Sample(NamedTuple):
    """Where a sample is: shard number and index inside the shard; `epoch` is how often the shard was read before."""

    epoch: int
    shard: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here


class Group(NamedTuple):
    """Shards that a stream reads together: its first position in the stream, and its samples, counted up."""

    first: int
    epoch: int
    shards: tuple[int, ...]
    ends: tuple[int, ...]


def default_streams(shards: int) -> int:
    """The largest power of two <= min(64, shards)."""
    return 1 << (min(64, shards).bit_length() - 1)


def shards_together(counts: Sequence[int], streams: int, shuffle: int) -> int:
    """How many shards a stream reads at once to mix `shuffle` samples, if there are enough shards for all streams."""
    wanted = -(-shuffle * len(counts) // sum(counts))
    return max(1, min(wanted, len(counts) // streams))


def batch_rows(position: int, batch: int, streams: int) -> list[int]:
    """The positions position .. position + batch - 1 in the order of the rows: stream by stream."""
    end = position + batch
    return [p for stream in range(streams) for p in range(position + (stream - position) % streams, end, streams)]


class Order:
    """The endless order of (manifest, seed). `counts` are the shards' numbers of samples, in manifest order. mine: the
    streams that will be asked for, by default all; what the others have is forgotten."""

    def __init__(
        self, counts: Sequence[int], streams: int, seed: int, together: int = 1, mine: Container[int] | None = None
    ) -> None:
        self._mine = range(streams) if mine is None else mine
        self._counts, self._streams, self._seed, self._together = counts, streams, seed, together
        self._dealt = self.groups()
        self._waiting: list[deque[Group]] = [deque() for _ in range(streams)]
        self._reading: list[tuple[Group, list[int]] | None] = [None] * streams

    def groups(self) -> Iterator[tuple[int, Group]]:
        """Endless (stream, group): how shards are dealt to streams."""
        ends = [(0, stream) for stream in range(self._streams)]
        epoch = 0
        while True:
            shuffled = Rows(self._seed, "shards", epoch, 0, len(self._counts)).uniform().argsort().tolist()
            for start in range(0, len(shuffled), self._together):
                shards = tuple(shuffled[start : start + self._together])
                counted = tuple(accumulate(self._counts[shard] for shard in shards))
                end, stream = heapq.heappop(ends)
                yield stream, Group(end, epoch, shards, counted)
                heapq.heappush(ends, (end + counted[-1], stream))
            epoch += 1

    def _shuffled(self, group: Group) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "inside", group.epoch, *group.shards))
        return torch.randperm(group.ends[-1], generator=generator).tolist()

    def at(self, position: int) -> Sample:
        """The sample at a position; those of one stream must be asked for in rising order."""
        stream, place = position % self._streams, position // self._streams
        current = self._reading[stream]
        while current is None or place >= current[0].first + current[0].ends[-1]:
            group = self._next(stream)
            behind = place >= group.first + group.ends[-1]  # on the way to a later position: no need to shuffle it
            current = self._reading[stream] = (group, [] if behind else self._shuffled(group))
        group, shuffled = current
        number = shuffled[place - group.first]
        which = bisect_right(group.ends, number)
        return Sample(group.epoch, group.shards[which], number - (group.ends[which - 1] if which else 0))

    def _next(self, stream: int) -> Group:
        self._fill(stream)
        return self._waiting[stream].popleft()

    def _fill(self, stream: int) -> None:
        while not self._waiting[stream]:
            owner, group = next(self._dealt)
            if owner in self._mine:
                self._waiting[owner].append(group)

    def coming(self, position: int) -> tuple[int, ...]:
        """The shards that the stream of `position` reads after those it is in."""
        stream = position % self._streams
        self._fill(stream)
        return self._waiting[stream][0].shards


def epoch_spans(counts: Sequence[int], streams: int, seed: int, together: int = 1) -> Iterator[tuple[int, int]]:
    """For each epoch, the position of its first sample, and the one by which it and all before are over."""
    begin, end, current = 0, 0, 0
    for stream, group in Order(counts, streams, seed, together).groups():
        if group.epoch > current:
            yield begin, end
            begin, current = group.first * streams + stream, group.epoch
        begin = min(begin, group.first * streams + stream)
        end = max(end, (group.first + group.ends[-1] - 1) * streams + stream + 1)


def neighbours_met(counts: Sequence[int], streams: int, together: int, batch: int) -> tuple[float, float]:
    """Of the pairs of neighbours in a shard, the share that comes into the same batch of `batch`, measured on up to 100
    batches of seed 0; and the share if the samples of an epoch were shuffled as a whole."""
    order, total = Order(counts, streams, 0, together), sum(counts)
    batches = max(1, min(100, total // batch))
    met = 0
    for step in range(batches):
        places = {order.at(position) for position in batch_rows(step * batch, batch, streams)}
        met += sum(place._replace(index=place.index + 1) in places for place in places)
    pairs = batches * batch * (total - len(counts)) / total
    return met / max(pairs, 1), min(1.0, (batch - 1) / max(total - 1, 1))
