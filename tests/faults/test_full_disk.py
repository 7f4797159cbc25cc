"""A disk that is really full, at each thing that a job writes; and on one process of several."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from breaking import COUNT, RUN, SEED, Child, at_once, ended, finish, hidden, launch, same
from helpers import checkpoints, verified

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PAGE = 4096
LATER = ("evaluation.json", "export", "report.html")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """`folder` is a disk of its own."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free: int) -> None:
    """Leave `free` bytes of the disk that `folder` is on."""
    pages = os.statvfs(folder).f_bavail - -(-free // PAGE)
    with (folder / "filler").open("wb") as file:
        file.write(b"x" * (pages * PAGE))


def taken(*paths: Path) -> int:
    """Bytes on the disk of files and folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(-(-max(file.stat().st_size, 1) // PAGE) * PAGE for file in files)


def permitted(folder: Path) -> bool:
    """Whether disks can be mounted here; where not, tests/test_checkpoint.py alone stands in."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
    if done.returncode:
        print("a disk cannot be mounted here")
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


FULL = {  # at what: what is missing of a finished run, and the file or folder that is named
    "metrics": ("checkpoints/step-00000030", "metrics.jsonl"),
    "a picture": ("checkpoints/step-00000030", "samples/step-00000030.png"),
    "a checkpoint": ("checkpoints/step-00000030", "checkpoints/step-00000030"),
    "the evaluation": ("evaluation.json", "evaluation.json"),
    "the export": ("export", "export"),
    "the report": ("report.html", "report.html"),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk(what: str, whole: Path, place: Path, tally: Callable[..., None]) -> None:
    if not permitted(place / "try"):
        return
    gone, named = FULL[what]
    run, newest = place / RUN, whole / "checkpoints" / "step-00000030"
    run.mkdir(parents=True)
    log, picture = taken(whole / "metrics.jsonl"), taken(whole / "samples/step-00000030.png")
    free = {
        "a picture": log + PAGE,
        "a checkpoint": log + picture + taken(newest) // 2,
        "the evaluation": taken(whole / "samples/teacher-student.png"),  # which is drawn first
    }.get(what, 0)
    with small_disk(run):
        shutil.copytree(whole, run, dirs_exist_ok=True)
        for name in (gone, *(LATER if gone.startswith("checkpoints") else LATER[LATER.index(gone) :])):
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        if gone not in ("export", "report.html"):
            (run / "samples/teacher-student.png").unlink()
        if gone.startswith("checkpoints"):
            (run / "samples/step-00000030.png").unlink()
        good = [verified(path) for path in checkpoints(run)]
        fill(run, free)
        tally(f"a full disk at {what}")
        child = Child(place, "resume", str(RUN))
        assert child.code() == 1, child.said()
        assert "No space left on device" in child.said() and str(RUN / named) in child.said()
        assert f"distill resume {RUN}" in child.said() and "Traceback" not in child.said()
        assert [verified(path) for path in checkpoints(run)] == good
        assert not hidden(run)
        (run / "filler").unlink()
        finish(place, "resume", str(RUN))
        same(run, whole)
    tally(f"a full disk at {what}", held=True)


def test_a_disk_that_is_full_at_any_moment(
    job: tuple[str, ...], whole: Path, tmp_path: Path, tally: Callable[..., None]
) -> None:
    if not permitted(tmp_path / "try"):
        return

    def one(number: int) -> None:
        folder = tmp_path / f"{number}"
        (folder / "runs").mkdir(parents=True)
        with small_disk(folder / "runs"):
            free = random.Random(f"{SEED}/{number}").randrange(int(1.2 * taken(whole)))
            _filled_and_resumed(folder, free, job, whole, tally)

    failed = [(n, error) for n, error in enumerate(at_once(one, range(COUNT))) if error]
    assert not failed, f"FAULTS_SEED={SEED}: {len(failed)} runs, the first {failed[0]}"


def _filled_and_resumed(folder: Path, free: int, job: tuple[str, ...], whole: Path, tally: Callable[..., None]) -> None:
    run, arguments = folder / RUN, ("resume", str(RUN))
    fill(folder / "runs", free)
    child = Child(folder, *job)
    code = child.code()
    if full := code != 0:
        tally("a full disk at a random moment")
        assert code == 1 and "No space left on device" in child.said() and "Traceback" not in child.said(), child.said()
    if run.exists():
        [verified(path) for path in run.glob("checkpoints/step-*")]  # all of them
        assert not hidden(run)
    (folder / "runs/filler").unlink()
    if not (run / "recipe.resolved.yaml").exists():
        arguments, run = (*job, "name=faults-again"), folder / "runs/faults-again"
    finish(folder, *arguments)
    same(run, whole)
    if full:
        tally("a full disk at a random moment", held=True)


def _no_more_after_two_checkpoints() -> None:
    """Plant: from the third checkpoint on process 1 cannot write files of more than a page."""
    if os.environ["RANK"] != "1":
        return
    from distill.training.callbacks import Checkpoints

    save = Checkpoints.save

    def limited(self: Any, trainer: Any, module: Any) -> None:
        if trainer.global_step > 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, resource.RLIM_INFINITY))
        save(self, trainer, module)

    Checkpoints.save = limited  # type: ignore[method-assign]


def test_a_disk_that_takes_no_more_on_one_process(
    job: tuple[str, ...], place: Path, tally: Callable[..., None]
) -> None:
    larger = ("student.network={name: mlp, width: 48, depth: 2}", "trainer.strategy=fsdp2", "trainer.steps=20")
    (place / "undisturbed").mkdir()
    finish(place / "undisturbed", *job, *larger, processes=2)
    started = launch(place, 2, *job, *larger, plant=_no_more_after_two_checkpoints)
    tally("a full disk on one process of fsdp2")
    assert ended(started) == [1, 1]
    said = started[1].said()
    assert f"{RUN}/checkpoints/step-00000018" in said and "File too large" in said, said
    assert "Traceback" not in said + started[0].said()
    run = place / RUN
    assert [verified(path) for path in checkpoints(run)] == [6, 12]
    assert not hidden(run)
    finish(place, "resume", str(RUN), processes=2)
    same(run, place / "undisturbed" / RUN)
    tally("a full disk on one process of fsdp2", held=True)
