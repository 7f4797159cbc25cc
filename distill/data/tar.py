"""Tar files read strictly: every member is found, or the place and the reason why not.

The usual readers take a zeroed or cut header for the end of the archive and lose what follows without a word. Here the
archive must end as tar says (two blocks of zeros and nothing after them), every header must carry its checksum, and
only plain files count. Names are looked at, never used as paths; nothing is extracted.

The index of a tar, ``x.idx`` beside ``x.tar``, is JSON: the tar's sha256 and for each member its name, the offsets of
its header and of its content, the content's size, and the CRC-32 of header and content, so that single samples are
read, and checked, without what lies before them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_CHUNK = 1 << 20
_HEADER_BYTES = 1 << 20  # of an extended header: names are short
_FILES = (b"0", b"\0", b"7")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
          b"S": "a sparse file"}  # fmt: skip
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)")


class Member(NamedTuple):
    """A file in a tar: where its header starts, offset and size of its content, and the CRC-32 of both."""

    name: str
    start: int
    offset: int
    size: int
    crc: int


class Fault(NamedTuple):
    """What is wrong: at which byte, in which member or sample ("" where there is none), and the reason."""

    offset: int
    member: str
    reason: str

    def __str__(self) -> str:
        member = f", {self.member}" if self.member else ""
        return f"offset {self.offset}{member}: {self.reason}"


@dataclass(frozen=True)
class Scan:
    """A tar read from end to end: its members up to the first structural fault, size in bytes and sha256 (hex)."""

    members: tuple[Member, ...]
    bytes: int
    sha256: str
    fault: Fault | None


def scan(stream: BinaryIO) -> Scan:
    """Read a tar from its beginning to its end, once, in order: fit for a pipe."""
    return _Scanner(stream).run()


class _Broken(Exception):
    def __init__(self, offset: int, member: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(offset, member, reason)


class _Scanner:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sha = hashlib.sha256()
        self._at = 0
        self._crc = 0  # of the member so far
        self._members: list[Member] = []
        self._global: dict[str, str] = {}

    def run(self) -> Scan:
        fault = None
        try:
            while self._member():
                pass
        except _Broken as broken:
            fault = broken.fault
        while self._read(_CHUNK):
            pass
        return Scan(tuple(self._members), self._at, self._sha.hexdigest(), fault)

    def _read(self, count: int) -> bytes:
        got = self._stream.read(count)
        self._sha.update(got)
        self._crc = zlib.crc32(got, self._crc)
        self._at += len(got)
        return got

    def _content(self, size: int, name: str) -> int:
        """Passes over the content of a member and returns the CRC-32 from its header on."""
        start, left = self._at, size
        while left:
            got = self._read(min(left, _CHUNK))
            if not got:
                raise _Broken(start, name, f"the file ends inside this member, {left} of its {size} bytes are missing")
            left -= len(got)
        crc, padding = self._crc, -size % _BLOCK
        if len(self._read(padding)) != padding:
            raise _Broken(self._at, name, "the file ends inside the padding of this member")
        return crc

    def _extended(self, size: int, kind: str) -> bytes:
        """The content of an extended header."""
        start = self._at
        if size > _HEADER_BYTES:
            raise _Broken(start, "", f"an extended header of {size} bytes")
        padded = size + -size % _BLOCK
        got = self._read(padded)
        if len(got) != padded:
            raise _Broken(start, "", f"the file ends inside {kind}")
        return got[:size]

    def _member(self) -> bool:
        """Reads one member with the headers that extend it; False at the end of the archive."""
        long_name, records = None, dict(self._global)
        begin, self._crc = self._at, 0
        while True:
            start = self._at
            info = self._header()
            if info is None:
                return False
            if info.type == b"L":
                long_name = self._extended(info.size, "a long name").rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == b"K":
                self._extended(info.size, "a long link name")
            elif info.type in (b"x", b"X"):
                records |= self._records(info.size)
            elif info.type == b"g":
                self._global |= self._records(info.size)
            else:
                break
        name = records.get("path", long_name if long_name is not None else info.name)
        if any(record.startswith("GNU.sparse") for record in records):
            raise _Broken(start, name, "is a sparse file, only plain files can be read")
        if info.type == b"5":
            self._content(info.size, name)
            return True
        if info.type not in _FILES:
            what = _KINDS.get(info.type, f"of the unknown type {info.type!r}")
            raise _Broken(start, name, f"is {what}, only plain files can be read")
        size = records.get("size", str(info.size))
        if not (size.isascii() and size.isdecimal() and len(size) < 20):
            raise _Broken(start, name, f"its header says it has {size[:40]!r} bytes")
        offset = self._at
        self._members.append(Member(name, begin, offset, int(size), self._content(int(size), name)))
        return True

    def _header(self) -> tarfile.TarInfo | None:
        start, block = self._at, self._read(_BLOCK)
        after = f" (after {self._members[-1].name})" if self._members else ""
        if not block:
            if start == 0:
                raise _Broken(0, "", "the file is empty: zero bytes")
            raise _Broken(start, "", f"the file ends without the mark of its end: cut off between two members{after}")
        if len(block) != _BLOCK:
            if start == 0 and not block.strip(b"\0").startswith(b"<"):
                raise _Broken(0, "", f"no tar: only {len(block)} bytes")
            if start:
                raise _Broken(start, "", f"the file ends inside a header{after}")
        if start == 0:
            self._not_a_tar(block)
        if not block.strip(b"\0"):
            self._end(start, after)
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _Broken(start, "", f"corrupt header{after}: {error}") from None
        if info.size < 0:
            raise _Broken(start, info.name, f"corrupt header: {info.size} bytes")
        return info

    @staticmethod
    def _not_a_tar(block: bytes) -> None:
        if block.lstrip()[:1] == b"<":
            raise _Broken(0, "", f"a web page instead of a tar: {block.lstrip()[:40].decode('ascii', 'replace')!r}")
        if block[:2] == b"\x1f\x8b":
            raise _Broken(0, "", "a gzip file: shards are plain tars, unpack it with gunzip")

    def _end(self, start: int, after: str) -> None:
        """After the first block of zeros: nothing but zeros may follow, at least one block of them."""
        length = _BLOCK
        while block := self._read(_CHUNK):
            if block.strip(b"\0"):
                raise _Broken(start, "", f"a block of zeros where a header should be{after}, and more data after it")
            length += len(block)
        if length < 2 * _BLOCK:
            raise _Broken(start, "", f"the mark of the end is cut{after}")
        if not self._members:
            raise _Broken(start, "", "an empty tar: nothing but the mark of its end")

    def _records(self, size: int) -> dict[str, str]:
        start, content = self._at, self._extended(size, "an extended header")
        found: dict[str, str] = {}
        while content.strip(b"\0"):
            length, space, _ = content.partition(b" ")
            digits = space and length.isdigit() and len(length) < 8
            if not digits or not len(length) + 1 < int(length) <= len(content):
                raise _Broken(start, "", "corrupt extended header")
            name, equals, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
            if not equals:
                raise _Broken(start, "", "corrupt extended header")
            found[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
            content = content[int(length) :]
        return found


@dataclass(frozen=True)
class Entry:
    """A sample of a tar: its key and its members by what follows the first dot of their names (lower case)."""

    key: str
    members: dict[str, Member]


def group(members: Sequence[Member]) -> tuple[list[Entry], list[Fault]]:
    """Neighbouring members of one key are a sample. Also everything that breaks this rule, each named by its key; the
    samples concerned stand where their first member was."""
    entries: list[Entry] = []
    faults: list[Fault] = []
    seen: dict[str, Entry] = {}
    previous = ""
    for member in members:
        matched = _KEY.fullmatch(member.name)
        if member.name.rpartition("/")[2].startswith("."):
            continue  # what some systems add to an archive
        if matched is None:
            faults.append(Fault(member.offset, member.name, "is not named KEY.ENDING"))
            continue
        key, ending = matched[1], matched[2].lower()
        if entries and entries[-1].key == key:
            if ending in entries[-1].members:
                faults.append(Fault(member.offset, key, f"has two members .{ending}"))
                continue
            entries[-1].members[ending] = member
        elif faults and previous == key:
            pass  # told already
        elif key in seen:
            first = next(iter(seen[key].members.values())).offset
            if ending in seen[key].members:
                faults.append(Fault(member.offset, key, f"duplicate key, first at offset {first}"))
            else:
                reason = f"split into parts that are not neighbours, the first at offset {first}"
                faults.append(Fault(member.offset, key, reason))
        else:
            entries.append(Entry(key, {ending: member}))
            seen[key] = entries[-1]
        previous = key
    return entries, faults


def index_of(found: Scan) -> bytes:
    """The content of an index file."""
    rows = ",\n".join(json.dumps(list(m)) for m in found.members)
    return f'{{"format": 1, "sha256": "{found.sha256}", "members": [\n{rows}\n]}}\n'.encode()


def broken(span: bytes, member: Member) -> Fault:
    """What is wrong with the bytes from a member's header to the end of its content, which have not its CRC-32."""
    if len(span) < member.offset + member.size - member.start:
        return Fault(member.start, member.name, "the file ends before or inside this member")
    found = scan(io.BytesIO(span + bytes(-len(span) % _BLOCK + 2 * _BLOCK)))
    if found.fault:
        return found.fault._replace(offset=member.start + found.fault.offset, member=member.name)
    return Fault(member.offset, member.name, "damaged, its CRC-32 differs")


def read_index(content: bytes) -> tuple[str, tuple[Member, ...]]:
    """sha256 of the tar, "" where it is not said, and the members of an index file. Raises ValueError for anything
    else."""
    try:
        raw = json.loads(content)
        members = tuple(Member(*row) for row in raw["members"])
        good = raw["format"] == 1 and all(map(_plausible, members))
        sha256 = str(raw.get("sha256", ""))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an index ({error!r})") from None
    if not good:
        raise ValueError("not an index of format 1")
    return sha256, members


def _plausible(member: Member) -> bool:
    """Whether it can be a member: nothing is read by numbers that only claim to be places."""
    name, *numbers = member
    return (
        isinstance(name, str)
        and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        and _BLOCK <= member.offset - member.start <= 4 * _HEADER_BYTES
    )
