"""The check of a recipe's values against its dataclasses: every leaf, with every problem collected. omegaconf converts
the values and resolves ``${...}``; range checks are the dataclasses' own."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.recipe_files import Key, Problem, Tree, suggest
from teachers.fields import FieldError

_REFERENCES = re.compile(r"(?:[^$]|\$(?!\{)|\$\{[\w.]+\})*", re.DOTALL)


class Checker:
    """Walks the values beside the dataclasses; whatever is wrong becomes a Problem and the walk goes on. tables: the
    classes that `name` chooses from."""

    def __init__(self, tree: Tree, tables: Sequence[Mapping[str, type]]) -> None:
        self.tree, self.tables = tree, tables
        self.problems = list(tree.problems)
        self.sections: dict[str, Any] = {}  # the outermost that are right, also when others are not
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
            elif has_default(spec):
                continue
            else:
                self.problem(key, f"the key {name!r} is missing ({_describe(hints[name])})")
            complete = False
        if key == ():
            defaults = {f.name: default(f) for f in fields.values() if f.name not in values and has_default(f)}
            self.sections = {**defaults, **arguments}
        missing = {f.name: _stand_in(hints[f.name]) for f in fields.values() if not has_default(f)}
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
            usual = type(default(spec)) if has_default(spec) else hint
            named = not isinstance(value, dict) or "name" in value or usual in table.values()
            if not named and has_default(spec) and dataclasses.is_dataclass(usual):
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


def has_default(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is not MISSING or spec.default_factory is not MISSING


def _stand_in(hint: Any) -> Any:
    return {int: 1, float: 1.0, str: "x"}.get(hint)


def default(spec: dataclasses.Field[Any]) -> Any:
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
