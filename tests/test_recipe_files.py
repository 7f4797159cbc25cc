"""Recipe files: what extends what, which value wins, and where each was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill import recipe_files
from distill.recipe_files import Place, RecipeError, Tree, find, names, read, suggest


def write(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return str(file)


def messages(tree: Tree) -> list[str]:
    return [str(problem) for problem in tree.problems]


# --- one file


def test_values_and_the_line_of_each_key(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "# head\nname: a\n\ntrainer:\n  steps: 10\n  betas: [0.9, 0.99]\n")
    tree = read(file)
    assert tree.values == {"name": "a", "trainer": {"steps": 10, "betas": [0.9, 0.99]}}
    lines = {("name",): 2, ("trainer",): 4, ("trainer", "steps"): 5, ("trainer", "betas"): 6}
    assert {key: tree.place(key) for key in lines} == {key: Place(file, line) for key, line in lines.items()}
    assert tree.place(("trainer", "batch", "deeper")) == Place(file, 4)  # the nearest section around what is not there
    assert tree.problems == []


def test_a_place_is_file_and_line() -> None:
    assert str(Place("a.yaml", 3)) == "a.yaml:3"
    assert str(Place("override 'a=1'")) == "override 'a=1'"


def test_keys_given_twice_are_problems_with_both_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "name: a\ntrainer:\n  steps: 1\n  lr: 2\n  steps: 3\nname: b\n")
    assert messages(read(file)) == [
        f"{file}:5: trainer.steps: given twice (first on line 3)",
        f"{file}:6: name: given twice (first on line 1)",
    ]


def test_what_is_no_plain_value_is_a_problem_and_never_executed(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", f"name: a\nx: !!python/object/apply:os.mkdir ['{tmp_path / 'evil'}']\n")
    (message,) = messages(read(file))
    assert message.startswith(f"{file}:2: x: not a plain value")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("name: a\ntrainer: [1\n", 3, "not valid YAML"),
        ("name: a\n\tb: 1\n", 2, "not valid YAML"),
        ("- a\n", 1, "a recipe is a mapping of sections"),
        ("just words\n", 1, "a recipe is a mapping of sections"),
        ("", 1, "a recipe is a mapping of sections"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    file = write(tmp_path, "a.yaml", text)
    with pytest.raises(RecipeError, match=reason) as error:
        read(file)
    (problem,) = error.value.problems
    assert problem.place == Place(file, line)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read(str(file))


# --- finding


def test_shipped_recipes_are_found_by_name() -> None:
    assert len(names()) >= 4
    assert {"quickstart", "teachers/digits", "toy/lagrangian", "toy/eulerian"} <= set(names())
    for name in names():
        file = find(name)
        assert file is not None
        assert file == recipe_files.RECIPES / f"{name}.yaml"


def test_unknown_recipes_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read("toy/lagrangan")
    assert "did you mean 'toy/lagrangian'?" in str(error.value)
    assert all(name in str(error.value) for name in names())
    with pytest.raises(RecipeError, match="no such file, nor a shipped recipe"):
        read(str(tmp_path / "nowhere.yaml"))


def test_suggest_names_the_closest_word_or_nothing() -> None:
    assert suggest("stpes", ["steps", "batch"]) == ", did you mean 'steps'?"
    assert suggest("colour", ["steps", "batch"]) == ""


# --- extends


def test_a_recipe_overrules_what_it_extends_key_by_key(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "name: base\ntrainer:\n  steps: 10\n  lr: 1\nseed: 3\n")
    file = write(tmp_path, "a.yaml", "extends: base.yaml\nname: a\ntrainer:\n  lr: 2\n  batch: 4\n")
    tree = read(file)
    assert tree.values == {"name": "a", "trainer": {"steps": 10, "lr": 2, "batch": 4}, "seed": 3}
    places = {
        ("name",): Place(file, 2),
        ("seed",): Place(base, 5),
        ("trainer", "steps"): Place(base, 3),
        ("trainer", "lr"): Place(file, 4),
        ("trainer", "batch"): Place(file, 5),
    }
    assert {key: tree.place(key) for key in places} == places
    assert tree.place(("nothing",)).file == file


def test_extends_goes_on_through_files_and_folders(tmp_path: Path) -> None:
    """Beside the file that says so, wherever one stands; or a shipped name."""
    write(tmp_path, "deep/root.yaml", "name: root\nseed: 1\ntrainer: {steps: 1}\n")
    write(tmp_path, "deep/middle.yaml", "extends: root.yaml\nseed: 2\n")
    file = write(tmp_path, "a.yaml", "extends: deep/middle.yaml\ntrainer: {batch: 2}\n")
    assert read(file).values == {"name": "root", "seed": 2, "trainer": {"steps": 1, "batch": 2}}
    shipped = write(tmp_path, "b.yaml", "extends: toy/lagrangian\nname: b\n")
    inherited = {key: value for key, value in read("toy/lagrangian").values.items() if key != "about"}
    assert read(shipped).values == inherited | {"name": "b"}


def test_what_a_recipe_costs_and_gives_is_not_passed_on(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "name: base\nabout: {summary: a, result: good}\nseed: 1\n")
    file = write(tmp_path, "a.yaml", "extends: base.yaml\nabout: {cost: little}\n")
    tree = read(file, ["about.result=none"])
    assert tree.values == {"name": "base", "seed": 1, "about": {"cost": "little", "result": "none"}}
    assert ("about", "summary") not in tree.places


def test_a_section_whose_name_changes_is_replaced(tmp_path: Path) -> None:
    """Its other keys belonged to the other name; so do their places."""
    base = "name: base\nobjective: {name: lagrangian, times: {name: uniform_triangle, diagonal: 0.5}}\n"
    write(tmp_path, "base.yaml", base)
    file = write(tmp_path, "a.yaml", "extends: base.yaml\nobjective: {name: eulerian}\n")
    tree = read(file)
    assert tree.values["objective"] == {"name": "eulerian"}
    assert tree.place(("objective", "times", "diagonal")) == Place(file, 2)
    same = write(tmp_path, "b.yaml", "extends: base.yaml\nobjective: {name: lagrangian, extra: 1}\n")
    assert read(same).values["objective"]["times"] == {"name": "uniform_triangle", "diagonal": 0.5}
    nested = write(tmp_path, "c.yaml", "extends: base.yaml\nobjective: {times: {name: uniform}}\n")
    assert read(nested).values["objective"] == {"name": "lagrangian", "times": {"name": "uniform"}}


def test_a_recipes_own_name_changes_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "name: base\nseed: 3\n")
    file = write(tmp_path, "a.yaml", "extends: base.yaml\nname: other\n")
    assert read(file).values == {"name": "other", "seed": 3}


def test_lists_are_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "evaluation: {steps: [1, 2, 4]}\n")
    file = write(tmp_path, "a.yaml", "extends: base.yaml\nevaluation: {steps: [1]}\n")
    assert read(file).values == {"evaluation": {"steps": [1]}}


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(RecipeError, match=r"extends: runs in a circle: a.yaml -> b.yaml -> a.yaml"):
        read(file)
    itself = write(tmp_path, "c.yaml", "extends: c.yaml\n")
    with pytest.raises(RecipeError, match=r"c\.yaml -> c\.yaml"):
        read(itself)


@pytest.mark.parametrize("value", ["toy/lagrangan", "nowhere.yaml", "[a, b]", "3"])
def test_extending_what_is_not_there_is_refused(tmp_path: Path, value: str) -> None:
    file = write(tmp_path, "a.yaml", f"name: a\nextends: {value}\n")
    with pytest.raises(RecipeError, match="extends: no such recipe") as error:
        read(file)
    assert error.value.problems[0].place == Place(file, 2)


def test_problems_of_every_file_are_kept(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "seed: 1\nseed: 2\n")
    file = write(tmp_path, "a.yaml", "extends: base.yaml\nname: a\nname: b\n")
    assert messages(read(file)) == [
        f"{base}:2: seed: given twice (first on line 1)",
        f"{file}:3: name: given twice (first on line 2)",
    ]


# --- overrides


def test_overrides_are_yaml_values_and_win_in_order(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "name: a\ntrainer: {steps: 1, lr: 2}\n")
    overrides = ["trainer.steps=5", "trainer.betas=[0.5, 0.6]", "seed=1", "seed=2", "about.cost=a=b", "data=null"]
    tree = read(file, overrides)
    assert tree.values["trainer"] == {"steps": 5, "lr": 2, "betas": [0.5, 0.6]}
    assert tree.values["seed"] == 2
    assert tree.values["about"] == {"cost": "a=b"}
    assert tree.values["data"] is None
    assert str(tree.place(("trainer", "steps"))) == "override 'trainer.steps=5'"
    assert tree.place(("trainer", "lr")) == Place(file, 2)
    assert str(tree.place(("about", "cost"))) == "override 'about.cost=a=b'"
    assert tree.place(()) == Place(file, 1)


def test_overriding_a_name_replaces_the_section(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "objective: {name: lagrangian, times: {name: uniform}}\n")
    assert read(file, ["objective.name=eulerian"]).values["objective"] == {"name": "eulerian"}


def test_the_key_null_is_a_word_in_files_and_in_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "teacher: {null: a.safetensors, of: [{null: b}]}\n")
    expected = {"null": "a.safetensors", "of": [{"null": "b"}]}
    assert read(file).values == {"teacher": expected}
    assert read(file, ["teacher={null: c}"]).values == {"teacher": {**expected, "null": "c"}}
    assert read(file, ["teacher.of=[{null: d}]"]).values == {"teacher": {**expected, "of": [{"null": "d"}]}}


@pytest.mark.parametrize("override", ["trainer", ".a=1", "a..b=1", "=3", "a.=1", "trainer.steps=[1", "a={"])
def test_malformed_overrides_are_problems_and_the_rest_is_read(tmp_path: Path, override: str) -> None:
    file = write(tmp_path, "a.yaml", "name: a\n")
    tree = read(file, [override, "seed=4"])
    (message,) = messages(tree)
    assert message.startswith(f"override {override!r}: cannot be read")
    assert tree.values == {"name": "a", "seed": 4}
