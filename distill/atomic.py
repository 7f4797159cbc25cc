"""Files and folders that appear under their name whole or not at all.

Written beside the target (same file system), flushed to disk, renamed; the folder is flushed too, so that a power cut
after the rename leaves the new one. What fails half-way is removed and the old file stays.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8). Raises OSError that names `path`; the old file is then untouched."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write; on success it becomes `path`, on failure it is removed. Raises as
    `write_atomic` does."""
    temporary = _beside(path)
    try:
        with naming(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; on success it becomes `path` (replacing an older one), on failure it is removed.

    Where `path` is a link it stays one, and the folder that it leads to is replaced. Raises OSError that names `path`
    when the disk does not take it.
    """
    given, path = path, path.resolve() if path.is_symlink() else path
    temporary = _beside(path)
    try:
        with naming(given):
            if path.exists() and not path.is_dir():
                raise FileExistsError(errno.EEXIST, "exists and is not a folder", str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():  # safetensors keeps files to their owner; ours are as open as the folder
                    file.chmod(temporary.stat().st_mode & 0o666)
                flush(file)
            flush(temporary)
            _replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What goes wrong with a disk comes out as an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except SafetensorError as error:  # safetensors wraps what the operating system said into its own message
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def remove(folder: Path) -> None:
    """Delete a folder; one that is killed half-way leaves nothing under its name, and the rest to `clear`."""
    leaving = _beside(folder)
    os.replace(folder, leaving)
    _delete(leaving)


def clear(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`; a folder that was just being replaced is put back."""
    for left in folder.glob(".*-[0-9]*"):
        name, _, word = left.name.rpartition("-")[0][1:].rpartition(".")
        if word == "old" and not (folder / name).exists():
            os.replace(left, folder / name)
        elif word in ("old", "new"):
            _delete(left)


def _delete(path: Path) -> None:
    """A file, a folder with what is in it, or a link alone."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _replace_directory(temporary: Path, path: Path) -> None:
    if path.exists():
        old = _beside(path, "old")
        os.replace(path, old)  # a folder cannot be renamed over a full one
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    flush(path.parent)


def _beside(path: Path, word: str = "new") -> Path:
    # never a name that a killed writer has left, whose process number may come again
    return path.with_name(f".{path.name}.{word}-{secrets.randbits(64)}")


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
