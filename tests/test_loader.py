"""The same global batches on any number of processes and workers, from any step on; and the books of every epoch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.data.base import Reader, joined
from distill.data.build import build
from distill.data.empty import NoData
from distill.data.law import TeacherLaw
from distill.data.loader import Books, Loader
from distill.data.manifest import DataError
from distill.data.mixture import Mixture, Part, _quotas
from distill.data.reader import ShardReader
from distill.data.shards import Shards
from distill.objectives.base import Batch
from teachers.analytic import Gaussian
from teachers.space import DataSpace


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 shards of 30 samples, the last of 11: image n is n everywhere, of class n mod 5."""
    folder = tmp_path_factory.mktemp("ragged")
    np.savez(folder / "x.npz", images=np.arange(191, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8),
             labels=np.arange(191) % 5)  # fmt: skip
    build(str(folder / "x.npz"), folder / "shards", 30)
    return folder / "shards"


def open_(path: Path, **keys: Any) -> ShardReader:
    return ShardReader(Shards(path=str(path), **keys))


def mixed(*parts: tuple[Path, float]) -> Mixture:
    return Mixture(sources=tuple(Part(shards=Shards(path=str(path)), weight=weight) for path, weight in parts))


def taken(loader: Loader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def same(a: Batch, b: Batch) -> bool:
    assert a.keys == b.keys and a.first == b.first
    assert torch.equal(a.x_1, b.x_1)
    assert (a.cond is None) == (b.cond is None)
    return all(torch.equal(a.cond[k], b.cond[k]) for k in a.cond or ())


READERS: dict[str, Callable[[Path, Path], Reader]] = {
    "7 shards, the last ragged": lambda ragged, built: open_(ragged),
    "shards taken two at a time": lambda ragged, built: open_(ragged, streams=2, shuffle=60),
    "mirrored": lambda ragged, built: open_(built, flip=True),
    "digits": lambda ragged, built: open_(built),
    "two sources": lambda ragged, built: mixed((ragged, 3.0), (ragged, 1.0)).open(None),
    "a law": lambda ragged, built: TeacherLaw().open(Gaussian(mean=(0.0,), covariance=((1.0,),)).load()),
    "no data": lambda ragged, built: NoData(DataSpace((2,), classes=4)),
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("batch", [12, 32])
def test_global_batches_do_not_depend_on_the_processes(what: str, batch: int, ragged: Path, built: Path) -> None:
    whole = list(islice(READERS[what](ragged, built).batches(3, batch, 0), 40))
    for world in (1, 2, 4):
        if what.startswith("shards taken") and world == 4:
            continue  # it has two streams
        for start in (0, 17):
            ranks = [taken(Loader(READERS[what](ragged, built), 3, batch, start, rank=rank, world=world), 20)
                     for rank in range(world)]  # fmt: skip
            for step in range(20):
                parts = [rank[step] for rank in ranks]
                assert [part.first for part in parts] == [batch // world * n for n in range(world)]
                assert same(joined(parts), whole[start + step])


@pytest.mark.parametrize("what", ["7 shards, the last ragged", "two sources", "mirrored", "a law"])
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 1), (4, 1)])
def test_nor_on_the_workers(what: str, world: int, workers: int, ragged: Path, built: Path) -> None:
    whole = list(islice(READERS[what](ragged, built).batches(3, 12, 0), 31))
    for start in (0, 23):
        ranks = [taken(Loader(READERS[what](ragged, built), 3, 12, start, rank=r, world=world, workers=workers), 8)
                 for r in range(world)]  # fmt: skip
        for step in range(8):
            assert same(joined([rank[step] for rank in ranks]), whole[start + step])


def test_four_processes_of_three_workers(built: Path) -> None:
    whole = list(islice(open_(built).batches(0, 64, 0), 4))
    ranks = [taken(Loader(open_(built), 0, 64, rank=rank, world=4, workers=3), 4) for rank in range(4)]
    assert all(same(joined([rank[step] for rank in ranks]), whole[step]) for step in range(4))


def test_readers_own_whole_streams(built: Path) -> None:
    """With 16 streams and 4 processes each reads 4 streams: the shards of an epoch are split between them."""
    opened = []
    for rank in range(4):
        reader = open_(built)
        taken(Loader(reader, 0, 64, rank=rank, world=4), 4)
        places = {number // 100 for batch in taken(Loader(reader, 0, 64, rank=rank, world=4), 4)
                  for number in batch.slots.tolist()}  # fmt: skip
        opened.append(places)
    assert sum(map(len, opened)) == len(set().union(*opened)) == 16


def test_what_does_not_go_together_is_said(ragged: Path) -> None:
    with pytest.raises(DataError, match=r"5 readers \(5 processes x 1 workers\) but 4 streams: build more shards"):
        Loader(open_(ragged), 0, 10, world=5)
    with pytest.raises(DataError, match=r"6 readers \(2 processes x 3 workers\) but 4 streams"):
        Loader(open_(ragged), 0, 12, world=2, workers=3)
    with pytest.raises(DataError, match="a batch of 10 cannot be shared by 4 processes"):
        Loader(open_(ragged), 0, 10, world=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_an_error_of_the_loader(workers: int, folder: Path) -> None:
    tar = folder / "digits-000004.tar"
    content = bytearray(tar.read_bytes())
    content[1540] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"^.*digits-000004.tar, sample 000000400, offset 1536.*rebuild the shards$"):
        taken(Loader(open_(folder), 0, 100, workers=workers), 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_budget_is_that_of_all_workers(workers: int, folder: Path) -> None:
    for number in range(4):
        tar = folder / f"digits-{number:06d}.tar"
        content = bytearray(tar.read_bytes())
        content[1540] ^= 1
        tar.write_bytes(content)
    loader = Loader(open_(folder, skip=4), 0, 100, workers=workers)
    taken(loader, 40)
    assert sorted(loader.skipped) == [0, 100, 200, 300]
    with pytest.raises(DataError, match=r"4 samples cannot be read, data\.skip allows 3"):
        taken(Loader(open_(folder, skip=3), 0, 100, workers=workers), 40)


def dying(death: Callable[[], None]) -> type[ShardReader]:
    class Deadly(ShardReader):
        def _read(self, numbers: Any) -> Any:
            for number in numbers:
                self._sound(number)
                if number == 777:
                    death()
            return super()._read(numbers)

    return Deadly


@pytest.mark.parametrize(
    ("death", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os._exit(0), "exit code 0"),
    ],
)
def test_a_worker_that_dies_names_its_last_sample(death: Callable[[], None], how: str, built: Path) -> None:
    said = rf"a process that reads data died \({how}\).*digits-000007.tar, sample 000000777"
    loader = Loader(dying(death)(Shards(path=str(built))), 0, 100, workers=2)
    with pytest.raises(DataError, match=said):
        taken(loader, 40)


@pytest.mark.parametrize("after", [0.0, 0.001, 0.003, 0.01, 0.02])
def test_whenever_it_dies(after: float, built: Path) -> None:
    """torch tells of it by errors of several kinds; what is said is the same."""
    loader = Loader(open_(built), 0, 96, workers=3)

    def kill_one() -> None:
        for step, _ in enumerate(loader):
            if step == 3:
                worker = multiprocessing.active_children()[1]
                threading.Timer(after, os.kill, (worker.pid, signal.SIGKILL)).start()

    said = r"died \(killed by SIGKILL\); the last sample it read: .*tar, sample \d+"
    with pytest.raises(DataError, match=said):
        kill_one()


def test_a_death_is_told_to_who_asks_for_data_alone(built: Path) -> None:
    """Not to whatever code runs when it happens, which it would break off: that may be writing a checkpoint."""
    batches = iter(Loader(open_(built), 0, 96, workers=3))
    next(batches)
    worker = multiprocessing.active_children()[1]
    os.kill(worker.pid or 0, signal.SIGKILL)
    time.sleep(0.5)  # it dies, and whom torch tells would be here
    with pytest.raises(DataError, match=r"died \(killed by SIGKILL\)"):
        list(batches)


# --- the books


@pytest.mark.parametrize("what", ["7 shards, the last ragged", "two sources", "digits"])
@pytest.mark.parametrize("start", [0, 5])
def test_every_epoch_adds_up(what: str, start: int, ragged: Path, built: Path) -> None:
    reader = READERS[what](ragged, built)
    books = Books(reader, 0, 32, start, 1)
    before = [account._epoch for account in books._accounts]
    for step, batch in enumerate(islice(reader.batches(0, 32, start), 200), start):
        books.add(step, batch, {})
    assert all(account._epoch >= epoch + 2 for account, epoch in zip(books._accounts, before, strict=True))


@pytest.mark.parametrize("wrong", ["twice", "lost"])
def test_books_that_do_not_add_up_stop_training(wrong: str, ragged: Path) -> None:
    reader = open_(ragged)
    books = Books(reader, 0, 32, 0, 1)

    def keep() -> None:
        for step, batch in enumerate(islice(reader.batches(0, 32, 0), 30)):
            slots = batch.slots.clone()
            if step == 1:
                slots = torch.cat([slots, slots[:1]]) if wrong == "twice" else slots[1:]
            books.add(step, replace(batch, slots=slots), {})

    with pytest.raises(DataError, match="read twice" if wrong == "twice" else r"epoch 0: read 190 \+ skipped 0, but"):
        keep()


def test_skipped_samples_are_in_the_books(folder: Path) -> None:
    (folder / "digits-000003.tar").unlink()
    assert len(taken(Loader(open_(folder, skip=100), 0, 100), 60)) == 60


def test_waiting_is_counted(ragged: Path) -> None:
    loader = Loader(open_(ragged), 0, 12)
    taken(loader, 5)
    assert loader.waited > 0


# --- mixtures


def test_sources_have_their_shares(ragged: Path, built: Path) -> None:
    reader = mixed((ragged, 3.0), (ragged, 1.0)).open(None)
    slots = torch.cat([batch.slots for batch in islice(reader.batches(0, 40, 0), 100)])
    assert Counter((slots >> 48).tolist()) == {0: 3000, 1: 1000}
    alone = torch.cat([batch.slots for batch in islice(open_(ragged).batches(0, 40, 0), 75)])
    assert set(slots[slots >> 48 == 0].tolist()) == set(alone.tolist())
    with pytest.raises(DataError, match="sources must hold the same kind of data"):
        mixed((ragged, 3.0), (built, 1.0)).open(None)


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [1, 2, 4], [1e-9, 1, 1], [1 / 3] * 3])
def test_quotas_are_the_shares_to_a_thousandth(weights: list[float]) -> None:
    quotas = _quotas(weights)
    assert sum(quotas) == 1000
    assert all(abs(q - w / sum(weights) * 1000) <= 1 for q, w in zip(quotas, weights, strict=True))
    assert min(quotas) >= 1
