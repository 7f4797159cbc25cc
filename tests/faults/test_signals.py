"""Fifty runs, each stopped at random moments by SIGKILL, SIGTERM, SIGINT or SIGUSR1, end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breaking import COUNT, RUN, SEED, Child, at_once, finish, same, step_of, unhurried, until
from helpers import verified
from test_job import records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STEPS = 30


def test_any_signal_at_any_moment(
    job: tuple[str, ...], whole: Path, tmp_path: Path, tally: Callable[..., None]
) -> None:
    def one(number: int) -> None:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        _broken_and_resumed(number, folder, job, whole, tally)

    failed = [(n, error) for n, error in enumerate(at_once(one, range(COUNT))) if error]
    assert not failed, f"FAULTS_SEED={SEED}: {len(failed)} runs, the first {failed[0]}"


def _broken_and_resumed(
    number: int, folder: Path, job: tuple[str, ...], whole: Path, tally: Callable[..., None]
) -> None:
    dice = random.Random(f"{SEED}/{number}")
    run, arguments, broken = folder / RUN, job, []
    for stroke in range(dice.choice((1, 1, 2, 3))):
        kind = SIGNALS[(number + stroke) % len(SIGNALS)]
        child = Child(folder, *arguments)
        _wait_for_the_moment(dice, child, run)
        if child.send(kind):
            broken.append(kind)
            tally(f"{kind.name} at a random moment, one process")
        _check_how_it_stopped(child, kind, run)
        if (run / "recipe.resolved.yaml").exists():
            arguments = ("resume", str(run.relative_to(folder)))
        elif run.exists():  # killed before there was anything to resume
            arguments = (*job, f"name=faults-{stroke}")
            run = folder / "runs" / f"faults-{stroke}"
    finish(folder, *arguments)
    same(run, whole)
    for kind in broken:
        tally(f"{kind.name} at a random moment, one process", held=True)


def _wait_for_the_moment(dice: random.Random, child: Child, run: Path) -> None:
    """Within training, most of the time: at a random step, at a random time in it. Else anywhere, evaluation and
    export included."""
    if dice.random() < 0.7:
        step = dice.randrange(STEPS)
        until(lambda: step_of(run) > step or not child.running(), child)
        time.sleep(dice.random() * 0.1)
    else:
        time.sleep(dice.random() * 6)


def _check_how_it_stopped(child: Child, kind: signal.Signals, run: Path) -> None:
    code = child.code()
    if code == 0 or (code == 1 and "KeyboardInterrupt" in child.said()):  # it was done before, or Python was ending
        assert (run / "report.html").is_file(), child.said()
        return
    if kind == signal.SIGKILL:
        assert code == -kind, child.said()
        return
    assert "Traceback" not in child.said() or "KeyboardInterrupt" in child.said(), child.said()  # before it answers
    assert code in (128 + kind, -kind), f"{code}: {child.said()}"
    if code == 128 + kind and f"/{STEPS} " in child.said() and step_of(run) < STEPS:  # in training
        assert f"stopped by {kind.name}" in child.said() and "distill resume" in child.said()
        newest = max((run / "checkpoints").glob("step-*"))
        assert verified(newest) == step_of(run)


def _killed_while_deleting() -> None:
    """Plant: the process dies when of the first checkpoint to be deleted one file is."""
    rmtree = shutil.rmtree

    def half(path: Any, *args: Any, **kwargs: Any) -> None:
        if "step-" in Path(path).name and (manifest := Path(path) / "manifest.json").exists():
            manifest.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(path, *args, **kwargs)

    shutil.rmtree = half  # type: ignore[assignment]


def test_killed_while_an_old_checkpoint_is_deleted(
    job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]
) -> None:
    child = Child(place, *job, plant=_killed_while_deleting)
    assert child.code() == -signal.SIGKILL
    tally("SIGKILL while an old checkpoint is deleted")
    finish(place, "resume", str(RUN))
    same(place / RUN, whole)
    tally("SIGKILL while an old checkpoint is deleted", held=True)


def test_wandb_shows_one_curve(job: tuple[str, ...], place: Path, tally: Callable[..., None]) -> None:
    """Stopped and then killed: three records of one run, which hold every step as it was trained, but for what wandb
    had not written yet when it was killed."""
    home = {name: str(place / "home") for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    arguments, run = (*job, "tracking.wandb=offline"), place / RUN
    stopped: list[int] = []
    for kind, step in ((signal.SIGTERM, 8), (signal.SIGKILL, 17)):
        child = Child(place, *arguments, env=home, plant=unhurried)
        until(lambda step=step: step_of(run) >= step, child)
        child.send(kind)
        tally(f"{kind.name} with wandb offline")
        child.code()
        stopped.append(int(max(path.name for path in (run / "checkpoints").glob("step-*")).removeprefix("step-")))
        arguments = ("resume", str(RUN))
    child = Child(place, *arguments, env=home)
    assert child.code() == 0, child.said()
    found = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.parent.name)
    assert len(found) == 3
    ids, curve = set(), {}
    for file in found:
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if "loss" in row:
                curve[row["trainer/global_step"]] = row["loss"]
    assert ids == {json.loads((run / "provenance.json").read_text())["id"]}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert curve.items() <= {row["step"]: row["loss"] for row in rows if "loss" in row}.items()
    assert {*range(1, stopped[0] + 1), *range(stopped[1] + 1, STEPS + 1)} <= curve.keys()
    for kind in (signal.SIGTERM, signal.SIGKILL):
        tally(f"{kind.name} with wandb offline", held=True)


def test_killed_before_the_first_checkpoint(
    job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]
) -> None:
    child = Child(place, *job)
    until(lambda: step_of(place / RUN) >= 1, child)
    child.send(signal.SIGKILL)
    child.code()
    tally("SIGKILL before the first checkpoint")
    finish(place, "resume", str(RUN))
    same(place / RUN, whole)
    tally("SIGKILL before the first checkpoint", held=True)
