"""What shards are built from: every pixel and label arrives, what is wrong is named by file, nothing is ever run."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import files
from PIL import Image

from distill.cli import main
from distill.data.build import build, default_shard_size
from distill.data.manifest import DataError, Manifest, read_manifest
from distill.data.reader import ShardReader
from distill.data.samples import open_shard, verify
from distill.data.shards import Shards
from distill.data.sources.base import Options
from distill.data.store import LocalFolder
from distill.data.tar import group, scan
from distill.data.unpickle import unpickled

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def held(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    manifest = read_manifest(folder)
    assert verify(LocalFolder(folder), manifest) == []
    found = []
    for shard in manifest.shards:
        opened = open_shard(LocalFolder(folder), shard)
        found += [(opened.key(n), opened.read(n, manifest.fields)) for n in range(shard.samples)]
    return found


def save(file: Path, array: np.ndarray[Any, Any], mode: str | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(file) if mode else Image.fromarray(array).save(file)
    return file


def built(source: Path, tmp_path: Path, shard_size: int | None = None, **options: Any) -> Manifest:
    return build(str(source), tmp_path / "out", shard_size, options=Options(**options))


# --- folders of images


def test_a_folder_of_classes(tmp_path: Path) -> None:
    arrays = {f"{name}/{n}.png": noise(6, 6, 3) + n for name in ("cat", "ant") for n in range(5)}
    for name, array in arrays.items():
        save(tmp_path / "in" / name, array)
    (tmp_path / "in" / "README.md").write_text("hello")
    (tmp_path / "in" / ".DS_Store").write_text("x")
    manifest = built(tmp_path / "in", tmp_path, 4)
    assert manifest.source["classes"] == ["ant", "cat"]
    assert manifest.source["passed over"] == {".md": 1}
    assert manifest.source["order"] == "shuffled once, seed 0"
    found = held(tmp_path / "out")
    order = np.random.default_rng(0).permutation(10)
    names = sorted(arrays)
    for (key, values), at, number in zip(found, order, range(10), strict=True):
        assert key == f"{number:09d}"
        assert values["class"] == ["ant", "cat"].index(names[at].partition("/")[0])
        assert np.array_equal(values["image"].numpy(), arrays[names[at]].transpose(2, 0, 1))
    first = files(tmp_path / "out")
    build(str(tmp_path / "in"), tmp_path / "again", 4)
    assert files(tmp_path / "again") == first
    build(str(tmp_path / "in"), tmp_path / "other", 4, options=Options(seed=1))
    assert files(tmp_path / "other") != first


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog", ".ipynb_checkpoints"):
        save(tmp_path / "in" / name / "a.png", noise(4, 5))
    assert built(tmp_path / "in", tmp_path).source["classes"] == ["cat", "dog"]


def test_files_keep_their_bytes_where_they_can(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "in" / f"{n}.jpg", noise(8, 8, 3))
    manifest = built(tmp_path / "in", tmp_path)
    assert manifest.fields["image"].member == "jpg" and "class" not in manifest.fields
    with (tmp_path / "out" / manifest.shards[0].file).open("rb") as stream:
        member = scan(stream).members[1]
        stream.seek(member.offset)
        assert stream.read(member.size) == (tmp_path / "in" / "1.jpg").read_bytes()


def test_images_are_scaled_and_cut(tmp_path: Path) -> None:
    save(tmp_path / "in" / "wide.png", noise(20, 40, 3))
    save(tmp_path / "in" / "high.webp", noise(37, 20))
    manifest = built(tmp_path / "in", tmp_path, size=10)
    assert manifest.fields["image"].shape == (3, 10, 10) and manifest.fields["image"].member == "png"
    assert manifest.source["preparation"] == "shorter side scaled to 10 (Lanczos), centre 10x10, RGB, PNG"
    image = Image.open(tmp_path / "in" / "wide.png").resize((20, 10), Image.Resampling.LANCZOS).crop((5, 0, 15, 10))
    wide = held(tmp_path / "out")[1][1]["image"]
    assert np.array_equal(wide.numpy(), np.asarray(image).transpose(2, 0, 1))
    with pytest.raises(DataError, match=r"wide.png: 40x20, but .*high.webp is 20x37: .*give --size N"):
        build(str(tmp_path / "in"), tmp_path / "no")


def test_captions_go_along(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "in" / f"{n}.png", noise(4, 4)).with_suffix(".txt").write_text(f"number {n} é")
    built(tmp_path / "in", tmp_path)
    assert [values["caption"] for _, values in held(tmp_path / "out")] == [f"number {n} é" for n in range(3)]
    (tmp_path / "in" / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1.png: has no caption 1.txt, others have"):
        build(str(tmp_path / "in"), tmp_path / "no")


@pytest.mark.parametrize("ending", ["png", "txt"])
def test_a_file_that_was_changed_is_seen_though_its_size_is_the_same(ending: str, tmp_path: Path) -> None:
    for n in range(3):
        file = tmp_path / "in" / f"{n}.png"
        save(file, noise(4, 4)).with_suffix(".txt").write_text(f"number {n}")
    built(tmp_path / "in", tmp_path)
    changed = tmp_path / "in" / f"1.{ending}"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    with pytest.raises(DataError, match=r"already holds the shards of 'in' \(input .* instead of"):
        built(tmp_path / "in", tmp_path)


def test_photographs_of_a_turned_camera_stand_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 6))
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        image.save(tmp_path / "in" / f"{name}.png", exif=exif)
        image.save(tmp_path / "photos" / f"{name}.jpg", exif=exif)
    assert build(str(tmp_path / "photos"), tmp_path / "p").fields["image"].shape == (3, 8, 6)
    manifest = build(str(tmp_path / "in"), tmp_path / "out")  # of one size and kind, yet their bytes will not do
    assert manifest.fields["image"].shape == (3, 8, 6) and manifest.source["preparation"].endswith("RGB, PNG")
    x = ShardReader(Shards(path=str(tmp_path / "out"))).everything()[0]
    assert x[0, :, 0, 5].tolist() == [1.0, -1.0, -1.0]  # top right
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in" / "a.png", "a.png")
    with pytest.raises(DataError, match=r"x\.tar, sample a: \.png is stored turned \(EXIF\); give --size N"):
        build(str(tmp_path / "x.tar"), tmp_path / "no")
    assert build(str(tmp_path / "x.tar"), tmp_path / "cut", options=Options(size=6)).samples == 1


def test_images_stand_upright_and_lose_transparency(tmp_path: Path) -> None:
    array = noise(4, 6, 3)
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.png", exif=exif)
    Image.fromarray(noise(6, 4, 4)).save(tmp_path / "in" / "b.png")
    built(tmp_path / "in", tmp_path, size=4)
    assert read_manifest(tmp_path / "out").fields["image"].shape == (3, 4, 4)
    upright = np.rot90(array, -1)[1:5]
    assert np.array_equal(held(tmp_path / "out")[0][1]["image"].numpy(), upright.transpose(2, 0, 1))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda f: f.mkdir(), "no images here"),
    "no image": (lambda f: save(f / "a.png", noise(4, 4)) and (f / "b.png").write_bytes(b"GIF89a"), "b.png: is not an"),
    "cut": (
        lambda f: save(f / "a.png", noise(64, 64)).write_bytes((f / "a.png").read_bytes()[:900]),
        "a.png: is not an image .*remove or replace it",
    ),
    "more bits": (lambda f: save(f / "a.png", noise(4, 4).astype(np.uint16)), "a.png: is of mode I;16, .*8 bits"),
    "loose": (lambda f: (save(f / "a.png", noise(4, 4)), save(f / "b" / "a.png", noise(4, 4))), "both here"),
    "a bomb": (lambda f: bomb(f / "a.png"), "a.png: is (not )?an image.*(pixels|bomb)"),
}


def bomb(file: Path) -> None:
    """A png whose header promises 50,000 x 50,000 pixels."""
    save(file, noise(4, 4))
    content = file.read_bytes()
    import zlib

    head = b"IHDR" + struct.pack(">II", 50_000, 50_000) + content[24:29]
    file.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_cannot_be_built(what: str, tmp_path: Path) -> None:
    make, reason = FOLDERS[what]
    make(tmp_path / "in")
    with pytest.raises(DataError, match=reason):
        built(tmp_path / "in", tmp_path)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not (tmp_path / "out" / "manifest.json").exists()


# --- idx


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(zipped: bool, tmp_path: Path) -> None:
    end, pack = (".gz", gzip.compress) if zipped else ("", bytes)
    images, labels = noise(30, 5, 7), np.arange(30, dtype=np.uint8) % 4
    (tmp_path / "in").mkdir()
    for prefix, count in (("train", 30), ("t10k", 12)):
        (tmp_path / "in" / f"{prefix}-images-idx3-ubyte{end}").write_bytes(pack(idx(images[:count])))
        (tmp_path / "in" / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels[:count])))
    for split, count in (("train", 30), ("test", 12)):
        manifest = build(str(tmp_path / "in"), tmp_path / split, 10, options=Options(split=split))
        assert manifest.split == split and manifest.fields["class"].classes == 4
        x, y = ShardReader(Shards(path=str(tmp_path / split))).everything()
        assert torch.equal(((x[:, 0] + 1) * 127.5).round(), torch.from_numpy(images[:count].copy()).float())
        assert y.tolist() == labels[:count].tolist()
    with pytest.raises(DataError, match="--split is train or test"):
        build(str(tmp_path / "in"), tmp_path / "no", options=Options(split="valid"))
    train = f"train-images-idx3-ubyte{end}"
    with pytest.raises(DataError, match="are the training images, and split is test"):
        build(str(tmp_path / "in" / train), tmp_path / "no", options=Options(split="test"))


def test_idx_files_of_other_names(tmp_path: Path) -> None:
    """With a dot, as archives have them; and of no split."""
    images, labels = noise(30, 5, 7), np.arange(30, dtype=np.uint8) % 4
    for name in ("train-images.idx3-ubyte", "mine.idx3-ubyte"):
        (tmp_path / name).write_bytes(idx(images))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "other-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "other-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    sources = [tmp_path, *(tmp_path / f"{name}-ubyte" for name in
                           ("train-images.idx3", "other-images-idx3", "mine.idx3"))]  # fmt: skip
    for number, source in enumerate(sources):
        build(str(source), tmp_path / f"out{number}", name="mine")
        found = [values.get("class") for _, values in held(tmp_path / f"out{number}")]
        assert found == ([None] * 30 if number == 3 else labels.tolist())


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "emnist-letters-train-images-idx3-ubyte"])
def test_training_images_are_no_test_split(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(idx(noise(30, 5, 7)))
    with pytest.raises(DataError, match=f"{name}: are the training images, and split is test"):
        built(tmp_path / name, tmp_path, split="test")
    np.savez(tmp_path / "x.npz", x_train=noise(6, 4, 5), y_train=np.arange(6))
    with pytest.raises(DataError, match=r"x.npz: no array of images \(images, x, x_test, .*there is: x_train, y_train"):
        built(tmp_path / "x.npz", tmp_path, split="test")
    np.savez(
        tmp_path / "x.npz", x_train=noise(6, 4, 5), y_train=np.arange(6), x_test=noise(2, 4, 5), label=np.arange(2)
    )
    assert built(tmp_path / "x.npz", tmp_path, split="test").samples == 2


def test_idx_files_without_images(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(noise(0, 5, 7)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0, np.uint8)))
    with pytest.raises(DataError, match="train-images-idx3-ubyte: holds no images"):
        built(tmp_path, tmp_path)


@pytest.mark.parametrize("array", [np.zeros((3, 4, 5), np.float32), np.zeros((3, 4, 5, 1), np.uint8)])
def test_idx_files_of_another_kind(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    kind = {"f": b"\x0d", "u": b"\x08"}[array.dtype.kind]
    head = b"\0\0" + kind + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    (tmp_path / "my.idx3-ubyte").write_bytes(head + array.tobytes())
    what = {"f": "float32", "u": "unsigned bytes"}[array.dtype.kind]
    reason = f"my.idx3-ubyte: an idx file of {what} in {array.ndim} dimensions, .*save other arrays as .npy"
    with pytest.raises(DataError, match=reason):
        built(tmp_path / "my.idx3-ubyte", tmp_path)


IDX: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda c: c[:-1], r"its header says \[30, 5, 7\], there are 1049 bytes"),
    "longer": (lambda c: c + b"x", "there are more than 1050 bytes"),
    "none": (lambda c: b"\0\0\x07" + c[3:], "not an idx file of unsigned bytes in 3 dimensions"),
    "huge": (lambda c: c[:4] + b"\xff" * 12 + c[16:], "more than is read at once"),
    "empty": (lambda c: b"", "not an idx file"),
}


@pytest.mark.parametrize("what", IDX)
def test_damaged_idx_files(what: str, tmp_path: Path) -> None:
    change, reason = IDX[what]
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(change(idx(noise(30, 5, 7))))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte: .*{reason}.*fetch or copy it again"):
        built(file, tmp_path)
    zipped = tmp_path / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(gzip.compress(idx(noise(30, 5, 7)))[:-20])
    with pytest.raises(DataError, match=r"ubyte.gz: damaged"):
        built(zipped, tmp_path)


# --- arrays


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 5, 3), (6, 3, 4, 5), (6, 1, 4, 5)])
def test_arrays_of_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = noise(*shape)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(6))
    built(tmp_path / "x.npy", tmp_path, labels=tmp_path / "y.npy")
    channels_first = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if shape[1] == 4 else x
    for n, (_, values) in enumerate(held(tmp_path / "out")):
        assert np.array_equal(values["image"].numpy(), channels_first[n]) and values["class"] == n
    np.savez(tmp_path / "x.npz", images=x, labels=np.arange(6))
    build(str(tmp_path / "x.npz"), tmp_path / "z")
    assert [v["class"] for _, v in held(tmp_path / "z")] == list(range(6))


def test_arrays_of_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    built(tmp_path / "x.npy", tmp_path)
    reader = ShardReader(Shards(path=str(tmp_path / "out"), field="x"))
    assert torch.equal(reader.everything()[0], torch.from_numpy(x))
    assert reader.space.value_range is None


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_numbers_are_trained_on_in_float32(dtype: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    built(tmp_path / "x.npy", tmp_path)
    reader = ShardReader(Shards(path=str(tmp_path / "out"), field="x"))
    assert torch.equal(next(reader.batches(0, 7, 0)).x_1.sort(0).values, torch.from_numpy(x).float().sort(0).values)


def test_arrays_are_shuffled_once(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.uint8).repeat(20).reshape(40, 4, 5))
    np.save(tmp_path / "y.npy", np.arange(40))
    built(tmp_path / "x.npy", tmp_path, labels=tmp_path / "y.npy", seed=5)
    found = held(tmp_path / "out")
    labels = [int(values["class"]) for _, values in found]
    assert labels != sorted(labels) == list(range(40))
    assert [int(values["image"][0, 0, 0]) for _, values in found] == labels
    assert read_manifest(tmp_path / "out").source["order"] == "shuffled once, seed 5"


def test_the_last_classes_need_not_occur(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=noise(6, 4, 5), y=np.arange(6) % 3)
    assert built(tmp_path / "x.npz", tmp_path).fields["class"].classes == 3
    more = build(str(tmp_path / "x.npz"), tmp_path / "more", options=Options(classes=10))
    assert more.fields["class"].classes == 10 and more.digest != read_manifest(tmp_path / "out").digest
    with pytest.raises(DataError, match=r"already holds the shards of 'x' .classes 10 instead of 4"):
        build(str(tmp_path / "x.npz"), tmp_path / "more", options=Options(classes=4))
    with pytest.raises(DataError, match=r"x.npz: has 3 classes, not 2"):
        build(str(tmp_path / "x.npz"), tmp_path / "no", options=Options(classes=2))
    save(tmp_path / "images" / "a.png", noise(4, 5))
    with pytest.raises(DataError, match="images: has no classes, not 2"):
        build(str(tmp_path / "images"), tmp_path / "no", options=Options(classes=2))


OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "digits": ("digits", {"size": 16}, "digits: --size does nothing for this source"),
    "labels of an npz": ("x.npz", {"labels": Path("y.npy")}, "x.npz: --labels does nothing"),
    "labels of a folder": ("images", {"labels": Path("y.npy")}, "images: --labels does nothing"),
    "pickles of arrays": ("x.npz", {"unpickle": True}, "x.npz: --unpickle does nothing"),
    "numbers": ("x.npy", {"size": 4}, "holds float32, and only images can be scaled; leave out --size"),
    "nothing": ("x.npz", {"size": 0}, "the size of images must be at least 1, got 0"),
    "a seed": ("x.npz", {"seed": -1}, "the seed must be at least 0, got -1"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_would_do_nothing_are_refused(what: str, cwd: Path) -> None:
    np.savez("x.npz", x=noise(6, 4, 5))
    np.save("x.npy", np.zeros((6, 4), np.float32))
    save(cwd / "images" / "a.png", noise(4, 5))
    source, options, reason = OPTIONS[what]
    with pytest.raises(DataError, match=reason):
        build(source, cwd / "out", options=Options(**options))
    assert not (cwd / "out").exists()


def test_a_home_folder_is_found(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(cwd / "home"))
    np.save(cwd / "x.npy", noise(6, 4, 5))
    (cwd / "home").mkdir()
    (cwd / "x.npy").rename(cwd / "home" / "x.npy")
    reader = Shards(path="~/shards", source="~/x.npy").open(None)
    assert reader.samples == 6 and (cwd / "home" / "shards" / "manifest.json").exists()
    assert {path.name for path in cwd.iterdir()} == {"home"}


def test_arrays_of_another_byte_order(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(7, 3))
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", ">f4", (7, 3))[:] = x
    built(tmp_path / "x.npy", tmp_path)
    tar(tmp_path / "x.tar", [(f"{n}.npy", npy(x[n].astype(">f4"))) for n in range(7)])
    build(str(tmp_path / "x.tar"), tmp_path / "again")
    for folder in ("out", "again"):
        found = ShardReader(Shards(path=str(tmp_path / folder), field="x")).everything()[0]
        assert torch.equal(found, torch.from_numpy(x.astype(np.float32)))


ARRAYS: dict[str, tuple[Any, str]] = {
    "long floats": (np.zeros((4, 3), np.longdouble), "the field x is of dtype float128; only booleans, integers"),
    "integers": (np.zeros((4, 3, 3), np.int64), "must be uint8 images"),
    "five channels": (np.zeros((4, 5, 5, 5), np.uint8), "images have 1 or 3 channels"),
    "none": (np.zeros((0, 3, 3), np.uint8), "must be uint8 images"),
    "objects": (np.array([{"a": 1}], dtype=object), "not a readable np"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_are_none_of_these(what: str, tmp_path: Path) -> None:
    array, reason = ARRAYS[what]
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    np.savez(tmp_path / "x.npz", images=array)
    for file in ("x.npy", "x.npz"):
        with pytest.raises(DataError, match=reason):
            built(tmp_path / file, tmp_path)
    np.save(tmp_path / "good.npy", noise(4, 3, 3))
    for labels, wrong in ((np.arange(3), "labels must be 4 integers"), (np.arange(4) - 1, "labels start at 0")):
        np.save(tmp_path / "y.npy", labels)
        with pytest.raises(DataError, match=wrong):
            built(tmp_path / "good.npy", tmp_path, labels=tmp_path / "y.npy")
    np.savez(tmp_path / "other.npz", pictures=noise(4, 3, 3))
    with pytest.raises(DataError, match=r"no array of images .*there is: pictures"):
        built(tmp_path / "other.npz", tmp_path)


# --- webdatasets


def tar(file: Path, entries: list[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as out:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return file


def png(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def sample(n: int, **more: bytes) -> list[tuple[str, bytes]]:
    members = {"png": png(noise(4, 4) + n), "cls": str(n % 3).encode(), "txt": f"t{n}".encode(),
               "json": json.dumps({"n": n}).encode(), "box.npy": npy(np.full(2, n, np.float32)), **more}  # fmt: skip
    return [(f"train/{n:04d}.{ending}", content) for ending, content in members.items()]


def test_other_webdatasets_are_taken_over(tmp_path: Path) -> None:
    for number in range(3):
        tar(tmp_path / "in" / f"old-{number}.tar", [e for n in range(5) for e in sample(5 * number + n)])
    built(tmp_path / "in", tmp_path, 4)
    found = held(tmp_path / "out")
    assert [key for key, _ in found] == [f"train/{n:04d}" for n in range(15)]
    for n, (_, values) in enumerate(found):
        assert values["class"] == n % 3 and values["caption"] == f"t{n}" and values["json"] == {"n": n}
        assert values["box"].tolist() == [n, n]
        assert np.array_equal(values["image"][0].numpy(), noise(4, 4) + n)


TARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda f: f.write_bytes(tar(f, sample(0)).read_bytes()[:530]), "offset 512, train/0000.png: the file ends"),
    "empty": (lambda f: tar(f, []), "an empty tar"),
    "hidden files alone": (lambda f: tar(f, [("._a.png", b"x")]), "no samples in it"),
    "twice": (lambda f: tar(f, [*sample(0), *sample(1), *sample(0)]), "duplicate key, first at"),
    "another's": (lambda f: (tar(f, sample(0)), tar(f.with_name("b.tar"), sample(0))), "duplicate key, also in"),
    "lacking": (lambda f: tar(f, [*sample(0), *sample(1)[:-1]]), "train/0001: has the members .*differs in box.npy"),
    "leaving": (lambda f: tar(f, [("../../etc/x.cls", b"1")]), "a key that leaves its folder"),
    "absolute": (lambda f: tar(f, [("/etc/x.cls", b"1")]), "a key that leaves its folder"),
    "unknown": (lambda f: tar(f, [("a.mp4", b"1")]), "there is no decoder for it"),
    "pickle": (lambda f: tar(f, sample(0, pth=b"x")), r".pth is a pickle.*convert it by adding --unpickle"),
    "array of texts": (lambda f: tar(f, [("a.npy", npy(np.array(["x"])))]), "the field x is of dtype <U1; only boo"),
    "array of times": (lambda f: tar(f, [("a.npy", npy(np.zeros(2, "M8[s]")))]), "is of dtype datetime64"),
    "array of nothing": (lambda f: tar(f, [("a.npy", npy(np.zeros((0, 3))))]), r"the field x has the shape \[0, 3\]"),
    "no class": (lambda f: tar(f, sample(0, cls=b"cat")), ".cls must be an integer from 0, got b'cat'"),
    "two sizes": (
        lambda f: tar(f, [*sample(0), *sample(1, png=png(noise(4, 5)))]),
        r"train/0001: image is uint8 \[1, 4, 5\], the first sample is uint8 \[1, 4, 4\]: .*--size N",
    ),
    "two shapes": (
        lambda f: tar(f, [*sample(0), *sample(1, **{"box.npy": npy(np.zeros(3, np.float32))})]),
        r"train/0001: box is float32 \[3\], the first sample is float32 \[2\]: all must be alike$",
    ),
}


@pytest.mark.parametrize("what", TARS)
def test_webdatasets_that_cannot_be_taken_over(what: str, tmp_path: Path) -> None:
    make, reason = TARS[what]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / "a.tar")
    with pytest.raises(DataError, match=reason):
        built(tmp_path / "in", tmp_path)
    assert not (tmp_path / "out" / "manifest.json").exists()


# --- pickles


class Mark:
    """Unpickled, it would leave a mark."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_pickles_are_converted_without_running_anything(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"latent": torch.arange(6.0).view(2, 3)}, buffer)
    entries = [(f"{n}.{end}", content) for n in range(3) for end, content in
               (("pth", buffer.getvalue()), ("a.pyd", pickle.dumps({"k": np.arange(3.0), "word": "w"})))]  # fmt: skip
    tar(tmp_path / "in" / "a.tar", entries)
    built(tmp_path / "in", tmp_path, unpickle=True)
    for _, values in held(tmp_path / "out"):
        assert torch.equal(values["latent"], torch.arange(6.0).view(2, 3))
        assert values["k"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("ending", ["pth", "pt", "pyd", "pkl"])
def test_a_pickle_that_would_run_code_is_refused(ending: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = pickle.dumps({"x": Mark(mark)})
    if ending in ("pth", "pt"):
        buffer = io.BytesIO()
        torch.save({"x": Mark(mark)}, buffer)
        hostile = buffer.getvalue()
    with pytest.raises(ValueError, match="cannot be converted"):
        unpickled(ending, hostile)
    tar(tmp_path / "in" / "a.tar", [(f"0.{ending}", hostile)])
    for allowed in (True, False):
        with pytest.raises(DataError):
            built(tmp_path / "in", tmp_path, unpickle=allowed)
    assert not mark.exists()


# --- all of them


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "a.png", noise(8, 9))
    (tmp_path / "in" / "notes.pdf").write_text("x")
    out = str(tmp_path / "out")
    assert main(["shards", "build", str(tmp_path / "in"), out, "--size", "4", "--name", "mine"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}: 1 samples in 1 shards, no classes\n"
    assert "passed over: 1 .pdf" in said.err
    assert main(["shards", "info", out]) == 0
    assert "mixing: 0.00% of neighbours" in capsys.readouterr().out
    assert (tmp_path / "out" / "mine-000000.tar").exists()
    assert main(["shards", "build", str(tmp_path / "nothing"), out]) == 2
    assert main(["shards", "build", str(tmp_path / "in"), out, "--name", "a/b"]) == 2


@pytest.mark.parametrize(("samples", "size"), [(1, 100), (1797, 100), (60_000, 938), (1_281_167, 1000)])
def test_shards_are_neither_few_nor_small(samples: int, size: int) -> None:
    assert default_shard_size(samples) == size


def test_groups_of_members_follow_webdataset(tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", [("a/b.c.PNG", b"1"), ("a/b.txt", b"2"), ("a/c.txt", b"3")])
    with file.open("rb") as stream:
        entries, faults = group(scan(stream).members)
    assert [(e.key, sorted(e.members)) for e in entries] == [("a/b", ["c.png", "txt"]), ("a/c", ["txt"])]
    assert not faults
