"""Arrays as sources: digits, npy, npz and idx files."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from distill.data.decode import ELEMENTS, array
from distill.data.manifest import DataError, Field
from distill.data.sources.base import Members, Options, Source
from distill.data.sources.prepare import png, prepared, sized

_Array = np.ndarray[Any, Any]
_About = Mapping[str, Any]


class Arrays:
    """Images ``[n, c, h, w]`` uint8, or other numbers ``[n, *dims]`` float, with classes ``[n]`` or none."""

    def __init__(
        self,
        x: _Array,
        labels: _Array | None,
        classes: int,
        about: _About,
        options: Options | None = None,
    ) -> None:
        options = options or Options()
        size = options.size
        self._x, self._labels, self._size = x, labels, size
        self._order = np.arange(len(x))
        if x.dtype == np.uint8:
            shape = (x.shape[1], size, size) if size else x.shape[1:]
            self.fields = {"image": Field("png", "uint8", shape)}
        else:
            self.fields = {"x": Field("npy", str(x.dtype.newbyteorder("=")), x.shape[1:])}
        if labels is not None:
            self.fields["class"] = Field("cls", "int64", (), classes)
        self.about = dict(about)
        if options.seed is not None:
            self._order = np.random.default_rng(options.seed).permutation(len(x))
            self.about["order"] = f"shuffled once, seed {options.seed}"

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
        at = self._order[number]
        members = {"cls": str(int(self._labels[at])).encode()} if self._labels is not None else {}
        x = self._x[at]
        if "image" in self.fields:
            image = Image.fromarray(np.ascontiguousarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0)))
            return f"{number:09d}", {"png": png(sized(image, self._size)), **members}
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


def _labels(found: _Array, count: int, where: str) -> tuple[_Array, int]:
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be {count} integers, got {found.dtype} {list(found.shape)}")
    if count and found.min() < 0:
        raise DataError(f"{where}: labels start at 0, got {found.min()}")
    return found.astype(np.int64), int(found.max()) + 1


def _checked(x: _Array, where: str) -> _Array:
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


_X, _Y = ("images", "x", "x_{split}", "data", "arr_0"), ("labels", "y", "y_{split}", "label", "targets", "arr_1")


def arrays(path: Path, options: Options) -> Source:
    """An npy file, its labels in `options.labels`, or an npz file with both. Raises DataError."""
    labels = None
    if path.suffix == ".npy":
        x = _mapped(path)
        if options.labels is not None:
            labels = _mapped(options.labels)
    else:
        held = _npz(path)
        names, of_labels = ([name.format(split=options.split) for name in known] for known in (_X, _Y))
        found = [held[name] for name in names if name in held]
        if not found:
            raise DataError(f"{path}: no array of images ({', '.join(names)}), there is: {', '.join(held)}")
        x, labels = found[0], next((held[name] for name in of_labels if name in held), None)
    x = _checked(x, str(path))
    if x.dtype != np.uint8 and options.size is not None:
        raise DataError(f"{path}: holds {x.dtype}, and only images can be scaled; leave out --size")
    where = str(options.labels or path)
    of, classes = _labels(labels, len(x), where) if labels is not None else (None, 0)
    return Arrays(x, of, classes, {"title": path.name, **prepared(options)}, options)


def _mapped(path: Path) -> _Array:
    """An npy file, read as far as it is needed."""
    try:
        return cast(Any, np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable npy file ({error})") from None


def _npz(path: Path) -> dict[str, _Array]:
    def check(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        if int(np.prod(shape, dtype=object)) > 64 * ELEMENTS:
            raise ValueError(f"has the shape {list(shape)}: too large for an npz file, save npy files")

    try:
        with zipfile.ZipFile(path) as held:
            return {Path(name).stem: _npz_member(held, name, check) for name in held.namelist()}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: not a readable npz file ({error})") from None


def _npz_member(held: zipfile.ZipFile, name: str, check: Any) -> _Array:
    with held.open(name) as file:
        try:
            return array(file.read(), check, limit=64 * ELEMENTS)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


# --- idx files, as MNIST and its kin have them


def idx_files(path: Path, split: str) -> tuple[Path, Path | None] | None:
    """Images and labels of a split, in a folder or beside a file of images; None if there are none.

    Named as MNIST's are, ``train-images-idx3-ubyte``, or with a dot before idx3. Raises DataError where there are those
    of another split alone.
    """
    prefix = {"train": "train", "test": "t10k"}.get(split, split)
    if path.is_dir():
        named = (path / f"{prefix}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz"))
        images = next((file for file in named if file.is_file()), None)
        if images is None and any(path.glob("*[-.]idx3-ubyte*")):
            raise DataError(f"{path}: no {prefix}-images-idx3-ubyte[.gz] here; --split is train or test")
        if images is None:
            return None
    elif "idx3" in path.name:
        images = path
        if split == "test" and "train" in path.name and "test" not in path.name:
            raise DataError(f"{path}: are the training images, and split is test; take the t10k file, or the folder")
    else:
        return None
    start, _, end = images.name.removesuffix(".gz").replace("images", "labels").partition("idx3")
    named = (images.with_name(f"{start[:-1]}{dot}idx1{end}{gz}") for dot in (start[-1:], *"-.") for gz in ("", ".gz"))
    labels = next((file for file in named if file.is_file()), None)
    return images, labels


def idx_arrays(images: Path, labels: Path | None, options: Options) -> Source:
    """What `idx_files` found. Raises DataError."""
    x = _read_idx(images, 3)[:, None]
    if not len(x):
        raise DataError(f"{images}: holds no images")
    y, classes = _labels(_read_idx(labels, 1), len(x), str(labels)) if labels else (None, 0)
    return Arrays(x, y, classes, {"title": images.name, **prepared(options)}, options)


_IDX = {b"\x08": "unsigned bytes", b"\x09": "signed bytes", b"\x0b": "int16", b"\x0c": "int32", b"\x0d": "float32",
        b"\x0e": "float64"}  # fmt: skip


def _read_idx(path: Path, dims: int) -> _Array:
    """An array of unsigned bytes. Raises DataError unless the file has exactly what its header says."""
    remedy = "fetch or copy it again"
    with path.open("rb") as raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw)
        try:
            head = file.read(4 + 4 * dims)
            if head[:2] == b"\0\0" and head[2:4] != bytes([8, dims]) and head[2:3] in _IDX:
                raise DataError(f"{path}: an idx file of {_IDX[head[2:3]]} in {head[3]} dimensions, unsigned bytes in "
                                f"{dims} are read; save other arrays as .npy")  # fmt: skip
            if head[:4] != bytes([0, 0, 8, dims]) or len(head) != 4 + 4 * dims:
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
