"""The order of training samples: a pure function of (manifest, seed), whoever reads them.

There is a fixed number of virtual streams; position p of training belongs to stream p mod streams. Shards come in an
endless sequence, shuffled anew each epoch, and each is dealt to the stream that runs out first. A stream reads its
shards one after another, each in a shuffled order. So batches run across epoch ends, nothing is dropped or repeated,
a reader that owns whole streams never needs another's shards, and the position is one integer.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from distill.rows import Rows


class Sample(NamedTuple):
    """Where a sample is: shard number and index inside the shard; `epoch` is how often the shard was read before."""

    epoch: int
    shard: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here


def default_streams(shards: int) -> int:
    """The largest power of two <= min(64, shards)."""
    return 1 << (min(64, shards).bit_length() - 1)


def _shuffled(seed: int, purpose: str, step: int, count: int) -> list[int]:
    return Rows(seed, purpose, step, 0, count).uniform().argsort().tolist()


def _deal(counts: Sequence[int], streams: int, seed: int) -> Iterator[tuple[int, int, int, int]]:
    """Endless (stream, first position in that stream, epoch, shard)."""
    ends = [(0, stream) for stream in range(streams)]
    epoch = 0
    while True:
        for shard in _shuffled(seed, "shards", epoch, len(counts)):
            end, stream = heapq.heappop(ends)
            yield stream, end, epoch, shard
            heapq.heappush(ends, (end + counts[shard], stream))
        epoch += 1


def samples_from(position: int, counts: Sequence[int], streams: int, seed: int) -> Iterator[Sample]:
    """The endless order from a global position on. `counts` are the shards' numbers of samples, in manifest order."""
    dealt = _deal(counts, streams, seed)
    waiting: list[deque[tuple[int, int, int]]] = [deque() for _ in range(streams)]
    reading: list[tuple[int, int, int, list[int]] | None] = [None] * streams
    while True:
        stream, place = position % streams, position // streams
        current = reading[stream]
        while current is None or place >= current[0] + len(current[3]):
            while not waiting[stream]:
                owner, first, epoch, shard = next(dealt)
                waiting[owner].append((first, epoch, shard))
            first, epoch, shard = waiting[stream].popleft()
            behind = place >= first + counts[shard]  # on the way to a later position: no need to shuffle it
            order = list(range(counts[shard])) if behind else _shuffled(seed, f"in {shard}", epoch, counts[shard])
            current = reading[stream] = (first, epoch, shard, order)
        first, epoch, shard, order = current
        yield Sample(epoch, shard, order[place - first])
        position += 1
