"""Small random networks of diffusers in its own folders, and its own pipelines as what they must agree with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils import logging
from families import weights
from proof import conditioning
from safetensors.torch import save_file
from torch import Tensor, nn

from teachers.adapters.diffusers import Diffusers

logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True)
class Tiny:
    """A class in small. settings: its arguments; scheduler: class and arguments; said: what the recipe says; vae: what
    the config of its autoencoder says; part: its folder."""

    settings: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]]
    said: Mapping[str, Any]
    vae: Mapping[str, Any]
    part: str


_DDIM = ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1})
_STABLE = (
    "EulerDiscreteScheduler",
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
     "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
)  # fmt: skip
_UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
         "sample_size": 4, "dropout": 0.3}  # fmt: skip
_TOKENS = {"tokens": 5}
_DYNAMIC = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})
_WAN_VAE = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]}


def _tiny(
    scheduler: tuple[str, Mapping[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    said: Mapping[str, Any] = _TOKENS,
    vae: Mapping[str, Any] | None = None,
    part: str = "transformer",
    **settings: Any,
) -> Tiny:
    vae = {"scaling_factor": 0.5, "shift_factor": 0.1, "block_out_channels": [4] * 4} if vae is None else vae
    return Tiny(settings, scheduler, said, vae, part)


# fmt: off
TINY: dict[str, Tiny] = {
    "SD3Transformer2DModel": _tiny(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    ),
    "FluxTransformer2DModel": _tiny(
        scheduler=_DYNAMIC, said={"tokens": 5, "size": (4, 6), "embedded_guidance": 3.5},
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ),
    "SanaTransformer2DModel": _tiny(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=4, dropout=0.3,
    ),
    "Lumina2Transformer2DModel": _tiny(
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 6.0}),
        sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(20, 8, 8), cap_feat_dim=12,
    ),
    "DiTTransformer2DModel": _tiny(
        scheduler=_DDIM, said={},
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        norm_num_groups=4, dropout=0.3,
    ),
    "PixArtTransformer2DModel": _tiny(
        scheduler=_DDIM, said={"tokens": 5, "size": (4, 6)},
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=128,
        norm_num_groups=4, cross_attention_dim=24, caption_channels=12,
    ),
    "UNet2DModel": _tiny(
        scheduler=_DDIM, said={}, vae={}, part="unet",
        in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **_UNET,
    ),
    "UNet2DConditionModel": _tiny(
        scheduler=_STABLE, part="unet",
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, **_UNET,
    ),
    "Flux2Transformer2DModel": _tiny(
        scheduler=_DYNAMIC, said={"tokens": 5, "size": (2, 3), "embedded_guidance": 4.0},
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(2, 2, 2, 2),
    ),
    "ChromaTransformer2DModel": _tiny(
        said={"tokens": 5, "size": (4, 6)},
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4), approximator_num_channels=16, approximator_hidden_dim=12,
        approximator_layers=1,
    ),
    "QwenImageTransformer2DModel": _tiny(
        scheduler=("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
        said={"tokens": 5, "size": (4, 6)}, vae=_WAN_VAE,
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    ),
    "AuraFlowTransformer2DModel": _tiny(
        sample_size=4, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pos_embed_max_size=16,
    ),
    "ZImageTransformer2DModel": _tiny(
        said={"tokens": 5, "size": (4, 6)},
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=(4, 4, 4), axes_lens=(64, 16, 16),
    ),
    "HiDreamImageTransformer2DModel": _tiny(
        said={"tokens": 5, "size": (4, 4)},
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=(12, 10), text_emb_dim=6, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(4, 4), llama_layers=(0, 1),
    ),
    "WanTransformer3DModel": _tiny(
        said={"tokens": 5, "size": (2, 4, 6)}, vae=_WAN_VAE,
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=16,
    ),
    "LTXVideoTransformer3DModel": _tiny(
        scheduler=("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.1}),
        said={"tokens": 5, "size": (2, 2, 3), "frame_rate": 25.0}, vae=_WAN_VAE,
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=12,
    ),
    "HunyuanVideoTransformer3DModel": _tiny(
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
        said={"tokens": 5, "size": (2, 4, 6), "embedded_guidance": 6.0}, vae={"scaling_factor": 0.476986},
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=12, pooled_projection_dim=10,
        rope_axes_dim=(2, 2, 4),
    ),
    "CogView4Transformer2DModel": _tiny(
        scheduler=("FlowMatchEulerDiscreteScheduler", {
            "use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear",
        }),
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=12,
        time_embed_dim=12, condition_dim=4, pos_embed_max_size=8, sample_size=4, rope_axes_dim=(8, 8),
    ),
    "PRXTransformer2DModel": _tiny(
        said={"tokens": 5, "size": (4, 6)},
        in_channels=4, patch_size=2, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=(4, 4),
    ),
    "MochiTransformer3DModel": _tiny(
        scheduler=("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        said={"tokens": 5, "size": (2, 4, 6)}, vae={**_WAN_VAE, "scaling_factor": 0.5},
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=12,
        in_channels=4, text_embed_dim=16, time_embed_dim=4,
    ),
    "CosmosTransformer3DModel": _tiny(
        scheduler=("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        said={"tokens": 5, "size": (1, 4, 6)}, vae=_WAN_VAE,
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2.0,
        text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 8, 8),
        extra_pos_embed_type=None,
    ),
}
# fmt: on


def module(name: str, **settings: Any) -> nn.Module:
    """A class of `TINY` with weights that depend on their names alone, in eval mode."""
    made = getattr(diffusers, name)(**{**TINY[name].settings, **settings}).eval()
    state = made.state_dict()
    made.load_state_dict(weights({key: value.shape for key, value in state.items()}))
    return made.requires_grad_(False)


def scheduler(name: str, **more: Any) -> Any:
    """The scheduler of a class of `TINY`."""
    cls, arguments = TINY[name].scheduler
    if "class" in more:
        cls, arguments = more.pop("class"), {}
    return getattr(diffusers, cls)(**{**arguments, **more})


def save(name: str, folder: Path, made: nn.Module, plan: Any) -> Path:
    """What a pipeline of these two saves, of the autoencoder its config alone."""
    tiny = TINY[name]
    made.save_pretrained(folder / tiny.part)
    plan.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "AnyPipeline"}))
    if tiny.vae:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **tiny.vae}))
    return folder


def said(name: str, folder: Path, **more: Any) -> Diffusers:
    """The recipe's part for it, with the embedding of an empty prompt where it has text."""
    config = Diffusers(path=str(folder), **{**TINY[name].said, **more})
    space = config.outline().space
    if not space.embeddings:
        return config
    row = {key: value[0] for key, value in (conditioning(space, 1, seed=9) or {}).items()}
    save_file({key: value.contiguous() for key, value in row.items() if key != "class"}, folder / "empty.safetensors")
    return Diffusers(path=str(folder), null=str(folder / "empty.safetensors"), **{**TINY[name].said, **more})


@contextmanager
def recorded(plan: Any) -> Iterator[list[Tensor]]:
    """The samples that the steps of a scheduler, or of its copies, give."""
    steps: list[Tensor] = []
    cls = type(plan)
    step = cls.step

    def record(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        steps.append((found[0] if isinstance(found, tuple) else found.prev_sample).clone())
        return found

    cls.step = record
    try:
        yield steps
    finally:
        cls.step = step
