"""Teacher and student measured alike: the same noise, the same features, the same real data, one protocol.

The reference is the teacher with Euler in `reference_steps` uniform steps. The result becomes evaluation.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.atomic import write_atomic
from distill.evaluation.config import EvaluationConfig
from distill.evaluation.features import Features
from distill.evaluation.judge import Judge, Judged, like
from distill.evaluation.metrics import WIDEST, interval
from distill.flow_map import steps_refused
from distill.parallel import on_main
from distill.sampling import Conditions, Generator, Samples, generate, student_generator, teacher_generator
from distill.student import Student
from teachers.velocity import Teacher

FORMAT = 1


def evaluate(
    student: Student,
    teacher: Teacher | None,
    real: tuple[Tensor, Tensor | None] | None,
    features: Features | None,
    config: EvaluationConfig,
    *,
    weights: str,
    reference: str,
    trained_on: Tensor | None = None,
    kept: Path | None = None,
    conditions: Conditions | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """The content of evaluation.json: metrics of teacher and student, paired and against real data.

    real: samples ``[m, *shape]`` and labels of the data; without data the reference teacher's samples from other noise
    stand in. features: None compares samples as they are. conditions: of sample i, by default `like` the real ones.
    weights and reference (the data's digest) are recorded. trained_on: training data ``[k, *shape]``, if the real
    samples are others: judged as if they were samples. kept: a file where the reference teacher's samples are, or go.
    """
    conditions = conditions or like(real, student.space)
    make = partial(generate, space=student.space, n=config.samples, batch=config.batch, seed=config.seed,
                   conditions=conditions)  # fmt: skip
    _warm_up(student, teacher, partial(make, n=min(config.batch, config.samples)))
    if real is None:
        assert teacher is not None
        real = make(teacher_generator(teacher, config.reference_steps), seed=config.seed + 1).x, None
    judge = Judge(real, features, conditions)

    def judged(who: str, n: int, generator: Generator, file: Path | None = None) -> Judged:
        progress(f"{who}, {n} step{'s' if n > 1 else ''}")
        making = partial(make, generator)
        return judge(_kept(file, making, config.batch) if file else making())

    teachers: list[tuple[int, Judged]] = []
    if teacher is not None:
        for n in _teacher_steps(teacher, config):
            one = judged("teacher", n, teacher_generator(teacher, n), None if teachers else kept)
            teachers.append((n, one))
    able = student_steps(student, config.steps, config.reference_steps)
    students = {n: judged("student", n, student_generator(student, n)) for n in able}
    exact = None if teacher is None or teacher.flow_map is None else make(_exact(teacher)).x
    result = {
        "format": FORMAT,
        "protocol": _protocol(config, features, weights, reference, teacher),
        **_entries(teacher, teachers, students, exact, judge.floor(config.samples, trained_on)),
    }
    seen = [*(one for _, one in teachers), *students.values()]
    if config.bootstrap and seen[0].features.shape[1] <= WIDEST:
        progress("intervals")
        _add_intervals(result, judge.errors([one.features for one in seen], config.bootstrap))
    return result


def _warm_up(student: Student, teacher: Teacher | None, make: Callable[[Generator], Samples]) -> None:
    """First calls are slow."""
    make(student_generator(student, student_steps(student, (1,), 1)[0]))
    if teacher is not None:
        make(teacher_generator(teacher, 1))


def _entries(
    teacher: Teacher | None,
    teachers: Sequence[tuple[int, Judged]],
    students: Mapping[int, Judged],
    exact: Tensor | None,
    floor: Mapping[str, float],
) -> dict[str, Any]:
    """What was measured. teachers: with their steps, the reference first; students: by their steps."""
    best = teachers[0][1] if teachers else None
    entries: dict[str, Any] = {
        "teacher": None,
        "teacher_steps": {},
        "floor": floor,
        "student": {str(n): one.entry(n, best, exact) for n, one in students.items()},
        "gap": {},
        "speedup": {},
    }
    if teacher is not None and best is not None:
        (first, _), *others = teachers
        entry = partial(_of_teacher, teacher, exact=exact)
        entries["teacher"] = {"steps": first, **entry(first, best, None)}
        entries["teacher_steps"] = {str(n): entry(n, one, best) for n, one in others}
        entries |= _beside(best, students, floor)
    return entries


def _of_teacher(teacher: Teacher, n: int, judged: Judged, best: Judged | None, exact: Tensor | None) -> dict[str, Any]:
    solver = "own" if teacher.velocity is None else "euler"
    return {"solver": solver, **judged.entry(n * teacher.calls, best, exact)}


def _beside(best: Judged, students: Mapping[int, Judged], floor: Mapping[str, float]) -> dict[str, Any]:
    """What is said of each student beside the reference."""
    gap, speedup, own = {}, {}, best.metrics["fd"]
    for n, judged in students.items():
        fd = judged.metrics["fd"]
        gap[str(n)] = {"fd": _ratio(fd, own), "excess": _ratio(fd - floor["fd"], own - floor["fd"])}
        speedup[str(n)] = _ratio(best.samples.seconds_per_sample, judged.samples.seconds_per_sample)
    return {"gap": gap, "speedup": speedup}


def _add_intervals(result: dict[str, Any], errors: Tensor) -> None:
    """To each entry, and to each excess over the teacher's, what 95 % of drawing samples again give.

    errors: ``[entries, times]`` of the Frechet distances, in the order of the entries. Beside a teacher that may be
    at the floor, an excess has no upper bound, and no interval.
    """
    teacher, students = result["teacher"], result["student"]
    entries = [*([teacher] if teacher else []), *result["teacher_steps"].values(), *students.values()]
    again = [entry["metrics"]["fd"] + error for entry, error in zip(entries, errors, strict=True)]
    for entry, values in zip(entries, again, strict=True):
        entry["interval"] = {"fd": interval(values)}
    floor = result["floor"]["fd"]
    if teacher is None:
        return
    above = again[0] - floor
    for steps, values in zip(students, again[-len(students) :], strict=True):
        bounds = interval(torch.where(above > 0, (values - floor) / above, torch.inf))
        if math.isfinite(bounds[1]):
            result["gap"][steps]["interval"] = {"excess": bounds}


def _kept(file: Path, make: Callable[..., Samples], batch: int) -> Samples:
    """The samples in `file`, timed by making a batch of them; all made, and written there, if there are none."""

    def read() -> Tensor | None:
        try:
            with safe_open(file, "pt") as held:
                return cast(Tensor, held.get_tensor("x"))
        except (OSError, SafetensorError):
            return None  # missing or damaged

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, safetensors.torch.save({"x": samples.x}))

    if (found := on_main(read)) is not None:
        return Samples(found, make(n=min(batch, len(found))).seconds_per_sample)
    samples = make()
    on_main(write)
    return samples


def _teacher_steps(teacher: Teacher, config: EvaluationConfig) -> tuple[int, ...]:
    """The reference first; a generator of samples alone knows one step."""
    return (1,) if teacher.velocity is None else (config.reference_steps, *config.steps)


def student_steps(student: Student, steps: Iterable[int], reference_steps: int) -> list[int]:
    """The numbers of `steps` that the student can take; its own where that is none of them."""
    # a velocity is a teacher to be: it is judged at the reference's number of steps too
    extra = (reference_steps,) if student.kind == "velocity" else ()
    able = [n for n in dict.fromkeys((*steps, *extra)) if not steps_refused(student.kind, student.finest, n)]
    return able or [student.finest]


def _exact(teacher: Teacher) -> Generator:
    assert teacher.flow_map is not None
    exact, start = teacher.flow_map, teacher.path.start
    return lambda x_0, cond, fresh: exact(start(x_0), x_0.new_zeros(len(x_0)), x_0.new_ones(len(x_0)))


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None  # JSON has no infinity


def _protocol(
    config: EvaluationConfig, features: Features | None, weights: str, reference: str, teacher: Teacher | None
) -> dict[str, Any]:
    own = teacher is not None and teacher.velocity is None
    return {
        "features": "raw" if features is None else f"classifier {features.digest[:12]}",
        "reference": reference,
        "samples": config.samples,
        "seed": config.seed,
        "weights": weights,
        "batch": config.batch,
        "solver": "own" if own else "euler",
        "reference_steps": 1 if own else config.reference_steps,
    }


def main_numbers(result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """steps -> the metrics of the student, paired ones and gap included: what an export and a table say."""
    numbers = {}
    for steps, entry in result["student"].items():
        numbers[steps] = {**entry["metrics"], **entry["paired"]}
        if steps in result["gap"]:
            numbers[steps]["fd_over_teacher"] = result["gap"][steps]["fd"]
            numbers[steps]["speedup"] = result["speedup"][steps]
    return numbers
