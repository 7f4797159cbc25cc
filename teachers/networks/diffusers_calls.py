"""What each network of diffusers is given, and what its config says of it: the entries of FORMS are made of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
    frame_rate: float | None


def no_fields(settings: Settings) -> Fields:
    return {}


def as_it_is(call: Call, said: Tensor) -> Tensor:
    return said


def patches(settings: Settings) -> tuple[int, ...]:
    return (settings["patch_size"], settings["patch_size"])


def in_channels(settings: Settings) -> int:
    return int(settings["in_channels"])


def no_class(settings: Settings) -> int | None:
    return None


def never(settings: Settings) -> bool:
    return False


def nothing(settings: Settings) -> str | None:
    return None


def sd3(call: Call) -> dict[str, Any]:
    return {**timed(call), "encoder_hidden_states": call.cond["text"], "pooled_projections": call.cond["pooled"]}


def timed(call: Call) -> dict[str, Any]:
    return {"hidden_states": call.x, "timestep": call.t}


def first_half(call: Call, said: Tensor) -> Tensor:
    """Without the variance that some predict beside."""
    return said[:, : call.x.shape[1]]


# --- packed: each square of 2 x 2 latents is a token


def pack(x: Tensor) -> Tensor:
    """``[b, c, h, w]`` -> ``[b, (h / 2) (w / 2), 4 c]``, channels before the pixels of a square."""
    x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse, of the shape of `like`."""
    rows, columns = like.shape[-2] // 2, like.shape[-1] // 2
    x = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def packed(settings: Settings) -> int:
    return int(settings["in_channels"]) // 4


def pairs(settings: Settings) -> tuple[int, ...]:
    return (2, 2)


def grid(x: Tensor, columns: int) -> Tensor:
    """Positions of the tokens of ``x: [b, c, h, w]``: 0, row, column, and zeros up to `columns` numbers."""
    row, column = torch.meshgrid(
        torch.arange(x.shape[-2] // 2, device=x.device), torch.arange(x.shape[-1] // 2, device=x.device), indexing="ij"
    )
    zero = torch.zeros_like(row)
    return torch.stack([zero, row, column, *[zero] * (columns - 3)], dim=-1).flatten(0, 1).to(x.dtype)


def flux(call: Call) -> dict[str, Any]:
    text = call.cond["text"]
    return {
        "hidden_states": pack(call.x),
        "timestep": call.t,
        "guidance": guidance(call),
        "encoder_hidden_states": text,
        "pooled_projections": call.cond["pooled"],
        "img_ids": grid(call.x, 3),
        "txt_ids": text.new_zeros(text.shape[1], 3),
    }


def guidance(call: Call) -> Tensor | None:
    return None if call.guidance is None else torch.full_like(call.t, call.guidance)


def unpacked(call: Call, said: Tensor) -> Tensor:
    return unpack(said, call.x)


# --- text with a mask


def sana(call: Call) -> dict[str, Any]:
    mask = call.cond["text_mask"].to(call.x.dtype)
    return {**timed(call), "encoder_hidden_states": call.cond["text"], "encoder_attention_mask": mask}


def lumina2(call: Call) -> dict[str, Any]:
    mask = call.cond["text_mask"].bool()
    return {**timed(call), "encoder_hidden_states": call.cond["text"], "encoder_attention_mask": mask}


def masked(key: str) -> Callable[[Settings], Fields]:
    return lambda s: {"text": (None, s[key]), "text_mask": (None,)}


def pixart(call: Call) -> dict[str, Any]:
    told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if call.pixels is not None:
        height, width = call.pixels
        told = {"resolution": each(call.x, height, width), "aspect_ratio": each(call.x, height / width)}
    return {**sana(call), "added_cond_kwargs": told}


def each(x: Tensor, *numbers: float) -> Tensor:
    """The numbers for every sample, ``[b, count]``."""
    return x.new_tensor(numbers).expand(len(x), -1)


def pixart_sized(settings: Settings) -> bool:
    more = settings["use_additional_conditions"]
    return bool(settings["sample_size"] == 128 if more is None else more)


def caption(settings: Settings) -> Fields:
    return masked("cross_attention_dim" if settings["caption_channels"] is None else "caption_channels")(settings)


# --- diffusions of images


def dit(call: Call) -> dict[str, Any]:
    return {**timed(call), "class_labels": call.cond["class"]}


def unet(call: Call) -> dict[str, Any]:
    return {"sample": call.x, "timestep": call.t, "class_labels": call.cond.get("class")}


def unet_text(call: Call) -> dict[str, Any]:
    more = None
    if call.pixels is not None:
        sizes = each(call.x, *call.pixels, 0, 0, *call.pixels)
        more = {"text_embeds": call.cond["pooled"], "time_ids": sizes}
    return {**unet(call), "encoder_hidden_states": call.cond["text"], "added_cond_kwargs": more}


def classes(settings: Settings) -> Fields:
    count = settings["num_class_embeds"]
    return {} if count is None else {"class": (count,)}


def unet_text_fields(settings: Settings) -> Fields:
    width = settings["encoder_hid_dim"] or settings["cross_attention_dim"]
    fields: dict[str, tuple[int | None, ...]] = {"text": (None, width if isinstance(width, int) else width[0])}
    if sdxl(settings):
        told = 6 * settings["addition_time_embed_dim"]
        fields["pooled"] = (settings["projection_class_embeddings_input_dim"] - told,)
    return {**fields, **classes(settings)}


def sdxl(settings: Settings) -> bool:
    return bool(settings["addition_embed_type"] == "text_time")


def halvings(settings: Settings) -> tuple[int, ...]:
    by = 2 ** (len(settings["block_out_channels"]) - 1)
    return (by, by)


def other_unet(settings: Settings) -> str | None:
    read = {
        "time_embedding_type": ("positional",),
        "class_embed_type": (None,),
        "addition_embed_type": (None, "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "out_channels": (settings["in_channels"],),
    }
    return next((f"{key} {settings[key]}" for key, allowed in read.items() if settings.get(key) not in allowed), None)
