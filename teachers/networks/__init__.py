"""Backbones: one a file, no loss, no path.

A network is called as ``network(x, t, cond, shift=None)``; `shift` is what its ``second_time()`` makes of a student's
second time, added to the time embedding before anything that follows. Those made of blocks have a `depth`, their
number, and take ``end`` and ``split`` too: the blocks from number `split` on, and the last layer's modulation, then see
the embedding of that time instead of t's. See `teachers.networks.base`.

NETWORKS are our own, which a recipe may name; those of other families come with their teachers, behind the convention
by which they see points and times (`converted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from teachers.networks.conventions import CONVENTIONS
from teachers.networks.converted import FOREIGN, ConvertedConfig, ForeignConfig
from teachers.networks.dit import DiTConfig
from teachers.networks.mlp import MLPConfig

NetworkConfig = MLPConfig | DiTConfig
NETWORKS: dict[str, type[NetworkConfig]] = {"mlp": MLPConfig, "dit": DiTConfig}
AnyConfig = NetworkConfig | ForeignConfig | ConvertedConfig
KNOWN: dict[str, type[AnyConfig]] = {**NETWORKS, **FOREIGN, "converted": ConvertedConfig}
"""All that an export may name."""
_NESTED: dict[str, Mapping[str, type[Any]]] = {"network": FOREIGN, "convention": CONVENTIONS}


def from_entry(entry: Mapping[str, Any]) -> AnyConfig:
    """The configuration of a network from a plain entry, e.g. ``{"name": "mlp", "width": 128}``.

    Raises ValueError for unknown names and values out of range, TypeError for unknown arguments.
    """
    return _config(entry, KNOWN)


def to_entry(config: AnyConfig) -> dict[str, Any]:
    """The inverse of `from_entry`."""
    return _entry(config, KNOWN)


def _config(entry: Mapping[str, Any], table: Mapping[str, type[Any]]) -> Any:
    arguments = dict(entry)
    name = arguments.pop("name", None)
    if name not in table:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(table)}")
    for key, value in arguments.items():
        if isinstance(value, Mapping) and key in _NESTED:
            arguments[key] = _config(value, _NESTED[key])
        elif isinstance(value, list):
            arguments[key] = tuple(value)
    return table[name](**arguments)


def _entry(config: Any, table: Mapping[str, type[Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": next(name for name, cls in table.items() if cls is type(config))}
    for spec in fields(config):
        value = getattr(config, spec.name)
        if spec.name in _NESTED:
            value = _entry(value, _NESTED[spec.name])
        entry[spec.name] = list(value) if isinstance(value, tuple) else value
    return entry
