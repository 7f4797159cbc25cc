"""Values of a recipe that are each right but do not go together, or not with the files they name."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch

from distill.cautions import unread
from distill.data.loader import Loader
from distill.data.manifest import DataError
from distill.data.mixture import Mixture
from distill.data.shards import Shards
from distill.evaluation.features import load_features
from distill.flow_map import SUPPORTS, Kind
from distill.lora import LoRA, installed
from distill.objectives import name_of
from distill.objectives.consistency import Consistency
from distill.objectives.data_free import DataFree
from distill.objectives.times import Grid
from distill.parameterisation import MeanVelocity, OneTime
from distill.recipe_files import Key
from distill.student import StudentConfig
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.space import DataSpace, Latent
from teachers.velocity import NO_VELOCITY, Teacher

Problem = tuple[Key, str]
Found = Iterator[Problem]


def contradictions(sections: Mapping[str, Any], given: Teacher | None = None) -> list[Problem]:
    """(key, what is wrong) for values that are each right but do not go together, or not with the files they name.

    `sections` are a recipe's sections by name; one that could not be built is left out, and with it what concerns it.
    """
    return list(_all(sections, given))


def _all(sections: Mapping[str, Any], given: Teacher | None) -> Found:
    yield from _of_objective(sections, given)
    yield from _of_trainer(sections)
    teacher, space = given, None
    if teacher is None and sections.get("teacher") is not None:
        try:
            teacher = unread(sections["teacher"])
        except FieldError as error:
            yield from ((("teacher", name), text) for name, text in error.problems.items())
            return
        except CheckpointError as error:
            yield ("teacher", "path"), str(error)
            return
    if teacher is not None or "teacher" in sections:
        yield from _of_student(sections, teacher)
        of_data = yield from _of_data(sections, teacher)
        space = teacher.space if teacher else of_data
        yield from _of_network(sections, space)
        yield from _of_guidance(sections, teacher)
        yield from _of_null(sections, teacher)
        yield from _of_velocity(sections, teacher)
        yield from _of_gap(sections, teacher)
    yield from _of_evaluation(sections, space)


_OFF = 0.02  # what scale and shift of the same autoencoder may differ by: 0.18125 was published for 0.18215


def _of_objective(sections: Mapping[str, Any], given: Teacher | None) -> Found:
    objective, student = sections.get("objective"), sections.get("student")
    if objective is None:
        return
    name = name_of(objective)
    if student is not None:
        yield from _of_kind(name, objective.kind, student)
    if objective.needs_data and sections.get("data", objective) is None:
        yield ("data",), f"is missing, but objective {name} needs data: add a section data"
    if objective.needs_teacher and given is None and sections.get("teacher", objective) is None:
        yield ("teacher",), f"is missing, but objective {name} learns from a teacher: add a section teacher"


def _of_trainer(sections: Mapping[str, Any]) -> Found:
    """Ways to share a step that an objective or a student does not allow."""
    objective, student, trainer = (sections.get(name) for name in ("objective", "student", "trainer"))
    if trainer is None:
        return
    if isinstance(objective, DataFree) and objective.corrected and trainer.accumulate > 1:
        yield ("trainer", "accumulate"), ("must be 1: data_free balances its correction by means over the whole "
                                          "batch, which parts of it do not know; use more processes, or "
                                          "objective.corrected 0")  # fmt: skip
    if student is not None and student.lora is not None and trainer.strategy == "fsdp2":
        yield ("trainer", "strategy"), ("cannot be fsdp2 with student.lora, whose weights are the teacher's: set it "
                                        "to ddp")  # fmt: skip


def _of_kind(name: str, kind: Kind, student: StudentConfig) -> Found:
    if kind not in SUPPORTS:
        yield ("objective",), f"{name} is of kind {kind!r}, which must be one of {', '.join(SUPPORTS)}"
    if kind == "velocity" and not isinstance(student.parameterisation, MeanVelocity):
        yield ("student", "parameterisation"), (f"must be mean_velocity: objective {name} trains a velocity, which is "
                                                "what a teacher predicts")  # fmt: skip
    if kind != "consistency" and isinstance(student.parameterisation, OneTime):
        yield ("student", "parameterisation"), (f"one_time knows t = 1 alone, objective {name} trains other times: "
                                                "name endpoint or trig")  # fmt: skip
    if kind not in ("flow_map", "shortcut", "grid") and student.split is not None:
        yield ("student", "split"), f"is for a student of two times, objective {name} trains a {kind}: remove it"


def _of_velocity(sections: Mapping[str, Any], teacher: Teacher | None) -> Found:
    """What a teacher of samples alone cannot give."""
    objective = sections.get("objective")
    if objective is None or teacher is None or teacher.velocity is not None or not objective.needs_velocity:
        return
    if hasattr(objective, "pairs"):
        key = ("objective", "pairs", "solver")
        yield key, "must be own: this teacher makes samples, it has no velocity to solve"
    else:
        yield ("objective",), f"learns from a velocity; this teacher {NO_VELOCITY}"


def _of_gap(sections: Mapping[str, Any], teacher: Teacher | None) -> Found:
    """A gap in sigma / alpha from where that is infinite."""
    objective, student = sections.get("objective"), sections.get("student")
    if not isinstance(objective, Consistency) or objective.gap_in != "sigma" or student is None:
        return
    from_zero = isinstance(objective.times, Grid) and objective.times.curve == "uniform"
    if from_zero and student.path_of(teacher)(torch.zeros(())).alpha <= 0:
        yield ("objective", "gap_in"), ("cannot be sigma on a grid from t = 0, where sigma / alpha is infinite: set "
                                        "objective.times.curve to karras, take the law ect, or set it to "
                                        "time")  # fmt: skip


def _of_guidance(sections: Mapping[str, Any], teacher: Teacher | None) -> Found:
    guidance, objective = sections.get("guidance"), sections.get("objective")
    if guidance is None:
        return
    if teacher is not None:
        try:
            guidance.guide(teacher)
        except InputError as error:
            yield ("guidance",), str(error)
    elif objective is not None and not hasattr(objective, "guidance"):
        yield ("guidance",), ("there is no teacher to guide, and this objective does not guide itself (mean_flow "
                              "does): remove it")  # fmt: skip


def _of_null(sections: Mapping[str, Any], teacher: Teacher | None) -> Found:
    """What needs a network that knows "no class"."""
    objective, student = sections.get("objective"), sections.get("student")
    if objective is None or student is None:
        return
    own, guided = getattr(objective, "guidance", None), sections.get("guidance")
    by_row = guided is not None and guided.scales is not None and getattr(objective, "source", None) == "data"
    guides_itself = own is not None and (own.scale > 1 or by_row or (teacher is None and guided is not None))
    uses = {"drop": getattr(objective, "drop", 0.0) > 0, "guidance": guides_itself}
    if any(uses.values()) and not _knows_null(student, teacher):
        needs = (
            "needs a network that knows the null class: set student.network.null_class to true, or start from a "
            "teacher trained with dropped labels"
        )
        yield from ((("objective", key), needs) for key, used in uses.items() if used)
    elif guides_itself and student.init == "random" and getattr(objective, "drop", None) == 0:
        yield ("objective", "drop"), ("must be above 0: guidance asks the student itself for no class, which a "
                                      "student of random weights learns from dropped labels alone; set it to 0.1, or "
                                      "student.init to teacher")  # fmt: skip


def _knows_null(student: StudentConfig, teacher: Teacher | None) -> bool:
    if student.network is None and (teacher is None or teacher.network_config is None):
        return False
    # not a key of every entry: behind a convention it stands with the network, and some networks derive it
    return student.network_config(teacher).null_class


def _of_student(sections: Mapping[str, Any], teacher: Teacher | None) -> Found:
    student = sections.get("student")
    if student is None:
        return
    if student.init == "teacher" and (teacher is None or teacher.network is None):
        why = "there is no teacher" if teacher is None else "this teacher has no network to start from"
        yield ("student", "init"), f"cannot be teacher: {why}; set student.init to random"
    elif student.init == "teacher" and student.network is not None:
        yield ("student", "network"), ("cannot be chosen while student.init is teacher: remove it, or set "
                                       "student.init to random")  # fmt: skip
    if student.network is None and (teacher is None or teacher.network_config is None):
        yield ("student", "network"), ("is missing, and there is no teacher's network to take: name one, e.g. "
                                       "{name: mlp, width: 128}")  # fmt: skip
    if teacher is not None and student.init == "teacher" and student.path not in (None, teacher.path.name):
        yield ("student", "path"), (f"is {student.path}, the teacher lives on {teacher.path.name}: remove it, or set "
                                    "student.init to random")  # fmt: skip
    network = student.network or (teacher and teacher.network)
    depth = getattr(network, "depth", None)
    if student.split is not None and network is not None and depth is None:
        yield ("student", "split"), "is for networks made of a row of blocks, this one is not: remove it"
    elif student.split is not None and depth is not None and not 0 <= student.split < depth:
        yield ("student", "split"), f"must be in [0, {depth - 1}], the network has {depth} blocks"
    yield from _of_lora(student.lora, teacher)


def _of_lora(lora: LoRA | None, teacher: Teacher | None) -> Found:
    if lora is None:
        return
    if not installed():
        yield ("student", "lora"), "needs peft: install with the extra [lora], or remove it"
    if teacher is not None and teacher.network is not None:
        try:
            lora.layers(teacher.network)
        except InputError as error:
            yield ("student", "lora", "targets"), str(error)


def _of_network(sections: Mapping[str, Any], space: DataSpace | None) -> Found:
    student = sections.get("student")
    if space is None or student is None or student.network is None:
        return
    try:
        student.network.check(space)
    except FieldError as error:
        yield from ((("student", "network", name), text) for name, text in error.problems.items())


def _of_data(sections: Mapping[str, Any], teacher: Teacher | None) -> Generator[Problem, None, DataSpace | None]:
    """What is wrong with the data; returns what its samples are, where that is written down."""
    data, space = sections.get("data"), None
    try:
        if isinstance(data, Shards | Mixture):
            reader = data.check()
            space = reader.space if reader else None
            if reader is not None and sections.get("trainer") is not None:
                Loader(reader, 0, sections["trainer"].batch, workers=data.workers)  # raises for too many
        elif data is not None:
            data.open(teacher)
    except DataError as error:
        yield ("data", *error.key), str(error)
    if teacher is None:
        return space
    if space is not None and space != teacher.space:
        yield ("data",), f"has samples of {space}, the teacher makes {teacher.space}: {remedy(teacher.space)}"
    if space is not None and teacher.latent is not None and (text := _of_latents(data, teacher.latent)):
        yield ("data",), text
    if data is None and "data" in sections and teacher.space.embeddings:
        yield ("data",), f"is missing: the teacher makes {teacher.space}, so it needs data with embeddings"
    return space


def _of_latents(data: Any, wanted: Latent) -> str | None:
    """What is wrong with latents for a teacher of `wanted` ones, as far as their manifests say."""
    for shards in [data] if isinstance(data, Shards) else [part.shards for part in data.sources]:
        said = shards.open(None).manifest.autoencoder
        if said is None or wanted.std is not None:  # by channel: nothing here to compare with
            continue
        if abs(wanted.scale / said["scale"] - 1) > _OFF or abs(wanted.shift - said["shift"]) * wanted.scale > _OFF:
            return (
                f"latents of {said['id']} are scaled by {said['scale']:g} and shifted by {said['shift']:g}, the "
                f"teacher's ({wanted.autoencoder}) by {wanted.scale:g} and {wanted.shift:g}: make them with the "
                "teacher's autoencoder"
            )
    return None


def remedy(space: DataSpace) -> str:
    """What to do where the data is not what a teacher of `space` makes."""
    if not space.embeddings:
        return "use the teacher's data"
    return f"use the teacher's data, with data.cond: [{', '.join(space.conditions)}]"


def _of_evaluation(sections: Mapping[str, Any], space: DataSpace | None) -> Found:
    evaluation, key = sections.get("evaluation"), ("evaluation", "features")
    if evaluation is not None and evaluation.data is not None:
        try:
            evaluation.data.check()
        except DataError as error:
            yield ("evaluation", "data", *error.key), str(error)
    if evaluation is None or evaluation.features is None:
        return
    try:
        seen = load_features(evaluation.features)
    except CheckpointError as error:
        yield key, str(error)
        return
    if space is not None and (text := seen.misfit(space)):
        yield key, text
