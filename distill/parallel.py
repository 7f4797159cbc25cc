"""The processes of a launch: who is who, work spread over them in order, and what they agree on.

Any number of processes gives the same result. What fails on one process fails on all of them at once: where it failed
the error itself is raised, elsewhere `FailedElsewhere`, so that nobody waits for a process that is gone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from distill.launch import BAD_INPUT, FailedElsewhere, Lost
from teachers.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=6)
"""How long the others wait while one prepares: builds data, trains a classifier. Training has its own."""


_GONE = r"gloo|nccl|pair closure|Connection (closed|reset)|Broken pipe"
"""What torch's errors say of another process that is gone or silent."""


@contextmanager
def noticing() -> Iterator[None]:
    """What torch says where a process is gone comes out as `Lost`."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not re.search(_GONE, str(error), re.IGNORECASE):
            raise
        silent = re.search(r"[Tt]imed? ?out", str(error)) is not None
        raise Lost(
            f"process {rank()} of {world()} stopped: another one "
            + ("did not answer in time (trainer.timeout)" if silent else "is gone; its own message says why")
        ) from error


@cache
def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE, **_store())


def _store() -> dict[str, Any]:
    """Where torchrun has started the processes of a host again: a part of its store of their own. It keeps the store,
    in which those that are gone still say where they can be reached."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":  # several hosts may count differently
        return {}
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    return {"store": PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": world}


def rank() -> int:
    """The number of this process among all of the launch."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes the launch has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def device(asked: str = "auto") -> torch.device:
    """The device of this process; the CPU where `asked`, as `trainer.device` may be, is cpu."""
    return torch.device("cpu" if asked == "cpu" else _state().device)


def patient(limit: timedelta, group: Any = None) -> None:
    """How long this process waits for another of a group, by default all, before it takes it for lost."""
    if world() > 1:
        _state()
        torch.distributed.distributed_c10d._set_pg_timeout(limit, group)


def mean(values: Sequence[float]) -> list[float]:
    """The means over the processes."""
    if world() == 1:
        return list(values)
    with noticing():
        found = torch.tensor(values, dtype=torch.float32, device=device())
        torch.distributed.all_reduce(found)
        return (found / world()).tolist()


def most(value: int) -> int:
    """The largest of the processes' values."""
    if world() == 1:
        return value
    with noticing():
        found = torch.tensor(int(value), device=device())
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)


def agreed(work: Callable[[], R]) -> R:
    """What ``work()`` gives on this process, if it fails on none."""
    if world() == 1:
        return work()
    result: list[R] = []
    error: Exception | None = None
    try:
        result.append(work())
    except Exception as raised:
        error = raised
    with noticing():
        _state()
        codes: list[int] = gather_object([0 if error is None else _code(error)])
    failed = [number for number, code in enumerate(codes) if code]
    if failed and failed[0] == rank():  # where all found the same fault, one tells of it
        assert error is not None
        raise error
    if failed:
        raise FailedElsewhere(codes[failed[0]])
    return result[0]


def everywhere(work: Callable[[], R]) -> list[R]:
    """What ``work()`` gives on each process, by rank, if it fails on none."""
    result = agreed(work)
    if world() == 1:
        return [result]
    with noticing():
        return list(gather_object([result]))


def _code(error: Exception) -> int:
    if isinstance(error, FailedElsewhere):
        return error.code
    return BAD_INPUT if isinstance(error, InputError) and not error.started else 1


def on_main(work: Callable[[], R]) -> R:
    """What ``work()`` gives on the main process, where alone it is done, on all of them."""
    return everywhere(lambda: work() if is_main() else cast(R, None))[0]


def spread(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """``[work(item) for item in items]``, each process taking every n-th item; all of them get the whole list."""
    parts = everywhere(lambda: [work(item) for item in share(items)])
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]


def share(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every n-th of n processes."""
    return items[rank() :: world()]
