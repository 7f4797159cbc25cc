"""manifest.json: what a folder of shards promises. Nothing is read that it does not describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill.rows import derived_seed
from teachers.errors import InputError
from teachers.space import DataSpace, Embedding

FORMAT = 1
NAME = "manifest.json"
IMAGES = ("png", "jpg", "jpeg", "webp")
ENDINGS = (*IMAGES, "cls", "txt", "json", "npy", "safetensors")
"""The members that are decoded, by the last part of their names."""
SHARD_SAMPLES = 1 << 24
"""Samples in a shard, checked before memory is taken for as many."""


class DataError(InputError):
    """Data that is not what it should be: the message names shard, member and reason, and what to do. key: of the
    section data in a recipe, where that is what does not agree."""

    def __init__(self, message: str, *key: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Shard:
    """One tar: its name, size in bytes, number of samples, sha256 (hex), and its index's sha256, "" without one."""

    file: str
    bytes: int
    samples: int
    sha256: str
    index: str = ""

    @property
    def index_file(self) -> str:
        """The name of its index."""
        return self.file.removesuffix(".tar") + ".idx"


@dataclass(frozen=True)
class Field:
    """A member of every sample: its ending in the tar, dtype and shape; `classes` for labels; `range` of its values,
    where it has one and is no image file (those are in [-1, 1] as they are read).

    Several fields may share a member that ends in ``safetensors``: each is the tensor of its name there.
    """

    member: str
    dtype: str
    shape: tuple[int, ...]
    classes: int | None = None
    range: tuple[float, float] | None = None

    def to_plain(self) -> dict[str, Any]:
        """As in manifest.json."""
        plain = asdict(self)
        return plain if self.range is not None else {k: v for k, v in plain.items() if k != "range"}


@dataclass(frozen=True)
class Manifest:
    """A split of a data set: its shards in order, its fields, and where it comes from.

    autoencoder: of a field `latent`: id, digest, and the scale and shift by which latents z are read as
    (z - shift) scale; None where there are no latents.
    """

    name: str
    split: str
    samples: int
    shards: tuple[Shard, ...]
    fields: Mapping[str, Field]
    source: Mapping[str, Any]
    autoencoder: Mapping[str, Any] | None = None

    def space(self, name: str, cond: tuple[str, ...]) -> DataSpace:
        """What the field `name` holds, conditioned on the fields `cond`: images are read as floats in [-1, 1], others
        as they are."""
        field = self.fields[name]
        span = (-1.0, 1.0) if field.member in IMAGES else field.range
        classes = self.fields["class"].classes if "class" in cond else None
        given = ((name, self.fields[name]) for name in cond if name != "class")
        embeddings = [Embedding(name, f.shape, "bool" if f.dtype == "bool" else "float32") for name, f in given]
        return DataSpace(field.shape, classes, (span[0], span[1]) if span else None, tuple(embeddings))

    @property
    def digest(self) -> str:
        """Identifies the samples, their order and how they are read."""
        fields = json.dumps({name: field.to_plain() for name, field in self.fields.items()}, sort_keys=True)
        latent = [] if self.autoencoder is None else [json.dumps(dict(self.autoencoder), sort_keys=True)]
        return f"{derived_seed(fields, *latent, *(shard.sha256 for shard in self.shards)):016x}"

    def to_json(self) -> str:
        """The text of manifest.json."""
        fields = {name: field.to_plain() for name, field in self.fields.items()}
        return json.dumps({"format": FORMAT, **asdict(self), "fields": fields}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a local folder of shards. Raises DataError when it is missing, damaged or contradicts itself."""
    file = folder / NAME
    if not file.is_file():
        raise DataError(f"{folder}: no {NAME} here; build the shards with `distill shards build SOURCE {folder}`")
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(content: bytes, file: str) -> Manifest:
    """The manifest that was read from `file`. Raises DataError when it is damaged or contradicts itself."""
    try:
        raw = json.loads(content.decode("utf-8"))
        if raw.pop("format") != FORMAT:
            raise DataError(f"{file}: another format than {FORMAT}; build the shards again with this version")
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        raw["fields"] = {k: Field(**{**v, "shape": tuple(v["shape"])}) for k, v in raw["fields"].items()}
        manifest = Manifest(**raw)
        wrong = _wrong(manifest)
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged or not a manifest ({error!r}); build the shards again") from None
    if wrong:
        raise DataError(f"{file}: {wrong}; build the shards again")
    return manifest


def _wrong(manifest: Manifest) -> str | None:
    """What contradicts itself or is not of the kind it should be, in words."""
    total = sum(shard.samples for shard in manifest.shards)
    if not manifest.shards or total != manifest.samples or any(shard.samples < 1 for shard in manifest.shards):
        return f"promises {manifest.samples} samples, its shards sum to {total}"
    if crowded := [shard for shard in manifest.shards if shard.samples > SHARD_SAMPLES]:
        return f"{crowded[0].file}: promises {crowded[0].samples} samples, at most {SHARD_SAMPLES} are read"
    files = [shard.file for shard in manifest.shards]
    if strange := [name for name in files if not isinstance(name, str) or Path(name).name != name]:
        return f"shard {strange[0]!r} is not a plain file name"
    if len(set(files)) != len(files):
        return "names a shard twice"
    if not isinstance(manifest.source, dict):
        return f"source is {manifest.source!r}, not a mapping"
    if manifest.autoencoder is not None:
        numbers = [manifest.autoencoder[key] for key in ("scale", "shift")]
        if not all(isinstance(n, int | float) for n in numbers) or not manifest.autoencoder["id"]:
            return f"autoencoder is {dict(manifest.autoencoder)}: needs id, scale and shift"
    return next((wrong for name, field in manifest.fields.items() if (wrong := wrong_field(name, field))), None)


def wrong_field(name: str, field: Field) -> str | None:
    """Why a field cannot be read, in words; None if it can."""
    if not isinstance(field.member, str) or field.member.rpartition(".")[2] not in ENDINGS:
        return f"the field {name} is a member .{field.member}, which is not read (but {', '.join(ENDINGS)})"
    array = field.member.rpartition(".")[2] in (*IMAGES, "npy", "safetensors")
    if array and not (isinstance(field.dtype, str) and isinstance(getattr(torch, field.dtype, None), torch.dtype)):
        return f"the field {name} is of dtype {field.dtype}; only booleans, integers, floats and complex can be read"
    if not all(isinstance(n, int) and n >= 1 for n in field.shape):
        return f"the field {name} has the shape {list(field.shape)}"
    if field.member in IMAGES and (field.dtype != "uint8" or len(field.shape) != 3 or field.shape[0] not in (1, 3)):
        return f"the field {name} is {field.dtype} {list(field.shape)}, only uint8 [1 or 3, h, w] can be read"
    if name == "class" and (not isinstance(field.classes, int) or field.classes < 1):
        return f"the field class has {field.classes!r} classes"
    return None
