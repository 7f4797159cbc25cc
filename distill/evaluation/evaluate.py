"""Teacher and student measured alike: the same noise, the same features, the same real data, one protocol.

The reference is the teacher with Euler in `reference_steps` uniform steps. The result becomes evaluation.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.atomic import write_atomic
from distill.evaluation.config import EvaluationConfig
from distill.evaluation.features import Features
from distill.evaluation.metrics import (
    agreement,
    frechet_distance,
    frechet_errors,
    frechet_floor,
    interval,
    kernel_distance,
    precision_recall,
    rmse,
    sliced_wasserstein,
)
from distill.flow_map import check_steps
from distill.parallel import on_main
from distill.sampling import Conditions, Generator, Samples, generate, student_generator, teacher_generator
from distill.student import Student
from teachers.errors import InputError
from teachers.space import DataSpace
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
    space = student.space
    conditions = conditions or like(real, space)
    make = partial(generate, space=space, n=config.samples, batch=config.batch, seed=config.seed, conditions=conditions)
    _warm_up(student, teacher, partial(make, n=min(config.batch, config.samples)))
    if real is None:
        assert teacher is not None
        other = make(teacher_generator(teacher, config.reference_steps), seed=config.seed + 1)
        real = (other.x, None)
    judge = Judge(real, features, conditions)
    result: dict[str, Any] = {"format": FORMAT, "protocol": _protocol(config, features, weights, reference)}
    result["protocol"] |= {} if teacher is None or teacher.velocity else {"solver": "own", "reference_steps": 1}
    result |= {"teacher": None, "teacher_steps": {}, "floor": judge.floor(config, trained_on)}
    result |= {"student": {}, "gap": {}, "speedup": {}}
    exact = None if teacher is None or teacher.flow_map is None else make(_exact(teacher)).x
    best: Judged | None = None
    seen: list[Judged] = []
    if teacher is not None:
        for n in _teacher_steps(teacher, config):
            progress(f"teacher, {_steps_in_words(n)}")
            making = partial(make, teacher_generator(teacher, n))
            judged = judge(_kept(kept, making) if best is None and kept else making())
            seen.append(judged)
            entry = {"solver": _solver(teacher), **judged.entry(n * teacher.calls, best, exact)}
            if best is None:
                best, result["teacher"] = judged, {"steps": n, **entry}
            else:
                result["teacher_steps"][str(n)] = entry
    for n in student_steps(student, config.steps, config.reference_steps):
        progress(f"student, {_steps_in_words(n)}")
        judged = judge(make(student_generator(student, n)))
        seen.append(judged)
        result["student"][str(n)] = judged.entry(n, best, exact)
        if best is not None:
            result["gap"][str(n)] = {"fd": _ratio(judged.metrics["fd"], best.metrics["fd"])}
            result["speedup"][str(n)] = _ratio(best.samples.seconds_per_sample, judged.samples.seconds_per_sample)
    if best is not None:
        for n, entry in result["student"].items():
            result["gap"][n] |= {"excess": _excess(entry, best.metrics, result["floor"])}
    if config.bootstrap and seen[0].features.shape[1] <= _WIDEST:
        progress("intervals")
        _add_intervals(result, judge.errors([judged.features for judged in seen], config.bootstrap))
    return result


def like(real: tuple[Tensor, Tensor | None] | None, space: DataSpace) -> Conditions:
    """Conditions that give samples the classes of the real ones in their shares, each in its turn; without labels all
    classes alike."""
    if real is None or real[1] is None or space.classes is None or space.embeddings:
        return space.cond_for
    shares = torch.bincount(real[1])
    places = torch.cat([(torch.arange(n).double() + 0.5) / n for n in shares.tolist()])
    turns = torch.arange(len(shares)).repeat_interleave(shares)[places.argsort(stable=True)]
    return lambda first, count: {"class": turns[torch.arange(first, first + count) % len(turns)]}


def _warm_up(student: Student, teacher: Teacher | None, make: Callable[[Generator], Samples]) -> None:
    """First calls are slow."""
    make(student_generator(student, student_steps(student, (1,), 1)[0]))
    if teacher is not None:
        make(teacher_generator(teacher, 1))


_WIDEST = 512  # features of which covariances are still taken a thousand times in a minute


def _excess(student: Mapping[str, Any], teacher: Mapping[str, float], floor: Mapping[str, float]) -> float | None:
    return _ratio(student["metrics"]["fd"] - floor["fd"], teacher["fd"] - floor["fd"])


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


def _kept(file: Path, make: Callable[[], Samples]) -> Samples:
    """The samples in `file`; made, and written there, if there are none."""

    def read() -> Samples | None:
        try:
            with safe_open(file, "pt") as held:
                return Samples(held.get_tensor("x"), float(held.metadata()["seconds_per_sample"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None  # missing or damaged

    def write() -> None:
        about = {"seconds_per_sample": repr(samples.seconds_per_sample)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, safetensors.torch.save({"x": samples.x}, about))

    if (found := on_main(read)) is not None:
        return found
    samples = make()
    on_main(write)
    return samples


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
class Judged:
    """Samples, their features, the classes that the classifier sees in them, and their distances to the real data."""

    samples: Samples
    features: Tensor
    classes: Tensor | None
    metrics: dict[str, float]

    def entry(self, nfe: int, reference: Judged | None, exact: Tensor | None) -> dict[str, Any]:
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


class Judge:
    """Compares samples with the real data, in features where there are any."""

    def __init__(self, real: tuple[Tensor, Tensor | None], features: Features | None, conditions: Conditions) -> None:
        self._real, self._labels = real
        if len(self._real) < 4:
            raise InputError(f"evaluation: compares with {len(self._real)} real samples: at least 4 are needed")
        self._features, self.conditions = features, conditions
        self._real_features, self._real_classes = self._of(self._real)

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (x.flatten(1), None) if self._features is None else self._features(x)

    def __call__(self, samples: Samples) -> Judged:
        finite = samples.x.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(f"evaluation: {int((~finite).sum())} of {len(finite)} samples are not finite")
        features, classes = self._of(samples.x)
        metrics = self._distances(samples.x, features)
        asked = self._asked(len(samples.x))
        if classes is not None and asked is not None:
            metrics["label_accuracy"] = agreement(classes, asked)
        return Judged(samples, features, classes, metrics)

    def _distances(self, x: Tensor, features: Tensor) -> dict[str, float]:
        some = _some(self._real_features, _MOST)
        precision, recall = precision_recall(features, some)
        return {
            "fd": frechet_distance(features, self._real_features),
            "kid": kernel_distance(features, some),
            "precision": precision,
            "recall": recall,
            "sw2": sliced_wasserstein(x, self._real),
        }

    def _asked(self, n: int) -> Tensor | None:
        """The classes of samples 0 .. n - 1."""
        cond = self.conditions(0, n)
        return None if cond is None else cond.get("class")

    def errors(self, samples: list[Tensor], count: int) -> Tensor:
        """See `frechet_errors`."""
        asked = self._asked(len(samples[0]))
        classes = None if asked is None or self._labels is None else (asked, self._labels)
        return frechet_errors(samples, self._real_features, count, classes)

    def floor(self, config: EvaluationConfig, trained_on: Tensor | None) -> dict[str, Any]:
        """Real against real: scaled to the sizes in use, and as measured on its halves; of the real samples, how many
        have the class that is seen in them; the training data as if they were samples."""
        by_class = self._labels if self._asked(1) is not None else None
        halves, scaled = frechet_floor(self._real_features, config.samples, by_class)
        found: dict[str, Any] = {"fd": scaled, "fd_halves": halves}
        if self._labels is not None and self._real_classes is not None:
            found["label_accuracy"] = agreement(self._real_classes, self._labels)
        if trained_on is not None:
            x = _some(trained_on, config.samples)
            found["trained_on"] = self._distances(x, self._of(x)[0])
        return found


_MOST = 10_000  # real samples that are compared one by one with others, in time that grows as their square


def _some(x: Tensor, count: int) -> Tensor:
    """At most `count` rows, from everywhere: of all classes, also where these are sorted."""
    count = min(count, len(x))
    return x[torch.arange(count) * len(x) // count]


def main_numbers(result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """steps -> the metrics of the student, paired ones and gap included: what an export and a table say."""
    numbers = {}
    for steps, entry in result["student"].items():
        numbers[steps] = {**entry["metrics"], **entry["paired"]}
        if steps in result["gap"]:
            numbers[steps]["fd_over_teacher"] = result["gap"][steps]["fd"]
            numbers[steps]["speedup"] = result["speedup"][steps]
    return numbers
