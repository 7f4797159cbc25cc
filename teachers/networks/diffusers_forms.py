"""FORMS: how each network of diffusers is called, and where its embedding of the time is. One row a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teachers.networks import diffusers_calls as calls
from teachers.networks import diffusers_films as films
from teachers.networks.diffusers_calls import Call, Fields, Settings


@dataclass(frozen=True, kw_only=True)
class Form:
    """A class of networks, by its config (`settings`).

    inputs: the keyword arguments of a call; output: what it says as a sample ``[b, *shape]``; fields: what it is
    conditioned on and the shape of each, None for the number of tokens (class: their number); channels: of a sample,
    cut: what its other sizes are multiples of. embedder: the module that embeds the time (``*``: of each block), whose
    last linear layer is `last` (None: it is a linear layer itself, which sees more); sinusoid: the module before it, if
    it is one; highest: radians a unit time of its fastest sinusoid; rounds: None, or what the time is multiplied by
    where the network rounds it to the weights' precision before the sinusoid. null_class: the id of "no class"; sized:
    whether it is told the height and width of the picture; filmed: the rate of the frames; square: whether samples have
    to be; refused: what of its config is not read here; prepare: what is changed in the module before it is called.
    """

    inputs: Callable[[Call], dict[str, Any]]
    embedder: str
    sinusoid: str | None = None
    last: str | None = "linear_2"
    highest: float = 1.0
    rounds: float | None = None
    output: Callable[[Call, Tensor], Tensor] = calls.as_it_is
    fields: Callable[[Settings], Fields] = calls.no_fields
    channels: Callable[[Settings], int] = calls.in_channels
    cut: Callable[[Settings], tuple[int, ...]] = calls.patches
    null_class: Callable[[Settings], int | None] = calls.no_class
    sized: Callable[[Settings], bool] = calls.never
    filmed: bool = False
    square: bool = False
    refused: Callable[[Settings], str | None] = calls.nothing
    prepare: Callable[[Any], None] | None = None


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
        highest=1000.0,
        rounds=1000.0,
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
        refused=films.switched_on("guidance_embeds"),
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
    "Flux2Transformer2DModel": Form(
        inputs=films.flux2,
        output=films.as_image,
        embedder="time_guidance_embed.timestep_embedder",
        sinusoid="time_guidance_embed.time_proj",
        highest=1000.0,
        rounds=1000.0,
        fields=lambda s: {"text": (None, s["joint_attention_dim"])},
        cut=films.pixels,
    ),
    "ChromaTransformer2DModel": Form(
        inputs=films.chroma,
        output=calls.unpacked,
        embedder="distilled_guidance_layer.in_proj",
        sinusoid="time_text_embed.time_proj",
        last=None,
        highest=1000.0,
        channels=calls.packed,
        cut=calls.pairs,
        fields=calls.masked("joint_attention_dim"),
    ),
    "QwenImageTransformer2DModel": Form(
        inputs=films.qwen,
        output=calls.unpacked,
        embedder="time_text_embed.timestep_embedder",
        sinusoid="time_text_embed.time_proj",
        highest=1000.0,
        rounds=1.0,
        channels=calls.packed,
        cut=calls.pairs,
        fields=calls.masked("joint_attention_dim"),
        refused=films.switched_on("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
    ),
    "AuraFlowTransformer2DModel": Form(
        inputs=films.text,
        embedder="time_step_proj",
        sinusoid="time_step_embed",
        highest=1000.0,
        fields=lambda s: {"text": (None, s["joint_attention_dim"])},
    ),
    "ZImageTransformer2DModel": Form(
        inputs=films.z_image,
        output=films.of_list,
        embedder="t_embedder.mlp",
        last="2",
        highest=1000.0,
        cut=calls.pairs,
        fields=calls.masked("cap_feat_dim"),
        refused=films.switched_on("siglip_feat_dim"),
    ),
    "HiDreamImageTransformer2DModel": Form(
        inputs=films.hidream,
        output=films.negative,
        embedder="t_embedder.timestep_embedder",
        sinusoid="t_embedder.time_proj",
        fields=lambda s: {
            "text": (None, s["caption_channels"][0]),
            "llama": (len(s["llama_layers"]), None, s["caption_channels"][1]),
            "pooled": (s["text_emb_dim"],),
        },
    ),
    "WanTransformer3DModel": Form(
        inputs=films.text,
        embedder="condition_embedder.time_embedder",
        sinusoid="condition_embedder.timesteps_proj",
        fields=lambda s: {"text": (None, s["text_dim"])},
        cut=lambda s: tuple(s["patch_size"]),
        refused=films.from_images,
    ),
    "LTXVideoTransformer3DModel": Form(
        inputs=films.ltx,
        output=films.as_image,
        embedder="time_embed.emb.timestep_embedder",
        sinusoid="time_embed.emb.time_proj",
        fields=calls.masked("caption_channels"),
        cut=lambda s: (s["patch_size_t"], s["patch_size"], s["patch_size"]),
        filmed=True,
    ),
    "HunyuanVideoTransformer3DModel": Form(
        inputs=films.hunyuan_video,
        embedder="time_text_embed.timestep_embedder",
        sinusoid="time_text_embed.time_proj",
        fields=lambda s: {**calls.masked("text_embed_dim")(s), "pooled": (s["pooled_projection_dim"],)},
        cut=lambda s: (s["patch_size_t"], s["patch_size"], s["patch_size"]),
        refused=films.switched_on("image_condition_type"),
    ),
    "CogView4Transformer2DModel": Form(
        inputs=films.cogview4,
        embedder="time_condition_embed.timestep_embedder",
        sinusoid="time_condition_embed.time_proj",
        fields=lambda s: {"text": (None, s["text_embed_dim"])},
        sized=lambda s: True,
    ),
    "PRXTransformer2DModel": Form(
        inputs=films.prx,
        embedder="time_in",
        last="out_layer",
        highest=1000.0,
        fields=calls.masked("context_in_dim"),
    ),
    "MochiTransformer3DModel": Form(
        inputs=films.mochi,
        embedder="time_embed.timestep_embedder",
        sinusoid="time_embed.time_proj",
        fields=calls.masked("text_embed_dim"),
        cut=lambda s: (1, s["patch_size"], s["patch_size"]),
    ),
    "CosmosTransformer3DModel": Form(
        inputs=films.cosmos,
        embedder="time_embed.t_embedder",
        sinusoid="time_embed.time_proj",
        fields=lambda s: {"text": (None, s["text_embed_dim"])},
        channels=lambda s: int(s["out_channels"]),
        cut=lambda s: tuple(s["patch_size"]),
        refused=films.from_images,
        prepare=films.unpadded,
    ),
}
