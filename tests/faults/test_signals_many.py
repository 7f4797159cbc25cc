"""Signals to one or all of several processes, a process that dies, one that stands still; nobody watches over them
but where a launcher is started."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from breaking import END, RUN, SEED, WAIT, Child, ended, finish, hidden, launch, same, step_of, unhurried, until
from helpers import checkpoints, environment, verified

from distill.training.checkpoint import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def a_step(*what: object) -> int:
    return random.Random(f"{SEED}/{what}").randrange(7, 24)


@pytest.mark.parametrize(
    ("strategy", "number", "ranks"),
    [
        ("ddp", signal.SIGTERM, [1]),
        ("ddp", signal.SIGINT, [0, 1]),
        ("fsdp2", signal.SIGUSR1, [0]),
        ("fsdp2", signal.SIGTERM, [0, 1]),
    ],
)
def test_all_stop_at_the_same_step(
    strategy: str, number: signal.Signals, ranks: list[int], job: tuple[str, ...], whole_of: Callable[[str], Path],
    place: Path, tally: Callable[..., None],
) -> None:  # fmt: skip
    whole, run = whole_of(strategy), place / RUN
    started = launch(place, 2, *job, f"trainer.strategy={strategy}", plant=unhurried)
    until(lambda: step_of(run) >= a_step(strategy, number), *started)
    for rank in ranks:
        assert started[rank].send(number)
    what = f"{number.name} to {'one' if len(ranks) == 1 else 'both'} of two processes"
    tally(what)
    assert ended(started) == [128 + number] * 2, started[0].said() + started[1].said()
    assert not any("Traceback" in child.said() for child in started)
    assert f"stopped by {number.name}" in started[0].said() and f"distill resume {RUN}" in started[0].said()
    assert verified(checkpoints(run)[-1]) == step_of(run) < 30
    assert not hidden(run)
    finish(place, "resume", str(RUN), processes=2)
    same(run, whole)
    tally(what, held=True)


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 0), ("ddp", 1), ("fsdp2", 1)])
def test_the_death_of_one_ends_the_others(
    strategy: str, rank: int, job: tuple[str, ...], whole_of: Callable[[str], Path], place: Path,
    tally: Callable[..., None],
) -> None:  # fmt: skip
    whole, run = whole_of(strategy), place / RUN
    started = launch(place, 2, *job, f"trainer.strategy={strategy}", plant=unhurried)
    until(lambda: step_of(run) >= a_step(strategy, rank), *started)
    started[rank].send(signal.SIGKILL)
    tally("SIGKILL to one of two processes")
    codes = ended(started, END)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, codes
    survivor = started[1 - rank].said()
    assert f"process {1 - rank} of 2 stopped: another one is gone" in survivor and "Traceback" not in survivor
    finish(place, "resume", str(RUN), processes=2)
    same(run, whole)
    tally("SIGKILL to one of two processes", held=True)


def test_one_that_stands_still_is_given_up(
    job: tuple[str, ...], whole_of: Callable[[str], Path], place: Path, tally: Callable[..., None]
) -> None:
    whole, run = whole_of("ddp"), place / RUN
    started = launch(place, 2, *job, "trainer.strategy=ddp", "trainer.timeout=20", plant=unhurried)
    until(lambda: step_of(run) >= a_step("still"), *started)
    started[1].send(signal.SIGSTOP)
    tally("SIGSTOP to one of two processes, trainer.timeout=20")
    try:
        assert started[0].code(20 + END) == 1
    finally:
        started[1].kill()
    said = started[0].said()
    assert "process 0 of 2 stopped: another one did not answer in time (trainer.timeout)" in said
    assert "Traceback" not in said
    finish(place, "resume", str(RUN), processes=2)
    same(run, whole)
    tally("SIGSTOP to one of two processes, trainer.timeout=20", held=True)


def test_a_second_signal_ends_even_one_that_waits(
    job: tuple[str, ...], place: Path, tally: Callable[..., None]
) -> None:
    """Under --gpus: a process that waits for another hears of no signal, but the launcher does."""
    what = "a second SIGINT to distill run --gpus 2, one process standing still"
    launcher = Child(place, *job, "trainer.strategy=ddp", "--gpus", "2")
    until(lambda: step_of(place / RUN) >= 3, launcher)
    assert launcher.process.pid is not None
    workers = workers_of(launcher.process.pid)
    os.kill(workers[1], signal.SIGSTOP)  # so that the step cannot end
    tally(what)
    time.sleep(0.5)
    launcher.send(signal.SIGINT)
    time.sleep(1)
    assert launcher.running()
    launcher.send(signal.SIGINT)
    assert launcher.code(END) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    tally(what, held=True)


def test_resumed_on_other_numbers_of_processes(
    job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]
) -> None:
    run, what = place / RUN, "SIGKILL to all, then another number of processes"
    arguments, strategy = job, "fsdp2"
    for processes, step in ((2, 8), (1, 14), (4, 21)):
        extra = () if arguments[0] == "resume" else (f"trainer.strategy={strategy}",)
        started = launch(place, processes, *arguments, *extra) if processes > 1 else [Child(place, *arguments)]
        until(lambda step=step: step_of(run) >= step, *started)
        for child in started:
            child.send(signal.SIGKILL)
        tally(what)
        ended(started)
        arguments = ("resume", str(RUN))
    finish(place, *arguments)
    for which in ("raw", "ema"):
        mine, theirs = (load_weights(checkpoints(folder)[-1], which) for folder in (run, whole))
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, atol=1e-5, rtol=1e-4)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 31))
    for _ in range(3):
        tally(what, held=True)


# --- under a launcher


def workers_of(pid: int) -> list[int]:
    """The processes of a launcher that train, when there are two."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = [int(child) for child in children if b"RANK=" in Path(f"/proc/{child}/environ").read_bytes()]
    return ranks if len(ranks) == 2 else []


LAUNCHERS = {
    "torchrun --max-restarts 1": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                                  "--max-restarts", "1", "-m", "distill"),
    "distill run --gpus 2": ("-m", "distill"),
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_death_of_one_under_a_launcher(
    launcher: str, job: tuple[str, ...], whole_of: Callable[[str], Path], place: Path, tally: Callable[..., None]
) -> None:
    whole, run = whole_of("ddp"), place / RUN
    gpus = ("--gpus", "2") if "--gpus" in launcher else ()
    with (place / "said").open("wb") as said:
        command = [sys.executable, *LAUNCHERS[launcher], *job, "trainer.strategy=ddp", *gpus]
        started = subprocess.Popen(command, cwd=place, stdout=said, stderr=said, env=environment())
    try:
        end = time.monotonic() + WAIT
        while step_of(run) < a_step(launcher) and time.monotonic() < end:
            assert started.poll() is None, (place / "said").read_text()
            time.sleep(0.01)
        os.kill(workers_of(started.pid)[1], signal.SIGKILL)
        tally(f"SIGKILL to one process of {launcher}")
        code = started.wait(WAIT)
    finally:
        started.kill()
        started.wait()
    text = (place / "said").read_text()
    if gpus:
        assert code == 1 and "was killed by SIGKILL" in text, text
        finish(place, "resume", str(RUN), processes=2)
    else:
        assert code == 0, text
    assert [path.name for path in (place / "runs").iterdir()] == ["faults"]
    same(run, whole)
    tally(f"SIGKILL to one process of {launcher}", held=True)
