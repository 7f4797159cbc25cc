"""The batches of one process: its rows of every global batch, read ahead by worker processes if there are any.

Each worker reads a run of the process's rows of every step and the parts are joined here, so what comes out does not
depend on how many there are. The books are kept here too: of every epoch, read + skipped = promised.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distill.data.base import Reader, joined
from distill.data.manifest import DataError
from distill.data.mixture import Mixed
from distill.data.packed import unpacked
from distill.data.reader import Accounted, ShardReader, to_float, too_many
from distill.launch import die_with
from distill.objectives.base import Batch

_AHEAD = 2  # steps that a worker reads ahead
_DYING = 1.0  # seconds in which a process that closed its connections is over


class Loader:
    """Iterates over the batches of steps step, step + 1, ... without end: the rows of process `rank` of `world`.

    waited: seconds spent on waiting for data so far; skipped: unreadable samples that were passed over, and why, each
    told to `say` once. Raises DataError for numbers that do not go together, and from the iteration.
    """

    def __init__(
        self,
        reader: Reader,
        seed: int,
        batch: int,
        step: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if batch % world:
            raise DataError(f"a batch of {batch} cannot be shared by {world} processes: make trainer.batch a multiple")
        per_rank = batch // world
        self._reader, self._seed, self._batch, self._step, self._world = reader, seed, batch, step, world
        self._rows = range(rank * per_rank, (rank + 1) * per_rank)
        self._workers = min(workers, per_rank)
        self._say = say or (lambda text: None)
        if isinstance(reader, ShardReader | Mixed):
            readers = world * max(1, workers)
            if readers > reader.streams:
                raise DataError(
                    f"{readers} readers ({world} processes x {max(1, workers)} workers) but {reader.streams} streams: "
                    "build more shards (--shard-size), raise data.streams, or use fewer workers"
                )
        self.waited = 0.0
        self.skipped: dict[int, str] = {}
        self._reading = torch.full((max(1, self._workers), 1), -1).share_memory_()  # by each worker: a sample's number
        self._parts: Any = None  # torch's iterator over what the workers read

    def __iter__(self) -> Iterator[Batch]:
        books = Books(self._reader, self._seed, self._batch, self._step, self._world)
        batches = self._parallel() if self._workers else self._alone()
        try:
            for step, batch in enumerate(self._timed(batches), self._step):
                self._check(batch)
                books.add(step, batch, self.skipped)
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            raise self._death() or error from None
        finally:
            if self._parts is not None:
                self._parts._shutdown_workers()

    def _check(self, batch: Batch) -> None:
        """Tells of samples that were skipped. Raises DataError where they are too many."""
        for number, reason in batch.skipped.items():
            if number not in self.skipped:
                self.skipped[number] = reason
                self._say(f"skipped: {reason}")
        allowed = self._reader.config.skip if isinstance(self._reader, ShardReader | Mixed) else 0
        if len(self.skipped) > allowed:  # more than each worker on its own has seen
            raise DataError(too_many(allowed, len(self.skipped), list(self.skipped.values())[-1]))

    def _alone(self) -> Iterator[Batch]:
        """One batch ahead, in a thread: while the network computes, Python is mostly idle."""
        batches = self._reader.batches(self._seed, self._batch, self._step, self._rows)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, batches)
            while True:
                batch = coming.result()
                coming = thread.submit(next, batches)
                yield batch

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            yield batch

    def _parallel(self) -> Iterator[Batch]:
        data = _Parts(self._reader, self._seed, self._batch, self._step, self._rows, self._reading)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of more workers than cores: that is for the user to say
            loader = DataLoader(data, batch_size=None, num_workers=self._workers, prefetch_factor=_AHEAD,
                                worker_init_fn=partial(_obey, os.getpid()))  # fmt: skip
            self._parts = iter(loader)
        # else torch tells of a death by an error in whatever code this process is; asking for a batch tells it too
        torch._C._remove_worker_pids(id(self._parts))
        self._parts._worker_pids_set = False
        while True:
            got = [next(self._parts) for _ in range(self._workers)]
            for part in got:
                if isinstance(part, str):
                    raise DataError(part)
            batch = joined(got)
            yield replace(batch, x_1=to_float(batch.x_1)) if batch.x_1.dtype == torch.uint8 else batch

    def _death(self) -> DataError | None:
        """What it means that a worker died; None if none did.

        torch tells of a death by an error of one kind or another; how the processes ended is the same each time.
        """
        ended = {} if self._parts is None else self._ended()
        if not ended:
            return None
        last = [int(self._reading[number]) for number in ended if self._reading[number] >= 0]
        reader = self._reader
        named = [reader.name(number) for number in last] if isinstance(reader, ShardReader | Mixed) else []
        return DataError(
            f"a process that reads data died ({', '.join(sorted(set(ended.values())))}); the last sample it read: "
            f"{'; '.join(named) or 'none yet'}. If memory ran out, use fewer data.workers; to see the error itself, 0"
        )

    def _ended(self) -> dict[int, str]:
        """How workers ended that did not end well, by their numbers."""
        processes = self._parts._workers
        dead = connection.wait([process.sentinel for process in processes], _DYING)
        for process in processes:
            if process.sentinel in dead:
                with suppress(ChildProcessError):  # torch has asked for its exit code already
                    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        codes = {n: process.exitcode for n, process in enumerate(processes)}
        return {n: _how(code) for n, code in codes.items() if code is not None}


def _how(code: int) -> str:
    names = {number.value: number.name for number in signal.Signals}
    return f"exit code {code}" if code >= 0 else f"killed by {names.get(-code, f'signal {-code}')}"


def _obey(parent: int, number: int) -> None:
    """A worker ends with its parent, whose lock on the run folder it shares, and at its word: a SIGTERM to all
    processes of a job is for the parent to answer, which still needs data up to its checkpoint."""
    die_with(parent)
    if sys.platform != "linux":  # others do not tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


class _Parts(IterableDataset[Batch | str]):
    """What one worker reads: its run of the process's rows. What goes wrong comes as a text, to be raised there."""

    def __init__(self, reader: Reader, seed: int, batch: int, step: int, rows: range, reading: Tensor) -> None:
        self._reader, self._seed, self._batch, self._step, self._rows = reader, seed, batch, step, rows
        self._reading = reading

    def __iter__(self) -> Iterator[Batch | str]:
        info = get_worker_info()
        assert info is not None
        count = len(self._rows)
        start, stop = (self._rows.start + count * n // info.num_workers for n in (info.id, info.id + 1))
        if isinstance(self._reader, ShardReader | Mixed):
            self._reader.follow(self._reading[info.id])
        try:
            yield from self._reader.batches(self._seed, self._batch, self._step, range(start, stop))
        except DataError as error:
            while True:
                yield str(error)


class Books:
    """Of every epoch that begins while they are kept: each sample once, read or skipped. Raises DataError if not."""

    def __init__(self, reader: Reader, seed: int, batch: int, step: int, world: int) -> None:
        self._batch, self._world = batch, world
        sources = reader.sources(seed) if isinstance(reader, ShardReader | Mixed) else ()
        self._accounts = [_Account(source, step * batch) for source in sources]

    def add(self, step: int, batch: Batch, skipped: dict[int, str]) -> None:
        """Enter a process's rows of a step."""
        if batch.slots is None:
            return
        sources, slots = unpacked(batch.slots)
        for number, account in enumerate(self._accounts):
            account.enter(slots[sources == number])
            lost = [n for source, n in map(unpacked, skipped) if source == number]
            account.close((step + 1) * self._batch, self._world, lost)


class _Account:
    def __init__(self, source: Accounted, start: int) -> None:
        self._source = source
        self._seen: dict[int, Tensor] = {}
        self._epoch, self._start = 0, source.consumed(start)
        self._span = next(source.spans)

    def enter(self, slots: Tensor) -> None:
        samples = self._source.samples
        for epoch in (slots // samples).unique().tolist():
            numbers = slots[slots // samples == epoch] % samples
            seen = self._seen.setdefault(epoch, torch.zeros(samples, dtype=torch.bool))
            if seen[numbers].any() or len(numbers.unique()) != len(numbers):
                raise DataError(f"{self._source.name}: epoch {epoch}: a sample was read twice; please report this")
            seen[numbers] = True

    def close(self, position: int, world: int, lost: list[int]) -> None:
        """Settle the epochs that are over by a global position: the same ones on every process."""
        source = self._source
        while source.consumed(position) >= self._span[1]:
            seen = self._seen.pop(self._epoch, torch.zeros(source.samples, dtype=torch.bool))
            together = torch.distributed.is_available() and torch.distributed.is_initialized()
            if self._span[0] >= self._start and (world == 1 or together):  # alone, a process knows its share only
                skipped = int(seen[lost].sum())
                counts = torch.tensor([int(seen.sum()) - skipped, skipped])
                if world > 1:
                    from distill.parallel import device  # slow to import, and not needed to check a recipe

                    counts = counts.to(device())  # of several GPUs no other tensors can be reduced
                    torch.distributed.all_reduce(counts)
                if int(counts.sum()) != source.samples:
                    raise DataError(f"{source.name}: epoch {self._epoch}: read {counts[0]} + skipped {counts[1]}, but "
                                    f"the manifest promises {source.samples} samples; please report this")  # fmt: skip
            self._epoch += 1
            self._span = next(source.spans)
