"""FORMS: how each network of diffusers is called, and where its embedding of the time is. One row a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Settings = Mapping[str, Any]
Fields = Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Call:
    """One evaluation: samples ``x: [b, *shape]``, the network's own time ``t: [b]``, conditioning by field name."""

    settings: Settings
    x: Tensor
    t: Tensor
    cond: Mapping[str, Tensor]
    guidance: float | None
    pixels: tuple[int, int] | None


def _none(settings: Settings) -> Fields:
    return {}


def _as_it_is(call: Call, said: Tensor) -> Tensor:
    return said


def _patches(settings: Settings) -> tuple[int, ...]:
    return (settings["patch_size"], settings["patch_size"])


def _in_channels(settings: Settings) -> int:
    return int(settings["in_channels"])


def _no_class(settings: Settings) -> int | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Form:
    """A class of networks, by its config (`settings`).

    inputs: the keyword arguments of a call; output: what it says as a sample ``[b, *shape]``; fields: what it is
    conditioned on and the shape of each, None for the number of tokens (class: their number); channels: of a sample,
    cut: what its other sizes are multiples of. embedder: the module that embeds the time (``*``: of each block), whose
    last linear layer is `last`; sinusoid: the one before it; inside: what the network multiplies the time by; rounds: a
    module behind a rounding of the time to the weights' precision, which has it as first argument. null_class: the id
    of "no class".
    """

    inputs: Callable[[Call], dict[str, Any]]
    embedder: str
    sinusoid: str
    last: str = "linear_2"
    inside: float = 1.0
    rounds: str | None = None
    output: Callable[[Call, Tensor], Tensor] = _as_it_is
    fields: Callable[[Settings], Fields] = _none
    channels: Callable[[Settings], int] = _in_channels
    cut: Callable[[Settings], tuple[int, ...]] = _patches
    null_class: Callable[[Settings], int | None] = _no_class


def _sd3(call: Call) -> dict[str, Any]:
    return {
        "hidden_states": call.x,
        "timestep": call.t,
        "encoder_hidden_states": call.cond["text"],
        "pooled_projections": call.cond["pooled"],
    }


FORMS: dict[str, Form] = {
    "SD3Transformer2DModel": Form(
        inputs=_sd3,
        embedder="time_text_embed.timestep_embedder",
        sinusoid="time_text_embed.time_proj",
        fields=lambda s: {"text": (None, s["joint_attention_dim"]), "pooled": (s["pooled_projection_dim"],)},
    ),
}
