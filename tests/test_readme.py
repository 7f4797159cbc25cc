"""README and docs: what they show runs, what they link to exists, what they list is all there is."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, data_in, environment, logged, problems

from distill.cli import _parser
from distill.data import DATA
from distill.guidance import Guidance
from distill.objectives import OBJECTIVES
from distill.objectives.endpoint import Pairs
from distill.objectives.guidance import OwnGuidance
from distill.objectives.pieces import Tangent
from distill.objectives.times import TIMES
from distill.objectives.weights import Weight
from distill.parameterisation import PARAMETERISATIONS, Parameterisation
from distill.recipe import Recipe
from distill.recipe_files import names
from teachers.adapters import TEACHERS
from teachers.adapters.base import Foreign
from teachers.fill import Placement
from teachers.networks import NETWORKS
from teachers.space import Latent

DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(file: Path, language: str) -> list[str]:
    """The fenced blocks of a language, '' for those of none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(file: Path) -> list[list[str]]:
    """Every command line that starts with distill: of blocks without a language, comments and columns cut off."""
    lines = [line.partition("#")[0] for block in blocks(file, "") for line in block.splitlines()]
    return [shlex.split(re.split(r"\s{2,}", line)[0]) for line in lines if line.startswith("distill ")]


def test_there_is_something_to_look_at() -> None:
    assert len(DOCS) >= 5
    assert len(commands(ROOT / "README.md")) >= 9
    assert len(blocks(ROOT / "README.md", "python")) == 2 and len(blocks(ROOT / "docs" / "python.md", "python")) == 2


# --- commands


@pytest.mark.parametrize("line", [" ".join(c) for file in DOCS for c in commands(file)])
def test_commands_parse(line: str, cwd: Path) -> None:
    arguments = shlex.split(line)[1:]
    arguments = [a.strip("[]") for a in arguments]  # optional in a synopsis
    parsed = _parser().parse_args(arguments)
    assert callable(parsed.command)
    if arguments[0] in ("run", "validate"):
        overrides = [word.replace("FOLDER", str(cwd)) for word in parsed.overrides]
        assert problems(parsed.recipe, *data_in(cwd, parsed.recipe), *overrides) == []


def test_every_verb_is_shown() -> None:
    shown = {c[1] for c in commands(ROOT / "README.md")}
    verbs = next(a for a in _parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict)).choices
    assert shown == set(verbs or ())


def test_commands_in_sentences_parse_too(cwd: Path) -> None:
    found = 0
    for file in (*DOCS, *(ROOT / "recipes").rglob("*.yaml")):
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for line in re.findall(r"`(distill [^`]+)`|^#\s+(distill [^#\n]+?)(?:\s{2,}.*)?$", text, re.MULTILINE):
            arguments = shlex.split("".join(line))[1:]
            if not any(a.isupper() for a in arguments) and arguments[0] != "ls" and "--help" not in arguments:
                parsed = _parser().parse_args(arguments)
                if hasattr(parsed, "overrides"):
                    assert problems(parsed.recipe, *data_in(cwd, parsed.recipe), *parsed.overrides) == []
                found += 1
    assert found >= 5


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {word for file in DOCS for word in re.findall(r"\bmake ([a-z-]+)", file.read_text(encoding="utf-8"))
             if f"make {word}" in "".join(blocks(file, "")) or f"`make {word}" in file.read_text()}  # fmt: skip
    assert {"quickstart", "test", "check"} <= shown <= targets


def test_exit_codes_are_those_of_the_code() -> None:
    from distill import cli, job  # noqa: F401

    said = " ".join(README.split())
    assert "0 done, 2 bad input (nothing was started), 130, 138 and 143 stopped by a signal" in said
    assert (cli.BAD_INPUT, cli.DIVERGED) == (2, 78) and "78 stopped because training diverged" in said


# --- examples


def test_the_example_of_docs_python_runs(cwd: Path) -> None:
    code = blocks(ROOT / "docs" / "python.md", "python")[0]
    (cwd / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:distill", "example.py"],
        capture_output=True, text=True, env=environment(), check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    distance = float(done.stdout.splitlines()[-1].removeprefix("distance to the exact map:"))
    assert distance < 0.3  # of points about 1 from the origin, which the identity would leave at 2
    assert (cwd / "runs" / "half-circle" / "report.html").is_file()


def test_the_example_of_a_network_of_ones_own_runs(cwd: Path) -> None:
    (cwd / "example.py").write_text(blocks(ROOT / "docs" / "python.md", "python")[1])
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:distill", "example.py"],
        capture_output=True, text=True, env=environment(WANDB_MODE="disabled"), check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    distance = float(done.stdout.splitlines()[-1].removeprefix("distance to the teacher's samples:"))
    assert distance < 0.1
    card = (cwd / "runs" / "of-my-net" / "export" / "README.md").read_text()
    assert 'distill.load("this/folder", network=MyNet(...))' in card


def test_the_readmes_use_of_an_export_runs(digits_run: Path, cwd: Path) -> None:
    import torch

    code = blocks(ROOT / "README.md", "python")[0].replace("runs/quickstart/export", str(digits_run / "export"))
    labels = torch.tensor([0, 1])
    found: dict[str, Any] = {"labels": labels, "x_s": torch.randn(2, 1, 8, 8), "s": torch.zeros(2), "t": torch.ones(2)}
    exec(code, found)
    assert found["x"].shape == (16, 1, 8, 8) and str(found["x"].dtype) == "torch.float32"
    assert found["threes"].shape == (8, 1, 8, 8)
    assert found["pixels"].dtype is torch.uint8
    assert found["x_t"].shape == (2, 1, 8, 8)


def test_the_readmes_python_runs(cwd: Path) -> None:
    import torch
    from test_job import PLANE, OneStep

    code = blocks(ROOT / "README.md", "python")[1]
    recipe = {
        "name": "mine",
        "student": {"init": "random", "network": {"name": "mlp", "width": 8, "depth": 1}},
        "objective": {"name": "mine"},
        "trainer": {"steps": 5, "batch": 8},
        "evaluation": {"samples": 20, "reference_steps": 2},
        "tracking": {"wandb": "disabled"},
    }
    (cwd / "my-recipe.yaml").write_text(yaml.safe_dump(recipe))
    torch.manual_seed(0)
    exec(code.replace("trainer.steps=500", "trainer.steps=6"), {"my_velocity": PLANE.velocity, "MyObjective": OneStep})
    assert (cwd / "runs" / "mine" / "checkpoints" / "step-00000006").is_dir()


def test_the_readmes_recipe_is_valid(cwd: Path) -> None:
    (text,) = blocks(ROOT / "README.md", "yaml")
    (cwd / "mine.yaml").write_text(text)
    assert problems(cwd / "mine.yaml") == []


# --- links


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_links_lead_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (file.parent / target.partition("#")[0]).exists(), target
    for target in re.findall(r"`((?:distill|teachers|recipes|docs|tests)/[\w./-]+)`", text):
        assert target in names() or (ROOT / target).exists(), target


def test_arxiv_links_say_what_they_link() -> None:
    found = re.findall(r"\[([^\]]+)\]\(https://arxiv\.org/abs/([^)]+)\)", README)
    assert len(found) >= 3 and all(label == target for label, target in found)


def test_nothing_was_left_to_fill_in() -> None:
    for file in DOCS:
        assert not re.findall(r"\b(TODO|FIXME|XXX|RESULT_TABLE|[A-Z]+_TABLE)\b", file.read_text(encoding="utf-8"))


# --- tables


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    first = next(i for i, line in enumerate(text.splitlines()) if line.startswith("|"))
    count = next((i for i, line in enumerate(text.splitlines()[first:]) if not line.startswith("|")), len(lines))
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:count]]
    return [dict(zip(head, row, strict=True)) for row in body]


def test_every_objective_has_a_row() -> None:
    found = {row["objective"].strip("`"): row for row in table(README.partition("## Objectives")[2])}
    assert found.keys() == OBJECTIVES.keys()
    for name, row in found.items():
        file = OBJECTIVES[name].__module__.replace(".", "/") + ".py"
        assert f"]({file})" in row["file"]
        recipes = re.findall(r"`([^`]+)`", row["recipe"])
        assert recipes and set(recipes) <= set(names())
        papers = re.findall(r"abs/([\d.]+)", row["paper"])
        text = (ROOT / file).read_text()
        assert papers and all(paper in text for paper in papers), f"{name}: {papers}"


RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = {
    part.partition("\n")[0]: part.partition("\n")[2] for part in re.split(r"^###? ", RECIPES, flags=re.MULTILINE)
}


def shown(value: Any) -> str:
    """A default as YAML writes it on one line."""
    if value == "":
        return "empty"
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, Parameterisation):
        return next(name for name, cls in PARAMETERISATIONS.items() if cls is type(value))
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


def test_every_key_of_every_section_is_listed_with_its_default() -> None:
    hints = typing.get_type_hints(Recipe)
    plain = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) or hint in (str, int)}
    top = table(RECIPES)
    assert [row["key"].strip("`") for row in top] == [name for name, hint in plain.items() if hint in (str, int)]
    checked = 0
    for name, hint in plain.items():
        if not dataclasses.is_dataclass(hint) or name == "objective":
            continue
        listed = {row["key"].strip("`"): row["default"].strip("`") for row in table(SECTIONS[name])}
        fields = {f.name: f for f in dataclasses.fields(hint)}
        assert list(listed) == list(fields)
        for key, spec in fields.items():
            value = default(spec)
            expected = "required" if value is dataclasses.MISSING else shown(value)
            assert listed[key] == expected or float(listed[key]) == value, (name, key)
            checked += 1
    assert checked >= 30
    assert set(SECTIONS) - {"# Recipes: every key"} >= set(hints) - {"name", "seed"}


def members(hint: Any) -> set[type]:
    found = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {m for m in found if m is not type(None)}


@pytest.mark.parametrize(
    ("section", "entries"),
    [("teacher", TEACHERS), ("objective", OBJECTIVES), ("times", TIMES), ("data", DATA)],
    ids=["teacher", "objective", "times", "data"],
)
def test_every_choice_is_listed_with_its_keys(section: str, entries: dict[str, type]) -> None:
    listed = {row["name"].strip("`"): re.findall(r"`(\w+)`", row["keys"]) for row in table(SECTIONS[section])}
    assert listed.keys() == entries.keys()
    for name, cls in entries.items():
        shared = {"weight"} | ({f.name for f in dataclasses.fields(Foreign)} if issubclass(cls, Foreign) else set())
        assert sorted(listed[name]) == sorted(f.name for f in dataclasses.fields(cls) if f.name not in shared), name


def test_what_teachers_of_files_share_is_named() -> None:
    for f in (*dataclasses.fields(Foreign), *dataclasses.fields(Placement), *dataclasses.fields(Latent)):
        assert f"`{f.name}`" in SECTIONS["teacher"], f.name
    assert len(dataclasses.fields(Foreign)) >= 3


@pytest.mark.parametrize(("section", "cls"), [("guidance", Guidance), ("weight", Weight)])
def test_pieces_are_listed_with_their_defaults(section: str, cls: type) -> None:
    listed = {row["key"].strip("`"): row["default"].strip("`") for row in table(SECTIONS[section])}
    assert listed == {f.name: shown(default(f)) for f in dataclasses.fields(cls)}


def test_pieces_of_objectives_are_named() -> None:
    for cls in (Tangent, Pairs, OwnGuidance):
        for f in dataclasses.fields(cls):
            assert f"`{f.name}`" in SECTIONS["objective"], f.name


def test_networks_and_parameterisations_are_named() -> None:
    for name, form in PARAMETERISATIONS.items():
        assert f"`{name}`" in SECTIONS["student"]
        for f in dataclasses.fields(form):
            assert f"`{f.name}`" in SECTIONS["student"]
    for name, network in NETWORKS.items():
        assert f"`name: {name}`" in SECTIONS["student"]
        for f in dataclasses.fields(network):
            assert f"`{f.name}`" in SECTIONS["student"]
    of_triangle = {f.name: default(f) for f in dataclasses.fields(TIMES["uniform_triangle"])}
    stated = {
        name: float(value)
        for row in table(SECTIONS["times"])
        for name, value in re.findall(r"`(\w+)` \(([\d.]+)\)", row["meaning"])
    }
    assert stated == of_triangle


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_of_docs_adding_learns(cwd: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "adding.md", "python")
    (cwd / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:distill", "example.py"],
        capture_output=True, text=True, env=environment(WANDB_MODE="disabled"), check=False, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = eval(done.stdout.splitlines()[-1])
    assert metrics["exact_rmse"] < 0.3  # one Euler step of the teacher: 1.19
    assert {"loss", "back"} <= set(logged(cwd / "runs" / "round-trip")[-1])
