"""A network of a class that this project does not know, as its author hands it over.

It is called as ``module(x, t)``, of classes ``module(x, t, y)`` with ``y: int64 [b]``, of embeddings ``module(x, t,
cond)``. A second time is added to the output of one of its parts, that which embeds the time: a vector a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teachers.networks.base import alone, zeroed
from teachers.networks.embeddings import TimeEmbedding
from teachers.networks.exact import exactly, norms
from teachers.space import Cond, DataSpace


class Own(nn.Module):
    """`module` called as networks are. place: the name of its part whose output, ``[b, width]``, a shift is added to;
    rounded: whether it is known to take times of x's dtype alone, in half precision too, which are then far apart.
    It stays in eval mode: dropout would be another function at each call, of the student and in its derivative."""

    def __init__(self, module: nn.Module, space: DataSpace, place: str, width: int) -> None:
        super().__init__()
        self.module = module.eval()
        self.space, self.place, self.width, self.rounded = space, place, width, False

    def train(self, mode: bool = True) -> Own:
        """The module stays as it is."""
        super().train(mode)
        self.module.eval()
        return self

    def second_time(self) -> nn.Module:
        """See `teachers.networks.base.Network`: an embedding of low frequencies, always the same."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            further = TimeEmbedding(self.width)
        zeroed(further.out)
        return further.to(next(self.module.parameters()).device)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """See `teachers.networks.base.Network`; the time is cast last, to x's dtype or, where that is below float32 and
        the module takes it, to float32. Raises ValueError for conditioning that is missing."""
        further = _conditioning(self.space, cond)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with alone(self.module), exactly(self._exact, x.device):
            if dtype != x.dtype and not self.rounded:
                try:
                    return self._said((x, t.to(dtype), *further), shift)
                except (TypeError, RuntimeError, ValueError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    self.rounded = True  # layers that see the time itself take none but of their weights' dtype
            return self._said((x, t.to(x.dtype), *further), shift)

    def _exact(self) -> list[nn.Module]:
        """What stays float32 in mixed precision."""
        time = [self.module.get_submodule(self.place)] if self.place else []
        return [*time, *norms(self.module)]

    def _said(self, given: tuple[Any, ...], shift: Tensor | None) -> Tensor:
        if shift is None:
            return self.module(*given)

        def shifted(part: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            return output + shift.to(output.dtype)

        # for this call alone: nothing stays behind, whatever happens in it, and the module remains its author's
        handle = self.module.get_submodule(self.place).register_forward_hook(shifted)
        try:
            return self.module(*given)
        finally:
            handle.remove()


def class_of(module: nn.Module) -> str:
    """Its full name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _conditioning(space: DataSpace, cond: Cond) -> tuple[Any, ...]:
    names = space.conditions
    if missing := [name for name in names if cond is None or name not in cond]:
        raise ValueError(f"this network is conditioned on {', '.join(missing)}: pass cond={{...}} with it")
    if not names or cond is None:
        return ()
    return ({name: cond[name] for name in names} if space.embeddings else cond["class"],)


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """What a file can say of such a network: its class, where a second time enters and how wide that is, and whether it
    knows a class id for "no class"."""

    of: str
    place: str
    width: int
    null_class: bool = False

    highest = 1.0
    """Radians a unit of its own time of the fastest sinusoid: a guess, as most have it."""

    def check(self, space: DataSpace) -> None:
        """Nothing can be checked."""

    def around(self, module: nn.Module, space: DataSpace) -> Own:
        """The network of this description that `module` is. Raises ValueError for one of a class of another name; the
        same class may be imported from elsewhere."""
        if type(module).__name__ != self.of.rpartition(".")[2]:
            raise ValueError(f"it is of the class {self.of}, the one that was passed of {class_of(module)}: pass one "
                             "of that class")  # fmt: skip
        return Own(module, space, self.place, self.width)

    def build(self, space: DataSpace) -> Own:
        """Raises ValueError: no file holds the class."""
        raise ValueError(
            f"it is of the class {self.of} of its author, which no file holds: make one and pass it to distill.load("
            f"path, network={self.of.rpartition('.')[2]}(...))"
        )
