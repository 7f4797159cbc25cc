"""Float32 inside of mixed precision: what autocast, which has matrix products in bfloat16, is to leave alone.

bfloat16 has three digits. Of times that is too few: two that are 0.001 apart would be one, and what is differentiated
along them would be noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
Method = Callable[Concatenate[M, Tensor, P], Tensor]


def exact(method: Method[M, P]) -> Method[M, P]:
    """A module's method of a time ``[b]`` and whatever else, as it is without autocast."""

    @wraps(method)
    def alone(self: M, t: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        # asked first, so that an export has nothing of it
        if not torch.is_autocast_enabled(t.device.type):
            return method(self, t, *args, **kwargs)
        with torch.autocast(t.device.type, enabled=False):
            return method(self, t, *args, **kwargs)

    return alone


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norms(network: nn.Module) -> list[nn.Module]:
    """Torch's own. Of a bfloat16 input and float32 weights, forward mode makes a tangent of another dtype than the
    value's; on GPUs autocast itself has them in float32."""
    return [part for part in network.modules() if isinstance(part, _NORMS)]


@contextmanager
def exactly(parts: Callable[[], Iterable[nn.Module]], device: torch.device) -> Iterator[None]:
    """Inside, these parts of a network compute in float32 what autocast would not, if their weights are float32."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    depth = 0  # of parts within parts

    def enter(part: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        torch.set_autocast_enabled(device.type, False)
        return tree_map_only(Tensor, _single, (args, kwargs))

    def leave(part: nn.Module, args: Any, said: Any) -> None:
        nonlocal depth
        depth -= 1
        torch.set_autocast_enabled(device.type, depth == 0)

    handles = []
    for part in set(parts()):
        if {weight.dtype for weight in part.parameters()} == {torch.float32}:
            handles.append(part.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _single(given: Tensor) -> Tensor:
    """What autocast has made of a float32, as one again."""
    return given.float() if given.dtype in (torch.bfloat16, torch.float16) else given
