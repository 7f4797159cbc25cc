"""Activations of blocks that are computed again in the backward pass instead of being kept: arXiv 1604.06174.

torch's checkpoint keeps what enters a block and calls it again in the backward pass. Of a block that is being
differentiated in forward mode it would call the value's part alone, and fail. So the differentiation ends at the
block's border: value and tangent of what enters are ordinary inputs of a checkpointed function, the block together with
its own forward-mode derivative, and what that returns is value and tangent again outside. That is exact, and gradients
go through both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, _unwrap_for_grad, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from distill.derivative import derivative
from teachers.networks.base import blocks


def recompute(network: nn.Module) -> None:
    """Makes the `blocks` of a network recompute their activations wherever gradients are taken, in place.

    Names, weights and state stay as they are, and copies do as it does. To be called before the network is sharded.
    """
    for block in blocks(network):
        if not isinstance(block, _Recomputed):
            cls: Any = type(block)
            block.__class__ = _recomputed(cls)


class _Recomputed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        given, spec = tree_flatten((args, kwargs))

        def call(*given: Any) -> Any:
            args, kwargs = tree_unflatten(given, spec)
            return forward(*args, **kwargs)

        levels = retrieve_all_functorch_interpreters()
        if not torch.is_grad_enabled():
            return call(*given)
        if not levels and forward_ad._current_level < 0:
            return _checkpointed(self, call, *given)
        if [level.key() for level in levels] == [TransformType.Jvp] and not _hides(self):
            return _differentiated(self, call, given, levels[0].level())
        return call(*given)


@cache
def _recomputed(cls: Any) -> Any:
    return type(cls.__name__, (_Recomputed, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _checkpointed(block: nn.Module, call: Callable[..., Any], *given: Any) -> Any:
    return checkpoint(call, *given, use_reentrant=False, context_fn=partial(_contexts, block))


# --- inside of a forward-mode derivative


def _differentiated(block: nn.Module, call: Callable[..., Any], given: list[Any], level: int) -> Any:
    """``call(*given)`` of dual tensors at this level of differentiation."""
    pairs: list[Any] = [forward_ad.unpack_dual(v) if _is_number(v) else (v, None) for v in given]
    moving = [i for i, (_, tangent) in enumerate(pairs) if tangent is not None]
    if not moving:
        return call(*given)
    values = [_unwrap_for_grad(v, level) if isinstance(v, Tensor) else v for v, _ in pairs]
    tangents = [_unwrap_for_grad(pairs[i][1], level).to(values[i].dtype) for i in moving]
    count, returned = len(given), _Returned()

    def both(*given: Any) -> Any:
        def numbers(*moved: Tensor) -> Any:
            now = dict(enumerate(given[:count])) | dict(zip(moving, moved, strict=True))
            return returned.numbers(call(*now.values()))

        return derivative(numbers, tuple(given[i] for i in moving), given[count:])

    with temporarily_pop_interpreter_stack():
        found, along = _checkpointed(block, both, *values, *tangents)
    return returned.with_numbers([forward_ad.make_dual(v, d.to(v.dtype)) for v, d in zip(found, along, strict=True)])


class _Returned:
    """What a block returns: its floating point tensors apart from all else."""

    def numbers(self, said: Any) -> tuple[Tensor, ...]:
        """Takes it apart."""
        self._leaves, self._spec = tree_flatten(said)
        found = tuple(v for v in self._leaves if _is_number(v))
        self._leaves = [None if _is_number(v) else (v,) for v in self._leaves]
        return found

    def with_numbers(self, numbers: list[Tensor]) -> Any:
        """Puts it together, with these tensors in their places."""
        rest = iter(numbers)
        return tree_unflatten([next(rest) if v is None else v[0] for v in self._leaves], self._spec)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# --- hooks, which may be there for one call: those by which a network is told of a second time


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For checkpoint, around the call and around its repetition, which finds the hooks that there are now."""
    return nullcontext(), _hooked([(part, name, hooks.copy()) for part, name, hooks in _hooks(block)])


@contextmanager
def _hooked(then: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    now = [(part, name, vars(part)[name]) for part, name, _ in then]
    for part, name, hooks in then:
        vars(part)[name] = hooks
    try:
        yield
    finally:
        for part, name, hooks in now:
            vars(part)[name] = hooks


def _hooks(block: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The hooks inside of a block, where there are any."""
    for part in block.modules():
        if part is not block:
            yield from ((part, name, vars(part)[name]) for name in _HOOKS if vars(part)[name])


def _hides(block: nn.Module) -> bool:
    """Whether a hook brings a tensor that is being differentiated in past the block's border."""
    for _, name, hooks in _hooks(block):
        for hook in hooks.values() if not name.endswith(("kwargs", "called")) else ():
            cells = getattr(hook, "__closure__", None) or ()
            if any(isinstance(c.cell_contents, Tensor) and is_functorch_wrapped_tensor(c.cell_contents) for c in cells):
                return True
    return False
