"""Checkpoints: verified directories of safetensors and JSON, without pickle.

    step-00000500/  student.safetensors  ema.safetensors  optimizer.safetensors  state.json  manifest.json

Written beside their final name, flushed, renamed; manifest.json (name, bytes, sha256 of each file) is written last. A
reader trusts only what verifies. state.json is Lightning's checkpoint with each tensor replaced by where it lies.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.atomic import atomic_directory
from distill.training.module import DistillModule
from distill.training.stops import Diverged
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""The folder of a run that holds them."""
_NAME = re.compile(r"step-(\d{8})")
_FILES = {"student.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}


class DirectoryCheckpoint(CheckpointIO):
    """Lightning's way to disk and back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write one checkpoint, whole or not at all. Raises OSError that names `path`."""
        files: dict[str, dict[str, Tensor]] = {}
        state = _without_tensors(checkpoint, (), files)
        with atomic_directory(Path(path)) as folder:
            for name, tensors in files.items():
                save_file(tensors, folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
            listed = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
            manifest = {"format": FORMAT, "step": checkpoint["global_step"], "identity": checkpoint["identity"],
                        "files": listed}  # fmt: skip
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one checkpoint after verifying it. Raises CheckpointError."""
        folder = Path(path)
        verify(folder)
        files = {f.stem: load_file(f) for f in folder.glob("*.safetensors")}
        state = _with_tensors(json.loads((folder / "state.json").read_text(encoding="utf-8")), files)
        assert isinstance(state, dict)
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one checkpoint."""
        shutil.rmtree(path)


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
        if missing := _FILES - stated.keys():
            raise ValueError(f"does not list {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: no usable manifest.json, so not a whole checkpoint of ours ({error})"
        ) from None
    for name, facts in stated.items():
        file = folder / name
        if not file.is_file() or (file.stat().st_size, sha256(file)) != facts:
            raise CheckpointError(f"{file}: missing, cut short or changed since it was written")
    return identity


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
    name, prefix = ("ema", "ema.module.") if which == "ema" else ("student", "student.")
    tensors = load_file(folder / f"{name}.safetensors")
    found = {k.removeprefix("state_dict.").removeprefix(prefix): v for k, v in tensors.items()
             if k.startswith(f"state_dict.{prefix}")}  # fmt: skip
    return found


def _steps(folder: Path) -> Iterator[Path]:
    return (p for p in folder.glob("step-*") if _NAME.fullmatch(p.name))


class Checkpoints(pl.Callback):
    """Saves every `every` steps and at the end, and deletes all but the newest `keep` once the new one is written."""

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self._every, self._keep = folder, every, keep
        self._saved = -1

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Save when due."""
        if trainer.global_step % self._every == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save now. Raises Diverged before anything is written if a weight is not finite."""
        assert isinstance(module, DistillModule)
        for name, value in module.student.named_parameters():
            if value.requires_grad and not torch.isfinite(value).all():
                raise Diverged(f"step {trainer.global_step}: weights of {name} are not finite")
        if self._saved == trainer.global_step:
            return
        path = self.folder / f"step-{trainer.global_step:08d}"
        trainer.save_checkpoint(path)
        self._saved = trainer.global_step
        prune(path, self._keep)


def prune(newest: Path, keep: int) -> None:
    """Delete all checkpoints older than a good one but the last keep - 1 of them; newer ones stay."""
    older = sorted(path for path in _steps(newest.parent) if path.name < newest.name)
    for path in older[: max(len(older) + 1 - keep, 0)]:
        shutil.rmtree(path)


def _file_of(key: tuple[str, ...]) -> str:
    if key[0] == "optimizer_states":
        return "optimizer"
    return key[1].partition(".")[0] if key[0] == "state_dict" else "other"


def _without_tensors(value: Any, key: tuple[str, ...], files: dict[str, dict[str, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        file, name = _file_of(key), ".".join(key)
        files.setdefault(file, {})[name] = value.detach().contiguous()
        return {"__tensor__": [file, name]}
    if isinstance(value, dict):
        items = [[k, _without_tensors(v, (*key, str(k)), files)] for k, v in value.items()]
        return dict(items) if all(isinstance(k, str) for k in value) else {"__items__": items}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, (*key, str(i)), files) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{'.'.join(key)}: a {type(value).__name__} cannot be saved without pickle")


def _with_tensors(value: Any, files: dict[str, dict[str, Tensor]]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__tensor__"}:
            file, name = value["__tensor__"]
            return files[file][name]
        if value.keys() == {"__items__"}:
            return {k: _with_tensors(v, files) for k, v in value["__items__"]}
        return {k: _with_tensors(v, files) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_tensors(v, files) for v in value]
    return value
