"""Spread work over the processes of a launch (torchrun) and gather it in order: any number gives the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")
R = TypeVar("R")


@cache
def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def spread(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """``[work(item) for item in items]``, each process taking every n-th item; all of them get the whole list."""
    state = _state()
    mine = [(i, work(items[i])) for i in range(state.process_index, len(items), state.num_processes)]
    if state.num_processes > 1:
        mine = gather_object(mine)
    return [result for _, result in sorted(mine, key=lambda pair: pair[0])]


def share(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every n-th of n processes."""
    state = _state()
    return items[state.process_index :: state.num_processes]


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return bool(_state().is_main_process)


def wait() -> None:
    """Go on when every process has come here."""
    _state().wait_for_everyone()


def device() -> torch.device:
    """The device of this process."""
    return torch.device(_state().device)
