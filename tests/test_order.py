"""The order of training samples: every epoch a permutation, the position one integer, streams independent readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import pytest

from distill.data.order import (
    Order,
    Sample,
    batch_rows,
    default_streams,
    epoch_spans,
    neighbours_met,
    shards_together,
)

PATTERNS = {
    "even": ([10] * 8, 4),
    "short last": ([10] * 7 + [3], 4),
    "one stream": ([5, 7, 2], 1),
    "one shard": ([9], 1),
    "a stream a shard": ([4, 4, 4, 4], 4),
    "uneven": ([1, 30, 2, 17, 5, 11], 4),
    "tiny": ([1, 1, 1], 2),
}
patterns = pytest.mark.parametrize(("counts", "streams"), PATTERNS.values(), ids=list(PATTERNS))


def samples_from(position: int, counts: Sequence[int], streams: int, seed: int, together: int = 1) -> Iterator[Sample]:
    """The endless order from a global position on."""
    order = Order(counts, streams, seed, together)
    while True:
        yield order.at(position)
        position += 1


def taken(count: int, counts: list[int], streams: int, seed: int = 0, position: int = 0) -> list[Sample]:
    return list(islice(samples_from(position, counts, streams, seed), count))


@patterns
def test_every_sample_is_read_once_an_epoch(counts: list[int], streams: int) -> None:
    """Of each epoch every sample appears exactly once, though epochs overlap where streams run apart."""
    total = sum(counts)
    read = Counter(taken((6 + 2 * len(counts)) * total, counts, streams))
    assert set(read.values()) == {1}
    everything = {(shard, index) for shard, n in enumerate(counts) for index in range(n)}
    complete = min(s.epoch for s in taken(1, counts, streams, position=sum(read.values())))
    assert complete >= 1
    for epoch in range(min(3, complete)):
        assert {(s.shard, s.index) for s in read if s.epoch == epoch} == everything


@pytest.mark.parametrize(("counts", "streams"), [([10] * 8, 4), ([5, 7, 2], 1), ([9], 1), ([4] * 4, 4)])
def test_an_epoch_is_a_permutation(counts: list[int], streams: int) -> None:
    """Where streams end together an epoch is the next block of sum(counts) samples."""
    total = sum(counts)
    order = taken(3 * total, counts, streams)
    epochs = [order[i * total : (i + 1) * total] for i in range(3)]
    for number, epoch in enumerate(epochs):
        assert {s.epoch for s in epoch} == {number}
        assert len({(s.shard, s.index) for s in epoch}) == total
    assert [s[1:] for s in epochs[0]] != [s[1:] for s in epochs[1]]


@patterns
def test_any_position_is_a_tail_of_the_whole_order(counts: list[int], streams: int) -> None:
    total = sum(counts)
    whole = taken(5 * total + 20, counts, streams)
    for position in {*range(0, 2 * total, 3), 1, total - 1, total, total + 1, 4 * total, 5 * total}:
        assert taken(20, counts, streams, position=position) == whole[position : position + 20]


@patterns
def test_streams_are_read_whole_shard_by_whole_shard(counts: list[int], streams: int) -> None:
    """What a reader that owns stream i needs: the rows i, i + streams, ... finish a shard before the next begins."""
    order = taken(4 * sum(counts), counts, streams)
    owners: dict[tuple[int, int], int] = {}
    for stream in range(streams):
        shards = [(s.epoch, s.shard) for s in order[stream::streams]]
        runs = [shards[0], *(b for a, b in pairwise(shards) if a != b)]
        assert len(runs) == len(set(runs))
        for run in runs[:-1]:
            assert shards.count(run) == counts[run[1]]
        for run in runs:
            assert owners.setdefault(run, stream) == stream


@patterns
def test_a_shard_goes_to_the_stream_that_runs_out_first(counts: list[int], streams: int) -> None:
    """Hence no shard starts, in its stream, later than any shard of the next epoch; and no stream runs far ahead."""
    order = taken(30 * sum(counts), counts, streams)
    starts: dict[int, list[int]] = {}
    for stream in range(streams):
        mine = order[stream::streams]
        for place, (sample, before) in enumerate(zip(mine, [None, *mine], strict=False)):
            if before is None or sample[:2] != before[:2]:
                starts.setdefault(sample.epoch, []).append(place)
    whole = [starts[epoch] for epoch in range(20)]
    assert all(len(epoch) == len(counts) for epoch in whole)
    for epoch, after in pairwise(whole):
        assert max(epoch) <= min(after)


@patterns
def test_seed_decides_the_order(counts: list[int], streams: int) -> None:
    total = sum(counts)
    assert taken(total, counts, streams, seed=1) == taken(total, counts, streams, seed=1)
    if total > 4:
        assert taken(total, counts, streams, seed=1) != taken(total, counts, streams, seed=2)


def test_samples_are_shuffled_inside_shards_and_anew_each_epoch() -> None:
    order = taken(300, [100], 1)
    inside = [[s.index for s in order[i : i + 100]] for i in (0, 100, 200)]
    for indices in inside:
        assert sorted(indices) == list(range(100))
        assert indices != sorted(indices)
    assert inside[0] != inside[1] != inside[2]
    two = taken(200, [100, 100], 1)
    assert [s.index for s in two[:100]] != [s.index for s in two[100:]]


def test_first_shards_vary_with_the_epoch() -> None:
    order = taken(40 * 8, [1] * 8, 1)
    starts = {order[8 * epoch].shard for epoch in range(40)}
    assert starts == set(range(8))


@pytest.mark.parametrize(("shards", "streams"), [(1, 1), (2, 2), (3, 2), (18, 16), (63, 32), (64, 64), (1000, 64)])
def test_default_streams_is_a_power_of_two_up_to_sixty_four(shards: int, streams: int) -> None:
    assert default_streams(shards) == streams


@pytest.mark.parametrize("together", [1, 2, 3])
@patterns
def test_shards_taken_together_are_mixed_and_nothing_is_lost(counts: list[int], streams: int, together: int) -> None:
    total = sum(counts)
    order = list(islice(samples_from(0, counts, streams, 0, together), (6 + 4 * len(counts)) * total))
    assert set(Counter(order).values()) == {1}
    everything = {(shard, index) for shard, n in enumerate(counts) for index in range(n)}
    for epoch, (begin, end) in enumerate(islice(epoch_spans(counts, streams, 0, together), 3)):
        places = [n for n, sample in enumerate(order) if sample.epoch == epoch]
        assert {(order[n].shard, order[n].index) for n in places} == everything
        assert min(places) == begin
        assert max(places) < end
        assert end == 1 + max(n for n, sample in enumerate(order) if sample.epoch <= epoch)
    for position in (1, total, 2 * total + 1):
        assert list(islice(samples_from(position, counts, streams, 0, together), 20)) == order[position : position + 20]


def test_a_group_mixes_its_shards() -> None:
    order = list(islice(samples_from(0, [50] * 4, 1, 0, 2), 200))
    for half in (order[:100], order[100:]):
        shards = [sample.shard for sample in half]
        assert len(set(shards)) == 2
        assert 25 < sum(a != b for a, b in pairwise(shards)) < 75


@pytest.mark.parametrize(("position", "batch", "streams"), [(0, 8, 4), (5, 8, 4), (96, 7, 16), (3, 40, 16), (7, 5, 1)])
def test_rows_stand_in_the_order_of_their_streams(position: int, batch: int, streams: int) -> None:
    rows = batch_rows(position, batch, streams)
    assert rows == sorted(range(position, position + batch), key=lambda p: (p % streams, p))


TOGETHER = [
    ([100] * 18, 16, 1000, 1),
    ([100] * 640, 64, 1000, 10),
    ([1000] * 100, 64, 1000, 1),
    ([10] * 100, 4, 55, 6),
]


@pytest.mark.parametrize(("counts", "streams", "shuffle", "together"), TOGETHER)
def test_as_many_shards_are_taken_as_there_are(counts: list[int], streams: int, shuffle: int, together: int) -> None:
    assert shards_together(counts, streams, shuffle) == together


def test_neighbours_rarely_meet() -> None:
    """In one stream of whole shards the share is known: of a batch of b from a shard of n, (b - 1) / (n - 1)."""
    met, ideal = neighbours_met([1000] * 64, 64, 1, 256)
    assert met == pytest.approx(3 / 999, rel=0.5) and ideal == pytest.approx(255 / 63999)
    assert neighbours_met([1000] * 64, 1, 1, 100)[0] == pytest.approx(99 / 999, rel=0.2)
    assert neighbours_met([100] * 640, 1, 10, 100)[0] == pytest.approx(99 / 999, rel=0.3)
    assert neighbours_met([4], 1, 1, 4) == (1.0, 1.0)


def test_streams_of_others_are_forgotten() -> None:
    order, mine = Order([5] * 8, 4, 0), Order([5] * 8, 4, 0, mine={1, 3})
    for position in range(4000):
        if position % 4 in (1, 3):
            assert mine.at(position) == order.at(position)
    assert sum(map(len, mine._waiting)) < 4 < 300 < sum(map(len, order._waiting))
