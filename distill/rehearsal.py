"""What can be found wrong with a job before anything is created: its teacher, its data, the device, one loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from distill.cautions import cautions
from distill.contradictions import remedy
from distill.data.loader import Loader
from distill.data.mixture import Mixed, Mixture
from distill.data.reader import ShardReader
from distill.data.shards import Shards
from distill.derivative import check
from distill.objectives.base import Draw, Loss, Objective
from distill.parallel import agreed, world
from distill.parts import Job, RunError
from distill.rows import Rows
from distill.teacher_check import TeacherError
from distill.training.precision import mixed


def rehearse(job: Job) -> None:
    """Raises InputError for what is wrong, the same on every process, and says what may be; fixes the number of streams
    of the job's data."""
    agreed(lambda: _rehearse(job))


def _rehearse(job: Job) -> None:
    for text in cautions(job.recipe, job.teacher):
        job.warn(text)
    if job.recipe.trainer.device == "cuda" and not torch.cuda.is_available():
        raise RunError("trainer.device is cuda, but torch sees no CUDA device here; set it to auto or cpu")
    _look_at_teacher(job)
    _look_at_data(job)
    trainer = job.recipe.trainer
    Loader(job.reader, 0, trainer.batch, world=world(), workers=getattr(job.recipe.data, "workers", 0))  # too many?
    job.strategy()
    _compare_teacher_with_data(job)
    _try_loss(job)


def _look_at_teacher(job: Job) -> None:
    if job.teacher is None:
        return
    assert job.reference is not None
    job.reference.freeze()
    try:
        json.dumps(dict(job.teacher.info))
    except TypeError as error:
        raise RunError(f"teacher: info must be plain values, since it goes into the export: {error}") from None
    if job.reader.space != job.teacher.space:
        raise RunError(f"data: {job.reader.space}; the teacher makes {job.teacher.space}: {remedy(job.teacher.space)}")


def _look_at_data(job: Job) -> None:
    reader = job.reader
    if isinstance(job.recipe.data, Shards | Mixture):
        assert isinstance(reader, ShardReader | Mixed)
        reader.look()
        reader.read_ahead()
        job.recipe = replace(job.recipe, data=job.recipe.data.resolved(cast(Any, reader)))
    if job.held_out is not None:
        job.held_out.look()
    if job.recipe.evaluation.features is not None:
        job.features(Path())


def _compare_teacher_with_data(job: Job) -> None:
    """Unless the data are pairs, which a teacher made and not the world."""
    teacher = job.teacher
    if teacher is None or teacher.velocity is None or job.recipe.data is None:
        return
    if next(job.reader.batches(job.recipe.seed, 1, 0)).x_0 is not None:
        return
    verdict = job.check_teacher()
    if verdict.wrong:
        raise TeacherError(f"teacher {teacher.info.get('id')}: {verdict.wrong}")
    if verdict.caution:
        job.warn(verdict.caution)


def _try_loss(job: Job) -> None:
    """On four rows, and with it the derivatives."""
    student, recipe, objective = job.new_student(), job.recipe, job.recipe.objective
    batch, rows = next(job.reader.batches(recipe.seed, 4, 0)), Rows(recipe.seed, "trial", 0, 0, 4)
    if recipe.guidance is not None:
        batch = replace(batch, cond=recipe.guidance.condition(batch.cond, rows))
    draw = objective.draw(batch, student.path, rows, 0)
    networks = {name: network.velocity for name, network in job.new_networks().items()}
    with mixed(recipe.trainer.precision, draw.x_s.device):
        _try_start(job, draw)
        if method := getattr(objective, "derivative", None):
            check(student, draw.x_s, draw.s, draw.t, draw.cond, draw.velocity_s, method)
        loss = cast(Any, objective).loss(student, student, job.reference, draw, **networks)
    if not isinstance(loss, Loss):
        raise RunError(
            f"objective {type(objective).__name__}: loss must return distill.Loss, got {type(loss).__name__}"
        )
    loss.check(4)
    _check_summands(objective, loss, draw)


def _try_start(job: Job, draw: Draw) -> None:
    """Raises RunError for a teacher that is not finite at the noise, where the samples it is compared by begin."""
    teacher = job.reference
    if teacher is None or teacher.velocity is None:
        return
    x_0 = Rows(job.recipe.seed, "trial start", 0, 0, len(draw.x_s)).normal(*draw.x_s.shape[1:]).to(draw.x_s)
    with torch.no_grad():
        v = teacher(teacher.path.start(x_0), torch.zeros_like(draw.s), draw.cond)
    if not v.isfinite().all():
        raise RunError(
            f"teacher {teacher.info.get('id')}: its velocity is not finite at t = 0, where sampling begins. If it is "
            "finite later, it comes from the noise or the score, which say nothing there: leave the noisiest part out "
            "(margin=1e-3 of teachers.Flow, or the path teachers.path.LinearFrom)"
        )


def _check_summands(objective: Objective, loss: Loss, draw: Draw) -> None:
    """Raises RunError for summands that learned weights do not know, and for such as are not finite where the points
    are."""
    name, found = f"objective {type(objective).__name__}", loss.summands
    if objective.weight.learned != "none" and found.keys() != set(objective.terms):
        raise RunError(
            f"{name}: its loss has the summands {', '.join(found)}, its terms are {', '.join(objective.terms)}: return "
            "from terms what the loss has"
        )
    points = torch.isfinite(draw.x_s).flatten(1).all(1)
    for summand, value in found.items():
        for row in torch.nonzero(points & ~torch.isfinite(value)).flatten().tolist()[:1]:
            raise RunError(
                f"{name}: before the first step {summand} is {value[row].item()} for a sample from s = "
                f"{draw.s[row].item():g} to t = {draw.t[row].item():g}: the teacher's velocity or the student is not "
                "finite on the way. At t = 1 neither need be (paths vp and linear_vp, networks that predict the data): "
                "choose a solver that asks nothing there, midpoint or euler, or times below 1"
            )
