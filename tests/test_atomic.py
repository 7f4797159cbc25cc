"""Files and folders appear under their name whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import files

from distill.atomic import atomic_directory, clear, remove, write_atomic


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# --- files


@pytest.mark.parametrize(("content", "expected"), [("größer\n", "größer\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_a_file_is_written_and_replaced(content: str | bytes, expected: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for _ in range(2):
        write_atomic(file, content)
        assert file.read_bytes() == expected
        assert names(tmp_path) == {"a.json"}
        file.write_text("old")


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace", "pathlib.Path.write_bytes"])
def test_a_file_that_cannot_be_written_leaves_the_old(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(broken, full)
        with pytest.raises(OSError, match=r"a\.json") as caught:
            write_atomic(file, "new")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(file)
    assert file.read_text() == "old"
    assert names(tmp_path) == {"a.json"}


def test_a_file_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    seen: list[tuple[str, str]] = []
    for name in ("fsync", "replace"):
        original: Callable[..., Any] = getattr(os, name)

        def watched(*args: Any, original: Callable[..., Any] = original, name: str = name) -> Any:
            seen.append((name, file.read_text()))
            return original(*args)

        monkeypatch.setattr(os, name, watched)
    write_atomic(file, "new")
    # flushed before it gets its name; the folder is flushed after, so that a power cut keeps the rename
    assert seen == [("fsync", "old"), ("replace", "old"), ("fsync", "new")]


def test_an_interruption_is_no_exception_to_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*args: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(os, "fsync", interrupt)
    (tmp_path / "a").write_text("old")
    with pytest.raises(Interrupted):
        write_atomic(tmp_path / "a", "new")
    with pytest.raises(Interrupted), atomic_directory(tmp_path / "b") as folder:
        (folder / "x").write_text("new")
    assert files(tmp_path) == {"a": b"old"} and names(tmp_path) == {"a"}


# --- folders


def filled(path: Path, word: str = "old") -> Path:
    with atomic_directory(path) as folder:
        (folder / word).write_text(word)
        (folder / "below").mkdir()
        (folder / "below" / "deep").write_text(word)
    return path


def test_a_folder_appears_when_it_is_full(tmp_path: Path) -> None:
    path = tmp_path / "far" / "a"  # the way there is made
    with atomic_directory(path) as folder:
        (folder / "x").write_text("new")
        assert not path.exists()
        assert folder.parent == path.parent  # the same file system
    assert files(path) == {"x": b"new"}
    assert names(path.parent) == {"a"}


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = filled(tmp_path / "a")
    with atomic_directory(path) as folder:
        (folder / "x").write_text("new")
        assert files(path) == {"old": b"old", "below/deep": b"old"}
    assert files(path) == {"x": b"new"}
    assert names(tmp_path) == {"a"}


def test_everything_in_a_folder_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    fsync, replace, open_ = os.fsync, os.replace, os.open

    def opening(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = open_(path, *args, **kwargs)
        opened[handle] = Path(path).name
        return handle

    def flushing(handle: int) -> None:
        done.append(("flush", opened[handle]))
        fsync(handle)

    def renaming(source: Any, target: Any) -> None:
        done.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", renaming)
    filled(tmp_path / "a")
    at = done.index(("rename", "a"))
    flushed = {name for word, name in done[:at] if word == "flush"}
    assert {"old", "below", "deep"} < flushed and any(name.startswith(".a.new-") for name in flushed)
    assert done[at + 1 :] == [("flush", tmp_path.name)]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("before", [True, False])
def test_a_folder_that_fails_leaves_the_old(error: BaseException, before: bool, tmp_path: Path) -> None:
    path = filled(tmp_path / "a") if before else tmp_path / "a"

    def fail() -> None:
        with atomic_directory(path) as folder:
            (folder / "x").write_text("new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    if isinstance(error, OSError):
        assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
    assert names(tmp_path) == ({"a"} if before else set())
    assert not before or files(path) == {"old": b"old", "below/deep": b"old"}


@pytest.mark.parametrize("n", [1, 2])
def test_a_folder_that_cannot_be_renamed_leaves_the_old(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "a")
    calls = [0]
    original = os.replace

    def failing(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == n:
            full()
        original(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises(OSError, match=str(path)):
            filled(path, "new")
    assert files(path) == {"old": b"old", "below/deep": b"old"}
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o775])
def test_files_are_as_open_as_their_folder(mode: int, tmp_path: Path) -> None:
    mask = os.umask(0o777 & ~mode)
    try:
        with atomic_directory(tmp_path / "a") as folder:
            (folder / "x").write_text("new")
            (folder / "x").chmod(0o600)  # as safetensors does
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "a" / "x").stat().st_mode) == mode & 0o666


@pytest.mark.parametrize("before", [True, False])
def test_a_folder_behind_a_link_is_replaced_where_it_is(before: bool, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    if before:
        filled(tmp_path / "far" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a")
    for word in ("new", "newer"):
        filled(tmp_path / "link", word)
        assert (tmp_path / "link").is_symlink() and word in names(tmp_path / "link")
        assert len(names(tmp_path / "link")) == 2
    assert names(tmp_path) == {"far", "link"} and names(tmp_path / "far") == {"a"}


def test_what_fails_behind_a_link_names_the_link(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(OSError, match=r"link'$"), atomic_directory(tmp_path / "link"):
        full()


def test_of_a_link_the_link_alone_is_removed(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    remove(tmp_path / "link")
    assert names(tmp_path) == {"a"} and files(tmp_path / "a") == {"old": b"old", "below/deep": b"old"}


# --- what a killed writer left


def test_a_writer_of_the_same_process_number_is_not_in_the_way(tmp_path: Path) -> None:
    for word in ("new", "old"):
        for name in ("a", "b"):
            filled(tmp_path / f".{name}.{word}-{os.getpid()}", "half")
    for word in ("old", "new"):
        filled(tmp_path / "a", word)
        write_atomic(tmp_path / "b", word)
    assert files(tmp_path / "a") == {"new": b"new", "below/deep": b"new"}
    assert (tmp_path / "b").read_text() == "new"
    clear(tmp_path)
    assert names(tmp_path) == {"a", "b"}


def test_half_written_things_are_removed(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    (tmp_path / ".hidden").write_text("stays")
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / ".a.new-12").mkdir()
    (tmp_path / ".a.new-12" / "x").write_text("half")
    (tmp_path / ".b.json.new-345").write_text("half")
    (tmp_path / ".a.old-12").symlink_to("a")
    clear(tmp_path)
    assert names(tmp_path) == {"a", ".hidden", "step-00000001"}
    assert files(tmp_path / "a") == {"old": b"old", "below/deep": b"old"}


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    filled(tmp_path / "a-1.b")
    (tmp_path / "a-1.b").rename(tmp_path / ".a-1.b.old-77")
    (tmp_path / ".a-1.b.new-77").mkdir()
    clear(tmp_path)
    assert names(tmp_path) == {"a-1.b"}
    assert files(tmp_path / "a-1.b") == {"old": b"old", "below/deep": b"old"}


def test_the_old_one_goes_where_the_new_one_is(tmp_path: Path) -> None:
    filled(tmp_path / "a", "new")
    filled(tmp_path / ".a.old-77", "old")
    clear(tmp_path)
    assert names(tmp_path) == {"a"}
    assert files(tmp_path / "a") == {"new": b"new", "below/deep": b"new"}


def test_there_may_be_nothing_to_clear(tmp_path: Path) -> None:
    clear(tmp_path)
    clear(tmp_path / "nowhere")
    assert names(tmp_path) == set()
