"""The tensors of a network that lie in shards over the processes: FSDP2, torch's fully_shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distill.memory import here
from teachers.errors import InputError
from teachers.networks.base import LISTS, blocks


def shard(module: nn.Module, mesh: Any) -> None:
    """Shard a module's parameters over the processes, in place: what it says is called `apart` from the block that it
    is in, the elements of its outermost lists of blocks one by one, what is left of it as one.

    Raises InputError for a parameter without dimensions.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise InputError(
                f"trainer.strategy: fsdp2 cannot shard {name}, which has no dimension: set it to ddp, or give the "
                "parameter the shape [1]"
            )
    roots = list(blocks(module)) if isinstance(module, LISTS) else [module]
    apart = [part for m in module.modules() for part in getattr(m, "apart", ())]
    for part in (*apart, *(block for root in roots for block in blocks(root)), *roots):
        if any(not isinstance(p, DTensor) for p in part.parameters()):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)  # the root too: it may be read after any forward


def idle(loss: Tensor, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that a loss does not depend on."""
    found, coming = set(), [loss.grad_fn]
    while coming:
        node = coming.pop()
        if node is not None and node not in found:
            found.add(node)
            coming += [before for before, _ in node.next_functions]
    reached = {id(node.variable) for node in found if hasattr(node, "variable")}
    return [p for p in parameters if id(p) not in reached]


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of tensors that may be sharded: the same memory."""
    return list(map(here, tensors))


def first_row(tensor: DTensor) -> int:
    """Where this process's shard begins in the first dimension."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0]) if tensor.dim() else 0


def number(value: Tensor) -> Tensor:
    """A scalar that may be the sum of what processes hold."""
    return value.full_tensor() if isinstance(value, DTensor) else value
