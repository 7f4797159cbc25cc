"""A teacher from Python: any torch module that predicts a velocity, noise, data or a score, its convention declared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from teachers.adapters.base import InDtype
from teachers.errors import InputError
from teachers.networks import AnyConfig, to_entry
from teachers.networks.convention import Convention
from teachers.networks.conventions import ConventionConfig, Flow
from teachers.networks.converted import Converted, ConvertedConfig
from teachers.networks.own import Own, OwnConfig, class_of
from teachers.space import DataSpace
from teachers.velocity import Teacher


def from_module(
    module: nn.Module,
    space: DataSpace,
    convention: ConventionConfig | None = None,
    *,
    second_time: str | None = None,
    null: Mapping[str, Tensor] | None = None,
    licence: str = "unknown",
    name: str | None = None,
) -> Teacher:
    """The teacher that a module is: ``module(x, t)``, of classes ``module(x, t, y)``, of embeddings ``module(x, t,
    cond)`` -> ``[b, *shape]``. The module is frozen and put into eval mode, in place.

    convention: what it is fed and what it predicts, by default our own: t = 0 is noise, t = 1 data, on the linear path,
    and the velocity x_1 - x_0. ``Flow(noise_time=1)`` has time and sign the other way round, ``Discrete()`` is a
    diffusion of 1000 levels that predicts the noise; see `teachers.networks.conventions`. second_time: the name of the
    part whose output ``[b, width]`` embeds the time, as ``named_modules()`` shows it; with it a student can start from
    the module, without it only from a network of its own. null: one row of conditioning that means "none", if the
    module was trained with one (``space.null`` for the class id after the last): a tensor for each field of the space,
    the class int64. The module is called, to see that all this holds; in half precision it is given times in float32,
    if it takes them. Raises InputError that says what does not hold.
    """
    convention = Flow() if convention is None else convention
    _check(module, convention, null, space)
    module.eval().requires_grad_(False)
    own = _tried(module, space, second_time, null)
    config = OwnConfig(of=class_of(module), place=own.place, width=own.width, null_class=null is not None)
    network: Own | Converted = own
    entry: AnyConfig = config
    if convention != Flow():
        network, entry = Converted(own, convention), ConvertedConfig(network=config, convention=convention)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    return Teacher(
        velocity=network.eval() if dtype == torch.float32 else InDtype(network.eval()),
        space=space,
        path=convention.path,
        network=network if second_time else None,
        network_config=to_entry(entry) if second_time else None,
        null=null,
        info={"id": name or class_of(module), "family": "own", "digest": _digest(module), "licence": licence},
    )


def _check(module: object, convention: object, null: object, space: DataSpace) -> None:
    """Raises InputError for what is no module, no convention, or no null."""
    if not isinstance(module, nn.Module):
        raise InputError(f"module must be a torch.nn.Module, got a {type(module).__name__}: wrap what it is in one")
    if not isinstance(convention, Convention):
        raise InputError(f"convention must be one, as teachers.Flow(noise_time=1) or Discrete(), got {convention!r}")
    if null is not None:
        _check_null(null, space)


def _check_null(null: object, space: DataSpace) -> None:
    """Raises InputError for what is not one row of a space's conditioning."""
    wanted = {e.name: f"torch.{e.dtype} {list(e.shape)}" for e in space.embeddings}
    if space.classes is not None:
        wanted["class"] = "torch.int64 []"
    if not wanted:
        raise InputError(f"null: samples of this space ({space}) are conditioned on nothing: leave it out")
    given = dict(null) if isinstance(null, Mapping) else null
    found: object = null
    if isinstance(given, dict):
        found = {k: f"{v.dtype} {list(v.shape)}" if isinstance(v, Tensor) else repr(v) for k, v in given.items()}
    if found != wanted:
        raise InputError(
            f"null must be one row of conditioning, a tensor for each field, without a batch dimension: {_list(wanted)}"
            f"; got {_list(found)}"
        )


def _list(fields: object) -> str:
    if not isinstance(fields, dict):
        return repr(fields)
    return ", ".join(f"{name!r} {what}" for name, what in sorted(fields.items(), key=str)) or "no fields"


def _tried(module: nn.Module, space: DataSpace, place: str | None, null: Mapping[str, Tensor] | None) -> Own:
    """The module as a network, after a call of it, which shows how wide the output of the part in `place` is."""
    parts, seen = dict(module.named_modules()), list[Any]()
    if place is not None and (not place or place not in parts):
        there = ", ".join(name for name in parts if name and "." not in name)
        raise InputError(f"second_time: {type(module).__name__} has no part {place!r}; it has {there or 'no parts'}")
    one = next(module.parameters(), torch.zeros(()))
    x = torch.zeros(2, *space.shape, device=one.device, dtype=one.dtype)
    dtypes = {"float32": x.dtype, "bool": torch.bool}
    cond = {e.name: torch.ones(2, *e.shape, dtype=dtypes[e.dtype], device=x.device) for e in space.embeddings}
    if space.classes is not None:
        cond["class"] = torch.zeros(2, dtype=torch.int64, device=x.device)
    handles = [parts[place].register_forward_hook(lambda part, given, out: seen.append(out))] if place else []
    own = Own(module, space, place or "", 0)
    try:
        _call(own, x, cond)
        if null is not None:
            none = {k: v.to(cond[k]).expand_as(cond[k]) for k, v in null.items()}
            _call(own, x, none, f", {'cond' if space.embeddings else 'y'} of null")
    finally:
        for handle in handles:
            handle.remove()
    if place is None:
        return own
    given = seen[-1] if seen else None
    if not isinstance(given, Tensor) or given.dim() != 2 or len(given) != 2:
        got = "is not called" if not seen else f"gives {list(given.shape) if isinstance(given, Tensor) else '?'}"
        raise InputError(f"second_time: the part {place!r} {got}; it must give the embedding of the time, [b, width]")
    own.width = given.shape[1]
    return own


def _call(own: Own, x: Tensor, cond: Mapping[str, Tensor], more: str = "") -> None:
    """Raises InputError if the module cannot be called, or answers another shape than x. more: what it is given."""
    name = type(own.module).__name__
    try:
        with torch.no_grad():
            said: object = own(x, x.new_full((2,), 0.5, dtype=torch.float64), cond or None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the module itself raises
        conditioned = "x, t" if not cond else "x, t, cond" if own.space.embeddings else "x, t, y"
        raise InputError(
            f"{name} cannot be called as module({conditioned}) with x {list(x.shape)}, t [2]{more}: "
            f"{type(error).__name__}: {error}; wrap it in a module that can"
        ) from error
    if not isinstance(said, Tensor) or said.shape != x.shape:
        got = list(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise InputError(f"{name} answers {got} for x {list(x.shape)}{more}: it must answer its shape")


def _digest(module: nn.Module) -> str:
    """Of the names and values of the weights."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            found.update(plain.numpy().tobytes())
    return found.hexdigest()
