"""As `diffusers_calls`, for networks of films ``[b, c, frames, h, w]`` and the later ones of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teachers.networks.diffusers_calls import Call, Settings, each, grid, guidance, pack, sana, timed


def switched_on(*keys: str) -> Callable[[Settings], str | None]:
    """What of these is on."""
    return lambda settings: next((f"{key} {settings[key]}" for key in keys if settings.get(key)), None)


def from_images(settings: Settings) -> str | None:
    """Networks that make films of images are told of them in further channels or features."""
    told = settings.get("image_dim") or settings.get("img_context_dim_in") or settings.get("controlnet_block_every_n")
    added = settings["in_channels"] - settings["out_channels"]
    return f"an image or more as input ({added} channels, {told})" if told or added else None


def text(call: Call) -> dict[str, Any]:
    return {**timed(call), "encoder_hidden_states": call.cond["text"]}


def flux2(call: Call) -> dict[str, Any]:
    """Every latent is a token, at (0, row, column, 0); a caption's at (0, 0, 0, number)."""
    told = call.cond["text"]
    rows, columns, words = (torch.arange(n, device=call.x.device) for n in (*call.x.shape[-2:], told.shape[1]))
    zero = torch.zeros(1, dtype=torch.long, device=call.x.device)
    return {
        "hidden_states": call.x.flatten(2).transpose(1, 2),
        "timestep": call.t,
        "guidance": guidance(call),
        "encoder_hidden_states": told,
        "img_ids": torch.cartesian_prod(zero, rows, columns, zero),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, words),
    }


def as_image(call: Call, said: Tensor) -> Tensor:
    """Tokens in the order of pixels -> the sample."""
    return said.transpose(1, 2).unflatten(2, call.x.shape[2:])


def pixels(settings: Settings) -> tuple[int, ...]:
    return (1, 1)


def chroma(call: Call) -> dict[str, Any]:
    # a mask that leaves tokens out, as it was trained; that of its pipeline adds 0 or 1 and masks nothing
    told, mask = call.cond["text"], call.cond["text_mask"].bool()
    tokens = pack(call.x)
    return {
        "hidden_states": tokens,
        "timestep": call.t.to(call.x.dtype),
        "encoder_hidden_states": told,
        "img_ids": grid(call.x, 3),
        "txt_ids": told.new_zeros(told.shape[1], 3),
        "attention_mask": torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
    }


def qwen(call: Call) -> dict[str, Any]:
    height, width = call.x.shape[-2:]
    return {
        "hidden_states": pack(call.x),
        "timestep": call.t,
        "encoder_hidden_states": call.cond["text"],
        "encoder_hidden_states_mask": call.cond["text_mask"].bool(),
        "img_shapes": [[(1, height // 2, width // 2)]] * len(call.x),
    }


def z_image(call: Call) -> dict[str, Any]:
    """One of each in a list; captions without what is masked."""
    kept = zip(call.cond["text"], call.cond["text_mask"].bool(), strict=True)
    return {
        "x": list(call.x[:, :, None].unbind()),
        "t": call.t,
        "cap_feats": [told[mask] for told, mask in kept],
    }


def of_list(call: Call, said: Any) -> Tensor:
    return torch.stack(list(said))[:, :, 0]


def hidream(call: Call) -> dict[str, Any]:
    """llama: the states of its layers, ``[b, layers, tokens, width]``, in the order of the config."""
    layers = dict(zip(call.settings["llama_layers"], call.cond["llama"].unbind(1), strict=True))
    return {
        "hidden_states": call.x,
        "timesteps": call.t,
        "encoder_hidden_states_t5": call.cond["text"],
        "encoder_hidden_states_llama3": layers,
        "pooled_embeds": call.cond["pooled"],
    }


def negative(call: Call, said: Tensor) -> Tensor:
    """Of one that says data - noise at a time that runs to the noise."""
    return -said


def ltx(call: Call) -> dict[str, Any]:
    frames, height, width = call.x.shape[2:]
    assert call.frame_rate is not None
    return {
        **sana(call),
        "hidden_states": call.x.flatten(2).transpose(1, 2),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / call.frame_rate, 32, 32),  # of its autoencoder
    }


def hunyuan_video(call: Call) -> dict[str, Any]:
    scale = guidance(call)
    return {
        **text(call),
        "encoder_attention_mask": call.cond["text_mask"].bool(),
        "pooled_projections": call.cond["pooled"],
        "guidance": None if scale is None else 1000 * scale,
    }


def cogview4(call: Call) -> dict[str, Any]:
    assert call.pixels is not None
    size = each(call.x, *call.pixels)
    return {**text(call), "original_size": size, "target_size": size, "crop_coords": each(call.x, 0, 0)}


def prx(call: Call) -> dict[str, Any]:
    return {**text(call), "attention_mask": call.cond["text_mask"].bool()}


def mochi(call: Call) -> dict[str, Any]:
    return {**text(call), "encoder_attention_mask": call.cond["text_mask"].bool()}


def cosmos(call: Call) -> dict[str, Any]:
    """No part of a sample is padding: a channel of zeros says so, added here (see `unpadded`)."""
    x = call.x
    if call.settings["concat_padding_mask"]:
        x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    return {**text(call), "hidden_states": x}


def unpadded(module: Any) -> None:
    """Its own way of adding that channel takes torchvision."""
    module.register_to_config(concat_padding_mask=False)
