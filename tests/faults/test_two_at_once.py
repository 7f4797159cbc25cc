"""Two launches in one run folder, or two of the same recipe at the same moment."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from breaking import RUN, Child, ended, finish, launch, same, step_of, until
from helpers import files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("stage", ["training", "evaluation"])
def test_the_second_is_refused(
    stage: str, job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]
) -> None:
    run = place / RUN
    first = Child(place, *job)
    done = run / "checkpoints" / "step-00000030" / "manifest.json"
    until(done.exists if stage == "evaluation" else lambda: step_of(run) >= 8, first)
    first.send(signal.SIGSTOP)  # it stays where it is, and holds what it holds
    before = files(run)
    assert "evaluation.json" not in before
    for arguments in (("resume", str(RUN)), ("resume", str(RUN), "--gpus", "2")):
        tally(f"a second resume during {stage}")
        second = Child(place, *arguments, said="second")
        assert second.code() == 2
        assert f"{RUN}: another process is at work in it" in second.said() and "Traceback" not in second.said()
        assert files(run) == before
    first.send(signal.SIGCONT)
    assert first.code() == 0, first.said()
    same(run, whole)
    for _ in range(2):
        tally(f"a second resume during {stage}", held=True)


def test_a_launch_of_several_holds_the_folder_too(
    job: tuple[str, ...], whole_of: Callable[[str], Path], place: Path, tally: Callable[..., None]
) -> None:
    whole, run = whole_of("ddp"), place / RUN
    first = launch(place, 2, *job, "trainer.strategy=ddp")
    until(lambda: step_of(run) >= 8, *first)
    for child in first:
        child.send(signal.SIGSTOP)
    tally("a second resume during training")
    second = launch(place, 2, "resume", str(RUN))
    assert ended(second) == [2, 2]
    for child in first:
        child.send(signal.SIGCONT)
    assert ended(first) == [0, 0]
    same(run, whole)
    tally("a second resume during training", held=True)


def test_two_of_a_recipe_get_two_folders(
    job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]
) -> None:
    started = [Child(place, *job, said=f"said-{n}") for n in range(2)]
    tally("two runs of a recipe at once")
    assert ended(started) == [0, 0]
    assert {path.name for path in (place / "runs").iterdir()} == {"faults", "faults-2"}
    for name in ("faults", "faults-2"):
        same(place / "runs" / name, whole)
    tally("two runs of a recipe at once", held=True)
    finish(place, "resume", str(RUN))  # nothing is left locked
