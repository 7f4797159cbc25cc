"""A recipe: the schema of a whole job, checked leaf by leaf with every problem collected, saved with nothing left open.

The schema is the dataclasses themselves: a section is one, its keys are the fields, its defaults the defaults. Where a
table offers a choice (OBJECTIVES, TEACHERS, ...) the key `name` picks the dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from distill.cautions import tamed
from distill.contradictions import contradictions
from distill.data import DATA, DataConfig
from distill.evaluation.config import EvaluationConfig
from distill.guidance import Guidance
from distill.objectives import OBJECTIVES
from distill.objectives.base import Objective
from distill.objectives.times import TIMES
from distill.parameterisation import PARAMETERISATIONS
from distill.recipe_check import Checker, default, has_default
from distill.recipe_files import Key, RecipeError, find, names, read, suggest
from distill.student import StudentConfig
from distill.training.config import TrackingConfig, TrainerConfig
from teachers.adapters import TEACHERS, TeacherConfig
from teachers.errors import InputError
from teachers.families import WEIGHTS
from teachers.fields import require
from teachers.networks import NETWORKS
from teachers.velocity import Teacher


@dataclass(frozen=True, kw_only=True)
class About:
    """For `distill ls`: what the recipe does, what it costs and what came out when it was measured."""

    summary: str = ""
    cost: str = ""
    result: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """weights: the averaged (ema) or the raw ones; licence: of the exported weights, null for the teacher's."""

    weights: Literal["ema", "raw"] = "ema"
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole job. name: of the run folder runs/<name>; seed: of all training randomness."""

    name: str
    seed: int = 0
    about: About = field(default_factory=About)
    teacher: TeacherConfig | None = None
    student: StudentConfig = field(default_factory=StudentConfig)
    objective: Objective
    guidance: Guidance | None = None
    data: DataConfig | None = None
    trainer: TrainerConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        plain = self.name.isprintable() and not set(self.name) & set('/\\:*?"<>|') and self.name == self.name.strip()
        fits = 1 <= len(self.name.encode("utf-8", "replace")) <= 200
        require(
            self,
            name=(plain and fits and not self.name.startswith("."), "must be usable as the name of a folder"),
            seed=(0 <= self.seed < 2**63, "must be in [0, 2^63)"),
        )

    def to_yaml(self, objectives: Mapping[str, type[Objective]] | None = None) -> str:
        """Every value written out: a recipe that runs this job again. `objectives`: the user's own, by name. Raises
        InputError for a value that YAML has no word for."""
        return yaml.safe_dump(_plain(self, objectives or {}), sort_keys=False, width=120)


_TABLES: tuple[Mapping[str, type], ...] = (OBJECTIVES, TIMES, TEACHERS, NETWORKS, DATA, PARAMETERISATIONS)


def load(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    teacher: Teacher | None = None,
    objectives: Mapping[str, type[Objective]] | None = None,
    text: str | None = None,
) -> Recipe:
    """The recipe of a file or shipped name, checked whole. `teacher` and `objectives` are what was passed from Python
    beside it; `text` is the recipe itself, if `recipe` is only where it was found. Raises RecipeError with every
    problem found."""
    for name, cls in (objectives or {}).items():
        if not (isinstance(cls, type) and issubclass(cls, Objective) and dataclasses.is_dataclass(cls)):
            raise InputError(f"objectives[{name!r}] must be a dataclass that extends distill.Objective, got {cls!r}")
    tables = (*_TABLES[1:], {**OBJECTIVES, **(objectives or {})})
    checker = Checker(read(str(recipe), overrides, text), tables)
    loaded = checker.section(Recipe, checker.values, ())
    for key, text in contradictions(checker.sections, teacher):
        checker.problem(key, text)
    if loaded is None or checker.problems:
        raise RecipeError(sorted(set(checker.problems), key=lambda p: (p.place.line == 0, p.place.file, p.place.line)))
    assert isinstance(loaded, Recipe)
    return loaded if "tangent" in checker.values["objective"] else tamed(loaded, teacher)


@dataclass(frozen=True, kw_only=True)
class _TeacherAlone:
    teacher: TeacherConfig


def load_teacher(name: str, overrides: Sequence[str] = ()) -> TeacherConfig:
    """The teacher of a recipe, or of a family by its name and ``key=value`` words. Raises RecipeError."""
    if name not in TEACHERS:
        if find(name) is None and any(folder.is_dir() for folder in (Path(name).expanduser(), WEIGHTS / name)):
            raise InputError(f"{name}: is a teacher's folder, no recipe: give it to its family (see distill ls "
                             f"--teachers), as in distill teachers info native path={name}")  # fmt: skip
        if find(name) is None:
            raise InputError(f"{name}: is no family of teachers{suggest(name, [*TEACHERS, *names()])} (see distill ls "
                             "--teachers), nor a shipped recipe (see distill ls) or a file")  # fmt: skip
        found = load(name, overrides).teacher
        if found is None:
            raise InputError(f"{name}: has no teacher")
        return found
    words = [f"teacher.{word}" for word in overrides]
    checker = Checker(read(f"teacher {name}", words, f"teacher: {{name: {name}}}"), _TABLES)
    alone = checker.section(_TeacherAlone, checker.values, ())
    if alone is None or checker.problems:
        raise RecipeError(checker.problems)
    assert isinstance(alone, _TeacherAlone)
    return alone.teacher


def _plain(value: Any, own: Mapping[str, type[Objective]], key: Key = ()) -> Any:
    if dataclasses.is_dataclass(value):
        kept = [f.name for f in dataclasses.fields(value) if f.init]
        entry = {name: _plain(getattr(value, name), own, (*key, name)) for name in kept}
        name = _name(value, own)
        return {"name": name, **entry} if name else entry
    if isinstance(value, dict):
        return {k: _plain(v, own, (*key, str(k))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, own, (*key, str(n))) for n, v in enumerate(value)]
    if value is not None and type(value) not in (bool, int, float, str):
        raise InputError(f"{'.'.join(key)}: a {type(value).__name__} cannot be written to a recipe, got {value!r}")
    return value


def changed(value: Any) -> Any:
    """`value` as plain data, of a dataclass its kind and the fields that differ from their defaults."""
    if dataclasses.is_dataclass(value):
        entry = {}
        for spec in dataclasses.fields(value):
            own = getattr(value, spec.name)
            if not (has_default(spec) and own == default(spec)):
                entry[spec.name] = changed(own)
        return {"name": _name(value, {}) or type(value).__name__, **entry}
    return [changed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _name(value: object, own: Mapping[str, type[Objective]]) -> str | None:
    """What chooses this class in a recipe; an objective in no table goes by the name of its class."""
    names = (name for table in (own, *_TABLES) for name, cls in table.items() if cls is type(value))
    return next(names, type(value).__name__ if isinstance(value, Objective) else None)
