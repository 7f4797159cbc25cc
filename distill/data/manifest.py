"""manifest.json: what a folder of shards promises. Nothing is read that it does not describe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.rows import derived_seed
from teachers.errors import InputError
from teachers.space import DataSpace

FORMAT = 1
NAME = "manifest.json"


class DataError(InputError):
    """Data that is not what it should be: the message names shard, member and reason, and what to do."""


@dataclass(frozen=True)
class Shard:
    """One tar: its name, size in bytes, number of samples and sha256 (hex)."""

    file: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True)
class Field:
    """A member of every sample: its ending in the tar, dtype and shape; `classes` for labels."""

    member: str
    dtype: str
    shape: tuple[int, ...]
    classes: int | None = None


@dataclass(frozen=True)
class Manifest:
    """A split of a data set: its shards in order, its fields (`image`, perhaps `class`), and where it comes from."""

    name: str
    split: str
    samples: int
    shards: tuple[Shard, ...]
    fields: Mapping[str, Field]
    source: Mapping[str, Any]

    @property
    def space(self) -> DataSpace:
        """Images are read as floats in [-1, 1]."""
        label = self.fields.get("class")
        return DataSpace(self.fields["image"].shape, label.classes if label else None, (-1.0, 1.0))

    @property
    def digest(self) -> str:
        """Identifies the samples, their order and how they are read."""
        fields = json.dumps({name: asdict(field) for name, field in self.fields.items()}, sort_keys=True)
        return f"{derived_seed(fields, *(shard.sha256 for shard in self.shards)):016x}"

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards. Raises DataError when it is missing, damaged or contradicts itself."""
    file = folder / NAME
    if not file.is_file():
        raise DataError(f"{folder}: no {NAME} here; build the shards with `distill shards build SOURCE {folder}`")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise DataError(f"{file}: another format than {FORMAT}; build the shards again with this version")
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        raw["fields"] = {k: Field(**{**v, "shape": tuple(v["shape"])}) for k, v in raw["fields"].items()}
        manifest = Manifest(**raw)
        wrong = _wrong(manifest)
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{file}: damaged or not a manifest ({error!r}); build the shards again") from None
    if wrong:
        raise DataError(f"{file}: {wrong}; build the shards again")
    return manifest


def _wrong(manifest: Manifest) -> str | None:
    """What contradicts itself or is not of the kind it should be, in words."""
    total = sum(shard.samples for shard in manifest.shards)
    if not manifest.shards or total != manifest.samples or any(shard.samples < 1 for shard in manifest.shards):
        return f"promises {manifest.samples} samples, its shards sum to {total}"
    files = [shard.file for shard in manifest.shards]
    if strange := [name for name in files if not isinstance(name, str) or Path(name).name != name]:
        return f"shard {strange[0]!r} is not a plain file name"
    if len(set(files)) != len(files):
        return "names a shard twice"
    if not isinstance(manifest.source, dict):
        return f"source is {manifest.source!r}, not a mapping"
    image, label = manifest.fields.get("image"), manifest.fields.get("class")
    if image is None:
        return f"no field 'image' (fields: {', '.join(manifest.fields)})"
    if image.dtype != "uint8" or len(image.shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in image.shape):
        return f"the field image is {image.dtype} {list(image.shape)}, only uint8 [c, h, w] can be read"
    if label is not None and (not isinstance(label.classes, int) or label.classes < 1):
        return f"the field class has {label.classes!r} classes"
    return None
