"""FORMS: how each network of diffusers is called, and where its embedding of the time is. One row a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teachers.networks import diffusers_calls as calls
from teachers.networks.diffusers_calls import Call, Fields, Settings


@dataclass(frozen=True, kw_only=True)
class Form:
    """A class of networks, by its config (`settings`).

    inputs: the keyword arguments of a call; output: what it says as a sample ``[b, *shape]``; fields: what it is
    conditioned on and the shape of each, None for the number of tokens (class: their number); channels: of a sample,
    cut: what its other sizes are multiples of. embedder: the module that embeds the time (``*``: of each block), whose
    last linear layer is `last`; sinusoid: the one before it; inside: what the network multiplies the time by; rounds: a
    module behind a rounding of the time to the weights' precision, which has it as first argument. null_class: the id
    of "no class"; sized: whether it is told the height and width of the picture; square: whether samples have to be;
    refused: what of its config is not read here.
    """

    inputs: Callable[[Call], dict[str, Any]]
    embedder: str
    sinusoid: str
    last: str = "linear_2"
    inside: float = 1.0
    rounds: str | None = None
    output: Callable[[Call, Tensor], Tensor] = calls.as_it_is
    fields: Callable[[Settings], Fields] = calls.no_fields
    channels: Callable[[Settings], int] = calls.in_channels
    cut: Callable[[Settings], tuple[int, ...]] = calls.patches
    null_class: Callable[[Settings], int | None] = calls.no_class
    sized: Callable[[Settings], bool] = calls.never
    square: bool = False
    refused: Callable[[Settings], str | None] = calls.nothing


FORMS: dict[str, Form] = {
    "SD3Transformer2DModel": Form(
        inputs=calls.sd3,
        embedder="time_text_embed.timestep_embedder",
        sinusoid="time_text_embed.time_proj",
        fields=lambda s: {"text": (None, s["joint_attention_dim"]), "pooled": (s["pooled_projection_dim"],)},
    ),
    "FluxTransformer2DModel": Form(
        inputs=calls.flux,
        output=calls.unpacked,
        embedder="time_text_embed.timestep_embedder",
        sinusoid="time_text_embed.time_proj",
        inside=1000.0,
        rounds="time_text_embed",
        channels=calls.packed,
        cut=calls.pairs,
        fields=lambda s: {"text": (None, s["joint_attention_dim"]), "pooled": (s["pooled_projection_dim"],)},
    ),
    "SanaTransformer2DModel": Form(
        inputs=calls.sana,
        output=calls.first_half,
        embedder="time_embed.emb.timestep_embedder",
        sinusoid="time_embed.emb.time_proj",
        fields=calls.masked("caption_channels"),
    ),
    "Lumina2Transformer2DModel": Form(
        inputs=calls.lumina2,
        embedder="time_caption_embed.timestep_embedder",
        sinusoid="time_caption_embed.time_proj",
        fields=calls.masked("cap_feat_dim"),
    ),
    "DiTTransformer2DModel": Form(
        inputs=calls.dit,
        output=calls.first_half,
        embedder="transformer_blocks.*.norm1.emb.timestep_embedder",
        sinusoid="transformer_blocks.0.norm1.emb.time_proj",
        fields=lambda s: {"class": (s["num_embeds_ada_norm"],)},
        null_class=lambda s: int(s["num_embeds_ada_norm"]),
        square=True,
    ),
    "PixArtTransformer2DModel": Form(
        inputs=calls.pixart,
        output=calls.first_half,
        embedder="adaln_single.emb.timestep_embedder",
        sinusoid="adaln_single.emb.time_proj",
        fields=calls.caption,
        sized=calls.pixart_sized,
    ),
    "UNet2DModel": Form(
        inputs=calls.unet,
        embedder="time_embedding",
        sinusoid="time_proj",
        fields=calls.classes,
        cut=calls.halvings,
        refused=calls.other_unet,
    ),
    "UNet2DConditionModel": Form(
        inputs=calls.unet_text,
        embedder="time_embedding",
        sinusoid="time_proj",
        fields=calls.unet_text_fields,
        sized=calls.sdxl,
        cut=calls.halvings,
        refused=calls.other_unet,
    ),
}
