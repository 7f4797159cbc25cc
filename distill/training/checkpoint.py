"""Checkpoints: verified directories of safetensors and JSON, without pickle.

    step-00000500/  student.safetensors  ema.safetensors  optimizer.safetensors  state.json  manifest.json

Written beside their final name, flushed, renamed; manifest.json (name, bytes, sha256 of each file) is written last. A
reader trusts only what verifies. state.json is Lightning's checkpoint with each tensor replaced by where it lies. Under
sharding each process writes its rows of the sharded tensors, ``student-00003-of-00008.safetensors``, which any number
of processes can read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.atomic import atomic_directory, flush, naming, remove
from distill.parallel import everywhere, is_main, on_main, rank, world
from distill.training.sharding import first_row
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""The folder of a run that holds them."""
_NAME = re.compile(r"step-(\d{8})")
_KINDS = {"student", "ema", "optimizer"}

Files = dict[str, dict[str, Tensor]]


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write one checkpoint, whole or not at all; every process comes to it. Raises OSError that names `path`."""
    files: Files = {}
    state = _without_tensors(checkpoint, (), files)
    with ExitStack() as stack:
        folder = on_main(lambda: stack.enter_context(atomic_directory(path)))
        with naming(path):  # on the process whose disk it is
            written = everywhere(lambda: _write(folder, files))
        on_main(lambda: _finish(folder, state, checkpoint, {k: v for part in written for k, v in part.items()}))
        on_main(stack.close)


def load(folder: Path) -> dict[str, Any]:
    """Read one checkpoint after verifying it, on every process; its tensors are `Stored`. Raises CheckpointError."""
    on_main(lambda: verify(folder))
    state = _with_stored(json.loads((folder / "state.json").read_text(encoding="utf-8")), _stored(folder))
    assert isinstance(state, dict)
    return state


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, read when it is asked for. parts: the files that hold its rows, in order, and the first
    row of each."""

    name: str
    parts: tuple[tuple[int, Path], ...]

    def whole(self) -> Tensor:
        """All of it."""
        pieces = [self._read(file) for _, file in self.parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows start .. stop - 1."""
        pieces = []
        for first, file in self.parts:
            with safe_open(file, "pt") as opened:
                piece = opened.get_slice(self.name)
                low, high = max(start - first, 0), min(stop - first, piece.get_shape()[0])
                if low < high:
                    pieces.append(piece[low:high])
        return torch.cat(pieces) if pieces else self._read(self.parts[0][1])[:0]

    def like(self, tensor: Tensor) -> Tensor:
        """What a process needs of it that holds `tensor` in its place: all of it, or the same shard."""
        if not isinstance(tensor, DTensor):
            return self.whole()
        first = first_row(tensor)
        rows = self.rows(first, first + tensor.to_local().shape[0]) if tensor.dim() else self.whole()
        return DTensor.from_local(
            rows.to(tensor.device), tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
            stride=tensor.stride(),
        )  # fmt: skip

    def _read(self, file: Path) -> Tensor:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(self.name)


def _write(folder: Path, files: Files) -> dict[str, Any]:
    """This process's part of the tensors: its rows of the sharded ones, and on the main process the others. Returns
    the size and digest of each file."""
    written = []
    for kind, tensors in files.items():
        whole = {key: value.contiguous() for key, value in tensors.items() if not isinstance(value, DTensor)}
        sharded = {key: value for key, value in tensors.items() if isinstance(value, DTensor)}
        if whole and is_main():
            written.append(folder / f"{kind}.safetensors")
            save_file(whole, written[-1])
        if sharded:
            rows = {key: value.to_local().contiguous() for key, value in sharded.items()}
            first = {key: str(first_row(value)) for key, value in sharded.items()}
            written.append(folder / f"{kind}-{rank():05d}-of-{world():05d}.safetensors")
            save_file(rows, written[-1], metadata=first)
    for file in written:
        flush(file)
    return {file.name: _facts(file) for file in written}


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _finish(folder: Path, state: Any, checkpoint: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    files = dict(sorted({**written, "state.json": _facts(folder / "state.json")}.items()))
    manifest = {"format": FORMAT, "step": checkpoint["global_step"], "identity": checkpoint["identity"],
                "files": files}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _stored(folder: Path) -> dict[tuple[str, str], Stored]:
    """The tensors of a verified checkpoint, by their kind and name."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    parts: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    for file in (folder / name for name in sorted(manifest["files"]) if name.endswith(".safetensors")):
        with safe_open(file, "pt") as opened:
            first_rows = opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118  not a mapping
                parts.setdefault((file.stem.partition("-")[0], name), []).append((int(first_rows.get(name, 0)), file))
    return {key: Stored(key[1], tuple(sorted(found))) for key, found in parts.items()}


def verify(folder: Path) -> dict[str, str]:
    """The identity (digests of recipe, teacher and data) of a checkpoint whose files are all as its manifest says.

    Raises CheckpointError.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        stated = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        identity = dict(manifest["identity"])
        if manifest["format"] != FORMAT or manifest["step"] != int(folder.name.removeprefix("step-")):
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")
        if missing := {"state", *_KINDS} - {name.partition(".")[0].partition("-")[0] for name in stated}:
            raise ValueError(f"does not list {', '.join(sorted(missing))}")
        if missing := {part for name in stated for part in _of(name)} - stated.keys():
            raise ValueError(f"does not list {min(missing)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: no usable manifest.json, so not a whole checkpoint of ours ({error})"
        ) from None
    for name, facts in stated.items():
        file = folder / name
        if not file.is_file() or (file.stat().st_size, sha256(file)) != facts:
            raise CheckpointError(f"{file}: missing, cut short or changed since it was written")
    if json.loads((folder / "state.json").read_text(encoding="utf-8"))["identity"] != identity:
        raise CheckpointError(f"{folder / 'manifest.json'}: changed since it was written")
    return identity


def _of(name: str) -> list[str]:
    """All files that a part ``student-00003-of-00008.safetensors`` belongs with."""
    found = re.fullmatch(r"(\w+)-\d{5}-of-(\d{5})\.safetensors", name)
    if not found:
        return []
    return [f"{found[1]}-{n:05d}-of-{found[2]}.safetensors" for n in range(int(found[2]))]


def newest(folder: Path, identity: Mapping[str, str]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies (None if there are none), and why newer ones were passed over.

    identity: digests of the recipe, teacher and data it must have been made with. Raises CheckpointError for one made
    with others, and where there are checkpoints but none of them verifies.
    """
    refused: list[str] = []
    for path in sorted(_steps(folder), reverse=True):
        try:
            theirs = verify(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        differing = [name for name, digest in identity.items() if theirs.get(name) != digest]
        if differing:
            raise CheckpointError(
                f"{path}: made with another {' and another '.join(differing)} than this run's: restore what it was "
                "made with, or move the checkpoint away"
            )
        return path, refused
    if refused:
        raise CheckpointError(
            f"{folder}: none of the checkpoints can be used: {'; '.join(refused)}. Restore one, or move them away to "
            "train from the start"
        )
    return None, refused


def load_weights(folder: Path, which: str) -> dict[str, Tensor]:
    """The student's weights of a verified checkpoint, `ema` or `raw`, under the student's own names."""
    kind, prefix = ("ema", "state_dict.ema.module.") if which == "ema" else ("student", "state_dict.student.")
    found = _stored(folder).items()
    return {name.removeprefix(prefix): tensor.whole() for (its, name), tensor in found
            if its == kind and name.startswith(prefix)}  # fmt: skip


def _steps(folder: Path) -> Iterator[Path]:
    return (p for p in folder.glob("step-*") if _NAME.fullmatch(p.name))


def prune(newest: Path, keep: int, identity: Mapping[str, str]) -> None:
    """Delete all checkpoints of this run older than a good one but the last keep - 1 of them; newer ones stay, and so
    does what was not made by this run."""
    older = sorted(p for p in _steps(newest.parent) if p.name < newest.name and _made_with(p, identity))
    for path in older[: max(len(older) + 1 - keep, 0)]:
        remove(path)


def _made_with(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether a checkpoint says that it is this run's."""
    try:
        theirs = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["identity"]
        return all(theirs[name] == digest for name, digest in identity.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _file_of(key: tuple[str, ...]) -> str:
    if key[0] == "optimizer_states":
        return "optimizer"
    return key[1].partition(".")[0] if key[0] == "state_dict" else "other"


def _without_tensors(value: Any, key: tuple[str, ...], files: Files) -> Any:
    if isinstance(value, Tensor):
        file, name = _file_of(key), ".".join(key)
        files.setdefault(file, {})[name] = value.detach()
        return {"__tensor__": [file, name]}
    if isinstance(value, dict):
        items = [[k, _without_tensors(v, (*key, str(k)), files)] for k, v in value.items()]
        return dict(items) if all(isinstance(k, str) for k in value) else {"__items__": items}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, (*key, str(i)), files) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{'.'.join(key)}: a {type(value).__name__} cannot be saved without pickle")


def _with_stored(value: Any, stored: Mapping[tuple[str, str], Stored]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__tensor__"}:
            file, name = value["__tensor__"]
            return stored[file, name]
        if value.keys() == {"__items__"}:
            return {k: _with_stored(v, stored) for k, v in value["__items__"]}
        return {k: _with_stored(v, stored) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_stored(v, stored) for v in value]
    return value
