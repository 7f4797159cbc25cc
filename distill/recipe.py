"""A recipe: the schema of a whole job, checked leaf by leaf with every problem collected, saved with nothing left open.

The schema is the dataclasses themselves: a section is one, its keys are the fields, its defaults the defaults. Where a
table offers a choice (OBJECTIVES, TEACHERS, ...) the key `name` picks the dataclass. omegaconf converts the values and
resolves ``${...}``; range checks are the dataclasses' own.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.cautions import tamed
from distill.contradictions import contradictions
from distill.data import DATA, DataConfig
from distill.evaluation.config import EvaluationConfig
from distill.guidance import Guidance
from distill.objectives import OBJECTIVES
from distill.objectives.base import Objective
from distill.objectives.times import TIMES
from distill.parameterisation import PARAMETERISATIONS
from distill.recipe_files import Key, Problem, RecipeError, Tree, find, names, read, suggest
from distill.student import StudentConfig
from distill.training.config import TrackingConfig, TrainerConfig
from teachers.adapters import TEACHERS, TeacherConfig
from teachers.errors import InputError
from teachers.families import WEIGHTS
from teachers.fields import FieldError, require
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
    checker = _Checker(read(str(recipe), overrides, text), objectives or {})
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
    checker = _Checker(read(f"teacher {name}", words, f"teacher: {{name: {name}}}"), {})
    alone = checker.section(_TeacherAlone, checker.values, ())
    if alone is None or checker.problems:
        raise RecipeError(checker.problems)
    assert isinstance(alone, _TeacherAlone)
    return alone.teacher


_REFERENCES = re.compile(r"(?:[^$]|\$(?!\{)|\$\{[\w.]+\})*", re.DOTALL)


class _Checker:
    """Walks the values beside the dataclasses; whatever is wrong becomes a Problem and the walk goes on."""

    def __init__(self, tree: Tree, objectives: Mapping[str, type[Objective]]) -> None:
        self.tree = tree
        self.problems = list(tree.problems)
        self.sections: dict[str, Any] = {}  # the recipe's sections that are right, also when others are not
        self.tables = (*_TABLES[1:], {**OBJECTIVES, **objectives})
        self.unresolved: set[Key] = set()
        readable = self._leaves(tree.values, (), self._readable)
        self.values = self._leaves(readable, (), lambda value, key: self._resolved(value, key, readable))

    def _leaves(self, value: Any, key: Key, change: Callable[[Any, Key], Any]) -> Any:
        """`value` with every leaf that refers to another key changed."""
        if isinstance(value, dict):
            return {k: self._leaves(v, (*key, k), change) for k, v in value.items()}
        return change(value, key) if "${" in str(value) else value

    def _readable(self, value: Any, key: Key) -> Any:
        if _REFERENCES.fullmatch(str(value)):
            return value
        return self._unresolvable(
            key, f"cannot be resolved: a reference to another key is ${{section.key}}, got {value!r}"
        )

    def _resolved(self, value: Any, key: Key, values: dict[str, Any]) -> Any:
        try:
            config: Any = OmegaConf.create(values)
            for part in key:
                config = config[part]
            return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
        except OmegaConfBaseException as error:
            return self._unresolvable(key, f"cannot be resolved: {error}".splitlines()[0])

    def _unresolvable(self, key: Key, message: str) -> None:
        self.problem(key, message)
        self.unresolved.add(key)

    def problem(self, key: Key, message: str) -> None:
        """Note what is wrong with a key."""
        self.problems.append(Problem(self.tree.place(key), ".".join(map(str, key)), message))

    def section(self, cls: type, values: Any, key: Key, *, named: bool = False) -> Any:
        """An instance of the dataclass `cls`, or None after noting why not. `named`: `name` chose the class."""
        if not isinstance(values, dict):
            self.problem(key, f"must be a section (a mapping of keys), got {values!r}")
            return None
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        hints = typing.get_type_hints(cls)
        for name in values.keys() - fields.keys() - ({"name"} if named else set()):
            allowed = ", ".join(fields) or "none beside name"
            self.problem((*key, str(name)), f"unknown key{suggest(str(name), fields)} (allowed here: {allowed})")
        arguments: dict[str, Any] = {}
        complete = True
        for name, spec in fields.items():
            if name in values:
                good, arguments[name] = self._value(hints[name], values[name], (*key, name), spec)
                if good:
                    continue
                del arguments[name]
            elif _has_default(spec):
                continue
            else:
                self.problem(key, f"the key {name!r} is missing ({_describe(hints[name])})")
            complete = False
        if cls is Recipe:
            defaults = {f.name: _default(f) for f in fields.values() if f.name not in values and _has_default(f)}
            self.sections = {**defaults, **arguments}
        missing = {f.name: _stand_in(hints[f.name]) for f in fields.values() if not _has_default(f)}
        return self._construct(cls, {**missing, **arguments}, key, complete)

    def _construct(self, cls: type, arguments: dict[str, Any], key: Key, complete: bool) -> Any:
        # where a value did not convert another stands in, so that the ranges of the others are still checked
        try:
            built = cls(**arguments)
        except FieldError as error:
            for name, text in error.problems.items():
                self.problem((*key, name), text)
            return None
        except (TypeError, AttributeError, ValueError) as error:
            if complete:
                self.problem(key, str(error))
            return None  # otherwise a stand-in does not fit, and what it stands for was told already
        return built if complete else None

    def _value(self, hint: Any, value: Any, key: Key, spec: dataclasses.Field[Any]) -> tuple[bool, Any]:
        if key in self.unresolved:
            return False, None
        optional, hint = _without_none(hint)
        if value is None:
            if not optional:
                self.problem(key, f"must be {_describe(hint)}, got null")
            return optional, None
        table = self._table(hint)
        if table is not None:
            usual = type(_default(spec)) if _has_default(spec) else hint
            named = not isinstance(value, dict) or "name" in value or usual in table.values()
            if not named and _has_default(spec) and dataclasses.is_dataclass(usual):
                built = self.section(usual, value, key)  # an own objective's default of an own class, in no table
            else:
                built = self._choice(table, value, key, usual)
            return built is not None, built
        if dataclasses.is_dataclass(hint):
            built = self.section(typing.cast(type, hint), value, key)
            return built is not None, built
        item = next(iter(typing.get_args(hint)), None)
        if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item):
            if not isinstance(value, list):
                self.problem(key, f"must be a list of sections, got {value!r}")
                return False, None
            items = [self.section(typing.cast(type, item), v, (*key, str(n))) for n, v in enumerate(value)]
            return all(built is not None for built in items), tuple(items)
        try:
            return True, _convert(hint, value)
        except (OmegaConfBaseException, ValueError):
            words = [str(word) for word in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
            self.problem(key, f"must be {_describe(hint)}, got {value!r}{suggest(str(value), words)}")
            return False, None

    def _table(self, hint: Any) -> Mapping[str, type] | None:
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for table in self.tables:
            if any(isinstance(m, type) and issubclass(entry, m) for m in members for entry in table.values()):
                return table
        return None

    def _choice(self, table: Mapping[str, type], value: Any, key: Key, usual: Any) -> Any:
        """The entry of `table` that ``value["name"]`` chooses; without a name, the `usual` class."""
        known = ", ".join(table)
        names = [name for name, cls in table.items() if cls is usual]
        if not isinstance(value, dict) or ("name" not in value and not names):
            self.problem(key, f"must be a section with the key 'name' (one of {known}), got {value!r}")
            return None
        name = value.get("name", *names)
        if not isinstance(name, str) or name not in table:
            self.problem((*key, "name"), f"must be one of {known}, got {name!r}{suggest(str(name), table)}")
            return None
        return self.section(table[name], value, key, named=True)


def _has_default(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is not MISSING or spec.default_factory is not MISSING


def _stand_in(hint: Any) -> Any:
    return {int: 1, float: 1.0, str: "x"}.get(hint)


def _default(spec: dataclasses.Field[Any]) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


@cache
def _leaf(hint: Any) -> type:
    return dataclasses.make_dataclass("Leaf", [("value", hint)])


def _convert(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, by omegaconf. Raises OmegaConfBaseException, or ValueError for a nested mapping."""
    leaf = OmegaConf.structured(_leaf(hint))
    OmegaConf.update(leaf, "value", value)
    return OmegaConf.to_object(leaf).value  # type: ignore[union-attr]


def _without_none(hint: Any) -> tuple[bool, Any]:
    if not isinstance(hint, types.UnionType) and typing.get_origin(hint) is not typing.Union:
        return False, hint
    members = [m for m in typing.get_args(hint) if m is not type(None)]
    rest = members[0]
    for member in members[1:]:
        rest = rest | member
    return len(members) < len(typing.get_args(hint)), rest


def _describe(hint: Any) -> str:
    optional, hint = _without_none(hint)
    if typing.get_origin(hint) is Literal:
        text = "one of " + ", ".join(map(str, typing.get_args(hint)))
    elif typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        text = f"a list of {count}{_plural(_describe(inner[0]))}"
    elif hint in (int, float, str, bool):
        text = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[hint]
    else:
        text = "a section"
    return f"{text} or null" if optional else text


def _plural(text: str) -> str:
    noun, of, rest = text.removeprefix("a ").removeprefix("an ").partition(" of ")
    return f"{noun}s{of}{rest}"


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
            if not (_has_default(spec) and own == _default(spec)):
                entry[spec.name] = changed(own)
        return {"name": _name(value, {}) or type(value).__name__, **entry}
    return [changed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _name(value: object, own: Mapping[str, type[Objective]]) -> str | None:
    """What chooses this class in a recipe; an objective in no table goes by the name of its class."""
    names = (name for table in (own, *_TABLES) for name, cls in table.items() if cls is type(value))
    return next(names, type(value).__name__ if isinstance(value, Objective) else None)
