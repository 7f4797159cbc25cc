"""What training takes of a device's memory: what it holds from step to step by part, and what a step needs on top.

Memory is counted, not tensors: what several tensors share counts once, of a sharded tensor what is here. It holds of
tensors without values too (on the meta device, or torch's fake ones), whose memory is as large as it would be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teachers.networks.base import matrices

FULL = 0.6  # of a device's memory, which one process's replica may take before the processes hold shards instead


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes from step to step. parameters: of what is trained, with its buffers and what is frozen of it; optimizer:
    AdamW's two moments and step counts, Muon's one moment; target: the slow copy, where the objective has one; teacher:
    the frozen one."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    target: int
    teacher: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(astuple(self))


def held(
    trained: Sequence[nn.Module],
    ema: nn.Module,
    target: nn.Module | None = None,
    teacher: Sequence[nn.Module] = (),
    *,
    optimizer: str = "adamw",
) -> Held:
    """Of modules as they are. What a part shares with one named before it (the order is teacher, trained, ema, target)
    is that one's: the adapters of a student are its own, the weights that they adapt the teacher's."""
    seen: set[int] = set()
    of_teacher = _bytes(teacher, seen)
    gradients, moments = _gradients(trained, optimizer)
    return Held(
        teacher=of_teacher,
        parameters=_bytes(trained, seen),
        gradients=gradients,
        optimizer=moments,
        ema=_bytes([ema], seen),
        target=0 if target is None else _bytes([target], seen),
    )


def replica_bytes(
    student: nn.Module,
    further: Sequence[nn.Module] = (),
    teacher: Sequence[nn.Module] = (),
    *,
    target: bool = False,
    optimizer: str = "adamw",
) -> int:
    """What a process holds that has all of it, before any copy is made. further: what is trained beside the student;
    target: whether a slow copy is kept; optimizer: as a recipe names it. Bytes, as `held` finds them when everything is
    there."""
    seen: set[int] = set()
    base = _bytes(teacher, seen)
    own = _bytes([student], seen)
    rest = _bytes(further, seen)
    gradients, moments = _gradients([student, *further], optimizer)
    return base + own * (2 + target) + 8 + rest + gradients + moments  # 8: the EMA's count of updates


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers, on this process."""
    for module in modules:
        yield from map(here, (*module.parameters(), *module.buffers()))


def _bytes(modules: Iterable[nn.Module], seen: set[int]) -> int:
    """Of memory that is not among `seen`, where it is entered."""
    total = 0
    for tensor in tensors(modules):
        memory = tensor.untyped_storage()
        if memory._cdata not in seen:
            seen.add(memory._cdata)
            total += memory.nbytes()
    return total


def _gradients(trained: Sequence[nn.Module], optimizer: str) -> tuple[int, int]:
    """Of gradients, and of AdamW's moments with a float32 count of steps for each parameter, or Muon's one moment."""
    sizes = {id(p): here(p).nbytes for module in trained for p in module.parameters() if p.requires_grad}
    own = [sizes[id(p)] for module in trained for p in matrices(module)] if optimizer == "muon" else []
    total = sum(sizes.values())
    return total, 2 * total - sum(own) + 4 * (len(sizes) - len(own))


class Alive(TorchDispatchMode):
    """Inside, follows the memory of all tensors that operations make: `now`, and the most there was, `peak`, in bytes.

    known: tensors whose memory is not counted. What an operation needs only while it runs is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no other memory takes their place
        self._seen.update(memory._cdata for memory in self._known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Enters what the operation gives."""
        del types
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and not tensor._is_zerotensor():  # a zero tangent: a shape without memory
                self._enter(tensor.untyped_storage())
        return found

    def _enter(self, memory: torch.UntypedStorage) -> None:
        key, size = memory._cdata, memory.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(memory, self._leave, key, size).atexit = False

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
