"""A pickle or torch checkpoint of anyone's -> safetensors that is read without pickle, and what was known beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from teachers.checkpoints import ABOUT, SAFETENSORS, WEIGHTS, sha256
from teachers.errors import CheckpointError
from teachers.pickled import AVERAGED, RAW, take


def convert(source: Path, out: Path, prefer: Sequence[str] = (*AVERAGED, *RAW)) -> str:
    """Write the weights in `source` as safetensors to `out`, whole or not at all -> a few lines that say what was kept
    and what was not.

    The metadata of `out` holds the plain data beside them (class, arguments) as JSON, which `checkpoints.read` gives
    back. prefer: names of what holds the weights in a training checkpoint, best first. Nothing in `source` is run.
    Raises CheckpointError, also where `out` is there already.
    """
    if out.suffix not in SAFETENSORS:
        raise CheckpointError(f"{out}: what is written is safetensors; name it {out.with_suffix('.safetensors')}")
    if out.exists():
        raise CheckpointError(f"{out}: is there already; remove it, or name another file")
    if source.suffix in SAFETENSORS:
        raise CheckpointError(f"{source}: is safetensors already; it needs no conversion")
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file")
    taken = take(source, prefer)
    tensors = _apart(taken.tensors, source)
    metadata = {
        ABOUT: json.dumps(taken.about),
        WEIGHTS: taken.weights,
        "source": source.name,
        "sha256": sha256(source),
    }
    _write(tensors, metadata, out)
    count = sum(v.numel() for v in tensors.values())
    kinds = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in tensors.values()}))
    lines = [f"{out}: {len(tensors)} tensors, {count:,} numbers ({kinds}), of {taken.weights}"]
    if taken.about:
        lines.append(f"kept beside them: {', '.join(taken.about)}")
    if taken.left:
        lines.append(f"left out: {', '.join(taken.left)}")
    return "\n".join(lines)


def _apart(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Contiguous, none sharing memory with another."""
    size, most = sum(v.numel() * v.element_size() for v in tensors.values()), 4 * source.stat().st_size
    if size > most:
        raise CheckpointError(f"{source}: its tensors repeat what is in it {size / most * 4:.0f} times; it is damaged")
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return apart


def _write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], out: Path) -> None:
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), beside, dict(metadata))
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.chmod(0o666 & ~_umask())
        _name(beside, out)
    except FileExistsError:
        raise CheckpointError(f"{out}: is there already; remove it, or name another file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from None
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _name(beside: Path, out: Path) -> None:
    try:
        os.link(beside, out)  # unlike a renaming, never over a file that has come meanwhile
    except OSError as error:
        if isinstance(error, FileExistsError) or out.exists():
            raise FileExistsError from None
        beside.rename(out)  # a file system without links


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
