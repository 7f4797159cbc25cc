"""Shards are trusted only if size, digest, count and fields are as the manifest says; all else is named."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.decode import decode
from distill.data.loader import Loader
from distill.data.manifest import DataError, Field, read_manifest
from distill.data.reader import ShardReader
from distill.data.samples import diagnose, open_shard
from distill.data.samples import verify as verify_folder
from distill.data.shards import Shards
from distill.data.store import LocalFolder
from distill.data.tar import group, scan
from teachers.checkpoints import sha256

Members = list[tuple[str, bytes]]


def reseal(folder: Path, number: int = 0, **changes: Any) -> None:
    """State a changed shard as it lies there, without its index, so that the checks behind the digest are reached."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    shard = folder / manifest["shards"][number]["file"]
    manifest["shards"][number] |= {"bytes": shard.stat().st_size, "sha256": sha256(shard), "index": ""} | changes
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


SHARD = "digits-000000.tar"


def verify(folder: Path) -> list[str]:
    return verify_folder(LocalFolder(folder), read_manifest(folder))


def reader(folder: Path, **keys: Any) -> ShardReader:
    return ShardReader(Shards(path=str(folder), **keys))


def without_index(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "digits-000000.idx").unlink()
        damage(folder)

    return apply


def flip(at: int) -> Callable[[Path], None]:
    return edit(lambda c: patch(c, at, bytes([c[at] ^ 1])), False)


# A sample is two members of a header and a block of content each: cls, then png. Sample 9 starts at 9 * 2048.
AT = 9 * 2048
KEY = "sample 000000009"
CUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut at a member": (edit(lambda c: c[:AT], False), f"offset {AT}.*ends without the mark.*after 000000008.png"),
    "cut inside a member": (
        edit(lambda c: c[: AT + 1540], False),
        f"offset {AT + 1536}, 000000009.png: the file ends inside this member",
    ),
    "cut in padding": (edit(lambda c: c[: AT + 700], False), "000000009.cls: the file ends inside the padding"),
    "cut inside a header": (edit(lambda c: c[: AT + 100], False), f"offset {AT}: the file ends inside a header"),
    "corrupt header": (edit(lambda c: patch(c, AT + 100, b"garbage"), False), f"offset {AT}.*corrupt header"),
    "zeroed header": (edit(lambda c: patch(c, AT, bytes(512)), False), f"offset {AT}.*a block of zeros where a header"),
    "zeroed content": (edit(lambda c: patch(c, AT + 1536, bytes(512)), False), f"offset {AT + 1536}.*damaged"),
    "flipped byte": (flip(AT + 1540), f"{KEY}, offset {AT + 1536}, 000000009.png: damaged, its CRC-32 differs"),
    "flipped label": (flip(AT + 512), f"{KEY}, offset {AT + 512}, 000000009.cls: damaged"),
}
"""Damage to sample 9 or from there on, and what is said of it where the shard has its index."""
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    **CUT,
    "missing": (lambda f: (f / SHARD).unlink(), "missing, though the manifest promises it"),
    "zero bytes": (edit(lambda c: b"", False), "0 bytes, the manifest promises 215040: offset 0: the file is empty"),
    "empty tar": (edit(lambda c: bytes(10240), False), "10240 bytes, the manifest promises 215040: offset 0: an empty"),
    "empty tar, sealed": (edit(lambda c: bytes(10240), True), "offset 0: an empty tar: nothing but the mark"),
    "HTML page": (edit(lambda c: b"<!doctype html><title>404</title>" * 40, False), "a web page instead of a tar"),
    "HTML page, sealed": (edit(lambda c: b"\n<html>404</html>" * 60, True), "offset 0: a web page instead of a tar"),
    "short HTML page": (edit(lambda c: b"<html>404</html>", False), "a web page instead of a tar"),
    "gzip": (edit(lambda c: gzip.compress(c), True), "a gzip file: shards are plain tars, unpack it"),
    "padding": (flip(AT + 1024 - 1), "sha256 differs from the manifest, where no sample is"),
    "exchanged": (lambda f: shutil.copy(f / "digits-000001.tar", f / SHARD), "the manifest promises|corrupt|damaged"),
    "wrong count": (lambda f: reseal(f, samples=99), "100 samples, the manifest promises 99"),
    "too few": (lambda f: reseal(f, samples=101), "100 samples, the manifest promises 101"),
    "damaged index": (lambda f: (f / "digits-000000.idx").write_bytes(b"{}"), "digits-000000.idx: sha256 differs"),
    "cut at a member, no index": (without_index(CUT["cut at a member"][0]), CUT["cut at a member"][1]),
    "cut inside, no index": (without_index(CUT["cut inside a member"][0]), CUT["cut inside a member"][1]),
    "corrupt header, no index": (without_index(CUT["corrupt header"][0]), f"offset {AT}: corrupt header"),
    "zeroed, no index": (without_index(CUT["zeroed header"][0]), f"offset {AT}: a block of zeros where"),
    "flipped, no index": (without_index(CUT["flipped byte"][0]), "sha256 differs from the manifest: damaged"),
    "corrupt header, sealed": (edit(lambda c: patch(c, AT + 100, b"x"), True), f"offset {AT}: corrupt header"),
    "cut, sealed": (edit(lambda c: c[:AT], True), f"offset {AT}: the file ends without the mark of its end"),
    "zeroed, sealed": (edit(lambda c: patch(c, AT, bytes(1024)), True), f"offset {AT}: a block of zeros"),
    "duplicate key": (
        repack(lambda m: [*m, ("000000004.cls", b"1"), ("000000004.png", image_of(m))]),
        f"sample 000000004, offset {100 * 2048 + 512}: duplicate key, first at offset {4 * 2048 + 512}",
    ),
    "split key": (
        repack(lambda m: [*m[:1], *m[2:], m[1]]),
        f"sample 000000000, offset {199 * 1024 + 512}: split into parts that are not neighbours, the first at",
    ),
    "member twice": (repack(lambda m: [m[0], *m]), "sample 000000000, offset 1536: has two members .cls"),
    "one more": (repack(lambda m: [*m, ("x.png", image_of(m)), ("x.cls", b"1")]), "101 samples, the manifest promises"),
    "no label": (
        repack(lambda m: [e for e in m if e[0] != "000000099.cls"]),
        f"sample 000000099, offset {99 * 2048 + 512}: no member .cls, which holds the field 'class'",
    ),
    "no image": (repack(lambda m: [e for e in m if e[0] != "000000050.png"]), "sample 000000050.*: no member .png"),
    "label out of range": (repack(lambda m: swap_member(m, "cls", b"10")), r"000000000.*: .cls must be .*\[0, 9\]"),
    "negative label": (repack(lambda m: swap_member(m, "cls", b"-1")), r".cls must be an integer in \[0, 9\]"),
    "label no integer": (repack(lambda m: swap_member(m, "cls", b"three")), r".cls must be an integer.*three"),
    "label of a language": (repack(lambda m: swap_member(m, "cls", b"1_0")), r".cls must be an integer.*1_0"),
    "no image at all": (repack(lambda m: swap_member(m, "png", b"GIF?")), "000000000.*: .png is not an image"),
    "image cut": (repack(lambda m: swap_member(m, "png", image_of(m)[:60])), "000000000.*: .png is not an image"),
    "larger image": (repack(lambda m: swap_member(m, "png", png(9, 8))), r"is L \[1, 9, 8\], the manifest says uint8"),
    "colour image": (repack(lambda m: swap_member(m, "png", png(8, 8, 3))), r"is RGB \[3, 8, 8\], the manifest says"),
    "a link": (edit(lambda c: linked(), True), "offset 0, 000000000.png: is a symbolic link, only plain files"),
    "a pickle": (
        repack(lambda m: [*m[:2], ("000000000.pth", b"x"), *m[2:]]),
        r"sample 000000000, offset 2560: .pth is a pickle.*distill shards build .* NEW --unpickle",
    ),
    "a named pickle": (repack(lambda m: [("000000000.a.pyd", b"x"), *m]), r".a.pyd is a pickle.*never read"),
    "no ending": (repack(lambda m: [*m, ("README", b"x")]), "README.*is not named KEY.ENDING"),
}


def linked() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("000000000.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_by_shard_sample_offset_and_reason(what: str, folder: Path) -> None:
    damage, reason = DAMAGE[what]
    damage(folder)
    listed = verify(folder)
    assert re.search(reason, listed[0]), listed
    assert "digits-000000." in listed[0]
    assert " object at 0x" not in listed[0]
    assert len(listed) == 1 or what in ("exchanged", "flipped, no index")
    if what != "padding":  # which nobody reads
        with pytest.raises(DataError, match=reason):
            reader(folder).everything()
        with pytest.raises(DataError, match=reason):
            list(islice(reader(folder).batches(0, 100, 0), 18))
    manifest = read_manifest(folder)
    assert list(diagnose(LocalFolder(folder), manifest, 1)) == []  # the others are still good


def no_label(entries: Members) -> Members:
    return [entry for entry in entries if entry[0] != "000000009.cls"]


REPLACED: dict[str, tuple[Callable[[Members], Members], str]] = {
    "duplicate key": (lambda m: [*m, *m[18:20]], f"{KEY}, offset {100 * 2048 + 512}: duplicate key, first at offset"),
    "split key": (lambda m: [*m[:18], *m[19:], m[18]], f"{KEY}, offset {199 * 1024 + 512}: split into parts that are"),
    "no label": (no_label, f"{KEY}, offset {AT + 512}: no member .cls, which holds the field 'class'"),
    "one less": (lambda m: m[:-2], "99 samples, the manifest promises 100"),
    "empty": (lambda m: [], "offset 0: an empty tar"),
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("stated", [True, False])
def test_a_shard_that_was_replaced_beside_its_old_index(what: str, stated: bool, folder: Path) -> None:
    """What is wrong with the new one is told, not that it differs from the old; the manifest may know of it or not."""
    change, reason = REPLACED[what]
    shard = folder / SHARD
    shard.write_bytes(packed(change(members(shard.read_bytes()))))
    if stated:
        index = json.loads((folder / "manifest.json").read_text())["shards"][0]["index"]
        reseal(folder, index=index)
    listed = verify(folder)
    assert re.search(reason, listed[-1]), listed
    assert len(listed) <= (1 if stated else 2)
    if stated:
        with pytest.raises(DataError, match=reason):
            reader(folder).everything()
    else:
        assert re.search(r"215040|sha256 differs", listed[0])
        with pytest.raises(DataError, match=r"digits-000000\.tar"):
            reader(folder).everything()


@pytest.mark.parametrize("what", CUT)
def test_damage_that_the_manifest_was_made_to_agree_with_is_told_by_the_index(what: str, folder: Path) -> None:
    damage, reason = CUT[what]
    damage(folder)
    reseal(folder, index=json.loads((folder / "manifest.json").read_text())["shards"][0]["index"])
    assert re.search(reason, verify(folder)[0])
    with pytest.raises(DataError, match=reason):
        reader(folder).everything()


@pytest.mark.parametrize("what", sorted({*CUT, "missing"}))
@pytest.mark.parametrize("indexed", [True, False])
def test_what_may_be_skipped_is_and_nothing_else(what: str, indexed: bool, folder: Path, built: Path) -> None:
    """Every slot of a skipped sample is filled by another one, all others are as if nothing had happened, and an epoch
    adds up."""
    damage = DAMAGE[what][0]
    (damage if indexed else without_index(damage))(folder)
    lost = {"missing": range(100)}.get(what, range(9, 100) if what.startswith("cut") else range(9, 10))
    if not indexed and what != "missing":
        lost = range(100) if "flipped" in what or what == "zeroed content" else range(9, 100)
    told: list[str] = []
    loader = Loader(reader(folder, skip=len(lost)), 0, 100, say=told.append)
    whole = reader(built)
    for batch, good in islice(zip(loader, whole.batches(0, 100, 0), strict=False), 40):
        for row, key in enumerate(good.keys):
            if int(key) in lost:
                assert int(batch.keys[row]) not in lost
            else:
                assert batch.keys[row] == key
                assert torch.equal(batch.x_1[row], good.x_1[row])
    assert set(loader.skipped) == set(lost)
    assert len(told) == len(lost) and all("digits-000000.tar" in text for text in told)
    x, labels = reader(folder, skip=len(lost)).everything()
    assert len(x) == len(labels) == 1797 - len(lost)
    if len(lost) > 1:
        with pytest.raises(DataError, match=f"{len(lost)} samples cannot be read, data.skip allows {len(lost) - 1}"):
            reader(folder, skip=len(lost) - 1).everything()


def test_no_byte_of_a_sample_can_go_wrong_unseen(folder: Path) -> None:
    """Whatever byte of header or content is flipped, the sample is named; the padding after it does not matter."""
    file = folder / SHARD
    good = file.read_bytes()
    manifest = read_manifest(folder)
    shard = manifest.shards[0]
    with file.open("rb") as stream:
        size = scan(stream).members[1].size
    for at in [*range(1024, 1536, 7), *range(1536, 1536 + size)]:
        file.write_bytes(patch(good, at, bytes([good[at] ^ 0x55])))
        with pytest.raises(DataError, match=r"sample 000000000, offset 1(024|536), 000000000.png"):
            open_shard(LocalFolder(folder), shard).read(0, manifest.fields)


def test_no_byte_of_an_image_can_crash_the_decoder(folder: Path) -> None:
    """Whatever byte of a png is wrong: an error that names the sample, or an image of the right shape."""
    file = folder / SHARD
    good = image_of(members(file.read_bytes()))
    refused = 0
    for at in range(len(good)):
        file.write_bytes(packed([("a.png", patch(good, at, bytes([good[at] ^ 0x55]))), ("a.cls", b"1")]))
        reseal(folder, samples=1)
        manifest = read_manifest(folder)
        found = list(diagnose(LocalFolder(folder), manifest, 0))
        assert all("sample a" in message for message in found)
        if found:
            refused += 1
        else:
            values = open_shard(LocalFolder(folder), manifest.shards[0]).read(0, manifest.fields)
            assert values["image"].shape == (1, 8, 8)
    assert refused > len(good) / 2


def test_sizes_are_checked_before_memory_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of 300 GB, of which there is nothing but the header, and arrays that promise more than there is."""
    manifest = read_manifest(folder)
    opened = open_shard(LocalFolder(folder), manifest.shards[0])
    png_ = opened.entries[3].members["png"]
    opened.entries[3].members["png"] = png_._replace(size=300 << 30)
    with pytest.raises(DataError, match=r"sample 000000003, .* has 322122547200 bytes, at most 268435456 are read"):
        opened.read(3, manifest.fields)
    field = Field("npy", "float32", (2, 2))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}".ljust(117) + b"\n"
    huge = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(ValueError, match=r"is float32 \[1000000, 1000000\], the manifest says float32 \[2, 2\]"):
        decode("x", field, huge)
    with pytest.raises(ValueError, match="has 1000000000000 elements, at most"):
        decode("x", replace(field, shape=(1000000, 1000000)), huge)
    monkeypatch.setattr("distill.data.decode.PIXELS", 60)
    with pytest.raises(ValueError, match="is an image of 8x8, at most 60 pixels are read"):
        decode("image", manifest.fields["image"], png(8, 8))
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickled objects, which are not read"):
        decode("x", field, buffer.getvalue())
    with pytest.raises(ValueError, match="is not a safetensors file"):
        decode("x", Field("safetensors", "float32", (2,)), (1 << 40).to_bytes(8, "little") + b"{}")
    header = b'{"x":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}'  # which torch has not
    with pytest.raises(ValueError, match="is not a safetensors file"):
        decode("x", Field("safetensors", "float32", (2,)), len(header).to_bytes(8, "little") + header + bytes(8))
    start = png(8, 8)[:12]
    head = b"IHDR" + (9900).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    declared = start + head + zlib.crc32(head).to_bytes(4, "big") + png(8, 8)[33:]  # PIL only warns of this many
    with pytest.raises(ValueError, match="could be decompression bomb"):
        decode("image", manifest.fields["image"], declared)


def extended(records: bytes) -> bytes:
    """A tar whose only member has these pax records."""
    info = tarfile.TarInfo("a.png")
    head = tarfile.TarInfo("././@PaxHeader")
    head.type, head.size = tarfile.XHDTYPE, len(records)
    return head.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + info.tobuf() + bytes(1024)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (b"9" * 5000 + b" path=a\n", "corrupt extended header"),
        (b"%d size=%s\n" % (5011, b"9" * 5000), "its header says it has '9999"),
        (b"12 size=9x9\n", "its header says it has '9x9' bytes"),
        ("13 size=٣٣\n".encode(), "its header says it has '٣٣' bytes"),
        (b"15 size=999999\n", "the file ends inside this member"),
    ],
)
def test_extended_headers_that_lie(records: bytes, reason: str) -> None:
    found = scan(io.BytesIO(extended(records)))
    assert found.fault is not None and reason in found.fault.reason


@pytest.mark.parametrize("place", [[-512, 512, 10], [0, 1 << 40, 10], [0, 512, -1], [0, 512, 1 << 70], [0, 0, 10]])
def test_an_index_of_impossible_places_is_refused(place: list[int], folder: Path) -> None:
    file = folder / "digits-000000.idx"
    index = json.loads(file.read_text())
    index["members"][3][1:4] = place
    file.write_text(json.dumps(index))
    reseal(folder, index=sha256(file))
    with pytest.raises(DataError, match=r"digits-000000.idx: not an index of format 1; remove it"):
        reader(folder).everything()


def test_verify_lists_everything_at_once(folder: Path) -> None:
    (folder / "digits-000003.tar").unlink()
    shard = folder / "digits-000005.tar"
    shard.write_bytes(patch(patch(shard.read_bytes(), 512, b"?"), 4 * 2048 + 1540, b"?"))
    shutil.copy(folder / SHARD, folder / "stray.tar")
    shutil.copy(folder / SHARD, folder / "digits-000007.tar")
    reseal(folder, 7)
    problems = verify(folder)
    assert "digits-000003.tar: missing" in problems[0]
    assert "digits-000005.tar, sample 000000500" in problems[1]
    assert "digits-000005.tar, sample 000000504" in problems[2]
    assert "digits-000007.tar, sample 000000000: duplicate key, also in digits-000000.tar" in problems[3]
    assert len([p for p in problems if "duplicate key, also in" in p]) == 100
    assert "stray.tar: not in the manifest" in problems[-1]
    assert len(problems) == 104


def test_shards_are_read_when_they_are_needed(folder: Path) -> None:
    """Damage in a shard that is not read yet does not stop the first batch."""
    wanted = {int(key) // 100 for key in next(reader(folder).batches(0, 4, 0)).keys}
    other = next(n for n in range(18) if n not in wanted)
    (folder / f"digits-{other:06d}.tar").unlink()
    next(reader(folder).batches(0, 4, 0))
    with pytest.raises(DataError, match=f"digits-{other:06d}"):
        list(islice(reader(folder).batches(0, 100, 0), 20))


@pytest.mark.parametrize("what", ["cut inside a member", "flipped byte", "corrupt header", "missing"])
def test_damage_shows_before_a_job_starts(what: str, folder: Path) -> None:
    DAMAGE[what][0](folder)
    with pytest.raises(DataError, match=DAMAGE[what][1]):
        Shards(path=str(folder)).check()
    assert Shards(path=str(folder), skip=100).check() is not None


def test_a_tar_of_any_tool_is_read(tmp_path: Path) -> None:
    """Long names, extended headers, folders and what some systems add."""
    name = "a" * 120 + "/" + "b" * 90
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers={"comment": "x"}) as tar:
            folder = tarfile.TarInfo("a" * 50)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for entry in (f"{name}.cls", f"{name}.txt", "a/.DS_Store", "a/._b.txt"):
                info = tarfile.TarInfo(entry)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
        found = scan(io.BytesIO(buffer.getvalue()))
        assert found.fault is None
        assert found.bytes == len(buffer.getvalue())
        entries, faults = group(found.members)
        assert faults == []
        assert [(e.key, sorted(e.members)) for e in entries] == [(name, ["cls", "txt"])]
        for member in found.members:
            assert buffer.getvalue()[member.offset : member.offset + member.size] == b"abc"
            assert zlib.crc32(buffer.getvalue()[member.start : member.offset + member.size]) == member.crc


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
def test_webdataset_reads_what_is_written(built: Path) -> None:
    import webdataset

    files = sorted(str(p) for p in built.glob("*.tar"))
    found = list(webdataset.WebDataset(files, shardshuffle=False))
    assert len(found) == 1797
    assert found[5]["__key__"] == "000000005" and found[5]["cls"] == b"5"


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
    "crowded": (
        lambda f: rewrite(f, lambda m: (m["shards"][3].update(samples=10**12), m.update(samples=10**12 + 1697))),
        "digits-000003.tar: promises 1000000000000 samples, at most",
    ),
    "no dtype": (lambda f: rewrite(f, lambda m: m["fields"]["image"].update(dtype="os")), "image is of dtype os"),
    "shapeless": (lambda f: rewrite(f, lambda m: m["fields"]["image"].update(shape=None)), "damaged or not a manifest"),
    "empty shard": (
        lambda f: rewrite(f, lambda m: (m["shards"][0].update(samples=0), m.update(samples=1697))),
        "build the shards again",
    ),
    "no decoder": (
        lambda f: rewrite(f, lambda m: m["fields"]["image"].update(member="pth")),
        "member .pth, which is not",
    ),
    "four channels": (lambda f: rewrite(f, lambda m: m["fields"]["image"].update(shape=[4, 8, 8])), "only uint8"),
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


def test_digest_is_that_of_samples_and_order(folder: Path) -> None:
    before = read_manifest(folder).digest
    rewrite(folder, lambda m: m["source"].update(title="another name"))
    assert read_manifest(folder).digest == before
    rewrite(folder, lambda m: m["shards"].reverse())
    assert read_manifest(folder).digest != before
