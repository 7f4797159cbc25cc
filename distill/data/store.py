"""Where shards lie: a local folder, a URL that fsspec knows (http, s3, gs, hf, ...), or a command (``pipe:``).

Remote shards are read once from beginning to end into a local cache (`distill.data.fetch`). A file enters it under the
digest of its full URL when its size and sha256 are as the manifest says. Locks keep the processes of a node from
fetching anything twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from distill.data.fetch import PIECE, Remote, fetch_pieces, page_instead
from distill.data.manifest import NAME, DataError, Manifest, Shard, parse_manifest, read_manifest

_FETCHERS = 8  # remote shards fetched at a time


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


def open_folder(path: str, remote: Remote) -> Folder:
    """The folder at a local path, a URL or behind a command. Raises DataError for a command that is not allowed."""
    if path.startswith("pipe:"):
        if not remote.pipe:
            raise DataError(f"{path}: runs a command; if you trust it, allow it with data.remote.pipe: true")
        if "{file}" not in path:
            raise DataError(f"{path}: names no file; write {{file}} where the name of a file belongs in the command")
    elif "://" not in path:
        return LocalFolder(Path(path).expanduser())
    return RemoteFolder(path, remote)


class RemoteFolder:
    """Shards at a URL, or that a command prints (``pipe:command {file}``)."""

    def __init__(self, url: str, remote: Remote) -> None:
        self._url, self._remote = url, remote
        self._cache = Cache(Path(remote.cache).expanduser(), int(remote.cache_gb * 1e9))
        self._fetchers: tuple[int, ThreadPoolExecutor] | None = None
        self._asked: dict[str, Future[Path]] = {}

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
        return parse_manifest(b"".join(fetch_pieces(url, self._remote, 0, None)), url)

    def shard(self, shard: Shard) -> Path:
        """See `Folder`."""
        return self._fetched(shard.file, shard.bytes, shard.sha256)

    def index(self, shard: Shard) -> bytes | None:
        """See `Folder`: None, since the whole shard is here, and was read when it came."""
        return None

    def check_cache(self, shards: Sequence[Shard], streams: int, together: int) -> None:
        """Raises DataError unless the cache has room for the shards that are read at once and those that come next."""
        needed = min(2 * streams * together, len(shards)) * max(shard.bytes for shard in shards)
        if needed > self._remote.cache_gb * 1e9:
            raise DataError(
                f"{self}: {streams} streams of {together} shards and those that come next need {needed / 1e9:.3g} GB "
                "of cache; raise data.remote.cache_gb, or lower data.streams or data.shuffle"
            )

    def fetch(self, now: Sequence[Shard], coming: Sequence[Shard]) -> None:
        """Fetch the shards `now` side by side, and begin with those that are `coming`."""
        if self._fetchers is None or self._fetchers[0] != os.getpid():  # threads do not live on in a forked worker
            self._fetchers, self._asked = (os.getpid(), ThreadPoolExecutor(_FETCHERS)), {}
        for shard in (*now, *coming):
            if shard.file not in self._asked:
                self._asked[shard.file] = self._fetchers[1].submit(self.shard, shard)
        for shard in now:
            self._asked.pop(shard.file).exception()  # it is told when the shard is opened

    def _fetched(self, name: str, size: int, sha256: str) -> Path:
        url = self._of(name)
        try:
            return self._cache.get(url, size, sha256, lambda start: fetch_pieces(url, self._remote, start, size))
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
        raise page_instead(url, head)
    if length != size:
        raise DataError(f"{url}: {length} bytes came, the manifest promises {size}")
    raise DataError(f"{url}: sha256 differs from the manifest: damaged, or replaced without it")
