"""A run folder: what is written when it is made, and what may be done in it."""

from __future__ import annotations

import fcntl
import json
import platform
import re
import secrets
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distill import __version__
from distill.atomic import clear, write_atomic
from distill.launch import launch_id
from distill.parallel import agreed, on_main
from distill.parts import Job, Objectives, RunError
from distill.recipe import Recipe, load
from distill.recipe_files import RecipeError
from distill.training.checkpoint import CHECKPOINTS
from teachers.errors import InputError
from teachers.velocity import Teacher

RESOLVED = "recipe.resolved.yaml"
PROVENANCE = "provenance.json"
_LIBRARIES = ("torch", "numpy", "safetensors", "pytorch-lightning", "webdataset", "omegaconf", "accelerate", "wandb")


def _provenance(job: Job, from_python: Sequence[str]) -> dict[str, Any]:
    versions = {"distill": __version__, "python": platform.python_version()}
    return {
        "command": _command(),
        "versions": versions | {name: metadata.version(name) for name in _LIBRARIES},
        "digests": job.identity,
        "id": secrets.token_hex(4),
        "launch": launch_id(),
        "from_python": list(from_python),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
    }  # fmt: skip


def _command() -> str:
    program = "distill" if _is_ours() else f"python {Path(sys.argv[0]).name}"
    return shlex.join([*program.split(), *sys.argv[1:]])


def _is_ours() -> bool:
    """Whether this process is the command `distill`, and not a program that calls us."""
    return Path(sys.argv[0]).name == "distill" or Path(sys.argv[0]).parts[-2:] == ("distill", "__main__.py")


def read_back(recipe: Recipe, teacher: Teacher | None, objectives: Objectives) -> Recipe:
    """A recipe as its run's recipe.resolved.yaml will give it, which must be the same: otherwise nobody could go on
    with what was trained. teacher: the one that is loaded, so that it is not again. Raises RunError."""
    remedy = (
        "so a run could not be resumed, evaluated or exported: use numbers, texts, true or false, lists of these and "
        "what a recipe can name, in fields that say so by their types"
    )
    try:
        again = load(RESOLVED, teacher=teacher, objectives=objectives, text=recipe.to_yaml(objectives))
    except RecipeError as error:
        said = "; ".join(f"{problem.key}: {problem.message}" for problem in error.problems)
        raise RunError(f"{said}; {remedy}") from None
    except InputError as error:
        raise RunError(f"{error}; {remedy}") from None
    for key, value, other in _differing(recipe, again):
        raise RunError(f"{key}: {value!r} is read back from its recipe as {other!r}; {remedy}")
    return again


def _differing(value: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys whose values differ, and both; a list is as good as a tuple, 1 as good as 1.0."""
    if is_dataclass(value) and type(value) is type(other):
        for name in [spec.name for spec in fields(value) if spec.init]:
            yield from _differing(getattr(value, name), getattr(other, name), f"{key}.{name}".strip("."))
    elif isinstance(value, list | tuple) and isinstance(other, list | tuple) and len(value) == len(other):
        for n, (mine, theirs) in enumerate(zip(value, other, strict=True)):
            yield from _differing(mine, theirs, f"{key}.{n}")
    elif value != other and not (value != value and other != other):  # NaN is itself
        yield key, value, other


def create_run(job: Job, given: bytes, from_python: Sequence[str]) -> None:
    """Make the folder runs/<name> of a checked job, or the first free runs/<name>-2, -3, ..."""

    def make() -> Path:
        folder = _new_folder(job.recipe.name, job.console)
        write_atomic(folder / "recipe.yaml", given)
        write_atomic(folder / PROVENANCE, json.dumps(_provenance(job, from_python), indent=1) + "\n")
        write_atomic(folder / RESOLVED, job.to_yaml())
        return folder

    job.folder = on_main(make)


def begun(job: Job) -> Path | None:
    """The run folder that this launch made for a job before it was started again, if it did."""
    name = re.compile(rf"{re.escape(job.recipe.name)}(-\d+)?")
    folders = [folder for folder in Path("runs").glob("*") if name.fullmatch(folder.name)]
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
        said = read_json(folder / PROVENANCE)
        ours = said.get("launch") == launch_id() and said.get("command") == _command() and (folder / RESOLVED).exists()
        # a command of ours is one run, whatever its recipe's file says by now; a program may make several
        if ours and (_is_ours() or _is_of(job, folder)):
            return folder
    return None


def _is_of(job: Job, folder: Path) -> bool:
    """Whether the run in `folder` has the recipe of a new job, whose streams of data may not be written out yet."""
    try:
        kept = load(folder / RESOLVED, teacher=job.teacher, objectives=job.objectives)
    except InputError:  # what it names is not there in this job
        return False
    return all(key.endswith(".streams") and ours is None for key, ours, _ in _differing(job.recipe, kept))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process may train in `folder`; the system takes the lock back from one that dies."""
    with (folder / PROVENANCE).open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another process is at work in it: wait for it, or stop it first") from None
        yield


@contextmanager
def held(job: Job) -> Iterator[Path | None]:
    """Inside, the run folder is this launch's alone, without what a kill left half-written. Yields the newest good
    checkpoint. Raises CheckpointError where there are others alone."""

    def tidy() -> Path | None:
        for left in (job.folder, job.folder / CHECKPOINTS, job.folder / "samples"):
            clear(left)
        return job.newest()

    agreed(job.strategy)  # raises for too many processes
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(locked(job.folder)))
        yield on_main(tidy)


def _new_folder(name: str, console: Console) -> Path:
    base = Path("runs")
    base.mkdir(exist_ok=True)
    number = 1
    while True:
        folder = base / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    if number > 1:
        console.print(f"{base / name} exists and stays as it is; this run is {folder}", markup=False, highlight=False)
    return folder


def open_run(
    folder: Path,
    console: Console,
    teacher: Teacher | None = None,
    objectives: Objectives | None = None,
    overrides: Sequence[str] = (),
) -> Job:
    """A job over an existing run folder. Raises RunError for another folder, or other data or teacher than it had."""
    for name in (RESOLVED, PROVENANCE):
        if not (folder / name).is_file():
            raise RunError(f"{folder}: not a run folder (no {name}); `distill run RECIPE` makes one under runs/")
    said = read_json(folder / PROVENANCE)
    try:
        from_python, digests = list(said["from_python"]), dict(said["digests"])
    except (KeyError, TypeError, ValueError):
        raise RunError(f"{folder / PROVENANCE}: damaged; restore it, or start a new run") from None
    passed = {"teacher": teacher, "objectives": objectives}
    if missing := [word for word in from_python if not passed[word]]:
        call = "".join(f", {word}=..." for word in from_python)
        raise RunError(
            f"{folder}: was started from Python with its own {' and '.join(missing)}: go on there, with "
            f"distill.resume({str(folder)!r}{call}), or evaluate and export of distill.job likewise"
        )
    recipe = load(folder / RESOLVED, overrides, teacher=teacher, objectives=objectives)
    job = Job(folder, recipe, teacher or (recipe.teacher.load() if recipe.teacher else None), console, objectives or {})
    for word in ("teacher", "data"):
        if job.identity[word] != digests.get(word):
            raise RunError(
                f"{folder}: its {word} had the digest {said['digests'][word]}, what is there now has "
                f"{job.identity[word]}: put the {word} back, or start a new run"
            )
    return job


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object, empty if there is no file. Raises RunError that names a damaged one."""
    # where a run came from cannot be made again, and without it the folder is none of a run
    remedy = "restore it, or start a new run" if file.name == PROVENANCE else "remove it to have it made again"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise RunError(f"{file}: not JSON ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise RunError(f"{file}: not a JSON object; {remedy}")
    return found
