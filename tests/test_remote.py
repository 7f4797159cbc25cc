"""Remote shards from a real server that drops, stalls, truncates, answers 503 or sends a page; their cache."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli import main
from distill.data import fetch
from distill.data.fetch import Remote
from distill.data.loader import Loader
from distill.data.manifest import DataError, read_manifest
from distill.data.reader import ShardReader
from distill.data.samples import open_shard, verify
from distill.data.shards import Shards
from distill.data.store import open_folder

Misbehave = Callable[["Handler", bytes, int], bool]
"""Given a request for the content from a byte on: whether it has been answered, badly."""


class Handler(BaseHTTPRequestHandler):
    """A static server with ranges, which may misbehave."""

    folder: Path
    wrong: Misbehave | None = None
    ranges = True
    asked: Counter[str]
    lock = threading.Lock()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        file = self.folder / name
        with self.lock:
            self.asked[name] += 1
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (
            (int(found[1]), min(int(found[2]) + 1, len(content))) if found and self.ranges else (0, len(content))
        )
        if self.wrong is not None and name.endswith(".tar") and type(self).wrong(self, content[start:stop], start):
            return
        self.reply(content[start:stop], 206 if found and self.ranges else 200)

    def reply(self, content: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    """URL of the digits, and the handler's class, to be set to misbehave."""
    handler = type("Serving", (Handler,), {"folder": built, "asked": Counter()})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(fetch, "PIECE", 40_000)
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    yield f"http://127.0.0.1:{httpd.server_port}/digits", handler
    httpd.shutdown()
    httpd.server_close()


def remote(tmp_path: Path, **keys: Any) -> Remote:
    return Remote(**{"cache": str(tmp_path / "cache"), **keys})


def open_(url: str, tmp_path: Path, **keys: Any) -> ShardReader:
    return ShardReader(Shards(path=url, remote=remote(tmp_path), **keys))


def same_as_local(reader: ShardReader, built: Path, count: int = 30) -> None:
    local = ShardReader(Shards(path=str(built)))
    pairs = zip(reader.batches(0, 100, 0), local.batches(0, 100, 0), strict=False)
    for got, expected in islice(pairs, count):
        assert got.keys == expected.keys
        assert torch.equal(got.x_1, expected.x_1)


def sometimes(act: Callable[[Handler, bytes], None], every: int = 3) -> Misbehave:
    state = Counter[str]()

    def wrong(handler: Handler, content: bytes, start: int) -> bool:
        with handler.lock:
            state["n"] += 1
            bad = state["n"] % every != 0
        if bad:
            act(handler, content)
        return bad

    return wrong


def drop(handler: Handler, content: bytes) -> None:
    handler.reply(content[: len(content) // 2], 206, length=len(content))
    handler.wfile.flush()
    handler.connection.close()


def stall(handler: Handler, content: bytes) -> None:
    handler.reply(content[: len(content) // 2], 206, length=len(content))
    handler.wfile.flush()
    time.sleep(1.5)


def truncate(handler: Handler, content: bytes) -> None:
    handler.reply(content[: len(content) // 2], 206)


def unavailable(handler: Handler, content: bytes) -> None:
    handler.send_error(503)


def test_the_same_batches_as_from_the_folder(server: tuple[str, type[Handler]], built: Path, tmp_path: Path) -> None:
    url, handler = server
    reader = open_(url, tmp_path)
    assert reader.digest == read_manifest(built).digest
    same_as_local(reader, built)
    assert all(count == 6 for name, count in handler.asked.items() if name.endswith(".tar") and "017" not in name)
    before = sum(handler.asked.values())
    same_as_local(open_(url, tmp_path), built)
    assert sum(handler.asked.values()) == before + 1  # the manifest; the shards are in the cache
    assert verify(reader.folder, reader.manifest) == []
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()).count(".tar") == 18
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("act", [drop, truncate, unavailable], ids=lambda act: act.__name__)
def test_what_passes_is_waited_for(
    act: Callable[..., None], server: tuple[str, type[Handler]], built: Path, tmp_path: Path
) -> None:
    url, handler = server
    handler.wrong = sometimes(act)
    same_as_local(open_(url, tmp_path), built)


def test_a_server_that_stalls_is_asked_again(server: tuple[str, type[Handler]], built: Path, tmp_path: Path) -> None:
    url, handler = server
    handler.wrong = sometimes(lambda h, c: stall(h, c), every=2)
    folder = open_folder(url, remote(tmp_path, timeout=0.5))
    shard = read_manifest(built).shards[0]
    assert folder.shard(shard).read_bytes() == (built / shard.file).read_bytes()


def test_a_server_without_ranges_will_do(server: tuple[str, type[Handler]], built: Path, tmp_path: Path) -> None:
    url, handler = server
    handler.ranges = False
    same_as_local(open_(url, tmp_path), built, 3)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_fetch_for_themselves(
    workers: int, server: tuple[str, type[Handler]], built: Path, tmp_path: Path
) -> None:
    url, handler = server
    reader = open_(url, tmp_path)
    next(reader.batches(0, 100, 0))  # connections and threads of this process are open
    local = ShardReader(Shards(path=str(built)))
    for got, expected in islice(zip(Loader(reader, 0, 96, workers=workers), local.batches(0, 96, 0), strict=False), 20):
        assert got.keys == expected.keys and torch.equal(got.x_1, expected.x_1)
    assert all(count == 6 for name, count in handler.asked.items() if name.endswith(".tar") and "017" not in name)


@pytest.mark.timeout(60)
def test_workers_may_start_while_shards_are_fetched(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    """They are forked with the locks that threads of their parent hold."""
    url, handler = server
    reader = open_(url, tmp_path)
    handler.wrong = lambda h, c, s: bool(time.sleep(0.2))
    next(reader.batches(0, 100, 0))
    assert len(list((tmp_path / "cache").glob("*.tar"))) < 18
    assert len(list(islice(Loader(reader, 0, 96, workers=1), 20))) == 20


LOST: dict[str, tuple[Misbehave, str]] = {
    "always 503": (lambda h, c, s: not h.send_error(503), r"digits-\d{6}.tar: failed 3 times, at last with: 503"),
    "always 403": (lambda h, c, s: not h.send_error(403), r"digits-\d{6}.tar: 403; check data.path and your cred"),
    "always cut": (
        lambda h, c, s: not h.reply(c[:100], 206),
        r"failed 3 times, at last with: 100 bytes came instead of",
    ),
    "a page": (
        lambda h, c, s: not h.reply(b"<html>log in</html>"),
        r"a web page came instead of the shard \('<html>log",
    ),
    "a flipped byte": (
        lambda h, c, s: not h.reply(bytes([c[0] ^ 1]) + c[1:], 206),
        r"digits-\d{6}.tar: sha256 differs from the manifest: damaged, or replaced",
    ),
    "not found": (lambda h, c, s: not h.send_error(404), r"digits-\d{6}.tar: not found"),
}


@pytest.mark.parametrize("what", LOST)
def test_what_does_not_pass_is_named(what: str, server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    handler.wrong, reason = LOST[what]
    reader = ShardReader(Shards(path=url, remote=remote(tmp_path, retries=2)))
    with pytest.raises(DataError, match=reason) as error:
        next(reader.batches(0, 100, 0))
    assert url in str(error.value)
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_no_manifest_there(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    handler.folder = tmp_path
    with pytest.raises(DataError, match=r"digits/manifest.json: not found"):
        open_(url, tmp_path)
    with pytest.raises(DataError, match="failed 1 times"):
        ShardReader(Shards(path="http://127.0.0.1:1/x", remote=remote(tmp_path, retries=0)))


def test_a_fetch_goes_on_where_another_stopped(server: tuple[str, type[Handler]], built: Path, tmp_path: Path) -> None:
    url, handler = server
    stopped = remote(tmp_path, retries=0)
    shard = read_manifest(built).shards[0]
    handler.wrong = lambda h, c, start: start >= 120_000 and not h.send_error(503)
    with pytest.raises(DataError, match="failed 1 times"):
        open_folder(url, stopped).shard(shard)
    (part,) = (tmp_path / "cache").glob("*.part")
    assert part.stat().st_size == 120_000
    handler.wrong, before = None, handler.asked[shard.file]
    assert open_folder(url, stopped).shard(shard).read_bytes() == (built / shard.file).read_bytes()
    assert handler.asked[shard.file] - before == 3
    # what is left of other content is thrown away
    (tmp_path / "cache" / "x").mkdir()
    other = open_folder(url, Remote(cache=str(tmp_path / "cache" / "x")))
    key = part.name
    (tmp_path / "cache" / "x" / key).write_bytes(b"?" * 50_000)
    assert other.shard(shard).read_bytes() == (built / shard.file).read_bytes()


def test_shards_of_one_name_do_not_collide(server: tuple[str, type[Handler]], built: Path, tmp_path: Path) -> None:
    url, _ = server
    shard = read_manifest(built).shards[0]
    files = {open_folder(f"{url}{more}", remote(tmp_path)).shard(shard) for more in ("", "/other", "?signed=1")}
    assert len(files) == 3
    assert len({file.read_bytes() for file in files}) == 1


def test_the_cache_is_bounded(server: tuple[str, type[Handler]], built: Path, tmp_path: Path) -> None:
    url, _ = server
    shards = read_manifest(built).shards
    bounded = remote(tmp_path, cache_gb=5.5 * shards[0].bytes / 1e9)
    folder = open_folder(url, bounded)
    for shard in shards:
        folder.shard(shard)
        folder.shard(shards[0])  # in use: it stays
        held = list((tmp_path / "cache").glob("*.tar"))
        assert sum(file.stat().st_size for file in held) <= bounded.cache_gb * 1e9
    assert len(held) == 5
    with pytest.raises(DataError, match=r"16 streams of 1 shards and those that come next need .* raise data.remote"):
        ShardReader(Shards(path=url, remote=bounded))
    same = ShardReader(Shards(path=url, remote=bounded, streams=2, shuffle=1))
    local = ShardReader(Shards(path=str(built), streams=2, shuffle=1))
    for got, expected in islice(zip(same.batches(0, 100, 0), local.batches(0, 100, 0), strict=False), 30):
        assert torch.equal(got.x_1, expected.x_1)


def test_what_was_damaged_in_the_cache_is_fetched_again(
    server: tuple[str, type[Handler]], built: Path, tmp_path: Path
) -> None:
    url, handler = server
    same_as_local(open_(url, tmp_path), built)
    asked = sum(handler.asked.values())
    for file in list((tmp_path / "cache").glob("*.tar"))[:2]:
        content = bytearray(file.read_bytes())
        content[700] ^= 1
        file.write_bytes(content)
    same_as_local(open_(url, tmp_path), built)
    assert sum(handler.asked.values()) - asked == 1 + 2 * 6  # the manifest, and the pieces of two shards


def test_a_shard_that_others_push_out_is_fetched_again(
    server: tuple[str, type[Handler]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    folder = open_folder(url, remote(tmp_path))
    manifest, real, left = folder.manifest(), type(folder).shard, [2]

    def shard(self: Any, shard: Any) -> Path:
        path = real(self, shard)
        if left[0]:
            left[0] -= 1
            path.unlink()
        return path

    monkeypatch.setattr(type(folder), "shard", shard)
    assert not open_shard(folder, manifest.shards[0]).wrong
    left[0] = 50
    (said,) = open_shard(folder, manifest.shards[0]).wrong
    assert "digits-000000.tar: leaves the cache before it is read" in said


def fetch_all(url: str, cache: Path, queue: Any) -> None:
    folder = open_folder(url, Remote(cache=str(cache)))
    queue.put([folder.shard(shard).stat().st_size for shard in folder.manifest().shards])


def test_many_processes_fetch_everything_once(server: tuple[str, type[Handler]], built: Path, tmp_path: Path) -> None:
    url, handler = server
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=fetch_all, args=(url, tmp_path / "cache", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    sizes = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sizes == [[shard.bytes for shard in read_manifest(built).shards]] * 4
    assert all(handler.asked[shard.file] == -(-shard.bytes // 40_000) for shard in read_manifest(built).shards)


# --- commands


def test_a_command_needs_to_be_allowed(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"pipe:cat {built}/{{file}}"
    with pytest.raises(DataError, match=r"runs a command; if you trust it, allow it with data.remote.pipe: true"):
        open_(path, tmp_path)
    same_as_local(ShardReader(Shards(path=path, remote=remote(tmp_path, pipe=True))), built, 3)
    with pytest.raises(DataError, match=r"names no file; write \{file\}"):
        ShardReader(Shards(path="pipe:cat x", remote=remote(tmp_path, pipe=True)))
    with pytest.raises(DataError, match=r"ended with exit code 3: no such bucket"):
        ShardReader(Shards(path="pipe:echo no such bucket >&2; exit 3 {file}", remote=remote(tmp_path, pipe=True)))
    assert main(["shards", "info", path]) == 2
    assert "allow it with" in capsys.readouterr().err
    assert main(["shards", "info", path, "--pipe"]) == 0
    marker = tmp_path / "ran"
    with pytest.raises(DataError):
        ShardReader(Shards(path=f"pipe:touch {marker} {{file}}", remote=remote(tmp_path)))
    assert not marker.exists()


def test_a_file_system_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere://bucket/manifest.json: .*install with the extra"):
        open_("nowhere://bucket", tmp_path)
