"""Our own exports: a folder with config.json and model.safetensors, read strictly and without pickle.

config.json (format 1) has the `KEYS`, and its kind is one of `KINDS`: a velocity is a teacher, the others are students.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from teachers.checkpoints import sha256
from teachers.errors import CheckpointError
from teachers.families import WEIGHTS
from teachers.fill import compare
from teachers.networks import KNOWN, from_entry
from teachers.networks.converted import Converted, ConvertedConfig
from teachers.networks.own import OwnConfig
from teachers.path import PATHS, from_plain
from teachers.space import DataSpace, Embedding, Latent
from teachers.velocity import Teacher

FORMAT = 1
KINDS = ("velocity", "flow_map", "shortcut", "consistency", "grid")
KEYS = {
    "format", "kind", "network", "path", "space", "supports", "student", "steps", "guidance", "teacher", "licence",
    "trained_on", "metrics", "recipe", "weights",
}  # fmt: skip


def locate(path: str, holds: str = "config.json") -> FilePath:
    """The folder meant by `path`: a folder, or the name of a teacher that ships with the project.

    A folder that lacks `holds` does not hide a shipped teacher of its name. Raises CheckpointError.
    """
    folders = [folder for folder in (FilePath(path).expanduser(), WEIGHTS / path) if folder.is_dir()]
    if not folders:
        names = ", ".join(sorted(p.parent.name for p in WEIGHTS.glob("*/config.json")))
        raise CheckpointError(f"{path}: no such folder, and no shipped teacher of that name (shipped: {names})")
    return next((folder for folder in folders if (folder / holds).exists()), folders[0])


def read_config(folder: FilePath) -> dict[str, Any]:
    """config.json of an export, checked: every key known and present, `format` and `kind` ours.

    Raises CheckpointError.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: no config.json here, so this is not an export of this project; give the folder that `distill "
            "export` wrote (in a run it is RUN/export)"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}); the file is damaged, export again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{file}: format is {got!r}, this version reads {FORMAT}; it is another tool's file, or from another "
            "version of this one"
        )
    unknown, missing = sorted(set(config) - KEYS), sorted(KEYS - set(config))
    if unknown or missing:
        raise CheckpointError(f"{file}: unknown keys {unknown}, missing keys {missing}; export again with this version")
    for name, (holds, allowed) in _SHAPES.items():
        if not holds(config[name]):
            raise CheckpointError(f"{file}: {name} is {config[name]!r}, must be {allowed}; export again")
    return config


def _is_space(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"embeddings"} != {"shape", "classes", "range"}:
        return False
    if not all(isinstance(e, dict) and set(e) == {"name", "shape", "dtype"} for e in value.get("embeddings", [])):
        return False
    shape, classes, span = value["shape"], value["classes"], value["range"]
    return (
        isinstance(shape, list)
        and len(shape) >= 1
        and all(isinstance(size, int) and size >= 1 for size in shape)
        and (classes is None or (isinstance(classes, int) and classes >= 1))
        and (
            span is None
            or (isinstance(span, list) and len(span) == 2 and all(map(_is_number, span)) and span[0] < span[1])
        )
    )


def _is_path(value: Any) -> bool:
    try:
        from_plain(value)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_weights(value: Any) -> bool:
    kinds = {"file": str, "bytes": int, "sha256": str}
    whole = isinstance(value, dict) and {k: type(v) for k, v in value.items()} == kinds
    return whole and FilePath(value["file"]).name == value["file"]


def _are_steps(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 1 and all(isinstance(n, int) and n >= 1 for n in value)


def _is_student(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"finest", "parameterisation", "own_output", "split"}


def _is_trained(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("steps"), int)


_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "network": (
        lambda value: isinstance(value, dict) and isinstance(value.get("name"), str),
        f"a mapping with the name of a network (known: {', '.join(KNOWN)})",
    ),
    "path": (_is_path, f"one of {', '.join(PATHS)}, or a mapping of its name and numbers"),
    "space": (_is_space, "{shape: sizes, classes: null or a number, range: null or [low, high]}"),
    "weights": (_are_weights, "{file: name, bytes: size, sha256: digest}"),
    "student": (_is_student, "a mapping with finest, parameterisation, own_output and split"),
    "steps": (_are_steps, "a list of numbers of steps"),
    "trained_on": (_is_trained, "a mapping with steps"),
    "recipe": (lambda value: isinstance(value, str), "the text of a recipe"),
}


def read_weights(folder: FilePath, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an export after its size and sha256 were found as config.json states them.

    Raises CheckpointError.
    """
    stated = config["weights"]
    file = folder / stated["file"]
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, though config.json names it; copy the whole folder again")
    size, digest = file.stat().st_size, sha256(file)
    if size != stated["bytes"] or digest != stated["sha256"]:
        raise CheckpointError(
            f"{file}: not the file config.json describes (bytes {size}, stated {stated['bytes']}; sha256 "
            f"{digest[:12]}, stated {str(stated['sha256'])[:12]}): damaged or exchanged; copy or export it again"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from None


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`. Raises CheckpointError that names the keys and shapes which do not agree."""
    compare(module, tensors, source, "the network of config.json")
    module.load_state_dict(dict(tensors))


def network_from(config: Mapping[str, Any], space: DataSpace, source: str, given: nn.Module | None = None) -> nn.Module:
    """A network as config["network"] describes it, uninitialised weights to be loaded. given: a module of the class
    that it is of, where that is its author's own; it is copied. Raises CheckpointError."""
    try:
        described = from_entry(config["network"])
        inner = described.network if isinstance(described, ConvertedConfig) else described
        if given is None:
            return described.build(space)
        if not isinstance(inner, OwnConfig):
            raise ValueError("it is known, so that no network is to be passed")
        network = inner.around(deepcopy(given), space)
        return Converted(network, described.convention) if isinstance(described, ConvertedConfig) else network
    except (TypeError, ValueError, RuntimeError) as error:
        name = config["network"].get("name")
        if name not in KNOWN:
            raise CheckpointError(f"{source}: {error}") from None
        raise CheckpointError(f"{source}: network {name!r} cannot be built: {error}") from None


@contextmanager
def as_exported() -> Iterator[None]:
    """Inside, modules are made in float32 on the CPU, whatever torch is set to, as those that were exported; their
    initial weights, which are thrown away, leave the caller's generator alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def space_from(config: Mapping[str, Any]) -> DataSpace:
    """The `DataSpace` of an export's config."""
    space = config["space"]
    value_range = None if space["range"] is None else (float(space["range"][0]), float(space["range"][1]))
    embeddings = tuple(Embedding(e["name"], tuple(e["shape"]), e["dtype"]) for e in space.get("embeddings", []))
    return DataSpace(tuple(space["shape"]), space["classes"], value_range, embeddings)


def space_to_plain(space: DataSpace) -> dict[str, Any]:
    """The inverse of `space_from`."""
    plain: dict[str, Any] = {"shape": list(space.shape), "classes": space.classes, "range": space.value_range}
    if space.embeddings:
        plain["embeddings"] = [{"name": e.name, "shape": list(e.shape), "dtype": e.dtype} for e in space.embeddings]
    return plain


def _latent_from(config: Mapping[str, Any], space: DataSpace, source: str) -> Latent | None:
    """The map to what a velocity works on: its own teacher's, which it was trained on. Raises CheckpointError."""
    teacher = config["teacher"]
    said = teacher.get("latent") if isinstance(teacher, dict) else None
    if said is None:
        return None
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
        latent = Latent(**values)
        if any(v is not None and len(v) != space.shape[0] for v in (latent.mean, latent.std)):
            raise ValueError(f"mean and std must have {space.shape[0]} channels, as its samples do")
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source}: teacher.latent is {said!r}, which is no map of latents ({error}); export "
                              "again") from None  # fmt: skip
    return latent


@dataclass(frozen=True, kw_only=True)
class Native:
    """A velocity exported by this project. `path`: its folder, or the name of a shipped one (``digits``)."""

    path: str

    def load(self) -> Teacher:
        """The frozen teacher, in eval mode. Raises CheckpointError."""
        folder = locate(self.path)
        config = read_config(folder)
        if config["kind"] != "velocity":
            raise CheckpointError(
                f"{folder}: this is an already distilled {config['kind']} student, not a velocity; a teacher is an "
                "export of kind velocity (distill the student's own teacher instead)"
            )
        space, source = space_from(config), str(folder / "config.json")
        latent = _latent_from(config, space, source)
        with as_exported():
            network = network_from(config, space, source)
        tensors = read_weights(folder, config)
        load_strict(
            network,
            {k.removeprefix("network."): v for k, v in tensors.items()},
            str(folder / config["weights"]["file"]),
        )
        network.eval().requires_grad_(False)
        return Teacher(
            velocity=network,
            space=space,
            path=from_plain(config["path"]),
            network=network,
            network_config=config["network"],
            null=space.null if from_entry(config["network"]).null_class else None,
            latent=latent,
            info={
                "id": self.path,
                "family": "native",
                "digest": config["weights"]["sha256"],
                "weights": config["trained_on"].get("weights", "unknown"),
                "licence": config["licence"],
                **({"latent": asdict(latent)} if latent else {}),
            },
        )
