"""Shards are trusted only if size, digest, count and fields are as the manifest says; all else is named."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.manifest import DataError, read_manifest
from distill.data.shards import ShardReader, read_shard, verify
from teachers.adapters.native import sha256

Members = list[tuple[str, bytes]]


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


def image_of(entries: Members) -> bytes:
    return next(content for name, content in entries if name.endswith("png"))


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
        repack(lambda m: [*m, ("x.png", image_of(m)), ("x.cls", b"1")]),
        "101 samples, the manifest promises 100",
    ),
    "no label": (
        repack(lambda m: [e for e in m if e[0] != "000000099.cls"]),
        r"sample 000000099: no member .cls, which holds the field 'class'",
    ),
    "no image": (
        repack(lambda m: [e for e in m if e[0] != "000000050.png"]),
        r"sample 000000050: no member .png",
    ),
    "label out of range": (
        repack(lambda m: swap_member(m, "cls", b"10")),
        r"sample 000000000: .cls must be .*\[0, 9\]",
    ),
    "negative label": (repack(lambda m: swap_member(m, "cls", b"-1")), r".cls must be an integer in \[0, 9\]"),
    "label no integer": (repack(lambda m: swap_member(m, "cls", b"three")), r".cls must be an integer.*three"),
    "no image at all": (repack(lambda m: swap_member(m, "png", b"GIF?")), "sample 000000000: .png is not an image"),
    "image cut": (repack(lambda m: swap_member(m, "png", image_of(m)[:60])), "sample 000000000: .png is not an image"),
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
    (listed,) = verify(folder)
    assert re.search(reason, listed)
    with pytest.raises(DataError, match=reason):
        ShardReader(folder).everything()
    with pytest.raises(DataError, match=reason):
        list(islice(ShardReader(folder).batches(0, 100, 0), 18))
    read_shard(folder, manifest, manifest.shards[1])  # the others are still good


@pytest.mark.parametrize("what", ["cut inside", "empty", "HTML page", "no image at all"])
def test_reasons_speak_of_files_and_not_of_objects(what: str, folder: Path) -> None:
    DAMAGE[what][0](folder)
    (listed,) = verify(folder)
    assert " object at 0x" not in listed


def test_no_byte_of_an_image_can_crash_the_reader(folder: Path) -> None:
    """Whatever byte of a png is wrong: an error that names the sample, or an image of the right shape."""
    manifest, file = read_manifest(folder), folder / "digits-000000.tar"
    good = image_of(members(file.read_bytes()))
    refused = 0
    for at in range(len(good)):
        file.write_bytes(packed([("a.png", patch(good, at, bytes([good[at] ^ 0x55]))), ("a.cls", b"1")]))
        reseal(folder, samples=1)
        manifest = read_manifest(folder)
        found = verify(folder)
        assert all("sample a" in message for message in found)
        if found:
            refused += 1
        else:
            assert read_shard(folder, manifest, manifest.shards[0]).images.shape == (1, 1, 8, 8)
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
    repack(lambda m: [*m[:-2], ("000000000.png", image_of(m)), ("000000000.cls", b"1")])(folder)
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
