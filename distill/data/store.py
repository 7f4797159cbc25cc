"""Where shards lie: a local folder, a URL that fsspec knows (http, s3, gs, hf, ...), or a command (``pipe:``).

Remote shards are read once from beginning to end into a local cache, piece by piece: a piece that fails is asked for
again, with growing pauses, so a broken connection costs one piece. A file enters the cache under the digest of its full
URL when its size and sha256 are as the manifest says. Locks keep the processes of a node from fetching anything twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from distill.data.manifest import NAME, DataError, Manifest, Shard, parse_manifest, read_manifest
from teachers.fields import require

PIECE = 8 << 20  # bytes asked for at once
PAUSE = 0.5  # seconds before the second try; doubled before each further one
_LONGEST_PAUSE = 30.0


class Folder(Protocol):
    """Where the shards of one manifest lie."""

    def manifest(self) -> Manifest:
        """Its manifest. Raises DataError."""
        ...

    def shard(self, shard: Shard) -> Path:
        """A local file with the content of a shard. Raises DataError."""
        ...

    def index(self, shard: Shard) -> bytes | None:
        """The content of the shard's index, if there is one."""
        ...

    def where(self, shard: Shard) -> str:
        """The shard as messages name it."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """Shards in a folder on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def manifest(self) -> Manifest:
        """See `Folder`."""
        return read_manifest(self.path)

    def where(self, shard: Shard) -> str:
        """See `Folder`."""
        return str(self.path / shard.file)

    def shard(self, shard: Shard) -> Path:
        """See `Folder`."""
        file = self.path / shard.file
        if not file.is_file():
            raise DataError(f"{file}: missing, though the manifest promises it; {remedy(self)}")
        return file

    def index(self, shard: Shard) -> bytes | None:
        """See `Folder`."""
        file = self.path / shard.index_file
        return file.read_bytes() if shard.index and file.is_file() else None


def remedy(folder: object) -> str:
    """What to do about a damaged shard."""
    return f"see `distill shards verify {shlex.quote(str(folder))}`, then restore or rebuild the shards"


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How remote shards are fetched. cache: folder for fetched shards; cache_gb: how much it holds, in 10^9 bytes; the
    least recently used shards give way. retries: of a piece, before it is an error; timeout: seconds without a byte.
    pipe: whether ``pipe:`` paths, which run a command of the recipe, are allowed."""

    cache: str = "~/.cache/flow-distill/shards"
    cache_gb: float = 50.0
    retries: int = 8
    timeout: float = 60.0
    pipe: bool = False

    def __post_init__(self) -> None:
        require(
            self,
            cache_gb=(self.cache_gb > 0, "must be above 0"),
            retries=(self.retries >= 0, "must be at least 0"),
            timeout=(self.timeout > 0, "must be above 0"),
        )


def open_folder(path: str, remote: Remote) -> Folder:
    """The folder at a local path, a URL or behind a command. Raises DataError for a command that is not allowed."""
    if path.startswith("pipe:"):
        if not remote.pipe:
            raise DataError(f"{path}: runs a command; if you trust it, allow it with data.remote.pipe: true")
        if "{file}" not in path:
            raise DataError(f"{path}: names no file; write {{file}} where the name of a file belongs in the command")
    elif "://" not in path:
        return LocalFolder(Path(path))
    return RemoteFolder(path, remote)


class RemoteFolder:
    """Shards at a URL, or that a command prints (``pipe:command {file}``)."""

    def __init__(self, url: str, remote: Remote) -> None:
        self._url, self._remote = url, remote
        self._cache = Cache(Path(remote.cache).expanduser(), int(remote.cache_gb * 1e9))

    def __str__(self) -> str:
        return self._url

    def _of(self, name: str) -> str:
        if self._url.startswith("pipe:"):
            return self._url.replace("{file}", shlex.quote(name))
        parts = urlsplit(self._url)  # what follows a ? belongs to every file: a signature
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def where(self, shard: Shard) -> str:
        """See `Folder`."""
        return self._of(shard.file)

    def manifest(self) -> Manifest:
        """See `Folder`."""
        url = self._of(NAME)
        return parse_manifest(b"".join(_pieces(url, self._remote, 0, None)), url)

    def shard(self, shard: Shard) -> Path:
        """See `Folder`."""
        return self._fetched(shard.file, shard.bytes, shard.sha256)

    def index(self, shard: Shard) -> bytes | None:
        """See `Folder`. A lost index is no harm: the shard is read through instead."""
        return None  # the whole shard is here, and was read when it came

    def _fetched(self, name: str, size: int, sha256: str) -> Path:
        url = self._of(name)
        try:
            return self._cache.get(url, size, sha256, lambda start: _pieces(url, self._remote, start, size))
        except DataError as error:
            raise DataError(f"{error}; {remedy(self)}") from None


class Cache:
    """Files by the digest of their full URL and of their content, at most `limit` bytes of them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._sound: set[str] = set()  # whose content this process has checked

    def get(self, url: str, size: int, sha256: str, pieces: Callable[[int], Iterator[bytes]]) -> Path:
        """The local copy of `url`, fetched by ``pieces(offset)`` if it is not here. Raises DataError."""
        if size > self.limit:
            raise DataError(f"{url}: {size} bytes, the cache holds {self.limit}: raise data.remote.cache_gb")
        self.folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()[:32]
        file = self.folder / f"{key}.tar"
        if key in self._sound and self._used(file, size):
            return file
        with _locked(self.folder / f"{key}.lock"):
            if not self._used(file, size) or not self._checked(file, key, sha256):
                self._room(size, key)
                part = self.folder / f"{key}.part"
                _fill(part, url, size, sha256, pieces)
                os.replace(part, file)
                self._sound.add(key)
        return file

    def _checked(self, file: Path, key: str, sha256: str) -> bool:
        """Whether what an earlier process left is what it should be, so that a damaged disk is no damage to the data.
        It is read once."""
        if key not in self._sound:
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == sha256:
                    self._sound.add(key)
        return key in self._sound

    @staticmethod
    def _used(file: Path, size: int) -> bool:
        try:
            os.utime(file)
            return file.stat().st_size == size
        except FileNotFoundError:
            return False

    def _room(self, size: int, key: str) -> None:
        """Lets the least recently used go until `size` more bytes fit. A reader that still has one open keeps it."""
        with _locked(self.folder / "room.lock"):
            held: list[tuple[float, int, Path]] = []
            for file in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue
                if file.stem != key:
                    held.append((stat.st_mtime, stat.st_size, file))
            total = sum(entry[1] for entry in held) + size
            for _, bytes_, file in sorted(held):
                if total <= self.limit:
                    break
                with _locked(file.with_suffix(".lock"), wait=False) as free:
                    if free:  # nobody is writing it just now
                        file.unlink(missing_ok=True)
                        total -= bytes_


@contextmanager
def _locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock `file`, which a killed process lets go. Yields whether it was to be had."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open too
        os.close(handle)


def _fill(part: Path, url: str, size: int, sha256: str, pieces: Callable[[int], Iterator[bytes]]) -> None:
    """Completes `part`, from where an earlier process left it. Raises DataError unless the content is as promised."""
    for fresh in (False, True):  # what an earlier process left may be of other content: then all over again
        started = part.stat().st_size if part.exists() and not fresh else 0
        digest, head = hashlib.sha256(), b""
        with part.open("r+b" if started else "w+b") as file:
            while block := file.read(PIECE):
                digest.update(block)
                head = head or block[:512]
            for piece in pieces(started):
                file.write(piece)
                digest.update(piece)
                head = head or piece[:512]
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        if length == size and digest.hexdigest() == sha256:
            return
        part.unlink()
        if not started:
            break
    if head.lstrip().startswith(b"<"):
        raise _page(url, head)
    if length != size:
        raise DataError(f"{url}: {length} bytes came, the manifest promises {size}")
    raise DataError(f"{url}: sha256 differs from the manifest: damaged, or replaced without it")


def _pieces(url: str, remote: Remote, start: int, size: int | None) -> Iterator[bytes]:
    """The bytes of `url` from `start` to `size`, or all there are. Raises DataError."""
    if url.startswith("pipe:"):
        yield from _piped(url, remote, start)
        return
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url, **_options(url, remote.timeout))
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}; install with the extra [remote]") from None
    if size is None:
        yield _tried(url, remote, lambda: _range(system, path, remote, None, None))
        return
    while start < size:
        stop = min(start + PIECE, size)
        yield _tried(url, remote, partial(_piece, url, system, path, remote, start, stop))
        start = stop


def _piece(url: str, system: Any, path: str, remote: Remote, start: int, stop: int) -> bytes:
    return _whole(url, _range(system, path, remote, start, stop), start, stop)


def _range(system: Any, path: str, remote: Remote, start: int | None, stop: int | None) -> bytes:
    if not system.async_impl:
        return bytes(system.cat_file(path, start=start, end=stop))
    from fsspec.asyn import sync

    # the file system's own limit is between two bytes; this one is for what it does not watch
    found = sync(system.loop, system._cat_file, path, start=start, end=stop, timeout=10 * remote.timeout)
    return bytes(found)


def _whole(url: str, piece: bytes, start: int, stop: int) -> bytes:
    """What was asked for. Some servers send the whole file, whatever was asked."""
    if len(piece) > stop - start and len(piece) >= stop:
        return piece[start:stop]
    if len(piece) != stop - start:
        if start == 0 and piece.lstrip().startswith(b"<"):
            raise _page(url, piece)
        raise OSError(f"{len(piece)} bytes came instead of {stop - start}")
    return piece


def _page(url: str, head: bytes) -> DataError:
    begins = head.lstrip()[:40].decode("ascii", "replace")
    return DataError(f"{url}: a web page came instead of the shard ({begins!r})")


def _tried(url: str, remote: Remote, get: Callable[[], bytes]) -> bytes:
    """get(), again after a pause when it fails in a way that may pass. Raises DataError."""
    for attempt in range(remote.retries + 1):
        try:
            return get()
        except DataError:
            raise
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            reason = {FileNotFoundError: "not found", PermissionError: "access denied"}.get(type(error), "a folder")
            raise DataError(f"{url}: {reason} ({error}); check data.path and your credentials") from None
        except Exception as error:
            status = getattr(error, "status", None)
            if status in (400, 401, 403, 405, 410) or "Credentials" in type(error).__name__:
                raise DataError(f"{url}: {status or error}; check data.path and your credentials") from None
            if attempt == remote.retries:
                words = str(error) or type(error).__name__
                raise DataError(f"{url}: failed {attempt + 1} times, at last with: {words}; try again when the server "
                                "answers, or raise data.remote.retries or data.remote.timeout") from None  # fmt: skip
            time.sleep(min(PAUSE * 2**attempt, _LONGEST_PAUSE) * (0.75 + random.random() / 2))
    raise AssertionError


def _options(url: str, timeout: float) -> dict[str, Any]:
    """Of the file system: the longest time without a byte."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)}}
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}}
    return {}


def _piped(url: str, remote: Remote, start: int) -> Iterator[bytes]:
    """What a command prints. It cannot go on in the middle: what is there already is passed over."""
    command = url.removeprefix("pipe:")
    with (
        TemporaryFile() as errors,
        subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        while block := process.stdout.read(PIECE):
            if start < len(block):
                yield block[start:]
            start = max(0, start - len(block))
        if process.wait():
            errors.seek(0)
            said = errors.read()[-500:].decode("utf-8", "replace").strip()
            raise DataError(f"{url}: the command ended with exit code {process.returncode}: {said}")
