"""Checkpoints that were damaged: passed over if there is an older one, never trusted, never deleted."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from breaking import RUN, SEED, Child, ended, finish, launch, same
from helpers import checkpoints, files, verified

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = ("student.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
SHARD = "student-00001-of-00002.safetensors"


def damage(file: Path, how: str) -> None:
    dice, content = random.Random(f"{SEED}/{file.name}/{how}"), bytearray(file.read_bytes())
    if how == "a missing file":
        file.unlink()
    elif how == "a cut file":
        file.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)


def copy(whole: Path, place: Path) -> Path:
    return Path(shutil.copytree(whole, place / RUN))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "a flipped bit") for name in (*FILES, SHARD)),
        *((name, how) for name in ("optimizer.safetensors", SHARD) for how in ("a cut file", "a missing file")),
    ],
)
def test_the_newest_is_damaged(
    name: str, how: str, whole: Path, whole_of: Callable[[str], Path], place: Path, tally: Callable[..., None]
) -> None:
    end = whole_of("fsdp2") if name == SHARD else whole
    run = copy(end, place)
    older, newest = checkpoints(run)
    damage(newest / name, how)
    tally(f"{how} in the newest checkpoint")
    said = finish(place, "resume", str(RUN), processes=2 if name == SHARD else 0)
    relative = newest.relative_to(place)
    assert f"passed over a checkpoint: {relative}" in said and f"continuing from {older.relative_to(place)}" in said
    same(run, end)
    assert all(verified(path) for path in checkpoints(run))
    tally(f"{how} in the newest checkpoint", held=True)


@pytest.mark.parametrize("processes", [0, 2])
def test_all_are_damaged(
    processes: int, whole: Path, whole_of: Callable[[str], Path], place: Path, tally: Callable[..., None]
) -> None:
    run = copy(whole_of("fsdp2") if processes else whole, place)
    damage(checkpoints(run)[0] / "state.json", "a cut file")
    damage(checkpoints(run)[1] / (SHARD if processes else FILES[0]), "a flipped bit")
    tally("all checkpoints damaged")
    before = files(run)
    started = launch(place, processes, "resume", str(RUN)) if processes else [Child(place, "resume", str(RUN))]
    assert ended(started) == [2] * len(started)
    said = " ".join(child.said() for child in started)
    assert "none of the checkpoints can be used" in said
    assert all(path.name in said for path in checkpoints(run))
    assert files(run) == before
    tally("all checkpoints damaged", held=True)


def test_what_is_not_of_this_run_is_left_alone(
    job: tuple[str, ...], whole: Path, place: Path, tally: Callable[..., None]
) -> None:
    """A checkpoint of another run, one without a manifest, files and a folder of the user's."""
    finish(place, *job, "name=other", "seed=1", "trainer.steps=1")
    run = copy(whole, place)
    folder = run / "checkpoints"
    shutil.rmtree(folder / "step-00000030")
    shutil.copytree(checkpoints(place / "runs" / "other")[0], folder / "step-00000001")
    shutil.copytree(folder / "step-00000024", folder / "step-00000002")
    (folder / "step-00000002" / "manifest.json").unlink()
    (folder / "best").mkdir()
    (folder / "best" / "weights.bin").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    tally("other files among the checkpoints", held=False)
    foreign = {name: content for name, content in files(folder).items() if not name.startswith("step-00000024")}
    settings = run / "recipe.resolved.yaml"
    settings.write_text(settings.read_text().replace("keep: 2", "keep: 1"))
    finish(place, "resume", str(RUN))
    assert {name: content for name, content in files(folder).items() if name in foreign} == foreign
    ours = {path.name for path in folder.iterdir()} - {name.partition("/")[0] for name in foreign}
    assert ours == {"step-00000030"}
    assert json.loads((folder / "step-00000030" / "manifest.json").read_text())["step"] == 30
    tally("other files among the checkpoints", held=True)
