"""Values of a recipe that are each right but do not go together, or not with the files they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.data.manifest import DataError
from distill.data.shards import Shards
from distill.evaluation.features import load_features
from distill.objectives import OBJECTIVES
from distill.recipe_files import Key
from teachers.adapters.native import CheckpointError
from teachers.velocity import Teacher


def contradictions(sections: Mapping[str, Any], given: Teacher | None = None) -> list[tuple[Key, str]]:
    """(key, what is wrong) for values that are each right but do not go together, or not with the files they name.

    `sections` are a recipe's sections by name; one that could not be built is left out, and with it what concerns it.
    """
    found = _of_objective(sections, given)
    teacher = given
    if teacher is None and sections.get("teacher") is not None:
        try:
            teacher = sections["teacher"].load()
        except CheckpointError as error:
            return [*found, (("teacher", "path"), str(error))]
    if teacher is not None or "teacher" in sections:
        found += _of_student(sections, teacher) + _of_data(sections, teacher)
    return found + _of_features(sections, teacher)


def _of_objective(sections: Mapping[str, Any], given: Teacher | None) -> list[tuple[Key, str]]:
    found: list[tuple[Key, str]] = []
    objective, student = sections.get("objective"), sections.get("student")
    if objective is None:
        return found
    name = next((n for n, cls in OBJECTIVES.items() if cls is type(objective)), type(objective).__name__)
    if student is not None and objective.needs_two_times and student.kind == "velocity":
        found.append((("student", "kind"), f"a velocity student has one time, but objective {name} trains two: set "
                                           "student.kind to flow_map, or objective.name to flow_matching"))  # fmt: skip
    if student is not None and not objective.needs_two_times and student.kind == "flow_map":
        found.append((("student", "kind"), f"objective {name} trains s = t alone, a flow_map student could not jump: "
                                           "set student.kind to velocity, or name another objective"))  # fmt: skip
    two = objective.times.two_times
    if objective.needs_two_times and not two:
        found.append((("objective", "times"), f"draws s = t alone, but objective {name} trains two times: name another "
                                              "law, e.g. uniform_triangle, with a diagonal below 1"))  # fmt: skip
    if two and not objective.needs_two_times:
        found.append((("objective", "times"), f"draws two times, but objective {name} trains s = t alone: name the law "
                                              "uniform"))  # fmt: skip
    if objective.needs_data and sections.get("data", objective) is None:
        found.append((("data",), f"is missing, but objective {name} needs data: add a section data"))
    if objective.needs_teacher and given is None and sections.get("teacher", objective) is None:
        found.append((("teacher",), f"is missing, but objective {name} learns from a teacher: add a section teacher"))
    return found


def _of_student(sections: Mapping[str, Any], teacher: Teacher | None) -> list[tuple[Key, str]]:
    found: list[tuple[Key, str]] = []
    student = sections.get("student")
    if student is None:
        return found
    if student.init == "teacher" and (teacher is None or teacher.network is None):
        why = "there is no teacher" if teacher is None else "this teacher has no network to start from"
        found.append((("student", "init"), f"cannot be teacher: {why}; set student.init to random"))
    elif student.init == "teacher" and student.network is not None:
        found.append((("student", "network"), "cannot be chosen while student.init is teacher: remove it, or set "
                                              "student.init to random"))  # fmt: skip
    if student.network is None and (teacher is None or teacher.network_config is None):
        found.append((("student", "network"), "is missing, and there is no teacher's network to take: name one, e.g. "
                                              "{name: mlp, width: 128}"))  # fmt: skip
    if teacher is not None and student.path not in (None, teacher.path.name):
        found.append((("student", "path"), f"is {student.path}, the teacher lives on {teacher.path.name}: remove it"))
    return found


def _of_data(sections: Mapping[str, Any], teacher: Teacher | None) -> list[tuple[Key, str]]:
    found: list[tuple[Key, str]] = []
    data, space = sections.get("data"), None
    try:
        if isinstance(data, Shards):
            reader = data.check()
            space = reader.space if reader else None
        elif data is not None:
            data.open(teacher)
    except DataError as error:
        found.append((("data",), str(error)))
    if space is not None and teacher is not None and space != teacher.space:
        found.append((("data",), f"has samples of {space}, the teacher makes {teacher.space}: use the teacher's data"))
    return found


def _of_features(sections: Mapping[str, Any], teacher: Teacher | None) -> list[tuple[Key, str]]:
    evaluation, key = sections.get("evaluation"), ("evaluation", "features")
    if evaluation is None or evaluation.features is None:
        return []
    try:
        channels = load_features(evaluation.features).channels
    except CheckpointError as error:
        return [(key, str(error))]
    if teacher is not None and (not teacher.space.is_image or teacher.space.shape[0] != channels):
        return [(key, f"sees images of {channels} channels, the teacher makes {teacher.space}: set it to null")]
    return []
