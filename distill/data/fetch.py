"""The bytes of a URL that fsspec knows, or of what a command prints, piece by piece.

A piece that fails is asked for again, with growing pauses, so a broken connection costs one piece.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryFile
from typing import Any

from distill.data.manifest import DataError
from teachers.fields import require

PIECE = 8 << 20  # bytes asked for at once
PAUSE = 0.5  # seconds before the second try; doubled before each further one
_LONGEST_PAUSE = 30.0


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


def fetch_pieces(url: str, remote: Remote, start: int, size: int | None) -> Iterator[bytes]:
    """The bytes of `url` from `start` to `size`, or all there are. Raises DataError."""
    if url.startswith("pipe:"):
        yield from _piped(url, start)
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
            raise page_instead(url, piece)
        raise OSError(f"{len(piece)} bytes came instead of {stop - start}")
    return piece


def page_instead(url: str, head: bytes) -> DataError:
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


def _piped(url: str, start: int) -> Iterator[bytes]:
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
