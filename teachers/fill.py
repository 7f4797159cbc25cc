"""The tensors of a file -> a network, strictly: built without weights (accelerate), it takes them as its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from teachers.checkpoints import Checkpoint
from teachers.errors import CheckpointError

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """dtype: of the weights, null as they are in the file, of several the widest (half precision of old training code
    becomes float32 where a family says so). device_map: null, or auto to have accelerate spread the network over the
    devices there are."""

    dtype: Dtype | None = None
    device_map: Literal["auto"] | None = None


def fill(
    build: Callable[[], nn.Module],
    checkpoint: Checkpoint,
    placement: Placement | None = None,
    *,
    ignore: Iterable[str] = (),
    weights: bool = True,
) -> nn.Module:
    """The network of `build` with the tensors of a checkpoint, frozen, in eval mode.

    ignore: patterns of names that the family stores and its velocity does not need. weights: False leaves the network
    without them, after every name and size was compared. Raises CheckpointError that names what is missing,
    unexpected or of another size.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = build()
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not unused.fullmatch(name)}
    compare(network, tensors, checkpoint.source)
    dtype = getattr(torch, placement.dtype) if placement and placement.dtype else None
    widest = _widest(network, tensors, checkpoint.source, dtype)
    if not weights:  # as large as they are
        tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name in list(tensors):
        tensor = tensors[name]
        if (dtype and tensor.is_floating_point()) or name in widest:
            tensor = tensor.to(dtype or widest[name])
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor  # students train and export them apart
        seen.add(place)
    network.load_state_dict(tensors, strict=True, assign=True)
    if dtype is not None:
        network.to(dtype)  # buffers that are not stored
    if weights and placement and placement.device_map:
        network = _spread(network)
    return network.eval().requires_grad_(False)


_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _widest(
    network: nn.Module, tensors: Mapping[str, Tensor], source: str, asked: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of what a network holds in float32, by name, where its file has several: layers compute in one alone.

    Raises CheckpointError for tensors of a kind that no network computes in. asked: what they are converted to.
    """
    names = [name for name, own in network.state_dict().items() if own.dtype == torch.float32]
    for name in names:
        found = tensors[name].dtype
        word = str(found).removeprefix("torch.")
        if not found.is_floating_point:
            raise CheckpointError(
                f"{source}: {name} is {word}, expected floating point numbers: it is quantised or damaged; take the "
                "weights that it was made of, or copy it again"
            )
        if found not in _COMPUTED and asked is None:
            raise CheckpointError(f"{source}: {name} is {word}, in which networks do not compute; set "
                                  "placement.dtype: bfloat16, or float32")  # fmt: skip
    kinds = {tensors[name].dtype for name in names}
    return dict.fromkeys(names, reduce(torch.promote_types, kinds)) if len(kinds) > 1 and asked is None else {}


def _spread(network: nn.Module) -> nn.Module:
    from accelerate import dispatch_model, infer_auto_device_map

    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    whole = sorted({type(block).__name__ for blocks in lists for block in blocks})
    return dispatch_model(network, infer_auto_device_map(network, no_split_module_classes=whole))


def compare(module: nn.Module, tensors: Mapping[str, Tensor], source: str, what: str = "the network") -> None:
    """Raises CheckpointError that names the keys and shapes in which a module and its weights do not agree. what: the
    module, in words."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    sizes = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
        for k in sorted(own.keys() & tensors.keys())
        if tensors[k].shape != own[k].shape
    ]
    parts = [f"{word}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" for word, names in
             (("missing", missing), ("unexpected", extra), ("wrong size", sizes)) if names]  # fmt: skip
    if parts:
        raise CheckpointError(f"{source}: the weights do not fit {what}; " + "; ".join(parts))
