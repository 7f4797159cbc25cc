"""Recipes: every shipped one loads, what loads is written out whole, and all that is wrong is told with its line.

Checks run in an empty folder that must stay empty: nothing is created before a recipe is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import data_in, problems, written

from distill.recipe import About, Recipe, load
from distill.recipe_files import names
from teachers.adapters import TEACHERS
from teachers.analytic import Gaussian

Values = dict[str, Any]
Key = tuple[str, ...]
pytestmark = pytest.mark.usefixtures("untouched")


VARIANTS: dict[str, tuple[str, ...]] = {
    "toy/lagrangian": (),
    "toy/eulerian": ("objective.times={name: logitnormal_sorted}",),
    "teachers/digits": ("objective.times={name: uniform}",),
    "toy/lagrangian as gaussian": ("teacher={name: gaussian, mean: [0, 1], covariance: [[1, 0], [0, 2]]}",),
}


def complete(variant: str) -> Values:
    """A recipe with every value written out."""
    return dict(yaml.safe_load(load(variant.split(" ")[0], VARIANTS[variant]).to_yaml()))


def set_in(values: Values, key: Key, value: Any) -> Values:
    changed = deepcopy(values)
    section = changed
    for part in key[:-1]:
        section = section[part]
    section[key[-1]] = value
    return changed


# --- what is shipped


@pytest.mark.parametrize("name", names())
def test_every_shipped_recipe_loads(name: str, tmp_path: Path) -> None:
    recipe = load(name, data_in(tmp_path, name))
    assert isinstance(recipe, Recipe)
    assert recipe.about.summary


def test_the_walk_over_recipes_found_some() -> None:
    assert len(names()) >= 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_resolved_loads_again_to_the_same(variant: str, untouched: Path) -> None:
    recipe = load(variant.split(" ")[0], VARIANTS[variant])
    again = load(written(untouched, yaml.safe_load(recipe.to_yaml())))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_every_default_is_written_out() -> None:
    values = complete("toy/lagrangian")
    assert list(values)[:3] == ["name", "seed", "about"]  # in the order of the schema
    assert values["trainer"]["warmup"] == 200
    assert values["objective"] == {
        "name": "lagrangian",
        "weight": {"gap": 0.0, "power": 0.0, "c": 0.001, "learned": "none"},
        "times": {"name": "uniform_triangle", "diagonal": 0.25, "noise": 0.0},
        "source": "teacher",
        "gradient": "convex",
        "tangent": {"warmup": 0, "r_max": 1.0, "normalise": False, "c": 0.1},
        "decay": 0.99,
        "derivative": "jvp",
    }
    assert values["evaluation"]["steps"] == [1, 2, 4, 8]
    assert values["student"]["network"]["name"] == "mlp"
    assert values["teacher"]["name"] == "mixture"
    assert values["student"]["path"] is None


def test_values_arrive_as_written(untouched: Path) -> None:
    file = untouched / "a.yaml"
    file.write_text(
        "extends: toy/lagrangian\nname: a\nseed: 7\nteacher: {name: gaussian, mean: [0, 1], "
        "covariance: [[1, 0.5], [0.5, 2]], path: cosine}\ntrainer: {lr: 1e-4, betas: [0.8, 0.9], batch: 16}\n"
        "objective: {times: {name: logitnormal_sorted, std: 2}}\nabout: {cost: '3'}\n"
    )
    recipe = load(file)
    assert recipe.teacher == Gaussian(mean=(0.0, 1.0), covariance=((1.0, 0.5), (0.5, 2.0)), path="cosine")
    assert (recipe.name, recipe.seed, recipe.trainer.lr, recipe.trainer.batch) == ("a", 7, 1e-4, 16)
    assert recipe.trainer.betas == (0.8, 0.9)
    assert recipe.trainer.steps == 1000
    assert recipe.objective.times.std == 2.0
    assert recipe.about == About(cost="3")  # summary and result are those of toy/lagrangian


# --- unknown keys


def sections(values: Values, key: Key = ()) -> Iterator[Key]:
    yield key
    for name, value in values.items():
        if isinstance(value, dict):
            yield from sections(value, (*key, name))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unknown_keys_are_named_with_their_line_in_every_section(variant: str, untouched: Path) -> None:
    values = complete(variant)
    walked = list(sections(values))
    assert len(walked) >= 11
    for key in walked:
        section = values
        for part in key:
            section = section[part]
        known = [k for k in section if k != "name" or key == ()]
        near = {f"{known[-1]}x": known[-1]} if known else {}
        for typo, meant in {"qqqq": None, **near}.items():
            file = written(untouched, set_in(values, (*key, typo), 1))
            line = [text.strip() for text in file.read_text().splitlines()].index(f"{typo}: 1") + 1
            (message,) = problems(file)
            assert message.startswith(f"{file}:{line}: {'.'.join((*key, typo))}: unknown key")
            assert ("did you mean" in message) == (meant is not None)
            assert f"did you mean {meant!r}?" in message or meant is None
            assert all(k in message for k in known)


# --- wrong values


LEAVES: list[tuple[str, str, str]] = [
    ("trainer.steps=many", "trainer.steps", "must be an integer, got 'many'"),
    ("trainer.steps=2.5", "trainer.steps", "must be an integer, got 2.5"),
    ("trainer.steps=true", "trainer.steps", "must be an integer, got True"),
    ("trainer.steps=", "trainer.steps", "must be an integer, got null"),
    ("trainer.steps=[1]", "trainer.steps", "must be an integer, got [1]"),
    ("trainer.steps={a: 1}", "trainer.steps", "must be an integer, got {'a': 1}"),
    ("trainer.lr=fast", "trainer.lr", "must be a number, got 'fast'"),
    ("trainer.betas=[0.9]", "trainer.betas", "must be a list of 2 numbers"),
    ("trainer.betas=0.9", "trainer.betas", "must be a list of 2 numbers"),
    ("trainer.schedule=cosin", "trainer.schedule", "one of cosine, constant, got 'cosin', did you mean 'cosine'?"),
    ("student.init=none", "student.init", "must be one of teacher, random, got 'none'"),
    ("export.licence=[a]", "export.licence", "must be a text"),
    ("trainer=3", "trainer", "must be a section (a mapping of keys), got 3"),
    ("trainer=", "trainer", "must be a section, got null"),
    ("objective=lagrangian", "objective", "must be a section with the key 'name' (one of flow_matching, lagrangian"),
    ("objective.name=lagrangan", "objective.name", "got 'lagrangan', did you mean 'lagrangian'?"),
    ("objective.times=uniform", "objective.times", "must be a section with the key 'name' (one of uniform, "),
    ("objective.times.name=unifrm", "objective.times.name", "did you mean 'uniform'?"),
    ("evaluation.steps=[1, two]", "evaluation.steps", "must be a list of integer"),
    ("trainer.steps=0", "trainer.steps", "must be in [1, 10^8), got 0"),
    ("trainer.batch=-1", "trainer.batch", "must be at least 1, got -1"),
    ("trainer.lr=.nan", "trainer.lr", "must be above 0, got nan"),
    ("trainer.lr=.inf", "trainer.lr", "got inf"),
    ("trainer.warmup=-1", "trainer.warmup", "must be at least 0, got -1"),
    ("trainer.betas=[0.9, 1.0]", "trainer.betas", "must both be in [0, 1)"),
    ("trainer.ema=1", "trainer.ema", "must be in [0, 1), got 1.0"),
    ("tracking.log_every=0", "tracking.log_every", "must be at least 1"),
    ("evaluation.steps=[4, 1]", "evaluation.steps", "must be rising numbers"),
    ("evaluation.steps=[]", "evaluation.steps", "must be rising numbers"),
    ("data.samples=1", "data.samples", "must be at least 4"),
    ("objective.times.diagonal=2", "objective.times.diagonal", "must be in [0, 1], got 2.0"),
    ("student.network.width=0", "student.network.width", "must be at least 1"),
    ("teacher.stds=[[1, 1, 0], [1, 1, 1]]", "teacher.stds", "be above 0"),
    ("name=a/b", "name", "must be usable as the name of a folder, got 'a/b'"),
    ("name=..", "name", "must be usable as the name of a folder"),
]


@pytest.mark.parametrize(("override", "key", "reason"), LEAVES, ids=[leaf[0] for leaf in LEAVES])
def test_wrong_values_are_told_with_key_and_reason(override: str, key: str, reason: str, untouched: Path) -> None:
    base = written(untouched, complete("toy/lagrangian"))
    found = [message for message in problems(base, override) if f": {key}: " in message]
    assert found
    assert found[0].startswith(f"override {override!r}: {key}: ")
    assert reason in found[0]


ONLY = [leaf for leaf in LEAVES if leaf[0] != "trainer.steps=0" and not leaf[0].startswith("teacher")]


@pytest.mark.parametrize(("override", "key", "reason"), ONLY, ids=[leaf[0] for leaf in ONLY])
def test_one_wrong_value_is_one_problem(override: str, key: str, reason: str, untouched: Path) -> None:
    assert len(problems(written(untouched, complete("toy/lagrangian")), override)) == 1


def test_a_wrong_teacher_is_one_problem(untouched: Path) -> None:
    """What depends on a section that could not be built is not complained of."""
    (message,) = problems(written(untouched, complete("toy/lagrangian")), "teacher.stds=[[1, 1, 0], [1, 1, 1]]")
    assert "teacher.stds" in message


@pytest.mark.parametrize(("key", "value"), [("steps", "many"), ("batch", 0), ("lr", -1)])
def test_a_wrong_value_in_a_file_has_its_line(key: str, value: Any, untouched: Path) -> None:
    file = written(untouched, set_in(complete("toy/lagrangian"), ("trainer", key), value))
    line = [text.strip() for text in file.read_text().splitlines()].index(f"{key}: {value}") + 1
    (message,) = problems(file)
    assert message.startswith(f"{file}:{line}: trainer.{key}: must be")


def test_a_run_shorter_than_its_warm_up_is_a_recipe() -> None:
    assert load("toy/lagrangian", ["trainer.steps=100"]).trainer.steps == 100


def test_several_problems_are_told_at_once(untouched: Path) -> None:
    file = untouched / "a.yaml"
    file.write_text(
        "name: a\n"
        "sed: 3\n"
        "teacher: {name: mixtur}\n"
        "objective: {name: lagrangian, times: {name: uniform_triangle, diagonal: 3}}\n"
        "data: {name: teacher_law}\n"
        "data: {name: teacher_law}\n"
        "trainer: {stpes: 3, lr: fast, ema: 2}\n"
        "tracking: {log_every: 0, wandb: maybe}\n"
    )
    found = problems(file, "evaluation.batch=0", "oops")
    for expected in (
        f"{file}:2: sed: unknown key, did you mean 'seed'?",
        f"{file}:3: teacher.name: must be one of {', '.join(TEACHERS)}, got 'mixtur', did you mean 'mixture'?",
        f"{file}:4: objective.times.diagonal: must be in [0, 1]",
        f"{file}:6: data: given twice (first on line 5)",
        f"{file}:7: trainer: the key 'steps' is missing (an integer)",
        f"{file}:7: trainer.stpes: unknown key, did you mean 'steps'?",
        f"{file}:7: trainer.lr: must be a number",
        f"{file}:8: tracking.log_every: must be at least 1",
        f"{file}:8: tracking.wandb: must be one of auto, online, offline, disabled, got 'maybe'",
        "override 'evaluation.batch=0': evaluation.batch: must be at least 1, got 0",
        "override 'oops': cannot be read",
    ):
        assert any(message.startswith(expected) for message in found), expected
    assert len(found) == len(set(found))
    lines = [int(m.split(":")[1]) for m in found if m.startswith(str(file))]
    assert lines == sorted(lines)


def test_ranges_are_told_although_another_section_is_wrong() -> None:
    found = problems("toy/lagrangian", "name=a/b", "trainer.steps=many")
    assert any("name: must be usable as the name of a folder" in message for message in found)
    assert any("trainer.steps: must be an integer" in message for message in found)


def test_missing_sections_are_told_together(untouched: Path) -> None:
    file = untouched / "a.yaml"
    file.write_text("seed: 1\n")
    found = problems(file)
    for name in ("name", "objective", "trainer"):
        assert any(f"{file}:1: the key '{name}' is missing" in message for message in found)


@pytest.mark.parametrize(
    "override",
    ["objective.name=[1]", "objective={name: {a: 1}}", "trainer={1: 2}", "{a: 1}=3", "student.network=[mlp]"],
)
def test_odd_values_are_problems_and_no_crash(override: str) -> None:
    assert problems("toy/lagrangian", override)
