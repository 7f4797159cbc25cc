"""Other webdatasets as a source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch

from distill.data.decode import MEMBER_BYTES, array
from distill.data.manifest import ENDINGS, IMAGES, DataError, Field
from distill.data.sources.base import Members, Options
from distill.data.sources.prepare import decoded, opened, orientation, png, prepared, sized
from distill.data.tar import Entry, group, scan
from distill.data.unpickle import PICKLES, unpickled


@dataclass
class _Tar:
    path: Path
    sha256: str
    entries: list[Entry] = field(default_factory=list)


class Webdataset:
    """The tars of another webdataset, read strictly. Members keep their bytes, but for images that are scaled."""

    def __init__(self, files: Sequence[Path], options: Options) -> None:
        self._options = options
        self._tars = [self._scanned(path) for path in files]
        self._ends = np.cumsum([len(tar.entries) for tar in self._tars])
        seen: dict[str, Path] = {}
        for tar in self._tars:
            for entry in tar.entries:
                if entry.key in seen:
                    also = f"duplicate key, also in {seen[entry.key]}; rename it"
                    raise DataError(f"{tar.path}, sample {entry.key}: {also}")
                seen[entry.key] = tar.path
        self._numbers = list(range(len(seen)))
        names = [path.name for path in files[:3]] + ["..."] * bool(files[3:])
        self.about: dict[str, Any] = {"title": ", ".join(names)}
        if options.seed is not None:
            self._numbers = np.random.default_rng(options.seed).permutation(len(seen)).tolist()
            self.about["order"] = f"shuffled once, seed {options.seed}"
        if options.size:
            self.about |= prepared(options)
        self.fields = self._fields()

    def _scanned(self, path: Path) -> _Tar:
        with path.open("rb") as stream:
            found = scan(stream)
        if found.fault:
            raise DataError(f"{path}, {found.fault}; restore the file, or leave it out")
        entries, faults = group(found.members)
        if faults:
            first = faults[0]
            raise DataError(f"{path}, sample {first.member}, offset {first.offset}: {first.reason}; repair it")
        if not entries:
            raise DataError(f"{path}: no samples in it; leave it out")
        for entry in entries:
            parts = Path(entry.key).parts
            if entry.key.startswith("/") or ".." in parts or not entry.key.isprintable():
                raise DataError(f"{path}, sample {entry.key!r}: a key that leaves its folder or cannot be printed")
        return _Tar(path, found.sha256, entries)

    def _fields(self) -> dict[str, Field]:
        """What the first sample has; all others must have it too."""
        _, members = self.sample(0, check=False)
        images = [ending for ending in members if ending in IMAGES]
        if len(images) > 1:
            raise DataError(f"{self._tars[0].path}: samples have several images (.{', .'.join(images)}); keep one")
        found: dict[str, Field] = {}
        for ending, content in members.items():
            found |= self._field(ending, content, f"{self._tars[0].path}")
        if "class" in found:
            found["class"] = Field("cls", "int64", (), 1 + max(self._class(n) for n in range(self.samples)))
        return found

    def _class(self, number: int) -> int:
        tar, entry = self._entry(number)
        if "cls" not in entry.members:
            raise DataError(f"{tar.path}, sample {entry.key}: no member .cls, which others have; add or remove it")
        with tar.path.open("rb") as file:
            file.seek(entry.members["cls"].offset)
            content = file.read(min(entry.members["cls"].size, 32)).strip()
        if not content.isdigit():
            raise DataError(f"{tar.path}, sample {entry.key}: .cls must be an integer from 0, got {content!r}")
        return int(content)

    def _field(self, ending: str, content: bytes, where: str) -> dict[str, Field]:
        where = f"{where}, member .{ending}"
        if ending in IMAGES:
            image = opened(content, where)
            return {"image": Field(ending, "uint8", (len(image.getbands()), image.height, image.width))}
        if ending == "cls":
            return {"class": Field("cls", "int64", (), 1)}
        last, name = ending.rpartition(".")[2], ending.rpartition(".")[0]
        if last in ("txt", "json"):
            return {name or {"txt": "caption", "json": "json"}[last]: Field(ending, last, ())}
        try:
            if last == "npy":
                held: list[Field] = []
                array(content, lambda dtype, shape: held.append(Field(ending, str(dtype), shape)))
                return {name or "x": held[0]}
            if last == "safetensors":
                return {key: Field(ending, str(value.dtype).removeprefix("torch."), tuple(value.shape))
                        for key, value in safetensors.torch.load(content).items()}  # fmt: skip
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            raise DataError(f"{where}: {error}") from None
        raise DataError(f"{where}: there is no decoder for it (but for {', '.join(ENDINGS)}); leave it out")

    def _entry(self, number: int) -> tuple[_Tar, Entry]:
        at = self._numbers[number]
        which = int(np.searchsorted(self._ends, at, side="right"))
        tar = self._tars[which]
        return tar, tar.entries[at - (int(self._ends[which - 1]) if which else 0)]

    @property
    def samples(self) -> int:
        """See `Source`."""
        return int(self._ends[-1])

    @property
    def digest(self) -> str:
        """See `Source`."""
        return hashlib.sha256("".join(tar.sha256 for tar in self._tars).encode()).hexdigest()

    def sample(self, number: int, check: bool = True) -> tuple[str, Members]:
        """See `Source`."""
        tar, entry = self._entry(number)
        where = f"{tar.path}, sample {entry.key}"
        members: Members = {}
        with tar.path.open("rb") as file:
            for ending, member in entry.members.items():
                if member.size > MEMBER_BYTES:
                    raise DataError(f"{where}: .{ending} has {member.size} bytes, at most {MEMBER_BYTES} are read")
                file.seek(member.offset)
                members |= self._member(ending, file.read(member.size), where)
        if check and (lacking := {f.member for f in self.fields.values()} ^ members.keys()):
            raise DataError(f"{where}: has the members {', '.join(members)}; the first sample differs in "
                            f"{', '.join(sorted(lacking))}: all must have the same")  # fmt: skip
        if check:
            self._check_alike(members, where)
        return entry.key, members

    def _check_alike(self, members: Members, where: str) -> None:
        for ending, content in members.items():
            own = {} if ending == "cls" else self._field(ending, content, where)
            for name, held in own.items():
                first = self.fields.get(name)
                if held != first:
                    also = f"is {first.dtype} {list(first.shape)}" if first else "is without it"
                    alike = first and held.shape[0] == first.shape[0]
                    scale = "; --size N scales and cuts images" if ending in IMAGES and alike else ""
                    raise DataError(f"{where}: {name} is {held.dtype} {list(held.shape)}, the first sample {also}: all "
                                    f"must be alike{scale}")  # fmt: skip

    def _member(self, ending: str, content: bytes, where: str) -> Members:
        if ending.rpartition(".")[2] in PICKLES:
            if not self._options.unpickle:
                raise DataError(f"{where}: .{ending} is a pickle, which can run code and is never read as such; "
                                "convert it by adding --unpickle (numbers, texts, arrays and tensors)")  # fmt: skip
            try:
                return unpickled(ending, content)
            except ValueError as error:
                raise DataError(f"{where}: .{ending} {error}") from None
        if ending in IMAGES:
            image = decoded(opened(content, f"{where}, .{ending}"), f"{where}, .{ending}")
            if image.mode in ("L", "RGB") and self._options.size is None:
                if orientation(image) != 1:
                    raise DataError(f"{where}: .{ending} is stored turned (EXIF); give --size N to set all upright")
                return {ending: content}
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            return {"png": png(sized(decoded(image, where, mode), self._options.size))}
        return {ending: content}
