"""Derivatives of a flow map along a direction of its arguments, as its objectives ask for them.

    D f = d/da f(p + a d) at a = 0:  Eulerian (p, d) = ((x, s, t), (w, 1, 0)),  Lagrangian ((x, s, t), (0, 0, 1))

`jvp` is forward mode: exact, one forward pass that carries the tangent along. `finite_difference` is for networks with
an operation that has no forward mode. A primal of shape ``[b]`` is a time; where there are several they are in order,
0 <= s <= t <= 1. What each form costs: docs/derivatives.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.errors import InputError
from teachers.path import expand_like
from teachers.space import Cond

if TYPE_CHECKING:
    from distill.flow_map import FlowMap

Method = Literal["jvp", "finite_difference"]
Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]
Tangents = tuple[Tensor | None, ...]

STEP, STEP_DOUBLE = 2e-3, 1e-5  # of finite differences: near the least error in float32 and float64
TOLERANCE = 0.03  # of the self-check: float32 is within 0.004, bfloat16 within 0.02
_DOUBLE_UP_TO = 100_000_000  # parameters; the self-check of a larger network does without a copy in float64


class DerivativeError(InputError):
    """A network that cannot be differentiated as asked: the message names the operation, or the error, and a remedy."""


def derivative(
    f: Function, primals: Tensors, tangents: Tangents, method: Method = "jvp", h: float | None = None
) -> tuple[Tensor, Tensor]:
    """``f(*primals)`` and its derivative along `tangents`, both ``[b, *dims]``; gradients flow through both.

    primals: floating point, each ``[b, *dims]`` or a time ``[b]``; tangents: alike in shape and dtype, None for what
    stands still: a time that costs nothing, but which differences do not pass.
    h: the step of finite differences along the tangents, by default 2e-3, or 1e-5 where f is float64. Their error is
    O(h^2) everywhere: no time leaves [0, 1], and none passes the next but within h / 10 of s = t = 0 and s = t = 1.
    Raises DerivativeError for an operation without forward mode.
    """
    if method == "jvp":
        return _jvp(f, primals, tangents)
    with _exact(primals[0]):
        with _replayed(primals[0]):
            value = f(*primals)
        return value, _difference(f, value, primals, tangents, h)


def stopped(
    f: Function, primals: Tensors, tangents: Tangents, method: Method = "jvp", passes: Literal[1, 2] = 2
) -> tuple[Tensor, Tensor]:
    """As `derivative`, but the derivative carries no gradient.

    passes: with jvp the value comes with the derivative (1), or from a second pass with the same dropout (2): about a
    tenth more time, but the memory of a plain step, and the network may checkpoint its activations by itself.
    """
    if method == "jvp" and passes == 1:
        value, along = _jvp(f, primals, tangents)
        return value, along.detach()
    if method == "jvp":
        with torch.no_grad(), _replayed(primals[0]):
            along = _jvp(f, primals, tangents)[1]
        return f(*primals), along
    with _exact(primals[0]):
        with _replayed(primals[0]):
            value = f(*primals)
        with torch.no_grad():
            return value, _difference(f, value, primals, tangents, None)


def _exact(x: Tensor) -> AbstractContextManager[object]:
    """No mixed precision: a difference in bfloat16 would be noise."""
    return torch.autocast(x.device.type, enabled=False)


def _replayed(x: Tensor) -> AbstractContextManager[None]:
    """What is drawn inside is drawn again after it."""
    if x.device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([x.device], device_type=x.device.type)


# --- forward mode


@contextmanager
def _plain_attention() -> Iterator[None]:
    # fused attention has no forward mode; scaled dot products have a plain form, nn.MultiheadAttention a plain path
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _jvp(f: Function, primals: Tensors, tangents: Tangents) -> tuple[Tensor, Tensor]:
    moving = {i: (primals[i], d) for i, d in enumerate(tangents) if d is not None}

    def of_moving(*values: Tensor) -> Tensor:
        at = dict(zip(moving, values, strict=True))
        return f(*(at.get(i, p) for i, p in enumerate(primals)))

    try:
        with _plain_attention():
            value, along = torch.func.jvp(of_moving, *zip(*moving.values(), strict=True))  # type: ignore[misc]
    except RuntimeError as error:
        for pattern, name, remedy in _NO_FORWARD_MODE:
            if (found := re.search(pattern, str(error))) and not (name == _GROUP_NORM and _fails(f, primals)):
                raise DerivativeError(
                    f"{_where(error, name or found[1])} has no forward-mode derivative: {remedy}; "
                    "or set objective.derivative: finite_difference"
                ) from error
        raise
    return value, along


_GROUP_NORM = "group norm of an input that is not contiguous"
_FUNCTION = "give it the static methods setup_context and jvp, or write it in torch operations"
# what torch says, the operation (None: it is in the message), what to do
_NO_FORWARD_MODE = (
    (r"forward AD with (\S+) that does not support it", None, "replace it by operations that have one"),
    (r"implement the jvp function for custom autograd", "autograd.Function", _FUNCTION),
    (r"override the setup_context staticmethod", "autograd.Function", f"{_FUNCTION} (checkpoint: use_reentrant=False)"),
    (r"in-place operation \((\S+)\) that would mutate", None, "do not change buffers (batch norm: take another norm)"),
    (r"view size is not compatible", _GROUP_NORM, "call x.contiguous() before it"),
)


def _fails(f: Function, primals: Tensors) -> bool:
    try:
        f(*primals)
    except RuntimeError:
        return True
    return False


def _where(error: BaseException, operation: str) -> str:
    """The operation that failed, by the name of its class where it has one, and the innermost module around it."""
    module, trace = "", error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_locals
        if isinstance(cls := names.get("cls"), type) and issubclass(cls, torch.autograd.Function):
            operation = f"autograd.Function {cls.__name__}"
        if isinstance(owner := names.get("self"), nn.Module):
            module = f" (in {type(owner).__name__})"
        trace = trace.tb_next
    return f"{operation}{module}"


# --- finite differences


def _difference(f: Function, value: Tensor, primals: Tensors, tangents: Tangents, h: float | None) -> Tensor:
    """The derivative at 0 of the parabola through `value` at 0 and f at two more points a row."""
    with torch.no_grad():
        a, b = _stencil(primals, tangents, h or (STEP_DOUBLE if value.dtype == torch.float64 else STEP))
    at_a, at_b = (tuple(p if d is None else p + expand_like(c, p) * d for p, d in zip(primals, tangents, strict=True))
                  for c in (a, b))  # fmt: skip
    with _replayed(value):
        to_a = f(*at_a) - value
    to_b = f(*at_b) - value  # takes from the global generator what one call does
    return expand_like(b / (a * (b - a)), value) * to_a - expand_like(a / (b * (b - a)), value) * to_b


def _stencil(primals: Tensors, tangents: Tangents, h: float) -> tuple[Tensor, Tensor]:
    """Two points ``[b]`` along the tangents: (-h, h) or, near where the times must end, (k, 2k) on the side with more
    room, k <= h."""
    times = [(p.double(), torch.zeros_like(p).double() if d is None else d.double())
             for p, d in zip(primals, tangents, strict=True) if p.dim() == 1]  # fmt: skip
    none = torch.full((len(primals[0]),), torch.inf, dtype=torch.float64, device=primals[0].device)
    ends = [pair for p, d in times for pair in ((p, -d), (1 - p, d))]
    order = [(q - p, d - e) for (p, d), (q, e) in pairwise(times)]
    back, forth = _room(ends, none)
    back_in_order, forth_in_order = _room(order, none)
    inner = (torch.minimum(back, back_in_order), torch.minimum(forth, forth_in_order))
    cornered = torch.maximum(*inner) < h / 10
    back, forth = torch.where(cornered, back, inner[0]), torch.where(cornered, forth, inner[1])
    side = torch.where(forth >= back, 1.0, -1.0) * (torch.maximum(back, forth) / 2).clamp(h / 20, h)
    central = torch.minimum(back, forth) >= h
    return torch.where(central, -h, side), torch.where(central, h, 2 * side)


def _room(gaps: Iterable[tuple[Tensor, Tensor]], none: Tensor) -> tuple[Tensor, Tensor]:
    """How far back and forth each row may go until one of the gaps, that close at the given speeds, is closed."""
    back = forth = none
    for gap, closing in gaps:
        reach = gap / closing.abs()
        back = torch.where(closing < 0, torch.minimum(back, reach), back)
        forth = torch.where(closing > 0, torch.minimum(forth, reach), forth)
    return back, forth


# --- the self-check


def check(flow_map: FlowMap, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond, w: Tensor, method: Method = "jvp") -> None:
    """Compares both derivatives of ``flow_map.mean_velocity``, as they will be computed, with central differences.

    ``x_s, w: [b, *dims]``, ``s, t: [b]``; 4 rows are enough. A module is copied, in float64 up to 100M parameters, and
    what is zero in the copy is made small, so that a part which has yet to be trained is checked like the rest; other
    objects are called as they are, with float64. Raises DerivativeError for an operation without forward mode, or a
    derivative that is off by more than 3 %.
    """
    x_s, s, t, w = (v[:4].detach() for v in (x_s, s, t, w))
    trial, reference, dtype = _copies(flow_map)
    # the first step will do, unless float32 inside the network or its frequencies ask for another
    steps = (1e-6, 1e-4, 1e-3) if dtype == torch.float64 else (1e-2, 1e-3, 1e-4)
    exactly = _of(reference, cond, dtype), (x_s.to(dtype), s.double(), t.double())
    still, one = torch.zeros_like(s), torch.ones_like(s)
    directions = {"(w, 1, 0)": (w, one, still), "(0, 0, 1)": (torch.zeros_like(w), still, one)}
    with torch.no_grad(), _replayed(x_s):
        for name, tangents in directions.items():
            found = derivative(_of(trial, cond), (x_s, s, t), tangents, method)[1].double()
            along = (tangents[0].to(dtype), tangents[1].double(), tangents[2].double())
            for h in steps:
                with _exact(x_s):
                    value, slope = derivative(*exactly, along, "finite_difference", h)
                row, error = _error(found, slope.double(), value)
                if error <= TOLERANCE:
                    break
            else:
                raise DerivativeError(_disagreement(name, found[row], slope[row].double(), error, method))


def _copies(flow_map: FlowMap) -> tuple[FlowMap, FlowMap, torch.dtype]:
    """The flow map to try, the one to compare with, and the dtype of the latter."""
    if not isinstance(flow_map, nn.Module):
        return flow_map, flow_map, torch.float64
    trial, generator = deepcopy(flow_map).eval(), torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        if not parameter.any():
            spread = 0.5 / parameter.shape[1:].numel() ** 0.5
            parameter.data.copy_(spread * torch.randn(parameter.shape, generator=generator))
    if sum(parameter.numel() for parameter in trial.parameters()) > _DOUBLE_UP_TO:
        return trial, trial, torch.float32
    return trial, deepcopy(trial).double(), torch.float64


def _of(flow_map: FlowMap, cond: Cond, dtype: torch.dtype | None = None) -> Function:
    if cond is not None:
        cond = {k: v[:4].to(dtype) if v.is_floating_point() else v[:4] for k, v in cond.items()}
    return lambda x, s, t: flow_map.mean_velocity(x, s, t, cond)


def _error(found: Tensor, slope: Tensor, value: Tensor) -> tuple[int, float]:
    """The row of the largest error but one, and that error beside its slope: a single row may be at a singular time.

    Where the slope is next to nothing, the error is taken beside the value.
    """
    off, of_slope, of_value = (v.double().square().flatten(1).mean(1).sqrt() for v in (found - slope, slope, value))
    errors = torch.where(off == 0, 0.0, off / torch.maximum(of_slope, of_value / 10)).nan_to_num(torch.inf)
    row = int(errors.argsort()[len(errors) // 2])
    return row, errors[row].item()


def _disagreement(direction: str, found: Tensor, slope: Tensor, error: float, method: Method) -> str:
    remedy = {
        "jvp": "Something in the network hides its input from forward mode (detach, no_grad, item, numpy, an integer "
        "type) or is an autograd.Function with another jvp: repair it, or set objective.derivative: finite_difference; "
        "or it computes below float32, as with adapters over a teacher of half precision: teacher.placement.dtype",
        "finite_difference": f"The network turns too fast for steps of {STEP} (sinusoids of 1000 t?), or computes "
        "below float32: set objective.derivative: jvp, or lower its frequencies",
    }
    worst = (found - slope).abs().nan_to_num(torch.inf).argmax()
    return (
        f"the {method} derivative of the mean velocity along {direction} in (x, s, t) is "
        f"{found.flatten()[worst].item():.6g} where central differences give {slope.flatten()[worst].item():.6g}: "
        f"an error of {error:.2g} where {TOLERANCE} is allowed. {remedy[method]}"
    )
