"""Single samples of a folder of shards, each checked before it is used, and all that can be wrong with a shard.

A shard with an index is read at any place: the index is as the manifest says, and each content has its CRC-32. One
without is read through once, which checks its sha256 too. Either way a fault is named by shard, sample, offset, reason.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.decode import MEMBER_BYTES, decode
from distill.data.manifest import DataError, Field, Manifest, Shard
from distill.data.store import Folder, LocalFolder, remedy
from distill.data.tar import Entry, Member, Scan, broken, group, read_index, scan
from distill.data.unpickle import PICKLES

_TRIES = 20  # at a shard that others push out of the cache


class Handle:
    """A file that is read at any place, by its number; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True)
class OpenShard:
    """A shard made ready to be read. lost: why a sample, by its index, cannot be read; faults: all that is wrong with
    its samples' places; archive: what is wrong with the file as a whole. All in whole sentences. indexed: whether an
    index says where its samples are, and what they were."""

    where: str
    file: Handle | None
    entries: tuple[Entry, ...]
    lost: Mapping[int, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    archive: str = ""
    indexed: bool = False

    @property
    def wrong(self) -> tuple[str, ...]:
        """All that is wrong with it."""
        return (self.archive, *self.faults) if self.archive else self.faults

    def key(self, index: int) -> str:
        """The key of a sample, or its number where the key is lost."""
        return self.entries[index].key if index < len(self.entries) else f"number {index}"

    def read(self, index: int, fields: Mapping[str, Field]) -> dict[str, Any]:
        """The values of the fields. Raises DataError."""
        if index in self.lost:
            raise DataError(self.lost[index])
        entry = self.entries[index]
        contents: dict[str, bytes] = {}
        values = {}
        for name, spec in fields.items():
            member = entry.members.get(spec.member)
            if member is None:
                raise self._error(entry, None, f"no member .{spec.member}, which holds the field {name!r}")
            if spec.member not in contents:
                contents[spec.member] = self._content(entry, member)
            try:
                values[name] = decode(name, spec, contents[spec.member])
            except ValueError as error:
                raise self._error(entry, member, f".{spec.member} {error}") from None
        return values

    def contents(self, index: int) -> dict[str, bytes]:
        """All members by ending, as they are. Raises DataError."""
        if index in self.lost:
            raise DataError(self.lost[index])
        entry = self.entries[index]
        return {ending: self._content(entry, member) for ending, member in entry.members.items()}

    def _content(self, entry: Entry, member: Member) -> bytes:
        assert self.file is not None
        if member.size > MEMBER_BYTES:
            raise self._error(entry, member, f"{member.name} has {member.size} bytes, at most {MEMBER_BYTES} are read")
        head = member.offset - member.start
        span = os.pread(self.file.number, head + member.size, member.start)
        if len(span) != head + member.size or zlib.crc32(span) != member.crc:
            fault = broken(span, member)
            raise DataError(f"{self.where}, sample {entry.key}, offset {fault.offset}, {fault.member}: {fault.reason}; "
                            "restore or rebuild the shards")  # fmt: skip
        return span[head:]

    def _error(self, entry: Entry, member: Member | None, reason: str) -> DataError:
        at = member or next(iter(entry.members.values()))
        return DataError(f"{self.where}, sample {entry.key}, offset {at.offset}: {reason}; rebuild the shards")


def open_shard(folder: Folder, shard: Shard, *, whole: bool = False) -> OpenShard:
    """A shard of `folder`, with all that is wrong with its structure. whole: read it to its end even where its index
    would do, and let all samples be read that may be good. Never raises for what is wrong with the data."""
    where, help_ = folder.where(shard), remedy(folder)
    try:
        file = _handle(folder, shard)
    except DataError as error:
        return OpenShard(where, None, (), dict.fromkeys(range(shard.samples), str(error)), (str(error),))
    size = os.fstat(file.number).st_size
    index, of, faults = _index(folder, shard)
    found, archive = None, ""
    if whole or of != shard.sha256 or size != shard.bytes:
        with open(file.number, "rb", closefd=False) as stream:
            found = scan(stream)
        index = index if index is not None and _fits(index, found) else None
        if wrong := _wrong(found, shard, index):
            archive = f"{where}{wrong}; {help_}"
    members = index if index is not None else found.members if found else ()
    entries, strange = group(members)
    faults += [f"{where}, sample {fault.member}, offset {fault.offset}: {fault.reason}; rebuild the shards"
               for fault in strange]  # fmt: skip
    faults += [text for entry in entries if (text := _code(where, entry))]
    if len(entries) != shard.samples and (index is None or not archive) and not (found and found.fault):
        faults.append(f"{where}: {len(entries)} samples, the manifest promises {shard.samples}; {help_}")
    names = {fault.member for fault in strange}
    if index is None and archive and entries and entries[-1].members.keys() != entries[0].members.keys():
        names.add(entries[-1].key)  # the fault is in the midst of it
    untold = archive and index is None and found and not found.fault  # some of it, and nobody knows which
    reason = next(iter([archive, *faults] if archive else faults), f"{where}: its index says more than is there")
    lost = {
        i: reason
        for i, entry in enumerate(entries)
        if (untold and not whole) or entry.key in names or any(m.offset + m.size > size for m in entry.members.values())
    }
    lost |= dict.fromkeys(range(len(entries), shard.samples), reason)
    return OpenShard(where, file, tuple(entries), lost, tuple(faults), archive, index is not None)


def _handle(folder: Folder, shard: Shard) -> Handle:
    for _ in range(_TRIES):
        try:
            return Handle(folder.shard(shard))
        except FileNotFoundError:  # another process has just made room in the cache for its own
            continue
    raise DataError(f"{folder.where(shard)}: leaves the cache before it is read, again and again; raise "
                    "data.remote.cache_gb, or give every job a data.remote.cache of its own")  # fmt: skip


def _fits(index: tuple[Member, ...], found: Scan) -> bool:
    """Whether an index is of the tar as it lies there, damaged perhaps, and not of one that it was replaced by."""
    if found.fault:
        return found.fault.offset > 0
    return [member[:4] for member in index] == [member[:4] for member in found.members]


def _index(folder: Folder, shard: Shard) -> tuple[tuple[Member, ...] | None, str, list[str]]:
    """The members by the shard's index, where there is one that is as the manifest says; sha256 of the tar that it was
    made of, and what is wrong with it."""
    content = folder.index(shard)
    if content is None:
        return None, "", []
    name = f"{folder.where(shard).removesuffix('.tar')}.idx"
    if hashlib.sha256(content).hexdigest() != shard.index:
        return None, "", [f"{name}: sha256 differs from the manifest; remove it, then the shard is read without"]
    try:
        sha256, members = read_index(content)
    except ValueError as error:
        return None, "", [f"{name}: {error}; remove it, then the shard is read without"]
    return members, sha256, []


def _wrong(found: Scan, shard: Shard, index: tuple[Member, ...] | None) -> str | None:
    """What is wrong with a shard that was read through, in words that follow its name."""
    if found.bytes != shard.bytes:
        fault = f": {found.fault}" if found.fault else ""
        return f": {found.bytes} bytes, the manifest promises {shard.bytes}{fault}"
    if found.fault:
        return f", {found.fault}"
    if found.sha256 == shard.sha256:
        return None
    if index is None:
        return ": sha256 differs from the manifest: damaged, or built anew without it (its index would tell where)"
    return ": sha256 differs from the manifest, where no sample is"


def _code(where: str, entry: Entry) -> str | None:
    """The refusal of members that can run code when they are read."""
    for ending, member in entry.members.items():
        if ending.rpartition(".")[2] in PICKLES:
            folder = where.rpartition("/")[0] or "."
            return (
                f"{where}, sample {entry.key}, offset {member.offset}: .{ending} is a pickle, which can run code and "
                f"is never read; convert it: distill shards build {folder} NEW --unpickle"
            )
    return None


def diagnose(folder: Folder, manifest: Manifest, number: int) -> Iterator[str]:
    """Everything that is wrong with a shard, sentence by sentence."""
    shard = manifest.shards[number]
    opened = open_shard(folder, shard, whole=True)
    found = []
    for index in range(min(len(opened.entries), shard.samples)):
        if index not in opened.lost:
            try:
                opened.read(index, manifest.fields)
            except DataError as error:
                found.append(str(error))
    if opened.archive and (opened.lost or not found or not opened.indexed):  # otherwise the samples tell more
        yield opened.archive
    yield from opened.faults
    yield from found


def verify(folder: Folder, manifest: Manifest) -> list[str]:
    """Everything that is wrong with a folder of shards, a line each; empty when all of it holds."""
    problems: list[str] = []
    seen: dict[str, str] = {}
    for number, shard in enumerate(manifest.shards):
        problems += diagnose(folder, manifest, number)
        opened = open_shard(folder, shard)
        for index, entry in enumerate(opened.entries[: shard.samples]):
            if entry.key in seen and index not in opened.lost:
                problems.append(
                    f"{opened.where}, sample {entry.key}: duplicate key, also in {seen[entry.key]}; rebuild the shards"
                )
            seen[entry.key] = shard.file
    if isinstance(folder, LocalFolder):
        extra = sorted({p.name for p in folder.path.glob("*.tar")} - {shard.file for shard in manifest.shards})
        problems += [f"{folder.path / name}: not in the manifest; move it away or rebuild the shards" for name in extra]
    return problems
