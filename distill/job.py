"""What can be asked of a job: run it, continue it, evaluate, export or report it again, sample from it."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from distill import recipe_files
from distill.atomic import write_atomic
from distill.contradictions import contradictions
from distill.data.manifest import Manifest
from distill.data.pairs import PairsPlan, build_pairs
from distill.evaluation import pictures
from distill.evaluation.report import read_run
from distill.evaluation.report import report as html
from distill.export import load as load_export
from distill.launch import restarted, take_place
from distill.objectives import OBJECTIVES
from distill.parallel import agreed, device, is_main, most, on_main
from distill.parts import Job, Objectives, RunError
from distill.recipe import Recipe, load
from distill.rehearsal import rehearse
from distill.run_folder import RESOLVED, begun, create_run, held, open_run, read_back
from distill.stages import answering, export_run, finish, measure, measure_export, print_table, write_json
from distill.teacher_check import Verdict
from teachers.velocity import Teacher


def run(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    teacher: Teacher | None = None,
    objectives: Objectives | None = None,
) -> Path:
    """A whole job: checks the recipe, trains, evaluates, exports, reports; returns the run folder runs/<name>.

    recipe: a shipped name, a file or a `Recipe`. teacher: your own, instead of the recipe's. objectives: your own
    classes by the name that the recipe uses. Raises RecipeError, DataError or CheckpointError before anything is
    created; Diverged or Stopped leave a folder that `resume` continues. In each process of a launch by torchrun or
    SLURM: the same job over all of them, which a launch that was started again continues.
    """
    take_place()
    _check_list("overrides", overrides, "'key.path=value'")
    if objectives is not None and not isinstance(objectives, Mapping):
        raise RunError(f"objectives must map names to classes, got {type(objectives).__name__}")
    if teacher is not None and not isinstance(teacher, Teacher):
        raise RunError(
            f"teacher must be a teachers.Teacher, got {type(teacher).__name__}: wrap your velocity v(x_t, t, cond) as "
            "Teacher(velocity=v, space=DataSpace(shape=(1, 28, 28), classes=10, value_range=(-1, 1)))"
        )
    with answering() as signals:
        job, given = agreed(lambda: _new_job(recipe, overrides, teacher, objectives or {}))
        folder = on_main(lambda: begun(job)) if most(restarted()) else None
        if folder is None:
            rehearse(job)
            from_python = [word for word, own in (("teacher", teacher), ("objectives", job.objectives)) if own]
            create_run(job, given, from_python)
            with held(job) as newest:
                finish(job, signals, newest)
            return job.folder
    return resume(folder, teacher=teacher, objectives=job.objectives)


def _new_job(
    recipe: str | Path | Recipe, overrides: Sequence[str], teacher: Teacher | None, objectives: Objectives
) -> tuple[Job, bytes]:
    """A job without a folder, and its recipe as it was given."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise RunError("overrides change a recipe file; change a Recipe object with dataclasses.replace instead")
        sections = {spec.name: getattr(recipe, spec.name) for spec in fields(recipe)}
        if found := contradictions(sections, teacher):
            raise RunError("; ".join(f"{'.'.join(key)}: {text}" for key, text in found))
        loaded, given = recipe, None
    else:
        loaded = load(recipe, overrides, teacher=teacher, objectives=objectives)
        file = recipe_files.find(str(recipe))
        assert file is not None
        given = file.read_bytes()
    if teacher is not None:
        loaded = replace(loaded, teacher=None)
    kind = type(loaded.objective)
    if kind not in (*OBJECTIVES.values(), *objectives.values()):  # of a Recipe object
        objectives = {**objectives, kind.__name__: kind}
    own = teacher or (loaded.teacher.load() if loaded.teacher else None)
    job = Job(Path(), read_back(loaded, own, objectives), own, _console(), objectives)
    return job, job.to_yaml().encode() if given is None else given


def plan(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    measure: bool = False,
    step_seconds: float | None = None,
) -> None:
    """Print what a recipe's job takes of each of so many GPUs (by default one), before anything is allocated.

    measure: make a few real steps here too; step_seconds: of a step, to count the days with. Raises RecipeError,
    RunError, and what `distill.plan.make_plan` does.
    """
    from distill.one_step import one_step
    from distill.plan import make_plan, show

    _check_list("overrides", overrides, "'key.path=value'")
    for name, count in (("nodes", nodes), ("gpus", gpus), ("step-seconds", step_seconds)):
        if count is not None and count <= 0:
            raise RunError(f"--{name} must be above 0, got {count}")
    loaded, processes, measured = load(recipe, overrides), (nodes or 1) * (gpus or 1), None
    planned = make_plan(loaded, processes)
    if measure:
        job = Job(Path(), loaded, loaded.teacher.load() if loaded.teacher else None, _console())
        rehearse(job)
        with job.threads():
            measured = one_step(job, processes)
    show(planned, _console(), measured, step_seconds)


def resume(folder: str | Path, *, teacher: Teacher | None = None, objectives: Objectives | None = None) -> Path:
    """Continue a run exactly where its newest good checkpoint stands, then do what is left of its stages.

    A run started with your own teacher or objectives needs them again. Raises as `run`, and RunError.
    """
    take_place()
    with answering() as signals:
        job = agreed(lambda: open_run(Path(folder), _console(), teacher, objectives))
        with held(job) as newest:
            finish(job, signals, newest)
    return job.folder


def evaluate(
    folder: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    teacher: Teacher | None = None,
    objectives: Objectives | None = None,
) -> Path:
    """Measure a run's newest checkpoint, or an export by the recipe it carries; returns the JSON file written.

    out: by default RUN/evaluation.json, for an export evaluation.json in the working directory; a file that is named
    must not exist yet. `overrides` of the evaluation section change the protocol, so they need `out`. A run started
    with your own teacher or objectives needs them again. Spread over processes when launched by torchrun.
    """
    folder, console = Path(folder), _console()
    _check_list("overrides", overrides, "'key.path=value'")
    if foreign := [override for override in overrides if not override.startswith("evaluation.")]:
        raise RunError(f"{foreign[0]}: only keys of the section evaluation can be changed here")
    is_run = (folder / RESOLVED).exists()
    if out is None and is_run and overrides:
        raise RunError(
            f"{folder}: another protocol than the run's must not replace its evaluation.json: give --out FILE"
        )
    file = Path(out) if out is not None else folder / "evaluation.json" if is_run else Path("evaluation.json")
    if file.exists() and (out is not None or not is_run):
        raise RunError(f"{file}: exists; give another file with --out, or move it away")
    _check_parent(file)
    if is_run:
        job = open_run(folder, console, teacher, objectives, overrides)
        with job.threads():
            result = measure(job, *job.trained_student(on_main(job.trained)), job.folder)
    else:
        result = measure_export(folder, overrides, console, teacher, objectives)
    if is_main():
        write_json(file, result)
        print_table(result, console)
    return file


def export(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    teacher: Teacher | None = None,
    objectives: Objectives | None = None,
) -> Path:
    """Write the export of a run's newest checkpoint to RUN/export, or to `out`, which must not exist yet."""
    job = open_run(Path(folder), _console(), teacher, objectives)
    if out is not None and Path(out).exists():
        raise RunError(f"{out}: exists; name another folder, or move it away")
    return export_run(job, Path(out) if out else job.folder / "export")


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run to RUN/report.html, or of several to `out`, which must not exist yet."""
    _check_list("folders", folders, "run folders")
    if not folders:
        raise RunError("folders must be a list of at least one run folder, got none")
    for folder in map(Path, folders):
        if not (folder / "evaluation.json").is_file() or not (folder / RESOLVED).is_file():
            raise RunError(f"{folder}: not a run with an evaluation.json; finish it first: distill resume {folder}")
    if out is None and len(folders) > 1:
        raise RunError("a report of several runs needs --out FILE")
    if out is not None and Path(out).exists():
        raise RunError(f"{out}: exists; name another file, or move it away")
    file = Path(out) if out else Path(folders[0]) / "report.html"
    write_atomic(file, html([read_run(Path(folder)) for folder in folders]))
    return file


def sample(
    source: str | Path,
    out: str | Path,
    *,
    n: int,
    steps: int | None = None,
    seed: int = 0,
    label: int | None = None,
    embeddings: str | Path | None = None,
    gamma: float = 0.0,
    guidance: float | None = None,
) -> None:
    """Draw from the exported student of a run, or in an export folder, into `out`: a picture (.png) or array (.npy).

    embeddings: a safetensors file with what it is conditioned on, one row for all samples or n.
    """
    folder, out = Path(source), Path(out)
    if (folder / RESOLVED).exists():
        if not (folder / "export").exists():
            raise RunError(f"{folder}: nothing exported yet; finish it first: distill resume {folder}")
        folder = folder / "export"
    if embeddings is not None and not Path(embeddings).is_file():
        raise RunError(f"{embeddings}: no such file")
    _check_parent(out)
    student = load_export(folder, device())
    try:
        given: dict[str, Any] = {} if embeddings is None else load_file(embeddings)
        cond = given if label is None else {**given, "class": label}
        x = student.sample(n, steps, seed, cond or None, gamma=gamma, guidance=guidance).cpu()
    except (ValueError, SafetensorError) as error:
        raise RunError(f"{folder}: {error}") from None
    if out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, x.numpy())
        write_atomic(out, buffer.getvalue())
    else:
        write_atomic(out, pictures.grid(x, student.space))


def pairs(recipe: str | Path, folder: Path, plan: PairsPlan, shard_size: int | None = None) -> Manifest:
    """Write pairs (x_0, x_1) of a recipe's teacher, guided and on the path that it is distilled on, to `folder`."""
    loaded = load(recipe)
    if loaded.teacher is None:
        raise RunError(f"{recipe}: has no teacher to make pairs")
    job = Job(Path(), loaded, loaded.teacher.load(), _console())
    assert job.reference is not None
    job.reference.freeze()
    given = job.reader.digest if job.space.embeddings else None
    with job.threads():
        return build_pairs(folder, job.reference, plan, shard_size, job.reader.cond_for, given)


def check_teacher(recipe: str | Path, overrides: Sequence[str] = ()) -> Verdict:
    """Whether a recipe's teacher is the velocity of its data, on real samples of it; see `distill.teacher_check`."""
    _check_list("overrides", overrides, "'key.path=value'")
    loaded = load(recipe, overrides)
    if loaded.teacher is None or loaded.data is None:
        raise RunError(f"{recipe}: needs a teacher and data to be checked")
    job = Job(Path(), loaded, loaded.teacher.load(), _console())
    with job.threads():
        return job.check_teacher()


def _check_list(name: str, given: Sequence[str | Path], of: str) -> None:
    """A text is a sequence too, of letters."""
    if isinstance(given, (str, Path)):
        raise RunError(f"{name} must be a list of {of}, got the text {str(given)!r}")


def _check_parent(file: Path) -> None:
    """Before anything is made that would then be lost."""
    if not file.parent.is_dir():
        raise RunError(f"{file}: there is no folder {file.parent}; make it first")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100, quiet=not is_main())
