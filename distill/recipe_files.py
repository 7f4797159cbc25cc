"""Recipe files: YAML with `extends`, and where each value was written. Free of torch, so that `distill ls` is instant.

A recipe extends at most one other, named like a shipped recipe (``quickstart``) or by a path beside the file. Sections
are merged key by key; one whose `name` changes is replaced whole, since its other keys belonged to the other name.
`about` is not passed on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from teachers.errors import InputError

_ROOT = Path(__file__).resolve().parent
RECIPES = next(p for p in (_ROOT / "recipes", _ROOT.parent / "recipes") if p.is_dir())
"""The shipped recipes: inside the package in a wheel, beside it in a checkout."""

Key = tuple[str, ...]
_TOO_DEEP = "nested too deeply, or an anchor refers to itself"


@dataclass(frozen=True)
class Place:
    """Where something was written: a file and a line from 1, or an override given on the command line."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where, under which key, what and what to do."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


class RecipeError(InputError):
    """Everything that is wrong with a recipe, at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))
        if len(problems) > 1:
            self.add_note(f"{len(problems)} problems; nothing was started")


@dataclass
class Tree:
    """A recipe's values as written, the place of each key, and what was wrong with the writing itself."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key) -> Place:
        """Where `key`, or else the nearest section around it, was written."""
        key = tuple(map(str, key))
        while key and key not in self.places:
            key = key[:-1]
        return self.places[key]


def suggest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def names() -> list[str]:
    """The shipped recipes."""
    return sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))


def find(name: str, beside: Path | None = None) -> Path | None:
    """The file of a recipe given as a path (also relative to the folder `beside`) or as a shipped name."""
    written = Path(name).expanduser()
    candidates = [written, *([beside / written] if beside else []), RECIPES / f"{name}.yaml"]
    return next((p for p in candidates if p.is_file()), None)


def read(name: str, overrides: Sequence[str] = (), text: str | None = None) -> Tree:
    """The merged tree of a recipe and ``key.path=value`` overrides; malformed overrides and keys given twice are in its
    `problems`. text: the recipe itself, if `name` is only where it was found. Raises RecipeError if a file is missing
    or not YAML, or `extends` runs in a circle."""
    file = find(name) if text is None else Path(name)
    if file is None:
        known = names()
        raise RecipeError([Problem(Place(name), "", f"no such file, nor a shipped recipe{suggest(name, known)} "
                                                    f"(shipped: {', '.join(known)})")])  # fmt: skip
    tree = _read_file(file, (), text)
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            if not equals or not all(key.split(".")):
                raise ValueError("an override is key.path=value")
            value = _worded(yaml.safe_load(text))
        except (ValueError, yaml.YAMLError) as error:
            tree.problems.append(Problem(Place(f"override {override!r}"), "", f"cannot be read: {error}"))
            continue
        for part in reversed(key.split(".")):
            value = {part: value}
        place = Place(f"override {override!r}")
        tree = _merge(tree, Tree(value, dict.fromkeys(_keys(value), place)))
    return tree


def _worded(value: Any) -> Any:
    """With every key as it is written: YAML reads the key null as nothing."""
    if isinstance(value, list):
        return [_worded(item) for item in value]
    return {"null" if k is None else k: _worded(v) for k, v in value.items()} if isinstance(value, dict) else value


def _keys(values: Any, above: Key = ()) -> Iterable[Key]:
    yield above
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _keys(value, (*above, str(key)))


def _read_file(file: Path, children: tuple[Path, ...], text: str | None = None) -> Tree:
    if file.resolve() in children:
        circle = " -> ".join(str(p.name) for p in (*children, file))
        raise RecipeError([Problem(Place(str(file), 1), "extends", f"runs in a circle: {circle}")])
    try:
        root = yaml.compose(file.read_text(encoding="utf-8") if text is None else text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise RecipeError(
            [Problem(Place(str(file), line), "", f"not valid YAML: {getattr(error, 'problem', error)}")]
        ) from None
    except RecursionError:
        raise RecipeError([Problem(Place(str(file), 1), "", _TOO_DEEP)]) from None
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError([Problem(Place(str(file), 1), "", "a recipe is a mapping of sections (see `distill ls`)")])
    tree = Tree(places={(): Place(str(file), 1)})
    try:
        tree.values = _values(root, (), str(file), tree)
    except RecursionError:
        raise RecipeError([Problem(Place(str(file), 1), "", _TOO_DEEP)]) from None
    parent = tree.values.pop("extends", None)
    if parent is None:
        return tree
    place = tree.places.pop(("extends",))
    found = find(parent, beside=file.parent) if isinstance(parent, str) else None
    if found is None:
        known = names()
        text = f"no such recipe: {parent!r}{suggest(str(parent), known)} (a path, or one of {', '.join(known)})"
        raise RecipeError([Problem(place, "extends", text)])
    above = _read_file(found, (*children, file.resolve()))
    above.values.pop("about", None)  # what another recipe costs and gives
    above.places = {key: at for key, at in above.places.items() if key[:1] != ("about",)}
    return _merge(above, tree)


def _values(node: yaml.Node, key: Key, file: str, tree: Tree) -> Any:
    if isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
        for number, item in enumerate(node.value):
            tree.places[(*key, str(number))] = Place(file, item.start_mark.line + 1)
        return [_values(item, (*key, str(number)), file, tree) for number, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        constructor = yaml.SafeLoader("")
        try:
            return constructor.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            place = Place(file, node.start_mark.line + 1)
            tree.problems.append(Problem(place, ".".join(key), f"not a plain value: {error}"))
            return None
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = Place(file, key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            tree.problems.append(Problem(place, ".".join(key), "a key must be a plain word"))
            continue
        name = str(key_node.value)
        if name in values:
            first = tree.places[(*key, name)]
            tree.problems.append(Problem(place, ".".join((*key, name)), f"given twice (first on line {first.line})"))
        tree.places[(*key, name)] = place
        values[name] = _values(value_node, (*key, name), file, tree)
    return values


def _merge(base: Tree, over: Tree) -> Tree:
    """`over` on top of `base`; the places of what `over` leaves alone stay."""
    places = dict(base.places)

    def merged(old: Any, new: Any, key: Key) -> Any:
        both = isinstance(old, dict) and isinstance(new, dict)
        if both and ("name" not in new or new["name"] == old.get("name")):
            values = {**old, **{k: merged(old.get(k), v, (*key, k)) for k, v in new.items()}}
            if key not in places:
                places[key] = over.place(key)
            return values
        for stale in [k for k in places if k[: len(key)] == key and k != ()]:
            del places[stale]
        places.update({k: p for k, p in over.places.items() if k[: len(key)] == key})
        return new

    # the recipe's own `name` is a plain key, not the name of a family
    values = {**base.values, **{k: merged(base.values.get(k), v, (k,)) for k, v in over.values.items()}}
    places[()] = over.places.get((), places[()]) if over.places[()].line else places[()]
    return Tree(values, places, base.problems + over.problems)
