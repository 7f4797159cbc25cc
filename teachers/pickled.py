"""The weights in what a pickle says: tensors by name, and the plain data beside them.

Weights are a mapping of names to tensors, at any depth, or the record of a torch module. A training checkpoint holds
several; the averaged ones are taken, and what is not is listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.errors import CheckpointError
from teachers.pickle_values import Name, NotDataError, Object
from teachers.pickles import read_pickle

AVERAGED = ("ema", "ema_model", "model_ema1", "model_ema", "net_ema", "params_ema", "state_dict_ema")
RAW = ("state_dict", "model_state_dict", "model", "net_model", "net", "network", "module", "params", "weights")
_NOT_WEIGHTS = ("opt", "sched", "scaler", "rng", "lr_")  # what their names begin with
_DEEP, _LONG = 64, 300_000  # levels of nesting, and parts, more than any network has
_MUCH = 100_000  # characters: more is no description


@dataclass(frozen=True)
class Taken:
    """tensors by name; weights: which of the file's they are; about: plain data that lies beside them (class and init:
    of a module and the arguments it was made with); left: what was not taken, in words."""

    tensors: Mapping[str, Tensor]
    weights: str
    about: Mapping[str, Any]
    left: Sequence[str]


def take(file: Path, prefer: Sequence[str] = (*AVERAGED, *RAW)) -> Taken:
    """The weights in a pickle or a torch checkpoint, without running anything in it.

    prefer: names of what holds them, best first. Raises CheckpointError.
    """
    held, walk = read_pickle(file), _Walk()
    try:
        states = {path: state for path, state in walk.states(held, ()) if state}
        if not states and (direct := {str(k): v for k, v in (_entries(held) or {}).items() if isinstance(v, Tensor)}):
            states = {(): direct}
        chosen = _chosen(states, prefer)
        about, unsaid = _about(held, chosen, walk)
    except NotDataError as error:
        raise CheckpointError(f"{file}: {error}; it is damaged") from None
    if not states:
        what = ", ".join(list(map(str, held))[:12]) if isinstance(held, dict) else type(held).__name__
        raise CheckpointError(f"{file}: holds no tensors by name ({what}); save the model's state_dict()")
    if chosen is None:
        tensors = {".".join((*path, name)): v for path, state in states.items() if not _aside(path)
                   for name, v in state.items()}  # fmt: skip
        weights, kept = "all that are in the file", [path for path in states if not _aside(path)]
    else:
        tensors, kept = states[chosen], [chosen]
        weights = ".".join(chosen) or "the file's"
    left = [f"{'.'.join(path)} ({len(state)} tensors)" for path, state in states.items() if path not in kept]
    return Taken(tensors, weights, about, (*left, *unsaid))


def _aside(path: tuple[str, ...]) -> bool:
    return any(part.lower().startswith(_NOT_WEIGHTS) for part in path)


def _chosen(states: Mapping[tuple[str, ...], Any], prefer: Sequence[str]) -> tuple[str, ...] | None:
    """The best of them, or None where all are as good."""
    if () in states:
        return ()
    for name in prefer:
        if found := [path for path in states if f".{'.'.join(path)}".endswith(f".{name}")]:
            return min(found, key=len)
    weights = [path for path in states if not _aside(path)]
    return weights[0] if len(weights) == 1 else None


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """Of a mapping, a kind of dict, or a list."""
    if isinstance(value, Object):
        return value.entries or None
    return value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else None


def _is_module(value: Object) -> bool:
    return isinstance(value.state, dict) and {"_parameters", "_buffers", "_modules"} <= value.state.keys()


def _about(held: Any, path: tuple[str, ...] | None, walk: _Walk) -> tuple[dict[str, Any], list[str]]:
    """What lies beside the weights at `path`: (plain data, what is none in words)."""
    about: dict[str, Any] = {}
    left = []
    for key, value in (_entries(held) or {}).items():
        if isinstance(value, Tensor):
            left += [f"{key} (Tensor)"] if path else []
            continue
        if (str(key),) == (path or ())[:1] or any(walk.states(value, ())):
            continue
        try:
            said = {str(key): walk.plain(value)}
        except NotDataError:
            said = {}
        if not said or len(json.dumps(said)) > _MUCH:
            left.append(f"{key} ({value.kind if isinstance(value, Object) else type(value).__name__})")
        else:
            about |= said
    chosen = None if path is None else held
    for key in path or ():
        chosen = {str(k): v for k, v in (_entries(chosen) or {}).items()}[key]
    if isinstance(chosen, Object) and _is_module(chosen):
        about |= walk.plain(chosen)
    return about, left


class _Walk:
    """Through what a pickle says, which may hold itself, or one thing a thousand times: to an end."""

    def __init__(self) -> None:
        self._steps = 0

    def _step(self, depth: int) -> None:
        self._steps += 1
        if depth > _DEEP or self._steps > _LONG:
            raise NotDataError(f"is nested deeper than {_DEEP} levels, or repeats itself")

    def states(self, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
        if isinstance(value, Object) and _is_module(value):
            yield path, dict(self.of_module(value, ""))
            return
        entries = _entries(value)
        if entries is None or len(path) > 3:
            return
        several = any(key in (*AVERAGED, *RAW) and not isinstance(part, Tensor) for key, part in entries.items())
        if not several and self.all_tensors(entries, 0):
            yield path, dict(self.flat(entries, "", 0))
            return
        for key, part in entries.items():
            yield from self.states(part, (*path, str(key)))

    def all_tensors(self, value: Any, depth: int) -> bool:
        if isinstance(value, Tensor):
            return True
        self._step(depth)
        entries = _entries(value)
        return entries is not None and all(self.all_tensors(part, depth + 1) for part in entries.values())

    def flat(self, entries: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        self._step(depth)
        for key, part in entries.items():
            if isinstance(part, Tensor):
                yield f"{prefix}{key}", part
            else:
                yield from self.flat(_entries(part) or {}, f"{prefix}{key}.", depth + 1)

    def of_module(self, module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """What a torch module's state_dict() holds."""
        self._step(prefix.count("."))
        if not isinstance(module, Object) or not _is_module(module):
            raise NotDataError(f"has a module {prefix} without parameters")
        state = module.state
        passing = state.get("_non_persistent_buffers_set", ())
        for own in (state["_parameters"], state["_buffers"]):
            yield from ((prefix + name, v) for name, v in own.items() if isinstance(v, Tensor) and name not in passing)
        for name, part in state["_modules"].items():
            if part is not None:
                yield from self.of_module(part, f"{prefix}{name}.")

    def plain(self, value: Any, depth: int = 0) -> Any:
        """`value` for JSON: of an object its class and the arguments it was made with, of a namespace its entries.

        Raises NotDataError for what is neither.
        """
        self._step(depth)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.item()
        if isinstance(value, (Name, torch.dtype)):
            return str(value)
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.plain(part, depth + 1) for part in value]
        if isinstance(value, dict):
            return {str(key): self.plain(part, depth + 1) for key, part in value.items()}
        if isinstance(value, Object) and value.entries and value.state is None:
            return self.plain(value.entries, depth + 1)
        state = value.state if isinstance(value, Object) else None
        if isinstance(state, dict) and ("_init_kwargs" in state or _is_module(value)):
            init = self.plain(state.get("_init_kwargs"), depth + 1) or {}
            return {"class": value.kind.name, "init": init}
        if isinstance(state, dict) and value.kind.name in ("Namespace", "SimpleNamespace", "EasyDict"):
            return self.plain(state, depth + 1)
        raise NotDataError(f"is a {value.kind if isinstance(value, Object) else type(value).__name__}")
