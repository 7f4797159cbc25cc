"""The stages of a job over its run folder: train, evaluate, export, report. Each can be run again alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from distill import recipe_files
from distill.atomic import atomic_directory, clear, write_atomic
from distill.contradictions import contradictions
from distill.data.manifest import Manifest
from distill.data.pairs import PairsPlan, build_pairs
from distill.evaluation import pictures
from distill.evaluation.config import EvaluationConfig
from distill.evaluation.evaluate import evaluate as measure
from distill.evaluation.evaluate import main_numbers, student_steps
from distill.evaluation.report import LEGEND, PAIRS, WIDE, columns, read_run, rows, verdict
from distill.evaluation.report import report as html
from distill.export import Facts, write
from distill.export import load as load_export
from distill.launch import requeue, restarted, take_place
from distill.parallel import agreed, device, is_main, most, on_main
from distill.recipe import Recipe, load
from distill.rows import fresh_noise, noise
from distill.run_folder import RESOLVED, Job, Objectives, RunError, begun, create_run, locked, open_run, read_json
from distill.sampling import teacher_generator
from distill.student import Student
from distill.teacher_check import Verdict
from distill.training.checkpoint import CHECKPOINTS, prune
from distill.training.stops import Diverged, Signals, Stopped
from teachers.errors import InputError
from teachers.networks.converted import Converted
from teachers.networks.own import Own
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
    if isinstance(overrides, str):
        raise RunError(f"overrides must be a list of 'key.path=value', got the text {overrides!r}")
    if objectives is not None and not isinstance(objectives, Mapping):
        raise RunError(f"objectives must map names to classes, got {type(objectives).__name__}")
    if teacher is not None and not isinstance(teacher, Teacher):
        raise RunError(
            f"teacher must be a teachers.Teacher, got {type(teacher).__name__}: wrap your velocity v(x_t, t, cond) as "
            "Teacher(velocity=v, space=DataSpace(shape=(1, 28, 28), classes=10, value_range=(-1, 1)))"
        )
    with _answering() as signals:
        job, given = agreed(lambda: _new_job(recipe, overrides, teacher, objectives or {}))
        folder = on_main(lambda: begun(job.recipe.name)) if most(restarted()) else None
        if folder is None:
            job.rehearse()
            from_python = [word for word, passed in (("teacher", teacher), ("objectives", objectives)) if passed]
            create_run(job, given, from_python)
            with _held(job) as newest:
                _stages(job, signals, newest)
            return job.folder
    return resume(folder, teacher=teacher, objectives=objectives)


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
        loaded, given = recipe, recipe.to_yaml(objectives).encode()
    else:
        loaded = load(recipe, overrides, teacher=teacher, objectives=objectives)
        file = recipe_files.find(str(recipe))
        assert file is not None
        given = file.read_bytes()
    if teacher is not None:
        loaded = replace(loaded, teacher=None)
    own = teacher or (loaded.teacher.load() if loaded.teacher else None)
    return Job(Path(), loaded, own, _console(), objectives), given


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

    for name, count in (("nodes", nodes), ("gpus", gpus), ("step-seconds", step_seconds)):
        if count is not None and count <= 0:
            raise RunError(f"--{name} must be above 0, got {count}")
    loaded, processes, measured = load(recipe, overrides), (nodes or 1) * (gpus or 1), None
    planned = make_plan(loaded, processes)
    if measure:
        job = Job(Path(), loaded, loaded.teacher.load() if loaded.teacher else None, _console())
        job.rehearse()
        with job.threads():
            measured = one_step(job, processes)
    show(planned, _console(), measured, step_seconds)


def resume(folder: str | Path, *, teacher: Teacher | None = None, objectives: Objectives | None = None) -> Path:
    """Continue a run exactly where its newest good checkpoint stands, then do what is left of its stages.

    A run started with your own teacher or objectives needs them again. Raises as `run`, and RunError.
    """
    take_place()
    with _answering() as signals:
        job = agreed(lambda: open_run(Path(folder), _console(), teacher, objectives))
        with _held(job) as newest:
            _stages(job, signals, newest)
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
    if is_run:
        job = open_run(folder, console, teacher, objectives, overrides)
        with job.threads():
            result = _measure(job, *job.trained_student(on_main(job.trained)), job.folder)
    else:
        result = _evaluate_export(folder, overrides, console, teacher, objectives)
    if is_main():
        _write_json(file, result)
        _print_table(result, console)
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
    return _export(job, Path(out) if out else job.folder / "export")


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run to RUN/report.html, or of several to `out`, which must not exist yet."""
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
    out: Path,
    *,
    n: int,
    steps: int | None = None,
    seed: int = 0,
    label: int | None = None,
    embeddings: Path | None = None,
    gamma: float = 0.0,
    guidance: float | None = None,
) -> None:
    """Draw from the exported student of a run, or in an export folder, into `out`: a picture (.png) or array (.npy).

    embeddings: a safetensors file with what it is conditioned on, one row for all samples or n.
    """
    folder = Path(source)
    if (folder / RESOLVED).exists():
        if not (folder / "export").exists():
            raise RunError(f"{folder}: nothing exported yet; finish it first: distill resume {folder}")
        folder = folder / "export"
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
    with job.threads():
        return build_pairs(folder, job.reference, plan, shard_size, job.reader.cond_for)


def check_teacher(recipe: str | Path, overrides: Sequence[str] = ()) -> Verdict:
    """Whether a recipe's teacher is the velocity of its data, on real samples of it; see `distill.teacher_check`."""
    loaded = load(recipe, overrides)
    if loaded.teacher is None or loaded.data is None:
        raise RunError(f"{recipe}: needs a teacher and data to be checked")
    job = Job(Path(), loaded, loaded.teacher.load(), _console())
    with job.threads():
        return job.check_teacher()


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100, quiet=not is_main())


@contextmanager
def _held(job: Job) -> Iterator[Path | None]:
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


@contextmanager
def _answering() -> Iterator[Signals]:
    """Inside, signals raise `Stopped`; on the one that SLURM sends before the time is up the job is queued again."""
    with Signals() as signals:
        try:
            yield signals
        except Stopped as stop:
            if stop.exit_code == 128 + signal.SIGUSR1:
                requeue() if is_main() else time.sleep(_QUEUING)
            raise


_QUEUING = 5.0 if "SLURM_JOB_ID" in os.environ else 0.0
"""Seconds that the other processes stay while one queues the job again: srun ends all when one has ended."""


def _stages(job: Job, signals: Signals, newest: Path | None) -> None:
    """Train, evaluate, export and report, leaving out what is done."""
    folder = job.folder
    try:
        with job.threads():
            result = _run_stages(job, signals, newest)
    except Stopped as stop:
        stop.add_note(f"continue with: distill resume {folder}")
        raise
    except Diverged as error:
        error.add_note(f"what came before is in {folder}; a lower trainer.lr or clip often helps, in a new run")
        raise
    except InputError as error:
        error.started = True
        raise
    except OSError as error:
        error.add_note(f"nothing half-written was left; mend it, then: distill resume {folder}")
        raise
    _print_table(result, job.console)
    for word, name in (
        ("export", "export"),
        ("report", "report.html"),
        ("pictures", "samples"),
        ("metrics", "metrics.jsonl"),
    ):
        job.console.print(f"{word:9} {folder / name}", markup=False, highlight=False)


def _run_stages(job: Job, signals: Signals, newest: Path | None) -> dict[str, Any]:
    folder, steps = job.folder, job.recipe.trainer.steps
    if newest is None or newest.name != f"step-{steps:08d}":
        _train(job, signals, newest)
    else:  # a kill may have come between a checkpoint and this
        on_main(lambda: prune(newest, job.recipe.trainer.keep, job.identity))
    result = on_main(lambda: _made(folder / "evaluation.json"))
    if result.get("step") != steps:
        student, step = job.trained_student(on_main(job.trained))
        result = _measure(job, student, step, folder)
        _draw(job, student, folder / PAIRS, job.recipe.evaluation.steps)
        on_main(lambda: _write_json(folder / "evaluation.json", result))
    on_main(lambda: _deliver(job, steps))
    return result


def _train(job: Job, signals: Signals, newest: Path | None) -> None:
    from distill.training.fit import Fit  # Lightning: not needed to evaluate, export or report

    strategy = job.strategy()
    own = job.recipe.teacher is not None
    Fit(
        folder=job.folder,
        student=job.new_student,
        objective=job.recipe.objective,
        networks=job.new_networks,
        guidance=job.recipe.guidance,
        teacher=job.reference,
        own_teacher=own,
        reader=job.reader,
        workers=getattr(job.recipe.data, "workers", 0),
        seed=job.recipe.seed,
        trainer=job.recipe.trainer,
        strategy=strategy,
        tracking=job.recipe.tracking,
        identity=job.identity,
        params=yaml.safe_load(job.to_yaml()),
        run_id=read_json(job.folder / "provenance.json").get("id"),
        draw_samples=lambda student, file: _draw(job, student, file, (1,)),
        signals=signals,
        console=job.console,
    )(newest)
    if strategy == "fsdp2" and own:
        job.load_teacher()  # what is left of the first one is shards


def _deliver(job: Job, steps: int) -> None:
    """The export, unless it is there already, and the report."""
    if _made(job.folder / "export" / "config.json").get("trained_on", {}).get("steps") != steps:
        _export(job, job.folder / "export")
    write_atomic(job.folder / "report.html", html([read_run(job.folder)]))


def _made(file: Path) -> dict[str, Any]:
    """What a stage has left, empty if that is nothing or damaged: then the stage is done again."""
    try:
        return read_json(file)
    except RunError:
        return {}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomic(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _measure(job: Job, student: Student, step: int, home: Path) -> dict[str, Any]:
    with job.console.status("evaluating") as status:
        real, reference, trained_on = job.compared_with()
        result = measure(
            student,
            job.reference,
            real,
            job.features(home),
            job.recipe.evaluation,
            weights=job.recipe.export.weights,
            reference=reference,
            trained_on=trained_on,
            kept=job.kept_samples(),
            conditions=job.reader.cond_for,
            progress=lambda what: status.update(f"evaluating: {what}"),
        )
    return {"format": result.pop("format"), "step": step, **result}


def _module_of(teacher: Teacher | None) -> nn.Module | None:
    """The module of a teacher that was made of one (`teachers.from_module`), of whose class its students are too."""
    network = teacher.network if teacher else None
    network = network.network if isinstance(network, Converted) else network
    return network.module if isinstance(network, Own) else None


def _evaluate_export(
    folder: Path,
    overrides: Sequence[str],
    console: Console,
    teacher: Teacher | None,
    objectives: Objectives | None,
) -> dict[str, Any]:
    student = load_export(folder, device(), _module_of(teacher))
    text = str(student.config["recipe"])
    recipe = load(f"{folder / 'config.json'} (recipe)", overrides, teacher=teacher, objectives=objectives, text=text)
    job = Job(folder, recipe, teacher or (recipe.teacher.load() if recipe.teacher else None), console)
    if job.reference is not None:
        job.reference.to(device())
    home = Path(on_main(mkdtemp))
    try:
        with job.threads():
            return _measure(job, student, student.config["trained_on"]["steps"], home)
    finally:
        if is_main():
            shutil.rmtree(home)


def _draw(job: Job, student: Student, file: Path, steps: Sequence[int]) -> dict[str, float]:
    """A picture of fixed noise: the teacher's samples and below them the student's in `steps` steps. Returns how far
    the student's first ones are from the teacher's, root mean square."""
    space = student.space
    n = 12 if space.is_image else 2000
    on = next(student.parameters()).device
    where = (job.recipe.evaluation.seed, 0, n, space.shape, on)
    x_0, fresh, cond = noise(*where), fresh_noise(*where), job.reader.cond_for(0, n)
    cond = None if cond is None else {k: v.to(on) for k, v in cond.items()}
    made = {}
    with torch.no_grad():
        if job.reference is not None:
            reference = job.recipe.evaluation.reference_steps
            name = f"teacher, {reference} steps" if job.reference.velocity else "teacher"
            made[name] = teacher_generator(job.reference, reference)(x_0, cond, fresh)
        for count in student_steps(student, steps, job.recipe.evaluation.reference_steps):
            made[f"student, {count} step{'s' if count > 1 else ''}"] = student.generate(x_0, count, cond, fresh=fresh)
    if is_main():
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, pictures.compare({name: x.cpu() for name, x in made.items()}, space))
    if job.reference is None or len(made) < 2:
        return {}
    theirs, own = [space.clamp(x) for x in made.values()][:2]
    return {"rmse_to_teacher": float((own - theirs).square().mean().sqrt())}


def _export(job: Job, folder: Path) -> Path:
    recipe, teacher = job.recipe, job.reference
    student, step = job.trained_student(job.trained())
    result = _made(job.folder / "evaluation.json")
    numbers = main_numbers(result) if result.get("step") == step else {}
    own = teacher.info.get("licence") if teacher else None
    source = getattr(getattr(job.reader, "manifest", None), "source", {})
    facts = Facts(
        name=job.folder.resolve().name,
        network=job.network,
        steps=_recommended(student, recipe.evaluation),
        teacher=dict(teacher.info) if teacher else None,
        licence=str(recipe.export.licence or own or "unknown"),
        trained_on={"steps": step, "batch": recipe.trainer.batch, "weights": recipe.export.weights,
                    "data": job.reader.digest, **source},
        metrics=numbers,
        recipe=job.to_yaml(),
    )  # fmt: skip
    with atomic_directory(folder) as temporary:
        write(temporary, student, student.state_dict(), facts)
        count = 32 if student.space.is_image else 2000
        cond = job.reader.cond_for(0, count) if student.space.embeddings else None
        x = student.cpu().sample(count, steps=facts.steps[0], seed=recipe.evaluation.seed, cond=cond)
        (temporary / "samples.png").write_bytes(pictures.grid(x, student.space))
    return folder


def _recommended(student: Student, config: EvaluationConfig) -> tuple[int, ...]:
    """Numbers of steps for the export, the default first."""
    if student.kind == "velocity":
        return (config.reference_steps,)
    return tuple(student_steps(student, config.steps, config.reference_steps))


def _print_table(result: Mapping[str, Any], console: Console) -> None:
    table = rows(result)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = [name for name in columns(table) if name not in WIDE]
    for name in names:
        shown.add_column(name, justify="left" if name == "model" else "right")
    for row in table:
        shown.add_row(*[row.get(name, "") for name in names])
    console.print(shown)
    floor = f"real data against real data: fd {result['floor']['fd']:.3g}. {LEGEND}"
    console.print(floor, style="dim", markup=False, highlight=False)
    console.print(verdict(result), markup=False, highlight=False)
