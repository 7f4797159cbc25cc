"""A file on disk -> the tensors in it, without running anything. Files are mapped, not read: a tensor takes memory
when it is used."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teachers.errors import CheckpointError
from teachers.pickled import take
from teachers.training_file import WHOLE, chosen


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name; `weights` says which of the file's they are, `about` is the plain data that lies beside them
    (arguments of a training script, metadata), files are all that was read."""

    source: str
    tensors: Mapping[str, Tensor]
    weights: str
    about: Mapping[str, Any]
    files: tuple[Path, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 of the file, or of the digests of several."""
        digests = [sha256(file) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Of the training script, where they lie beside the weights."""
        held = self.about.get("args")
        return held if isinstance(held, Mapping) else {}

    def shape(self, name: str, dims: int | None = None) -> tuple[int, ...]:
        """Of a tensor that has to be there, with so many dimensions. Raises CheckpointError."""
        if name not in self.tensors:
            self._refuse_wrapped(name)
            held = ", ".join(list(self.tensors)[:5])
            raise CheckpointError(
                f"{self.source}: has no {name}, so it is not of this family (it holds {len(self.tensors)} tensors: "
                f"{held}, ...); name the family that it is of: distill ls --teachers"
            )
        shape = tuple(self.tensors[name].shape)
        if dims is not None and len(shape) != dims:
            raise CheckpointError(
                f"{self.source}: the weights do not fit the network; wrong size: {name} is {shape}, expected {dims} "
                "dimensions"
            )
        return shape

    def _refuse_wrapped(self, name: str) -> None:
        """Raises CheckpointError where a tensor is there behind a prefix."""
        prefixes = sorted(other.removesuffix(f".{name}") for other in self.tensors if other.endswith(f".{name}"))
        if prefixes:
            ways = [p if self.weights == WHOLE else f"{self.weights}.{p}" for p in prefixes]
            raise CheckpointError(
                f"{self.source}: its names begin with {' or '.join(f'{p}.' for p in prefixes)}, as code that wraps the "
                f"network saves them (it has {prefixes[0]}.{name}); set teacher.weights: {' or '.join(ways)}"
            )

    def count(self, prefix: str) -> int:
        """How many blocks there are: 1 + the highest number behind `prefix`."""
        found = [int(m[1]) for m in (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in self.tensors) if m]
        return 1 + max(found, default=-1)

    def renamed(self, change: Callable[[str], str]) -> Checkpoint:
        """With other names. Raises CheckpointError where two become one."""
        tensors = {change(name): tensor for name, tensor in self.tensors.items()}
        if len(tensors) < len(self.tensors):
            raise CheckpointError(f"{self.source}: two of its names mean the same tensor; it is damaged")
        return Checkpoint(self.source, tensors, self.weights, self.about, self.files)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


SAFETENSORS, TORCH, PICKLES = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt"), (".pkl",)
ABOUT, WEIGHTS = "about", "weights"
"""Metadata of converted files: what lay beside the weights, as JSON, and which of the file's they are."""


def read(path: str, prefer: Sequence[str] = (), asked: str | None = None) -> Checkpoint:
    """The weights in a file, in the shards that a ``*.safetensors.index.json`` lists, or in a folder with one of them.

    prefer: names of what holds weights in a training checkpoint, best first (averaged ones before others); asked: the
    one that has to be taken, dots lead into it (``state.ema``) and into its names (``state_dict.model``). Prefixes of
    wrappers (``module.``, ``_orig_mod.``) are taken off. Raises CheckpointError.
    """
    found = _read(path, (asked,) if asked else prefer)
    if not asked or f".{found.weights}".endswith(f".{asked}"):
        return found
    return _under(found, asked)


def _read(path: str, prefer: Sequence[str]) -> Checkpoint:
    file = _file(Path(path).expanduser())
    if re.search(r"\.index(\.[^.]+)?\.json$", file.name):  # .index.fp16.json lists a variant's shards
        return _sharded(file)
    if file.suffix in SAFETENSORS:
        tensors, metadata = _safetensors(file)
        return _unwrapped(Checkpoint(str(file), tensors, metadata.get(WEIGHTS, WHOLE), _told(metadata), (file,)))
    if file.suffix in TORCH:
        return _unwrapped(Checkpoint(str(file), *chosen(file, _torch(file), prefer), (file,)))
    if file.suffix in PICKLES or _begins_as_pickle(file):
        taken = take(file, prefer) if prefer else take(file)
        return _unwrapped(Checkpoint(str(file), taken.tensors, taken.weights, taken.about, (file,)))
    raise CheckpointError(
        f"{file}: not a kind of file that is read ({', '.join((*SAFETENSORS, *TORCH, *PICKLES))}); convert it first: "
        f"distill teachers convert {file} {file.with_suffix('.safetensors')}"
    )


def _under(found: Checkpoint, asked: str) -> Checkpoint:
    """What of the weights in a file has names that begin with what was asked for."""
    prefix = f"{asked.removeprefix(f'{found.weights}.')}."
    tensors = {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
    if tensors:
        return _unwrapped(replace(found, tensors=tensors, weights=asked))
    what = "one set of weights alone" if found.weights == WHOLE else f"the weights {found.weights}"
    raise CheckpointError(
        f"{found.source}: holds {what}, and no names in it begin with {prefix}; remove teacher.weights, which says "
        f"{asked}"
    )


def _begins_as_pickle(file: Path) -> bool:
    """Whether it does: some training code gives its files no suffix."""
    with file.open("rb") as stream:
        return stream.read(1) == b"\x80"


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        there = f"in {path.parent} there are: {', '.join(near)}" if near else f"{path.parent} is empty or missing"
        raise CheckpointError(f"{path}: no such file ({there})")
    for pattern in ("*.safetensors.index.json", "*.safetensors", *(f"*{suffix}" for suffix in TORCH)):
        found = sorted(path.glob(pattern))
        shards = any(re.search(r"-\d+-of-\d+\.safetensors$", file.name) for file in found)
        if shards and not any(path.glob("*.safetensors.index.*.json")):  # a variant's, which has to be named
            raise CheckpointError(
                f"{path}: has shards of weights ({found[0].name}, ...) without their index (*.safetensors.index.json), "
                "which says what is in which; copy the whole folder again"
            )
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{path}: {len(found)} files of weights ({found[0].name}, ...); name one of them")
    raise CheckpointError(f"{path}: no file of weights in this folder")


def _safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file}: cut short, damaged or not safetensors ({error}); copy it again") from None


def _told(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Metadata, that of a converted file as what lay beside its weights."""
    try:
        told = json.loads(metadata.get(ABOUT, "null"))
    except ValueError:
        return metadata
    return told if isinstance(told, dict) else metadata


def _sharded(index: Path) -> Checkpoint:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        strange = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error!r}); copy it again") from None
    files = [index.parent / name for name in names]
    if missing := strange or [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index}: lists {', '.join(missing)}, not beside it; copy the whole folder again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _safetensors(file)[0]
    if places.keys() != tensors.keys():
        off = sorted(places.keys() ^ tensors.keys())
        raise CheckpointError(f"{index}: does not agree with its shards on {', '.join(off[:8])}; copy them again")
    return _unwrapped(Checkpoint(str(index), tensors, WHOLE, {}, (index, *files)))


def _torch(file: Path) -> Any:
    """What a file of torch.save holds: tensors and plain data, or an error. Nothing in it is run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)  # of before torch 1.6
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {asked[1]}" if asked else "asks for more than tensors and plain data"
        if not (zipfile.is_zipfile(file) or _begins_as_pickle(file)):
            raise CheckpointError(f"{file}: damaged, or not a file of torch at all; copy it again") from None
        raise CheckpointError(
            f"{file}: {what}, which is code, and code in a checkpoint is never run; take its tensors without it: "
            f"distill teachers convert {file} {file.with_suffix('.safetensors')}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file}: cut short, damaged or not of torch ({_line(error)}); copy it again") from None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    pattern = re.compile(r"^(?:module\.|_orig_mod\.)+")
    counter = checkpoint.tensors.get("n_averaged")
    if counter is not None and counter.dim() == 0:  # of torch's AveragedModel
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "n_averaged"}
        checkpoint = replace(checkpoint, tensors=kept)
    return checkpoint.renamed(lambda name: pattern.sub("", name))
