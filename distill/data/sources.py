"""What shards are built from: digits, image folders, idx, npy and npz files, webdatasets. Samples by number, in a fixed
order, each as the members it will have; what is wrong is named by file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import safetensors
import safetensors.torch
from PIL import ExifTags, Image, ImageOps

from distill.data.decode import ELEMENTS, MEMBER_BYTES, array, open_image, pixels
from distill.data.manifest import ENDINGS, IMAGES, DataError, Field
from distill.data.tar import Entry, group, scan
from distill.data.unpickle import PICKLES, unpickled

Members = dict[str, bytes]
_Array = np.ndarray[Any, Any]
_About = Mapping[str, Any]


class Source(Protocol):
    """Samples 0 .. n - 1 with the same fields."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """What every sample has."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """What the manifest says of their origin, in plain JSON."""
        ...

    @property
    def samples(self) -> int:
        """How many there are."""
        ...

    @property
    def digest(self) -> str:
        """Changes when the samples do."""
        ...

    def sample(self, number: int) -> tuple[str, Members]:
        """Key and members by ending. Raises DataError."""
        ...


@dataclass(frozen=True)
class Options:
    """How images are prepared. size: the shorter side is scaled to it, then the centre is cut out; None: as they are.
    split: which part of a source that has several. seed: of the order that the samples get; None: as they come.
    labels: a file of labels beside arrays. unpickle: turn pickled members into safetensors and JSON."""

    size: int | None = None
    split: str = "train"
    seed: int | None = None
    labels: Path | None = None
    unpickle: bool = False


def open_source(name: str, options: Options) -> Source:
    """The source that a name or path means. Raises DataError."""
    path = Path(name)
    if name == "digits" and not path.exists():
        return digits()
    if not path.exists():
        raise DataError(f"unknown source {name!r}: no such file or folder, and the only name is known: digits")
    if path.is_dir() and any(path.glob("*.tar")):
        return Webdataset(sorted(path.glob("*.tar")), options)
    if path.suffix == ".tar":
        return Webdataset([path], options)
    if path.suffix in (".npy", ".npz"):
        return _arrays(path, options)
    idx = _idx_files(path, options.split)
    if idx is not None:
        return _idx(*idx, options)
    if path.is_dir():
        return ImageFolder(path, options)
    raise DataError(f"{path}: not a source; take a folder of images or tars, idx files, .npy, .npz or .tar")


# --- arrays of images


class Arrays:
    """Images ``[n, c, h, w]`` uint8, or other numbers ``[n, *dims]`` float, with classes ``[n]`` or none."""

    def __init__(self, x: _Array, labels: _Array | None, classes: int, about: _About, size: int | None = None) -> None:
        self._x, self._labels, self._size = x, labels, size
        if x.dtype == np.uint8:
            shape = (x.shape[1], size, size) if size else x.shape[1:]
            self.fields = {"image": Field("png", "uint8", shape)}
        else:
            self.fields = {"x": Field("npy", str(x.dtype.newbyteorder("=")), x.shape[1:])}
        if labels is not None:
            self.fields["class"] = Field("cls", "int64", (), classes)
        self.about = about

    @property
    def samples(self) -> int:
        """See `Source`."""
        return len(self._x)

    @property
    def digest(self) -> str:
        """See `Source`."""
        sha = hashlib.sha256()
        for start in range(0, len(self._x), 4096):
            sha.update(np.ascontiguousarray(self._x[start : start + 4096]).tobytes())
        sha.update(b"" if self._labels is None else self._labels.tobytes())
        return sha.hexdigest()

    def sample(self, number: int) -> tuple[str, Members]:
        """See `Source`."""
        members = {"cls": str(int(self._labels[number])).encode()} if self._labels is not None else {}
        x = self._x[number]
        if "image" in self.fields:
            image = Image.fromarray(np.ascontiguousarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0)))
            return f"{number:09d}", {"png": _png(_sized(image, self._size)), **members}
        buffer = io.BytesIO()
        np.save(buffer, x)
        return f"{number:09d}", {"npy": buffer.getvalue(), **members}


def digits() -> Source:
    """scikit-learn's digits: 1,797 grey 8x8 images in 10 classes; values 0..16 are stretched to 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    about = {
        "title": "Optical Recognition of Handwritten Digits, test part, as in sklearn.datasets.load_digits",
        "authors": "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, doi 10.24432/C50P49",
        "licence": "CC-BY-4.0",
        "preparation": "8x8, values 0..16 scaled to 0..255 and rounded, PNG",
    }
    return Arrays(images, data.target.astype(np.int64), 10, about)


def _labels(found: np.ndarray[Any, Any], count: int, where: str) -> tuple[np.ndarray[Any, Any], int]:
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be {count} integers, got {found.dtype} {list(found.shape)}")
    if count and found.min() < 0:
        raise DataError(f"{where}: labels start at 0, got {found.min()}")
    return found.astype(np.int64), int(found.max()) + 1


def _checked(x: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """Images as ``[n, c, h, w]``, floats as they are. Raises DataError."""
    if x.dtype.kind == "f" and x.ndim >= 2 and len(x):
        return x
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or not len(x):
        raise DataError(f"{where}: must be uint8 images [n, h, w], [n, h, w, c] or [n, c, h, w], or floats [n, ...], "
                        f"got {x.dtype} {list(x.shape)}")  # fmt: skip
    if x.ndim == 3:
        return x[:, None]
    if x.shape[1] in (1, 3):
        return x
    if x.shape[3] in (1, 3):
        return x.transpose(0, 3, 1, 2)
    raise DataError(f"{where}: images have 1 or 3 channels, got {list(x.shape)}")


def _prepared(options: Options) -> dict[str, Any]:
    if options.size is None:
        return {"preparation": "as they are, PNG"}
    size = options.size
    return {"preparation": f"shorter side scaled to {size} (Lanczos), centre {size}x{size}, PNG"}


_X, _Y = ("images", "x", "x_train", "data", "arr_0"), ("labels", "y", "y_train", "targets", "arr_1")


def _arrays(path: Path, options: Options) -> Source:
    labels = None
    if path.suffix == ".npy":
        x = _mapped(path)
        if options.labels is not None:
            labels = _mapped(options.labels)
    else:
        held = _npz(path)
        names = [name for name in _X if name in held]
        if not names:
            raise DataError(f"{path}: no array of images ({', '.join(_X)}), there is: {', '.join(held)}")
        x = held[names[0]]
        labels = next((held[name] for name in _Y if name in held), None)
    x = _checked(x, str(path))
    where = str(options.labels or path)
    found, classes = _labels(labels, len(x), where) if labels is not None else (None, 0)
    return Arrays(x, found, classes, {"title": path.name, **_prepared(options)}, options.size)


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    """An npy file, read as far as it is needed."""
    try:
        return cast(Any, np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable npy file ({error})") from None


def _npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    def check(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        if int(np.prod(shape, dtype=object)) > 64 * ELEMENTS:
            raise ValueError(f"has the shape {list(shape)}: too large for an npz file, save npy files")

    try:
        with zipfile.ZipFile(path) as held:
            return {Path(name).stem: _npz_member(held, name, check) for name in held.namelist()}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: not a readable npz file ({error})") from None


def _npz_member(held: zipfile.ZipFile, name: str, check: Any) -> np.ndarray[Any, Any]:
    with held.open(name) as file:
        try:
            return array(file.read(), check, limit=64 * ELEMENTS)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


# --- idx files, as MNIST and its kin have them


def _idx_files(path: Path, split: str) -> tuple[Path, Path | None] | None:
    """Images and labels of a split, in a folder or beside a file of images; None if there are none."""
    prefix = {"train": "train", "test": "t10k"}.get(split, split)
    names = ("", ".gz")
    if path.is_dir():
        images = next((path / f"{prefix}-images-idx3-ubyte{end}" for end in names
                       if (path / f"{prefix}-images-idx3-ubyte{end}").is_file()), None)  # fmt: skip
        if images is None and any(path.glob("*-idx3-ubyte*")):
            raise DataError(f"{path}: no {prefix}-images-idx3-ubyte[.gz] here; --split is train or test")
        if images is None:
            return None
    elif "idx3" in path.name:
        images = path
    else:
        return None
    beside = images.name.replace("images-idx3", "labels-idx1").removesuffix(".gz")
    labels = next((images.with_name(beside + end) for end in names if images.with_name(beside + end).is_file()), None)
    return images, labels


def _idx(images: Path, labels: Path | None, options: Options) -> Source:
    x = _read_idx(images, 3)[:, None]
    y, classes = _labels(_read_idx(labels, 1), len(x), str(labels)) if labels else (None, 0)
    return Arrays(x, y, classes, {"title": images.name, **_prepared(options)}, options.size)


def _read_idx(path: Path, dims: int) -> np.ndarray[Any, Any]:
    """An array of unsigned bytes. Raises DataError unless the file has exactly what its header says."""
    remedy = "fetch or copy it again"
    with path.open("rb") as raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw)
        try:
            head = file.read(4 + 4 * dims)
            if head[:3] != b"\0\0\x08" or len(head) != 4 + 4 * dims or head[3] != dims:
                raise DataError(f"{path}: not an idx file of unsigned bytes in {dims} dimensions; {remedy}")
            shape = struct.unpack(f">{dims}I", head[4:])
            count = int(np.prod(shape, dtype=object))
            if count > 64 * ELEMENTS:
                raise DataError(f"{path}: its header says {list(shape)}, more than is read at once; {remedy}")
            content = file.read(count + 1)
        except (EOFError, OSError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged ({error}); {remedy}") from None
    if len(content) != count:
        raise DataError(f"{path}: its header says {list(shape)}, there are {'more than ' * (len(content) > count)}"
                        f"{min(len(content), count)} bytes; {remedy}")  # fmt: skip
    return np.frombuffer(content, np.uint8).reshape(shape)


# --- folders of images


class ImageFolder:
    """``folder/CLASS/*.png`` with a class for each subfolder, by name, or ``folder/*.png`` without classes; a text file
    of the same name beside every image is its caption."""

    def __init__(self, path: Path, options: Options) -> None:
        every = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
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
                image = _opened(stream, str(file))
                turn = _turn(image)
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
                with part.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
                found.update(f"{json.dumps(part.relative_to(self._path).as_posix())} {content}\n".encode())
        return found.hexdigest()

    def sample(self, number: int) -> tuple[str, Members]:
        """See `Source`."""
        file = self._files[number]
        content = file.read_bytes()
        if self._mode is None:
            _decoded(_opened(content, str(file)), str(file))  # damaged files must not enter a shard
        else:
            content = _png(_sized(_decoded(_opened(content, str(file)), str(file), self._mode), self._size))
        members = {self._ending: content}
        if self._classes:
            members["cls"] = str(self._classes.index(file.relative_to(self._path).parts[0])).encode()
        if self._captioned:
            members["txt"] = file.with_suffix(".txt").read_bytes()
        return f"{number:09d}", members


def _opened(content: Any, where: str) -> Image.Image:
    try:
        image = open_image(content)
    except ValueError as error:
        raise DataError(f"{where}: {error}; remove or replace it") from None
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise DataError(f"{where}: is of mode {image.mode}, which has more than 8 bits; convert it to 8 bits a channel")
    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{where}: is an animation; take single images")
    return image


def _turn(image: Image.Image) -> int:
    """How the camera was held, by EXIF: 1 upright, from 5 on width and height are exchanged."""
    if "exif" not in image.info:  # asking a PNG for it would decode the whole of it
        return 1
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    return turn if turn in range(1, 9) else 1


def _decoded(image: Image.Image, where: str, mode: str | None = None) -> Image.Image:
    """The image upright and, if asked for, in a mode; transparency is dropped."""
    try:
        pixels(image)
        return image if mode is None else ImageOps.exif_transpose(image).convert(mode)
    except (ValueError, OSError, SyntaxError) as error:
        raise DataError(f"{where}: {error}; remove or replace it") from None


def _sized(image: Image.Image, size: int | None) -> Image.Image:
    if size is None:
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


# --- webdatasets


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
            self.about |= _prepared(options)
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
            found |= self._field(ending, content)
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

    def _field(self, ending: str, content: bytes) -> dict[str, Field]:
        where = f"{self._tars[0].path}, member .{ending}"
        if ending in IMAGES:
            image = _opened(content, where)
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
        return entry.key, members

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
            image = _decoded(_opened(content, f"{where}, .{ending}"), f"{where}, .{ending}")
            if image.mode in ("L", "RGB") and self._options.size is None:
                if _turn(image) != 1:
                    raise DataError(f"{where}: .{ending} is stored turned (EXIF); give --size N to set all upright")
                return {ending: content}
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            return {"png": _png(_sized(_decoded(image, where, mode), self._options.size))}
        return {ending: content}
