"""The Fashion-MNIST teacher over its steps and guidance scales: docs/results/teacher.json, for bench/results.py.

    python bench/teacher.py                     what is not there yet, or is of other samples, teacher or features
    python bench/teacher.py --student EXPORT    first a student that has the scale as its input
    python bench/teacher.py data.source=FOLDER evaluation.data.source=FOLDER    where the images lie elsewhere

Guided, a step is two network calls of the teacher and one of the student; a sample of each setting starts from the same
noise as in the other ones.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from objectives_report import rounded
from rich.console import Console

import distill
from distill.evaluation.features import load_features
from distill.evaluation.judge import Judge, like
from distill.evaluation.metrics import interval
from distill.guidance import Guidance
from distill.parallel import device
from distill.parts import Job
from distill.recipe import load
from distill.sampling import Samples, generate, teacher_generator
from distill.student import Student
from teachers.adapters.native import Native
from teachers.velocity import Teacher

FILE = Path(__file__).resolve().parents[1] / "docs" / "results" / "teacher.json"
SCALES, STEPS, STUDENT_STEPS = (1.0, 1.5, 2.0, 3.0), (1, 2, 4, 8, 16, 32, 100), (1, 2, 4, 8)
BATCH, SEED, AGAIN = 500, 0, 200


def of_teacher(teacher: Teacher, steps: int, samples: int, judge: Judge) -> dict[str, Any]:
    """The metrics of evaluation.json for a teacher in Euler steps."""
    made = generate(teacher_generator(teacher, steps), teacher.space, samples, BATCH, SEED, judge.conditions)
    return _metrics(made, steps * teacher.calls, judge)


def of_student(student: Student, steps: int, scale: float, samples: int, judge: Judge) -> dict[str, Any]:
    """The same for a student that is told the scale, which must be in its range."""
    x = student.sample(samples, steps, SEED, judge.conditions(0, samples), guidance=scale)
    return _metrics(Samples(x.cpu(), 0.0), steps, judge)


def _metrics(made: Samples, nfe: int, judge: Judge) -> dict[str, Any]:
    judged = judge(made)
    errors = judge.errors([judged.features], AGAIN)[0]
    return {"nfe": nfe, **judged.metrics, "interval": interval(judged.metrics["fd"] + errors)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The Fashion-MNIST teacher over steps and guidance scales.")
    parser.add_argument("--teacher", default="fashion", help="an export, or the shipped one")
    parser.add_argument("--student", help="the export of a student with the scale as its input: measured anew")
    parser.add_argument("--features", default="fashion", help="the teacher's classifier")
    parser.add_argument("--samples", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe teachers/fashion: its data")
    asked = parser.parse_args()

    teacher, features = Native(path=asked.teacher).load(), load_features(asked.features)
    teacher.freeze()
    teacher.to(device())
    job = Job(Path(), load("teachers/fashion", asked.overrides), None, Console())
    assert job.held_out is not None
    real = job.real_samples(job.held_out)
    judge = Judge(real, features, like(real, teacher.space))
    head = {"samples": asked.samples, "teacher": teacher.info["digest"], "features": features.digest,
            "floor": rounded(judge.floor(asked.samples, None)["fd"])}  # fmt: skip
    found = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    if {k: found.get(k) for k in head} != head:
        found = {**head, "runs": {}, "student": {}}
    asked.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(kind: str, name: str, result: dict[str, Any]) -> None:
        found[kind][name] = rounded(result)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
        print(kind, name, found[kind][name], flush=True)

    if asked.student:
        student = distill.load(asked.student, device())
        for scale, steps in product(SCALES, STUDENT_STEPS):
            keep("student", f"{scale:g} {steps}", of_student(student, steps, scale, asked.samples, judge))
    for scale, steps in product(SCALES, STEPS):
        if f"{scale:g} {steps}" not in found["runs"]:
            guided = teacher if scale == 1 else Guidance(scale=scale).guide(teacher)
            keep("runs", f"{scale:g} {steps}", of_teacher(guided, steps, asked.samples, judge))


if __name__ == "__main__":
    main()
