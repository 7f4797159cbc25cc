"""The stages of a job over its run folder: train, evaluate, export, report. Each can be done again alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from distill.atomic import atomic_directory, write_atomic
from distill.evaluation import pictures
from distill.evaluation.config import EvaluationConfig
from distill.evaluation.evaluate import evaluate, main_numbers, student_steps
from distill.evaluation.report import LEGEND, PAIRS, WIDE, columns, read_run, report, rows, verdict
from distill.export import Facts, write
from distill.export import load as load_export
from distill.parallel import device, is_main, on_main
from distill.parts import Job, Objectives, RunError
from distill.recipe import load
from distill.rows import fresh_noise, noise
from distill.run_folder import PROVENANCE, read_json
from distill.sampling import teacher_generator
from distill.slurm import requeue
from distill.student import Student
from distill.training.checkpoint import prune
from distill.training.stops import Diverged, Signals, Stopped
from teachers.errors import InputError
from teachers.networks.converted import Converted
from teachers.networks.own import Own
from teachers.space import DataSpace, cond_on
from teachers.velocity import Teacher

_QUEUING = 5.0 if "SLURM_JOB_ID" in os.environ else 0.0
"""Seconds that the other processes stay while one queues the job again: srun ends all when one has ended."""


@contextmanager
def answering() -> Iterator[Signals]:
    """Inside, signals raise `Stopped`; on the one that SLURM sends before the time is up the job is queued again."""
    with Signals() as signals:
        try:
            yield signals
        except Stopped as stop:
            if stop.exit_code == 128 + signal.SIGUSR1:
                requeue() if is_main() else time.sleep(_QUEUING)
            raise


def finish(job: Job, signals: Signals, newest: Path | None) -> None:
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
    print_table(result, job.console)
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
        train(job, signals, newest)
    else:  # a kill may have come between a checkpoint and this
        on_main(lambda: prune(newest, job.recipe.trainer.keep, job.identity))
    result = on_main(lambda: _made(folder / "evaluation.json"))
    if result.get("step") != steps:
        student, step = job.trained_student(on_main(job.trained))
        result = measure(job, student, step, folder)
        draw(job, student, folder / PAIRS, job.recipe.evaluation.steps)
        on_main(lambda: write_json(folder / "evaluation.json", result))
    on_main(lambda: _deliver(job, steps))
    return result


def train(job: Job, signals: Signals, newest: Path | None) -> None:
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
        run_id=read_json(job.folder / PROVENANCE).get("id"),
        draw_samples=lambda student, file: draw(job, student, file, (1,)),
        signals=signals,
        console=job.console,
    )(newest)
    if strategy == "fsdp2" and own:
        job.load_teacher()  # what is left of the first one is shards


def _deliver(job: Job, steps: int) -> None:
    """The export, unless it is there already, and the report."""
    if _made(job.folder / "export" / "config.json").get("trained_on", {}).get("steps") != steps:
        export_run(job, job.folder / "export")
    write_atomic(job.folder / "report.html", report([read_run(job.folder)]))


def _made(file: Path) -> dict[str, Any]:
    """What a stage has left, empty if that is nothing or damaged: then the stage is done again."""
    try:
        return read_json(file)
    except RunError:
        return {}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_atomic(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def measure(job: Job, student: Student, step: int, home: Path) -> dict[str, Any]:
    with job.console.status("evaluating") as status:
        real, reference, trained_on = job.compared_with()
        result = evaluate(
            student,
            job.reference,
            real,
            job.features(home),
            job.recipe.evaluation,
            weights=job.recipe.export.weights,
            reference=reference,
            trained_on=trained_on,
            kept=job.kept_samples(),
            conditions=job.reader.cond_for if job.space.embeddings else None,
            progress=lambda what: status.update(f"evaluating: {what}"),
        )
    return {"format": result.pop("format"), "step": step, **result}


def measure_export(
    folder: Path,
    overrides: Sequence[str],
    console: Console,
    teacher: Teacher | None,
    objectives: Objectives | None,
) -> dict[str, Any]:
    """As `measure`, of an export, by the recipe it carries."""
    student = load_export(folder, device(), _module_of(teacher))
    text = str(student.config["recipe"])
    if not text.strip():
        raise RunError(f"{folder}: carries no recipe to be measured by: it was converted, not trained here")
    recipe = load(f"{folder / 'config.json'} (recipe)", overrides, teacher=teacher, objectives=objectives, text=text)
    job = Job(folder, recipe, teacher or (recipe.teacher.load() if recipe.teacher else None), console)
    if job.reference is not None:
        job.reference.to(device())
    home = Path(on_main(mkdtemp))
    try:
        with job.threads():
            return measure(job, student, student.config["trained_on"]["steps"], home)
    finally:
        if is_main():
            shutil.rmtree(home)


def _module_of(teacher: Teacher | None) -> nn.Module | None:
    """The module of a teacher that was made of one (`teachers.from_module`), of whose class its students are too."""
    network = teacher.network if teacher else None
    network = network.network if isinstance(network, Converted) else network
    return network.module if isinstance(network, Own) else None


def draw(job: Job, student: Student, file: Path, steps: Sequence[int]) -> dict[str, float]:
    """A picture of fixed noise: the teacher's samples and below them the student's in `steps` steps. Returns how far
    the student's first ones are from the teacher's, root mean square."""
    space = student.space
    n = 12 if space.is_image else _drawn(space)
    on = next(student.parameters()).device
    where = (job.recipe.evaluation.seed, 0, n, space.shape, on)
    x_0, fresh, cond = noise(*where), fresh_noise(*where), job.reader.cond_for(0, n)
    cond = cond_on(cond, on)
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


def export_run(job: Job, folder: Path) -> Path:
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
        count = _drawn(student.space)
        cond = job.reader.cond_for(0, count) if student.space.embeddings else None
        x = student.sample(count, steps=facts.steps[0], seed=recipe.evaluation.seed, cond=cond)
        (temporary / "samples.png").write_bytes(pictures.grid(x.cpu(), student.space))
    return folder


def _drawn(space: DataSpace) -> int:
    """How many samples a picture of them takes: a cloud of points many."""
    return 2000 if math.prod(space.shape) <= 2 else 32


def _recommended(student: Student, config: EvaluationConfig) -> tuple[int, ...]:
    """Numbers of steps for the export, the default first."""
    if student.kind == "velocity":
        return (config.reference_steps,)
    return tuple(student_steps(student, config.steps, config.reference_steps))


def print_table(result: Mapping[str, Any], console: Console) -> None:
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
