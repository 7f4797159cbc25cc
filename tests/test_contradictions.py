"""Contradictions: values that are each right but do not go together; what Python hands over; references."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import problems, written

from distill.cautions import cautions
from distill.data.build import build
from distill.objectives.lagrangian import Lagrangian
from distill.recipe import load
from distill.recipe_files import RecipeError
from teachers.networks import NETWORKS, to_entry
from teachers.networks.conventions import Flow
from teachers.networks.converted import ConvertedConfig
from teachers.networks.sit import SiTConfig
from teachers.path import Cosine, Linear
from teachers.space import DataSpace
from teachers.velocity import Teacher

pytestmark = pytest.mark.usefixtures("untouched")


CONTRADICTIONS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "no data": ("toy/lagrangian", ("data=null",), "data", "objective lagrangian needs data: add a section data"),
    "no teacher": (
        "toy/lagrangian",
        ("teacher=null", "data={name: shards, path: data/digits, source: digits}"),
        "teacher",
        "learns from a teacher: add a section teacher",
    ),
    "no network to start from": (
        "toy/lagrangian",
        ("student.init=teacher",),
        "student.init",
        "this teacher has no network to start from; set student.init to random",
    ),
    "no teacher to start from": (
        "teachers/digits",
        ("student.init=teacher",),
        "student.init",
        "there is no teacher; set student.init to random",
    ),
    "no network": ("toy/lagrangian", ("student.network=null",), "student.network", "name one, e.g."),
    "a network of images for vectors": (
        "toy/lagrangian",
        ("student.network={name: dit}",),
        "student.network.patch",
        "must divide height and width of samples [channels, height, width], here [2]",
    ),
    "a patch that does not fit": (
        "quickstart",
        ("student.init=random", "student.network={name: dit, patch: 3}"),
        "student.network.patch",
        "here [1, 8, 8], got 3",
    ),
    "another path": ("quickstart", ("student.path=cosine",), "student.path", "the teacher lives on linear"),
    "one time, two wanted": (
        "toy/lagrangian",
        ("objective.times={name: uniform}",),
        "objective.times",
        "must draw two times s < t",
    ),
    "two times, one wanted": (
        "teachers/digits",
        ("objective.times={name: uniform_triangle}",),
        "objective.times",
        "must draw one time",
    ),
    "no diagonal for a source of one's own": (
        "toy/lsd",
        ("objective.times.diagonal=0",),
        "objective.times",
        "which alone ties source student down",
    ),
    "one time's output, two times": (
        "toy/lagrangian",
        ("student.parameterisation={name: one_time}",),
        "student.parameterisation",
        "one_time knows t = 1 alone",
    ),
    "a velocity's output": (
        "teachers/digits",
        ("student.parameterisation={name: endpoint}",),
        "student.parameterisation",
        "must be mean_velocity",
    ),
    "a split of one time": ("toy/cd", ("student.split=1",), "student.split", "trains a consistency: remove it"),
    "a split beyond the network": ("toy/dmf", ("student.split=3",), "student.split", "must be in [0, 2]"),
    "labels to drop, no null class": (
        "teachers/digits",
        ("objective.drop=0.1",),
        "objective.drop",
        "set student.network.null_class to true",
    ),
    "a gap in sigma from t = 0": (
        "toy/ict",
        ("objective.times.curve=uniform",),
        "objective.gap_in",
        "set objective.times.curve to karras, take the law ect, or",
    ),
    "guidance by a null class never seen": (
        "teachers/digits",
        ("objective={name: mean_flow, source: data, guidance: {scale: 3}}", "student.network.null_class=true"),
        "objective.drop",
        "must be above 0: guidance asks the student itself for no class",
    ),
    "the same by scales": (
        "teachers/digits",
        (
            "objective={name: mean_flow, source: data}",
            "student.network.null_class=true",
            "guidance={scale: 2, scales: [1, 3]}",
        ),
        "objective.drop",
        "which a student of random weights learns from dropped labels alone",
    ),
    "guidance without a null condition": ("quickstart", ("guidance={scale: 2}",), "guidance", "never saw a null"),
    "guidance of nothing": ("teachers/digits", ("guidance={scale: 2}",), "guidance", "there is no teacher to guide"),
    "a tangent without its form": (
        "toy/lagrangian",
        ("objective.tangent.warmup=10",),
        "objective.tangent",
        "acts on gradient stop alone",
    ),
    "no law": (
        "teachers/digits",
        ("data={name: teacher_law}",),
        "data",
        "teacher_law needs an analytic teacher (gaussian, mixture)",
    ),
    "no shards": (
        "teachers/digits",
        ("data.path=nowhere", "data.source=null"),
        "data",
        "nowhere: no manifest.json here",
    ),
    "no such teacher": ("toy/lagrangian", ("teacher={name: native, path: nowhere}",), "teacher.path", "no such folder"),
    "features of points": (
        "toy/lagrangian",
        ("evaluation.features=digits",),
        "evaluation.features",
        "sees images of 1 channels in 10 classes, here are",
    ),
    "no such features": ("toy/lagrangian", ("evaluation.features=nowhere",), "evaluation.features", "no such folder"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradictions_name_key_and_remedy(what: str) -> None:
    recipe, overrides, key, reason = CONTRADICTIONS[what]
    found = problems(recipe, *overrides)
    assert any(f": {key}: " in message and reason in message for message in found), found
    assert len(found) == 1


GUIDED = "objective={name: mean_flow, source: data, guidance: {scale: 3}, drop: "


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("toy/ict", ("objective.times.curve=uniform", "student.path=ve")),  # EDM's own grid, whose noise is finite
        ("toy/ict", ("objective.times.curve=uniform", "objective.gap_in=time")),
        ("teachers/digits", (f"{GUIDED}0.1}}", "student.network.null_class=true")),
    ],
)
def test_what_goes_together_is_no_contradiction(recipe: str, overrides: tuple[str, ...]) -> None:
    assert problems(recipe, *overrides) == []


@pytest.mark.parametrize(("recipe", "last"), [("toy/progressive", 750), ("toy/pfmm", 600)])
def test_stages_that_are_not_reached_are_told_of(recipe: str, last: int) -> None:
    assert cautions(load(recipe)) == cautions(load(recipe, [f"trainer.steps={last + 1}"])) == []
    [said] = cautions(load(recipe, [f"trainer.steps={last}"]))
    assert f"begins at step {last}, so after {last} steps this student is not yet trained on its longest jumps" in said


def test_a_warm_up_that_does_not_end_is_told_of() -> None:
    [said] = cautions(load("toy/lagrangian", ["trainer.steps=200"]))
    assert "of 200 steps, but the run has 200: the learning rate never reaches trainer.lr" in said
    assert cautions(load("toy/lagrangian", ["trainer.steps=201"])) == []


def test_a_coarse_smallest_step_is_told_of() -> None:
    [said] = cautions(load("toy/shortcut", ["objective.times.finest=16"]))
    assert "no row trains the step 1/16" in said
    assert cautions(load("toy/shortcut", ["objective.times.finest=32"])) == []
    assert cautions(load("toy/shortcut-published", ["objective.times.finest=16"])) == []


@dataclass(frozen=True, kw_only=True)
class OfNoKind(Lagrangian):
    kind = "flowmap"  # type: ignore[assignment]


def test_an_own_objective_of_no_kind_is_told_of(untouched: Path) -> None:
    file = untouched / "a.yaml"
    file.write_text("extends: toy/lagrangian\nname: a\nobjective: {name: own}\n")
    with pytest.raises(RecipeError, match="OfNoKind is of kind 'flowmap', which must be one of flow_map, shortcut"):
        load(file, objectives={"own": OfNoKind})


DIGITS = DataSpace((1, 8, 8), 10, (-1.0, 1.0))


def network_teacher(space: DataSpace = DIGITS) -> Teacher:
    network = NETWORKS["mlp"](width=8, depth=1).build(space)

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        return network(x, t, cond)

    config = {"name": "mlp", "width": 8, "depth": 1}
    return Teacher(velocity=velocity, space=space, path=Cosine(), network=network, network_config=config)


def test_a_teacher_from_python_takes_the_sections_place(untouched: Path) -> None:
    file = untouched / "a.yaml"
    file.write_text(
        "name: a\nobjective: {name: lagrangian}\ndata: {name: shards, path: digits, source: digits}\n"
        "trainer: {steps: 500}\n"
    )
    assert len(problems(file)) >= 1
    assert load(file, teacher=network_teacher()).student.init == "teacher"
    (message,) = problems(file, "student.network={name: mlp}", teacher=network_teacher())
    assert "student.network: cannot be chosen while student.init is teacher" in message
    (message,) = problems(file, "student.path=linear", teacher=network_teacher())
    assert "is linear, the teacher lives on cosine" in message
    assert problems(file, "student.init=random", "student.path=cosine", teacher=network_teacher()) == []


def test_data_must_have_the_teachers_space(untouched: Path) -> None:
    build("digits", untouched / "digits")
    file = untouched / "a.yaml"
    file.write_text(
        f"name: a\nobjective: {{name: lagrangian}}\ndata: {{name: shards, path: {untouched / 'digits'}}}\n"
        "trainer: {steps: 500}\n"
    )
    assert problems(file, teacher=network_teacher()) == []
    for space in (DataSpace((1, 4, 4), 10, (-1.0, 1.0)), DataSpace((1, 8, 8), 9, (-1.0, 1.0))):
        (message,) = problems(file, teacher=network_teacher(space))
        assert f"{file}:3: data: has samples of" in message
    (message,) = problems(file, "data.streams=19", teacher=network_teacher())
    assert "19 streams but 18 shards" in message


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("convention", [Flow(noise_time=1), None], ids=["reversed", "ours"])
@pytest.mark.parametrize(
    "use", ["{name: flow_matching, drop: 0.1}", "{name: mean_flow, source: data, guidance: {scale: 2}}"]
)
def test_what_needs_the_null_class_asks_the_network_behind_its_convention(
    use: str, convention: Flow | None, knows: bool, untouched: Path
) -> None:
    config: Any = SiTConfig(width=32, depth=1, heads=2, null_class=knows)
    config = config if convention is None else ConvertedConfig(network=config, convention=convention)
    given = replace(network_teacher(), network=config.build(DIGITS), network_config=to_entry(config), path=Linear())
    file = written(untouched, {"name": "a", "objective": {"name": "flow_matching"}, "trainer": {"steps": 500},
                               "data": {"name": "shards", "path": "digits", "source": "digits"}})  # fmt: skip
    found = problems(file, f"objective={use}", teacher=given)
    assert len(found) == (not knows), found
    assert knows or "needs a network that knows the null class" in found[0]


class Mine(Lagrangian):
    """An objective of the user's own."""


def test_objectives_from_python_join_the_table() -> None:
    recipe = load("toy/lagrangian", ["objective={name: mine}"], objectives={"mine": Mine})
    assert type(recipe.objective) is Mine
    (message,) = problems("toy/lagrangian", "objective={name: mine}")
    assert "got 'mine'" in message


def test_a_resolved_objective_from_python_loads_again(untouched: Path) -> None:
    recipe = load("toy/lagrangian", ["objective={name: mine}"], objectives={"mine": Mine})
    file = written(untouched, yaml.safe_load(recipe.to_yaml({"mine": Mine})))
    assert load(file, objectives={"mine": Mine}) == recipe


# --- interpolation


def test_values_may_refer_to_each_other(untouched: Path) -> None:
    file = untouched / "a.yaml"
    file.write_text(
        "extends: toy/lagrangian\nname: a-${trainer.batch}\nseed: 3\ntrainer: {batch: '${seed}', checkpoint_every: "
        "'${trainer.steps}'}\n"
    )
    recipe = load(file)
    assert recipe.name == "a-3"
    assert recipe.trainer.batch == 3
    assert recipe.trainer.checkpoint_every == 1000
    assert "${" not in recipe.to_yaml()
    assert load(file, ["seed=4"]).name == "a-4"


@pytest.mark.parametrize("value", ["${nothing}", "${trainer.batch}", "${trainer.nothing.deep}", "${seed"])
def test_references_to_nothing_or_in_a_circle_are_told(value: str) -> None:
    found = problems("toy/lagrangian", f"trainer.batch={value}")
    assert any("trainer.batch: cannot be resolved" in message for message in found)


def test_one_bad_reference_leaves_the_others_resolved() -> None:
    found = problems("toy/lagrangian", "trainer.batch=${trainer.steps}", "trainer.keep=${nothing}")
    assert not any("trainer.batch" in message for message in found)
    assert any("trainer.keep: cannot be resolved" in message for message in found)
