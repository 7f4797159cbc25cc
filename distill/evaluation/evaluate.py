"""Teacher and student measured alike: the same noise, the same features, the same real data, one protocol.

The reference is the teacher with Euler in `reference_steps` uniform steps. The result becomes evaluation.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from distill.evaluation.config import EvaluationConfig
from distill.evaluation.features import Features
from distill.evaluation.metrics import agreement, frechet_distance, frechet_floor, rmse, sliced_wasserstein
from distill.flow_map import check_steps
from distill.sampling import Conditions, Generator, Samples, generate, teacher_generator
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
    conditions: Conditions | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """The content of evaluation.json: metrics of teacher and student, paired and against real data.

    real: samples ``[m, *shape]`` and labels of the data; without data the reference teacher's samples from other noise
    stand in. features: None compares samples as they are. conditions: of sample i, by default the classes in turn.
    weights and reference (the data's digest) are recorded.
    """
    space = student.space
    conditions = conditions or space.cond_for
    make = partial(generate, space=space, n=config.samples, batch=config.batch, seed=config.seed, conditions=conditions)
    for warm in (
        _steps(student, student_steps(student, (1,), 1)[0]),
        *([teacher_generator(teacher, 1)] if teacher else []),
    ):  # first calls are slow
        generate(warm, space, min(config.batch, config.samples), config.batch, config.seed, conditions)
    if real is None:
        assert teacher is not None
        other = make(teacher_generator(teacher, config.reference_steps), seed=config.seed + 1)
        real = (other.x, None)
    judge = _Judge(real[0], features, conditions)
    result: dict[str, Any] = {"format": FORMAT, "protocol": _protocol(config, features, weights, reference)}
    result["protocol"] |= {} if teacher is None or teacher.velocity else {"solver": "own", "reference_steps": 1}
    result |= {"teacher": None, "teacher_steps": {}, "floor": judge.floor(config)}
    result |= {"student": {}, "gap": {}, "speedup": {}}
    exact = None if teacher is None or teacher.flow_map is None else make(_exact(teacher)).x
    best: _Judged | None = None
    if teacher is not None:
        for n in _teacher_steps(teacher, config):
            progress(f"teacher, {_steps_in_words(n)}")
            judged = judge(make(teacher_generator(teacher, n)))
            entry = {"solver": _solver(teacher), **judged.entry(n * teacher.calls, best, exact)}
            if best is None:
                best, result["teacher"] = judged, {"steps": n, **entry}
            else:
                result["teacher_steps"][str(n)] = entry
    for n in student_steps(student, config.steps, config.reference_steps):
        progress(f"student, {_steps_in_words(n)}")
        judged = judge(make(_steps(student, n)))
        result["student"][str(n)] = judged.entry(n, best, exact)
        if best is not None:
            result["gap"][str(n)] = {"fd": _ratio(judged.metrics["fd"], best.metrics["fd"])}
            result["speedup"][str(n)] = _ratio(best.samples.seconds_per_sample, judged.samples.seconds_per_sample)
    return result


def _teacher_steps(teacher: Teacher, config: EvaluationConfig) -> tuple[int, ...]:
    """The reference first; a generator of samples alone knows one step."""
    return (1,) if teacher.velocity is None else (config.reference_steps, *config.steps)


def _solver(teacher: Teacher) -> str:
    return "own" if teacher.velocity is None else "euler"


def _steps_in_words(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


def student_steps(student: Student, steps: Iterable[int], reference_steps: int) -> list[int]:
    """The numbers of `steps` that the student can take; its own where that is none of them."""
    # a velocity is a teacher to be: it is judged at the reference's number of steps too
    extra = (reference_steps,) if student.kind == "velocity" else ()
    able = [n for n in dict.fromkeys((*steps, *extra)) if _takes(student, n)]
    return able or [student.finest]


def _takes(student: Student, n: int) -> bool:
    try:
        check_steps(student.kind, student.finest, n)
    except ValueError:
        return False
    return True


def _steps(student: Student, n: int) -> Generator:
    return lambda x_0, cond, fresh: student.generate(x_0, n, cond, fresh=fresh)


def _exact(teacher: Teacher) -> Generator:
    assert teacher.flow_map is not None
    exact, start = teacher.flow_map, teacher.path.start
    return lambda x_0, cond, fresh: exact(start(x_0), x_0.new_zeros(len(x_0)), x_0.new_ones(len(x_0)))


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None  # JSON has no infinity


def _protocol(config: EvaluationConfig, features: Features | None, weights: str, reference: str) -> dict[str, Any]:
    return {
        "features": "raw" if features is None else f"classifier {features.digest[:12]}",
        "reference": reference,
        "samples": config.samples,
        "seed": config.seed,
        "weights": weights,
        "batch": config.batch,
        "solver": "euler",
        "reference_steps": config.reference_steps,
    }


@dataclass(frozen=True)
class _Judged:
    """Samples, the classes that the classifier sees in them, and their distances to the real data."""

    samples: Samples
    classes: Tensor | None
    metrics: dict[str, float]

    def entry(self, nfe: int, reference: _Judged | None, exact: Tensor | None) -> dict[str, Any]:
        """An entry of evaluation.json; `paired` are comparisons with what the same noise gives elsewhere."""
        paired = {}
        if reference is not None:
            paired["endpoint_rmse"] = rmse(self.samples.x, reference.samples.x)
            if self.classes is not None and reference.classes is not None:
                paired["class_agreement"] = agreement(self.classes, reference.classes)
        if exact is not None:
            paired["exact_rmse"] = rmse(self.samples.x, exact)
        seconds = self.samples.seconds_per_sample
        return {"nfe": nfe, "metrics": self.metrics, "paired": paired, "seconds_per_sample": seconds}


class _Judge:
    """Compares samples with the real data, in features where there are any."""

    def __init__(self, real: Tensor, features: Features | None, conditions: Conditions) -> None:
        self._real, self._features, self._conditions = real, features, conditions
        self._real_features = self._of(real)[0]

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (x.flatten(1), None) if self._features is None else self._features(x)

    def __call__(self, samples: Samples) -> _Judged:
        features, classes = self._of(samples.x)
        metrics = {
            "fd": frechet_distance(features, self._real_features),
            "sw2": sliced_wasserstein(samples.x, self._real),
        }
        asked = self._conditions(0, len(samples.x)) if classes is not None else None
        if classes is not None and asked is not None and "class" in asked:
            metrics["label_accuracy"] = agreement(classes, asked["class"])
        return _Judged(samples, classes, metrics)

    def floor(self, config: EvaluationConfig) -> dict[str, float]:
        """Real against real: scaled to the sizes in use, and as measured on its halves."""
        halves, scaled = frechet_floor(self._real_features, config.samples)
        return {"fd": scaled, "fd_halves": halves}


def main_numbers(result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """steps -> the metrics of the student, paired ones and gap included: what an export and a table say."""
    numbers = {}
    for steps, entry in result["student"].items():
        numbers[steps] = {**entry["metrics"], **entry["paired"]}
        if steps in result["gap"]:
            numbers[steps]["fd_over_teacher"] = result["gap"][steps]["fd"]
            numbers[steps]["speedup"] = result["speedup"][steps]
    return numbers
