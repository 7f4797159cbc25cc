"""Sources -> shards: plain webdataset tars, an index for each, and a manifest, byte-identical for identical input.

A shard appears under its name whole, and the manifest last. A build that was killed goes on where it stopped when the
same command is given again; under torchrun every process writes its share of the shards, to the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distill.atomic import atomic_file, clear, write_atomic
from distill.data.manifest import NAME, DataError, Field, Manifest, Shard, read_manifest, wrong_field
from distill.data.sources import mark, open_source
from distill.data.sources.base import Members, Options
from distill.data.tar import index_of, scan
from teachers.checkpoints import sha256

PLAN = ".plan.json"
SHARD_SIZE = 100


@dataclass(frozen=True)
class Plan:
    """What a folder of shards will hold. made_from: everything that decides the bytes."""

    name: str
    split: str
    samples: int
    shard_size: int
    fields: Mapping[str, Field]
    about: Mapping[str, Any]
    made_from: Mapping[str, Any]
    autoencoder: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise DataError(f"shard size must be at least 1, got {self.shard_size}")
        if self.samples < 1:
            raise DataError("there are no samples to write")
        for name, field in self.fields.items():
            if wrong := wrong_field(name, field):
                raise DataError(f"{self.name}: {wrong}; convert it or leave it out")
        if Path(self.name).name != self.name or not self.name.isprintable():
            raise DataError(f"the name {self.name!r} cannot be part of a file's name; give another with --name")

    @property
    def shards(self) -> list[range]:
        """The samples of each shard."""
        return [range(n, min(n + self.shard_size, self.samples)) for n in range(0, self.samples, self.shard_size)]

    def file(self, number: int) -> str:
        """The name of a shard."""
        return f"{self.name}-{number:06d}.tar"

    @property
    def identity(self) -> dict[str, Any]:
        """As plain JSON, to be compared with what a folder was begun or finished with."""
        parts = {"name": self.name, "split": self.split, "samples": self.samples, "shard size": self.shard_size,
                 **self.made_from}  # fmt: skip
        plain: dict[str, Any] = json.loads(json.dumps(parts))
        return plain


def default_shard_size(samples: int) -> int:
    """At least 64 shards where there are samples enough, of 100 to 1,000 samples."""
    return min(max(SHARD_SIZE, -(-samples // 64)), 1000)


def build(
    source: str, folder: Path, shard_size: int | None = None, *, name: str | None = None, options: Options | None = None
) -> Manifest:
    """Write the shards of a source to `folder`; what an earlier call left there is kept if it verifies.

    source: ``digits``, or a folder of images, of idx files or of tars, or an .npy, .npz or .tar file. A folder that
    holds the same data already is left as it is. Raises DataError if it holds anything else.
    """
    options = options or Options()
    made_from = {"builder": source if source == "digits" else "files", "size": options.size, "seed": options.seed}
    _refuse_foreign(folder)
    opened = open_source(source, options)
    fields = dict(opened.fields)
    if options.classes is not None:
        found = fields["class"].classes if "class" in fields else None
        if found is None or found > options.classes:
            raise DataError(f"{source}: has {found or 'no'} classes, not {options.classes}")
        fields["class"] = replace(fields["class"], classes=options.classes)
        made_from["classes"] = options.classes
    plan = Plan(
        name or name_of(source),
        options.split,
        opened.samples,
        default_shard_size(opened.samples) if shard_size is None else shard_size,
        fields,
        {**opened.about, **({"files": files} if (files := mark(source, options.split)) else {})},
        made_from | {"input": opened.digest},
    )
    return write_shards(folder, plan, lambda rows: (opened.sample(row) for row in rows))


def name_of(source: str) -> str:
    """What shards of it are called, unless another name is given."""
    return source if source == "digits" else Path(source).expanduser().resolve().name.partition(".")[0] or "data"


def write_shards(folder: Path, plan: Plan, make: Callable[[range], Iterable[tuple[str, Members]]]) -> Manifest:
    """Write the shards of a plan; ``make(rows)`` gives key and members of these samples, the same ones every time.

    Spread over the processes of a launch by torchrun. Raises DataError if the folder holds anything else, and what
    `make` raises: what is finished then stays, and the next call goes on.
    """
    from distill.parallel import everywhere, on_main, share  # slow to import, and not needed to check a recipe

    def write() -> None:
        for number in share(range(len(plan.shards))):
            if _finished(folder, plan, number) is None:
                _write_shard(folder, plan.file(number), make(plan.shards[number]), len(plan.shards[number]))

    with ExitStack() as writing:
        done = on_main(lambda: _begin(folder, plan, writing))
        if done is not None:
            return done
        everywhere(write)
        on_main(lambda: _complete(folder, plan))
    return read_manifest(folder)


def _complete(folder: Path, plan: Plan) -> None:
    """Writes the manifest of shards that are all there."""
    shards = []
    for number in range(len(plan.shards)):
        shard = _finished(folder, plan, number, trust=True)
        if shard is None:
            raise DataError(f"{folder / plan.file(number)}: was written, and is gone; give the same command again")
        shards.append(shard)
    source = {**plan.about, "plan": plan.identity}
    held = (plan.name, plan.split, plan.samples, tuple(shards), plan.fields, source, plan.autoencoder)
    manifest = Manifest(*held)
    write_atomic(folder / NAME, manifest.to_json())
    for shard in shards:
        (folder / _receipt(shard.file)).unlink(missing_ok=True)
    (folder / PLAN).unlink()


_REMEDY = "nothing was written; choose another folder, or move this one away"


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder / PLAN).is_file():
        return
    if folder.is_dir() and all(PLAN in path.name for path in folder.iterdir()):
        return  # empty, or another job is just writing its plan
    if not folder.is_dir():
        raise DataError(f"{folder}: exists and is not a folder of shards; {_REMEDY}")
    try:
        read_manifest(folder)
    except DataError as error:
        raise DataError(f"{folder}: exists and is not a folder of shards ({error}); {_REMEDY}") from None


def _begin(folder: Path, plan: Plan, writing: ExitStack) -> Manifest | None:
    """Makes the folder ready, and this launch the one that writes to it until `writing` is closed; returns the manifest
    if all is done already. Raises DataError for other data."""
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writing.enter_context(_alone(folder))
    if (folder / NAME).exists():
        manifest = read_manifest(folder)
        held = manifest.source.get("plan")
        if held != plan.identity:
            raise DataError(f"{folder}: already holds {_difference(held, plan, manifest.name)}; {_REMEDY}")
        return manifest
    if (folder / PLAN).is_file():
        try:
            held = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if held != plan.identity:
            raise DataError(f"{folder}: unfinished, with {_difference(held, plan, 'other data')}; {_REMEDY}")
        clear(folder)  # what a kill left half-written
    else:
        write_atomic(folder / PLAN, json.dumps(plan.identity, indent=1) + "\n")
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another job that builds the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems that cannot lock a folder
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: waiting for another job that builds it", file=sys.stderr)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has it open too
        os.close(handle)


def _difference(held: Any, plan: Plan, name: str) -> str:
    if not isinstance(held, dict):
        return f"the shards of {name!r}"
    wanted = plan.identity
    differ = [key for key in {**wanted, **held} if held.get(key) != wanted.get(key)]
    said = [f"{key} {_short(held.get(key))} instead of {_short(wanted.get(key))}" for key in differ]
    return f"the shards of {held.get('name', name)!r} ({', '.join(said)})"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _receipt(file: str) -> str:
    return f".{file}.done"


def _finished(folder: Path, plan: Plan, number: int, trust: bool = False) -> Shard | None:
    """The shard, if an earlier call or this one has finished it. trust: do not read it again to make sure."""
    file = folder / plan.file(number)
    try:
        shard = Shard(**json.loads((folder / _receipt(file.name)).read_text(encoding="utf-8")))
        if file.stat().st_size != shard.bytes:
            return None
        if not trust and (sha256(file) != shard.sha256 or sha256(folder / shard.index_file) != shard.index):
            return None
    except (OSError, ValueError, TypeError):
        return None
    return shard


def _write_shard(folder: Path, name: str, samples: Iterable[tuple[str, Members]], count: int) -> Shard:
    """The tar, then its index, then a receipt that both are whole."""
    import webdataset  # slow to import, and not needed to check a recipe

    with atomic_file(folder / name) as temporary:
        with temporary.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for key, members in samples:
                tar.write({"__key__": key, **members})
        with temporary.open("rb") as read:
            found = scan(read)
        assert found.fault is None, found.fault
    index = index_of(found)
    shard = Shard(name, found.bytes, count, found.sha256, hashlib.sha256(index).hexdigest())
    write_atomic(folder / shard.index_file, index)
    write_atomic(folder / _receipt(name), json.dumps(asdict(shard)))
    return shard
