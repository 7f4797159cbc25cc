"""Folders of images as a source."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.manifest import IMAGES, DataError, Field
from distill.data.sources.base import Members, Options
from distill.data.sources.prepare import decoded, opened, orientation, png, sized
from teachers.checkpoints import sha256


def visible(path: Path) -> list[Path]:
    """The files below a folder in order, but for hidden ones and what is in hidden folders."""
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


class ImageFolder:
    """``folder/CLASS/*.png`` with a class for each subfolder, by name, or ``folder/*.png`` without classes; a text file
    of the same name beside every image is its caption."""

    def __init__(self, path: Path, options: Options) -> None:
        every = visible(path)
        self._files = [p for p in every if p.suffix[1:].lower() in IMAGES]
        if not self._files:
            raise DataError(f"{path}: no images here ({', '.join(IMAGES)}); an empty folder, or another path?")
        self._path, self._size = path, options.size
        parents = {p.parent for p in self._files}
        if path in parents and len(parents) > 1:
            loose = next(p for p in self._files if p.parent == path)
            raise DataError(f"{path}: images both here ({loose.name}) and in subfolders; put each into its class's")
        self._classes = [] if parents == {path} else sorted({p.relative_to(path).parts[0] for p in self._files})
        captions = {p.with_suffix("") for p in every if p.suffix == ".txt"}
        without = [p for p in self._files if p.with_suffix("") not in captions]
        if captions and len(without) < len(self._files) and without:
            raise DataError(f"{without[0]}: has no caption {without[0].stem}.txt, others have; add it or remove all")
        self._captioned = bool(captions) and not without
        self._ending = self._look()
        other = Counter(p.suffix or p.name for p in every if p not in set(self._files) and p.suffix != ".txt")
        seed = 0 if options.seed is None and self._classes else options.seed
        self.about: dict[str, Any] = {
            "title": path.resolve().name,
            "preparation": self._preparation,
            **({"classes": self._classes} if self._classes else {}),
            **({"passed over": dict(sorted(other.items()))} if other else {}),
        }
        if seed is not None:
            self._files = [self._files[i] for i in np.random.default_rng(seed).permutation(len(self._files))]
            self.about["order"] = f"shuffled once, seed {seed}"

    def _look(self) -> str:
        """Reads the header of every image; decides fields and form. Returns the ending of the member."""
        kinds, sizes, turned = Counter[str](), dict[tuple[int, int], Path](), False
        for file in self._files:
            with file.open("rb") as stream:
                image = opened(stream, str(file))
                turn = orientation(image)
                turned |= turn != 1
                kinds[image.mode] += 1
                sizes.setdefault(image.size[::-1] if turn >= 5 else image.size, file)
        if len(sizes) > 1 and self._size is None:
            (a, first), (b, second) = list(sizes.items())[:2]
            raise DataError(f"{second}: {b[0]}x{b[1]}, but {first} is {a[0]}x{a[1]}: all images must be of one size; "
                            "give --size N to scale and cut them")  # fmt: skip
        grey = set(kinds) <= {"L", "1", "LA"}
        width, height = (self._size, self._size) if self._size else next(iter(sizes))
        endings = {file.suffix[1:].lower() for file in self._files}
        plain = len(endings) == 1 and set(kinds) in ({"L"}, {"RGB"}) and self._size is None and not turned
        ending = endings.pop() if plain else "png"
        self._mode = None if plain else "L" if grey else "RGB"
        self.fields = {"image": Field(ending, "uint8", (1 if grey else 3, height, width))}
        if self._classes:
            self.fields["class"] = Field("cls", "int64", (), len(self._classes))
        if self._captioned:
            self.fields["caption"] = Field("txt", "txt", ())
        size = "as they are" if self._size is None else (f"shorter side scaled to {self._size} (Lanczos), "
                                                         f"centre {self._size}x{self._size}")  # fmt: skip
        self._preparation = f"{size}, the files' bytes" if plain else f"{size}, {self._mode}, PNG"
        return ending

    @property
    def samples(self) -> int:
        """See `Source`."""
        return len(self._files)

    @property
    def digest(self) -> str:
        """See `Source`: names and contents of the files."""
        found = hashlib.sha256()
        for file in self._files:
            for part in (file, file.with_suffix(".txt")) if self._captioned else (file,):
                found.update(f"{json.dumps(part.relative_to(self._path).as_posix())} {sha256(part)}\n".encode())
        return found.hexdigest()

    def sample(self, number: int) -> tuple[str, Members]:
        """See `Source`."""
        file = self._files[number]
        content = file.read_bytes()
        if self._mode is None:
            decoded(opened(content, str(file)), str(file))  # damaged files must not enter a shard
        else:
            content = png(sized(decoded(opened(content, str(file)), str(file), self._mode), self._size))
        members = {self._ending: content}
        if self._classes:
            members["cls"] = str(self._classes.index(file.relative_to(self._path).parts[0])).encode()
        if self._captioned:
            members["txt"] = file.with_suffix(".txt").read_bytes()
        return f"{number:09d}", members
