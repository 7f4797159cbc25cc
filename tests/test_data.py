"""Shards: built byte-identical, read strictly, and batches that are a function of (data, seed, step)."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import environment
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

import distill.data.build as build_module
from distill.data import DATA
from distill.data.build import _alone, build
from distill.data.manifest import DataError, read_manifest
from distill.data.mixture import Mixture, Part
from distill.data.reader import ShardReader, to_float
from distill.data.samples import verify
from distill.data.shards import Shards
from distill.data.sources import mark
from distill.data.sources.base import Options
from distill.data.store import LocalFolder
from teachers.checkpoints import sha256
from teachers.fields import FieldError
from teachers.space import DataSpace

Members = list[tuple[str, bytes]]


def reader(folder: Path, **keys: Any) -> ShardReader:
    return ShardReader(Shards(path=str(folder), **keys))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in sorted(folder.iterdir())}


# --- building


def test_shards_are_byte_identical_when_built_again(built: Path, tmp_path: Path) -> None:
    build("digits", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(built)
    assert len(hashes(built)) == 37


def test_manifest_says_what_is_there(built: Path) -> None:
    manifest = read_manifest(built)
    assert (manifest.name, manifest.split, manifest.samples) == ("digits", "train", 1797)
    assert [s.samples for s in manifest.shards] == [100] * 17 + [97]
    assert [s.file for s in manifest.shards] == [f"digits-{i:06d}.tar" for i in range(18)]
    assert all(
        s.bytes == (built / s.file).stat().st_size and s.sha256 == sha256(built / s.file) for s in manifest.shards
    )
    assert manifest.space("image", ("class",)) == DataSpace((1, 8, 8), 10, (-1.0, 1.0))
    assert manifest.fields["class"].classes == 10
    assert manifest.source["licence"] == "CC-BY-4.0"
    assert manifest.to_json() == (built / "manifest.json").read_text(encoding="utf-8")
    assert verify(LocalFolder(built), manifest) == []


def test_a_folder_with_the_same_data_is_left_alone(folder: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert build("digits", folder) == read_manifest(folder)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_an_empty_folder_is_filled(built: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    build("digits", tmp_path / "empty")
    assert hashes(tmp_path / "empty") == hashes(built)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_foreign_folders_are_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis: exists and is not a folder of shards.*nothing was written"):
        build("digits", foreign)
    assert [p.name for p in foreign.iterdir()] == ["chapter.txt"]
    with pytest.raises(DataError, match="exists and is not"):
        build("digits", foreign / "chapter.txt")
    before = hashes(folder)
    with pytest.raises(DataError, match=r"already holds the shards of 'digits' \(shard size 100 instead of 50\)"):
        build("digits", folder, 50)
    np.save(tmp_path / "letters.npy", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"already holds the shards of 'digits' \(name .*choose another folder"):
        build(str(tmp_path / "letters.npy"), folder)
    assert hashes(folder) == before


def test_bad_arguments_build_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown source 'digts'.*digits"):
        build("digts", tmp_path / "x")
    with pytest.raises(DataError, match="at least 1, got 0"):
        build("digits", tmp_path / "x", shard_size=0)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_goes_on_where_it_stopped(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "digits"
    real, written = build_module._write_shard, []

    def full(folder: Path, name: str, samples: Any, count: int) -> Any:
        if len(written) == 5:
            raise OSError(28, "No space left on device", str(folder / name))
        written.append(name)
        return real(folder, name, samples, count)

    monkeypatch.setattr(build_module, "_write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        build("digits", target)
    with pytest.raises(DataError, match=r"no manifest.json here"):
        Shards(path=str(target)).open(None)
    shard = target / "digits-000002.tar"
    shard.write_bytes(b"damaged after it was written")
    times = {p.name: p.stat().st_mtime_ns for p in target.glob("*.tar")}
    monkeypatch.setattr(build_module, "_write_shard", real)
    with pytest.raises(DataError, match=r"unfinished, with the shards of 'digits' \(shard size 100 instead of 50\)"):
        build("digits", target, 50)
    build("digits", target)
    assert hashes(target) == hashes(built)
    assert {n: (target / n).stat().st_mtime_ns == t for n, t in times.items()} == {
        **dict.fromkeys(times, True), "digits-000002.tar": False}  # fmt: skip


def test_a_build_killed_anywhere_goes_on(built: Path, tmp_path: Path) -> None:
    """kill -9 after random numbers of shards, again and again until it comes through."""
    code = (
        "import sys; from pathlib import Path; from distill.data.build import build; build('digits', Path(sys.argv[1]))"
    )
    target, kills = tmp_path / "digits", 0
    for shards in (*sorted(np.random.default_rng(0).integers(0, 15, 6)), None):
        process = subprocess.Popen([sys.executable, "-c", code, str(target)], env=environment())
        if shards is not None:
            while len(list(target.glob("*.tar"))) <= shards and process.poll() is None:
                time.sleep(0.001)
            process.kill()
            kills += process.wait() == -9
        assert process.wait() in (0, -9)
    assert kills >= 3
    assert hashes(target) == hashes(built)


# --- reading


def test_every_pixel_and_label_is_that_of_the_source(built: Path) -> None:
    digits = load_digits()
    images, labels = reader(built).everything()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    levels = (images[:, 0].double().numpy() + 1) * 127.5
    np.testing.assert_allclose(levels, np.rint(digits.images * 255 / 16), atol=1e-4)
    assert labels is not None
    assert labels.tolist() == digits.target.tolist()
    assert images.min() == -1
    assert images.max() == 1


def test_to_float_spans_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 255, 51], dtype=torch.uint8)).tolist() == pytest.approx([-1, 1, -0.6])


def test_batches_of_a_step_are_those_of_the_unbroken_run(built: Path) -> None:
    """batches(step=k) starts with the k-th of batches(step=0), across epoch ends (1797 / 256 is no integer)."""
    whole = list(islice(reader(built).batches(seed=3, batch=256, step=0), 24))
    for step in (1, 6, 7, 8, 15, 22):
        batch = next(reader(built).batches(seed=3, batch=256, step=step))
        assert batch.keys == whole[step].keys
        assert torch.equal(batch.x_1, whole[step].x_1)
        assert torch.equal(batch.cond["class"], whole[step].cond["class"])
    assert next(reader(built).batches(seed=4, batch=256, step=0)).keys != whole[0].keys


def test_batches_hold_the_samples_their_keys_name(built: Path) -> None:
    images, labels = reader(built).everything()
    batches = list(islice(reader(built).batches(seed=0, batch=100, step=0), 18))
    for batch in batches:
        rows = [int(key) for key in batch.keys]
        assert torch.equal(batch.x_1, images[rows])
        assert torch.equal(batch.cond["class"], labels[rows])
        assert batch.first == 0
    assert len({key for batch in batches[:15] for key in batch.keys}) == 1500


def test_streams_are_the_recipes_or_the_default(built: Path) -> None:
    assert reader(built).streams == 16
    assert Shards(path=str(built), streams=4).open(None).streams == 4
    one, four = (next(reader(built, streams=n).batches(0, 64, 0)).keys for n in (1, 4))
    assert one != four
    with pytest.raises(DataError, match=r"19 streams but 18 shards; .*at most 16"):
        reader(built, streams=19)


# --- as a recipe names them


def test_what_is_missing_is_built_when_opened_and_not_when_checked(built: Path, tmp_path: Path) -> None:
    shards = Shards(path=str(tmp_path / "new" / "digits"), source="digits")
    assert shards.check() is None
    assert list(tmp_path.iterdir()) == []
    assert shards.open(None).manifest.samples == 1797
    assert hashes(tmp_path / "new" / "digits") == hashes(built)
    found = shards.check()
    assert found is not None
    assert found.digest == reader(built).digest


def test_an_empty_folder_is_still_to_be_built(tmp_path: Path) -> None:
    """What `open` would fill, `check` must not refuse."""
    (tmp_path / "digits").mkdir()
    assert Shards(path=str(tmp_path / "digits"), source="digits").check() is None


def test_shards_that_neither_are_nor_can_be_are_refused(tmp_path: Path) -> None:
    shards = Shards(path=str(tmp_path / "nowhere"))
    for look in (shards.check, lambda: shards.open(None)):
        with pytest.raises(DataError, match=r"nowhere: no manifest.json here; build"):
            look()
    with pytest.raises(FieldError) as error:
        Shards(path="x", shuffle=0, streams=0)
    assert set(error.value.problems) == {"shuffle", "streams"}
    missing = Shards(path=str(tmp_path / "new"), source="digts")
    with pytest.raises(DataError, match=r"digts: is not there, and neither are shards in .*new") as unknown:
        missing.check()
    assert unknown.value.key == ("source",)
    assert DATA["shards"] is Shards


def test_shards_of_other_data_than_the_source_are_refused(built: Path, photos: Path) -> None:
    """They lie where another recipe built them."""
    assert Shards(path=str(built), source="digits").check() is not None
    assert Shards(path=str(photos), source="elsewhere/images").check() is not None  # by its name, it may have moved
    for shards in (Shards(path=str(built), source=str(photos.parent / "images")),
                   Shards(path=str(built), source="digits", split="test")):  # fmt: skip
        for look in (shards.check, lambda shards=shards: shards.open(None)):  # type: ignore[misc]
            with pytest.raises(
                DataError, match=r"holds 'digits', split 'train', .*set path to .* or source to null"
            ) as e:
                look()
            assert e.value.key == ("path",)


@pytest.mark.parametrize("kind", ["idx", "npy", "images", "tars"])
def test_other_files_in_a_source_of_the_same_name_are_refused(kind: str, tmp_path: Path) -> None:
    """As MNIST/raw and KMNIST/raw are."""
    for value, parent in enumerate(("a", "same", "b")):
        images = np.full((6, 4, 5), max(value, 1), np.uint8)
        raw = tmp_path / parent / "raw"
        raw.mkdir(parents=True)
        if kind == "idx":
            head = b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes()
            (raw / "train-images-idx3-ubyte").write_bytes(head + images.tobytes())
        elif kind == "npy":
            np.save(raw.with_suffix(".npy"), images)
        elif kind == "images":
            [Image.fromarray(image).save(raw / f"{n}.png") for n, image in enumerate(images)]
        else:
            np.save(tmp_path / f"{parent}.npy", images)
            build(str(tmp_path / f"{parent}.npy"), tmp_path / f"{parent}-shards", name="x")
            shutil.copy(tmp_path / f"{parent}-shards" / "x-000000.tar", raw / "x.tar")
    end = ".npy" if kind == "npy" else ""
    Shards(path=str(tmp_path / "out"), source=str(tmp_path / "a" / f"raw{end}")).open(None)
    again = Shards(path=str(tmp_path / "out"), source=str(tmp_path / "same" / f"raw{end}"))
    assert again.check() is not None  # a copy of it elsewhere
    other = Shards(path=str(tmp_path / "out"), source=str(tmp_path / "b" / f"raw{end}"))
    for look in (other.check, lambda: other.open(None).look()):
        with pytest.raises(DataError, match=r"was built from other files than are in .*b/raw.*: set path to") as error:
            look()
        assert error.value.key == ("path",)
    assert other.open(None).samples == 6  # of a run that goes on


def test_what_a_source_does_not_read_may_come_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own shards among them, which may lie in it."""
    for n in range(3):
        (tmp_path / "in" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 5), n, np.uint8)).save(tmp_path / "in" / "cat" / f"{n}.png")
    inside = Shards(path=str(tmp_path / "in" / "shards"), source=str(tmp_path / "in"))
    inside.open(None).look()
    (tmp_path / "in" / "README.md").write_text("mine")
    inside.open(None).look()
    monkeypatch.chdir(tmp_path / "in")
    assert mark(".", "train") == mark(str(tmp_path / "in"), "train") != mark("cat", "train")


def test_a_build_waits_for_another_of_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    writing = tmp_path / "out" / "..plan.json.new-1"  # as the other one begins
    writing.touch()
    with ThreadPoolExecutor(1) as pool:
        with _alone(tmp_path / "out"):
            waiting = pool.submit(build, "digits", tmp_path / "out")
            time.sleep(1)
            assert not waiting.done() and list((tmp_path / "out").iterdir()) == [writing]
            writing.unlink()
            assert "out: waiting for another job that builds it" in capsys.readouterr().err
        assert waiting.result().samples == 1797


def test_no_more_shards_are_open_than_may_be(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(300, dtype=np.float32)[:, None])
    build(str(tmp_path / "x.npy"), tmp_path / "out", 1)
    reader = Shards(path=str(tmp_path / "out"), field="x").open(None)
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, kept[1]))
        reader = Shards(path=str(tmp_path / "out"), field="x").open(None)
        assert reader.everything()[0].flatten().tolist() == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)


def test_of_large_data_some_are_measured_with(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.reader._TOGETHER", 64 * 100 + 5)
    every, labels = Shards(path=str(built)).open(None).everything()
    assert len(every) == len(cast(Tensor, labels)) == 100
    assert torch.bincount(cast(Tensor, labels)).min() > 0  # from everywhere


def test_of_large_data_whose_classes_come_in_turn_all_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((200, 4, 4), np.uint8), y=np.arange(200) % 2)
    build(str(tmp_path / "x.npz"), tmp_path / "out", 50)
    monkeypatch.setattr("distill.data.reader._TOGETHER", 16 * 100)
    _, labels = Shards(path=str(tmp_path / "out")).open(None).everything()
    assert torch.bincount(cast(Tensor, labels), minlength=2).min() > 30


def test_classes_of_other_names_are_not_mixed(tmp_path: Path) -> None:
    for folder, names in (("one", "ab"), ("same", "ab"), ("other", "ac"), ("fewer", "a")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / folder / name / "x.png")
        build(str(tmp_path / folder), tmp_path / f"{folder}-shards", options=Options(classes=2))
    names = ("one", "same", "fewer", "other")
    one, same, fewer, other = (Part(shards=Shards(path=str(tmp_path / f"{name}-shards"))) for name in names)
    Mixture(sources=(one, same, fewer)).open(None)
    with pytest.raises(DataError, match="other-shards: class 1 is c, in the data trained on b: build it"):
        Mixture(sources=(one, other)).open(None)


def test_a_split_that_a_source_does_not_have_is_refused(photos: Path, tmp_path: Path) -> None:
    for source in ("digits", str(photos.parent / "images")):
        shards = Shards(path=str(tmp_path / "new"), source=source, split="test")
        for look in (shards.check, lambda shards=shards: shards.open(None)):  # type: ignore[misc]
            with pytest.raises(DataError, match=r"only idx files have splits; take the 'test' one as source") as error:
                look()
            assert error.value.key == ("split",)
    assert not (tmp_path / "new").exists()
