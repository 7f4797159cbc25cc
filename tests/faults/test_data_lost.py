"""Data that goes away: a process that reads is killed, a shard is removed or cut."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breaking import RUN, Child, finish, same, step_of, unhurried, until
from helpers import checkpoints, verified

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _stands_still() -> None:
    """Plant: after step 9 the job stops itself, until it is told to go on."""
    from distill.training.callbacks import StopWhenAsked

    after_step = StopWhenAsked.after_step

    def still(self: Any, trainer: Any, module: Any) -> None:
        if trainer.global_step == 9:
            os.kill(os.getpid(), signal.SIGSTOP)
        after_step(self, trainer, module)

    StopWhenAsked.after_step = still  # type: ignore[method-assign]


def test_a_reader_is_killed(job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]) -> None:
    run = place / RUN
    reading = [word.replace("field: x", "field: x, workers: 2") for word in job]
    child = Child(place, *reading, plant=_stands_still)
    pid = child.process.pid
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", child)
    readers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(readers) == 2
    os.kill(int(readers[1]), signal.SIGKILL)
    child.send(signal.SIGCONT)
    tally("SIGKILL to a process that reads data")
    assert child.code() == 1
    assert "a process that reads data died (killed by SIGKILL)" in child.said() and "Traceback" not in child.said()
    assert [verified(path) for path in checkpoints(run)]
    finish(place, "resume", str(RUN))
    same(run, whole)
    tally("SIGKILL to a process that reads data", held=True)


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_shard_is_gone_when_training_continues(
    how: str, few: Path, job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]
) -> None:
    run, data = place / RUN, Path(shutil.copytree(few, place / "data"))
    child = Child(place, *(word.replace(str(few), "data") for word in job), plant=unhurried)
    until(lambda: step_of(run) >= 14, child)
    shard = data / "points-000004.tar"
    content = shard.read_bytes()
    shard.unlink() if how == "removed" else shard.write_bytes(content[:700])
    tally(f"a shard {how}")
    child.send(signal.SIGTERM)  # what was read of small data stays in memory: until it is started again
    assert child.code() == 143
    child = Child(place, "resume", str(RUN))
    assert child.code() in (1, 2), child.said()
    assert shard.name in child.said() and "Traceback" not in child.said()
    assert verified(checkpoints(run)[-1]) >= 14
    shard.write_bytes(content)
    finish(place, "resume", str(RUN))
    same(run, whole)
    tally(f"a shard {how}", held=True)
