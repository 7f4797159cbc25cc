"""Shards: built byte-identical, read strictly, and batches that are a function of (data, seed, step)."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from distill.data import DATA
from distill.data.build import SOURCES, build
from distill.data.manifest import DataError, read_manifest
from distill.data.shards import ShardReader, Shards, read_shard, to_float, verify
from teachers.adapters.native import sha256
from teachers.fields import FieldError
from teachers.space import DataSpace

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    build("digits", folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "digits"))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in sorted(folder.iterdir())}


# --- building


def test_shards_are_byte_identical_when_built_again(built: Path, tmp_path: Path) -> None:
    build("digits", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(built)
    assert len(hashes(built)) == 19


def test_manifest_says_what_is_there(built: Path) -> None:
    manifest = read_manifest(built)
    assert (manifest.name, manifest.split, manifest.samples) == ("digits", "train", 1797)
    assert [s.samples for s in manifest.shards] == [100] * 17 + [97]
    assert [s.file for s in manifest.shards] == [f"digits-{i:06d}.tar" for i in range(18)]
    assert all(s.bytes == (built / s.file).stat().st_size and s.sha256 == sha256(built / s.file) for s in manifest.shards)
    assert manifest.space == DataSpace((1, 8, 8), 10, (-1.0, 1.0))
    assert manifest.fields["class"].classes == 10
    assert manifest.source["licence"] == "CC-BY-4.0"
    assert manifest.to_json() == (built / "manifest.json").read_text(encoding="utf-8")
    assert verify(built) == []


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
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"]["builder"] = "letters"
    manifest["name"] = "letters"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = hashes(folder)
    with pytest.raises(DataError, match=r"already holds the shards of 'letters'.*choose another folder"):
        build("digits", folder)
    assert hashes(folder) == before


def test_bad_arguments_build_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown source 'digts'; known: digits"):
        build("digts", tmp_path / "x")
    with pytest.raises(DataError, match="at least 1, got 0"):
        build("digits", tmp_path / "x", shard_size=0)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*arguments: object) -> Iterable[object]:
        (tmp_path / "never.tar").touch()
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr("distill.data.build._write_shards", half)
    with pytest.raises(OSError, match="No space left") as error:
        build("digits", tmp_path / "digits")
    assert error.value.filename == str(tmp_path / "digits")
    assert [p.name for p in tmp_path.iterdir()] == ["never.tar"]


# --- reading


def test_every_pixel_and_label_is_that_of_the_source(built: Path) -> None:
    digits = load_digits()
    images, labels = ShardReader(built).everything()
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
    whole = list(islice(ShardReader(built).batches(seed=3, batch=256, step=0), 24))
    for step in (1, 6, 7, 8, 15, 22):
        batch = next(ShardReader(built).batches(seed=3, batch=256, step=step))
        assert batch.keys == whole[step].keys
        assert torch.equal(batch.x_1, whole[step].x_1)
        assert torch.equal(batch.cond["class"], whole[step].cond["class"])
    assert next(ShardReader(built).batches(seed=4, batch=256, step=0)).keys != whole[0].keys


def test_batches_hold_the_samples_their_keys_name(built: Path) -> None:
    images, labels = ShardReader(built).everything()
    batches = list(islice(ShardReader(built).batches(seed=0, batch=100, step=0), 18))
    for batch in batches:
        rows = [int(key) for key in batch.keys]
        assert torch.equal(batch.x_1, images[rows])
        assert torch.equal(batch.cond["class"], labels[rows])
        assert batch.first == 0
    assert len({key for batch in batches[:15] for key in batch.keys}) == 1500


def test_streams_are_the_recipes_or_the_default(built: Path) -> None:
    assert ShardReader(built).streams == 16
    assert Shards(path=str(built), streams=4).open(None).streams == 4
    one, four = (next(ShardReader(built, n).batches(0, 64, 0)).keys for n in (1, 4))
    assert one != four
    with pytest.raises(DataError, match=r"19 streams but 18 shards; .*at most 16"):
        ShardReader(built, 19)


# --- damage: a shard is trusted only if size, digest, count and fields are as promised


def reseal(folder: Path, number: int = 0, **changes: int) -> None:
    """State a changed shard as it lies there, so that the checks behind size and digest are reached."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    shard = folder / manifest["shards"][number]["file"]
    manifest["shards"][number] |= {"bytes": shard.stat().st_size, "sha256": sha256(shard)} | changes
    manifest["samples"] = sum(s["samples"] for s in manifest["shards"])
    file.write_text(json.dumps(manifest))


def edit(change: Callable[[bytes], bytes], seal: bool) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard = folder / "digits-000000.tar"
        shard.write_bytes(change(shard.read_bytes()))
        if seal:
            reseal(folder)

    return apply


def members(content: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]


def packed(entries: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def repack(change: Callable[[Members], Members]) -> Callable[[Path], None]:
    return edit(lambda content: packed(change(members(content))), seal=True)


def patch(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def swap_member(entries: Members, ending: str, content: bytes) -> Members:
    """The first member of that ending holds something else."""
    number = next(i for i, (name, _) in enumerate(entries) if name.endswith(ending))
    return [*entries[:number], (entries[number][0], content), *entries[number + 1 :]]


def png(*shape: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda f: (f / "digits-000000.tar").unlink(), "missing, though the manifest promises it"),
    "cut": (edit(lambda c: c[:-10], False), "bytes, the manifest promises"),
    "emptied": (edit(lambda c: b"", False), "0 bytes, the manifest promises"),
    "flipped byte": (edit(lambda c: patch(c, 600, bytes([c[600] ^ 1])), False), "sha256 differs"),
    "exchanged": (lambda f: shutil.copy(f / "digits-000001.tar", f / "digits-000000.tar"), "manifest"),
    "cut at a member": (edit(lambda c: c[: 100 * 1024], True), "50 samples, the manifest promises 100"),
    "cut inside": (edit(lambda c: c[: 100 * 1024 + 700], True), "not a readable tar|samples, the manifest promises"),
    "cut inside a header": (edit(lambda c: c[: 100 * 1024 + 100], True), "not a readable tar|samples, the manifest"),
    "corrupt header": (edit(lambda c: patch(c, 1024 * 9 + 100, b"garbage"), True), "not a readable tar|samples, the"),
    "zeroed block": (edit(lambda c: patch(c, 1024 * 9, bytes(1024)), True), "samples, the manifest promises 100"),
    "empty": (edit(lambda c: b"", True), "not a readable tar|0 samples"),
    "HTML page": (edit(lambda c: b"<!doctype html><title>404</title>" * 40, True), "not a readable tar"),
    "wrong count": (lambda f: reseal(f, samples=99), "100 samples, the manifest promises 99"),
    "one more": (
        repack(lambda m: [*m, ("x.png", m[0][1]), ("x.cls", b"1")]),
        "101 samples, the manifest promises 100",
    ),
    "no label": (repack(lambda m: m[:-1]), r"sample 000000099: no member .cls, which holds the field 'class'"),
    "no image": (
        repack(lambda m: [e for e in m if e[0] != "000000050.png"]),
        r"sample 000000050: no member .png",
    ),
    "label out of range": (repack(lambda m: swap_member(m, "cls", b"10")), r"sample 000000000: .cls must be .*\[0, 9\]"),
    "negative label": (repack(lambda m: swap_member(m, "cls", b"-1")), r".cls must be an integer in \[0, 9\]"),
    "label no integer": (repack(lambda m: swap_member(m, "cls", b"three")), r".cls must be an integer.*three"),
    "no image at all": (repack(lambda m: swap_member(m, "png", b"GIF?")), "sample 000000000: .png is not an image"),
    "image cut": (repack(lambda m: swap_member(m, "png", m[0][1][:60])), "sample 000000000: .png is not an image"),
    "larger image": (repack(lambda m: swap_member(m, "png", png(9, 8))), r"uint8 \(1, 9, 8\), the manifest says"),
    "colour image": (repack(lambda m: swap_member(m, "png", png(8, 8, 3))), r"uint8 \(3, 8, 8\), the manifest says"),
    "member twice": (repack(lambda m: [m[0], *m]), "not a readable tar|samples"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_named_with_the_reason(what: str, folder: Path) -> None:
    damage, reason = DAMAGE[what]
    damage(folder)
    manifest = read_manifest(folder)
    with pytest.raises(DataError, match=reason) as error:
        read_shard(folder, manifest, manifest.shards[0])
    assert str(folder / "digits-000000.tar") in str(error.value)
    assert verify(folder) == [str(error.value)]
    with pytest.raises(DataError, match=reason):
        ShardReader(folder).everything()
    with pytest.raises(DataError, match=reason):
        list(islice(ShardReader(folder).batches(0, 100, 0), 18))
    read_shard(folder, manifest, manifest.shards[1])  # the others are still good


def test_no_byte_of_an_image_can_crash_the_reader(folder: Path) -> None:
    """Whatever byte of a png is wrong: an error that names the sample, or an image of the right shape."""
    manifest, file = read_manifest(folder), folder / "digits-000000.tar"
    good = members(file.read_bytes())[0][1] if members(file.read_bytes())[0][0].endswith("png") else b""
    assert good
    refused = 0
    for at in range(len(good)):
        file.write_bytes(packed([("a.png", patch(good, at, bytes([good[at] ^ 0x55]))), ("a.cls", b"1")]))
        reseal(folder, samples=1)
        manifest = read_manifest(folder)
        try:
            decoded = read_shard(folder, manifest, manifest.shards[0])
        except DataError as error:
            assert "sample a" in str(error)
            refused += 1
        else:
            assert decoded.images.shape == (1, 1, 8, 8)
    assert refused > len(good) / 2


def test_verify_lists_everything_at_once(folder: Path) -> None:
    (folder / "digits-000003.tar").unlink()
    shard = folder / "digits-000005.tar"
    shard.write_bytes(patch(shard.read_bytes(), 600, b"?"))
    shutil.copy(folder / "digits-000000.tar", folder / "stray.tar")
    shutil.copy(folder / "digits-000000.tar", folder / "digits-000007.tar")
    reseal(folder, 7)
    problems = verify(folder)
    assert "digits-000003.tar: missing" in problems[0]
    assert "digits-000005.tar: sha256 differs" in problems[1]
    assert "digits-000007.tar, sample 000000000: key also in digits-000000.tar" in problems[2]
    assert len([p for p in problems if "key also in" in p]) == 100
    assert "stray.tar: not in the manifest" in problems[-1]
    assert len(problems) == 103


def test_a_key_twice_in_one_shard_is_listed(folder: Path) -> None:
    repack(lambda m: [*m[:-2], ("000000000.png", m[0][1]), ("000000000.cls", b"1")])(folder)
    assert any("digits-000000.tar, sample 000000000: key also in digits-000000.tar" in p for p in verify(folder))


def test_shards_are_read_when_they_are_needed(folder: Path) -> None:
    """Damage in a shard that is not read yet does not stop the first batch."""
    reader = ShardReader(folder)
    wanted = {int(key) // 100 for key in next(reader.batches(0, 4, 0)).keys}
    other = next(n for n in range(18) if n not in wanted)
    (folder / f"digits-{other:06d}.tar").unlink()
    next(ShardReader(folder).batches(0, 4, 0))
    with pytest.raises(DataError, match=f"digits-{other:06d}"):
        list(islice(ShardReader(folder).batches(0, 100, 0), 20))


# --- the manifest


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "manifest.json").unlink(), "no manifest.json here; build the shards with"),
    "not JSON": (lambda f: (f / "manifest.json").write_text('{"format": 1,'), "damaged or not a manifest"),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00{"), "damaged or not a manifest"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "damaged or not a manifest"),
    "a number": (lambda f: (f / "manifest.json").write_text("3"), "damaged or not a manifest"),
    "foreign": (lambda f: (f / "manifest.json").write_text('{"a": 1}'), "damaged or not a manifest"),
    "other format": (lambda f: rewrite(f, lambda m: m.update(format=2)), "another format than 1"),
    "unknown key": (lambda f: rewrite(f, lambda m: m.update(colour=1)), "damaged or not a manifest"),
    "no shards key": (lambda f: rewrite(f, lambda m: m.pop("shards")), "damaged or not a manifest"),
    "no shards": (lambda f: rewrite(f, lambda m: m.update(shards=[])), "its shards sum to 0"),
    "wrong total": (lambda f: rewrite(f, lambda m: m.update(samples=1796)), "promises 1796 .*sum to 1797"),
    "count a text": (lambda f: rewrite(f, lambda m: m["shards"][0].update(samples="100")), "damaged or not a manifest"),
    "shapeless": (lambda f: rewrite(f, lambda m: m["fields"]["image"].update(shape=None)), "damaged or not a manifest"),
    "empty shard": (
        lambda f: rewrite(f, lambda m: (m["shards"][0].update(samples=0), m.update(samples=1697))),
        "build the shards again",
    ),
    "no image": (lambda f: rewrite(f, lambda m: m["fields"].pop("image")), "no field 'image'"),
    "elsewhere": (
        lambda f: rewrite(f, lambda m: m["shards"][0].update(file="../digits-000000.tar")),
        "is not a plain file name",
    ),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_damaged_manifest_says_what_to_do(what: str, folder: Path) -> None:
    damage, reason = MANIFESTS[what]
    damage(folder)
    with pytest.raises(DataError, match=reason) as error:
        read_manifest(folder)
    assert str(folder) in str(error.value)
    assert "build the shards" in str(error.value)
    assert verify(folder) == [str(error.value)]


def test_digest_is_that_of_samples_and_order(folder: Path) -> None:
    before = read_manifest(folder).digest
    rewrite(folder, lambda m: m["source"].update(title="another name"))
    assert read_manifest(folder).digest == before
    rewrite(folder, lambda m: m["shards"].reverse())
    assert read_manifest(folder).digest != before


# --- as a recipe names them


def test_what_is_missing_is_built_when_opened_and_not_when_checked(built: Path, tmp_path: Path) -> None:
    shards = Shards(path=str(tmp_path / "new" / "digits"), source="digits")
    assert shards.check() is None
    assert list(tmp_path.iterdir()) == []
    assert shards.open(None).manifest.samples == 1797
    assert hashes(tmp_path / "new" / "digits") == hashes(built)
    reader = shards.check()
    assert reader is not None
    assert reader.digest == ShardReader(built).digest


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
        Shards(path="x", source="digts", streams=0)
    assert set(error.value.problems) == {"source", "streams"}
    assert set(SOURCES) == {"digits"}
    assert DATA["shards"] is Shards
