"""The pipelines of diffusers, each called with (network, scheduler, noise, conditioning, none)."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from teachers.networks.diffusers_calls import pack

ROWS, STEPS, SCALE = 2, 5, 3.0
Cond = dict[str, Tensor]


def _vae() -> Any:
    return diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2)


def _prompts(cond: Cond, none: Cond) -> dict[str, Any]:
    """Embeddings as pipelines take them."""
    names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "text_mask": "prompt_attention_mask"}
    none = {key: value.expand(ROWS, *value.shape) for key, value in none.items()}
    negative = {"text": "negative_prompt_embeds", "pooled": "negative_pooled_prompt_embeds",
                "text_mask": "negative_prompt_attention_mask"}  # fmt: skip
    return {names[k]: v for k, v in cond.items()} | {negative[k]: v for k, v in none.items()}


def sd3(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(transformer=made, scheduler=plan, vae=None, **dict.fromkeys(names))
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


def _told(x: Tensor, pixels: int = 8) -> dict[str, Any]:
    height, width = x.shape[-2:]
    return {"height": pixels * height, "width": pixels * width, "num_inference_steps": STEPS, "output_type": "latent"}


def flux(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.FluxPipeline(transformer=made, scheduler=plan, vae=None, **dict.fromkeys(names))
    pipe(**_prompts(cond, none), latents=pack(x), guidance_scale=3.5, true_cfg_scale=SCALE, **_told(x))


def sana(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.SanaPipeline(transformer=made, scheduler=plan, vae=None, text_encoder=None, tokenizer=None)
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, use_resolution_binning=False, negative_prompt=None,
         **_told(x, 32))  # fmt: skip


def lumina2(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.Lumina2Pipeline(transformer=made, scheduler=plan, vae=None, text_encoder=None, tokenizer=None)
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


def dit(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.DiTPipeline(transformer=made, vae=_vae(), scheduler=plan)
    pipe(cond["class"].tolist(), SCALE, torch.Generator().manual_seed(0), STEPS, output_type="np")


def pixart(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.PixArtAlphaPipeline(transformer=made, scheduler=plan, vae=None, text_encoder=None, tokenizer=None)
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, use_resolution_binning=False, negative_prompt=None,
         **_told(x))  # fmt: skip


def ddim(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    plan.set_timesteps(STEPS)  # the pipeline takes a copy
    diffusers.DDIMPipeline(made, plan)(ROWS, torch.Generator().manual_seed(0), num_inference_steps=STEPS)


def sd(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = diffusers.StableDiffusionPipeline(
        unet=made, scheduler=plan, vae=None, requires_safety_checker=False, **dict.fromkeys(names)
    )
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


def sdxl(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=made, scheduler=plan, vae=None, add_watermarker=False, **dict.fromkeys(names)
    )
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


class _Unchecked:
    """In place of Cosmos' checker of prompts, a package of its own."""

    def to(self, device: object) -> None:
        """It is nowhere."""


def _piped(name: str, made: nn.Module, plan: Any, parts: tuple[str, ...], **call: Any) -> None:
    """Run the pipeline of this name without encoders and autoencoder."""
    made_of: dict[str, Any] = {"transformer": made, "scheduler": plan}
    made_of |= dict.fromkeys(("vae", "text_encoder", "tokenizer", *parts))
    if "safety_checker" in parts:
        made_of["safety_checker"] = _Unchecked()
    pipe = getattr(diffusers, name)(**made_of)
    if name == "HiDreamImagePipeline":
        pipe.default_sample_size = call["height"] // 8  # it makes every picture as large as its own
    pipe(**call)


def _film(x: Tensor, frames: int, pixels: int) -> dict[str, Any]:
    return {**_told(x, pixels), "num_frames": frames * (x.shape[2] - 1) + 1}


def flux2(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    del none  # it has an embedded scale alone
    _piped("Flux2Pipeline", made, plan, (), prompt_embeds=cond["text"], latents=x, guidance_scale=4.0, **_told(x, 16))


def chroma(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    _piped("ChromaPipeline", made, plan, (), **_prompts(cond, none), latents=pack(x), guidance_scale=SCALE, **_told(x))


def qwen(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    prompts = {k.replace("attention_mask", "embeds_mask"): v for k, v in _prompts(cond, none).items()}
    _piped("QwenImagePipeline", made, plan, (), **prompts, latents=pack(x), true_cfg_scale=SCALE, **_told(x))


def aura_flow(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    masks = {name: torch.ones(ROWS, 5) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    _piped("AuraFlowPipeline", made, plan, (), **_prompts(cond, none), **masks, latents=x, guidance_scale=SCALE,
           **_told(x))  # fmt: skip


def z_image(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond, **more: Any) -> None:
    prompts = [text[mask] for text, mask in zip(cond["text"], cond["text_mask"], strict=True)]
    _piped("ZImagePipeline", made, plan, (), prompt_embeds=prompts, latents=x, guidance_scale=SCALE - 1,
           negative_prompt_embeds=[none["text"][none["text_mask"]]] * ROWS, **_told(x), **more)  # fmt: skip


def hidream(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    empty = {key: value.expand(ROWS, *value.shape) for key, value in none.items()}
    parts = tuple(f"{part}_{i}" for part in ("text_encoder", "tokenizer") for i in (2, 3, 4))
    prompts = {"prompt_embeds_t5": cond["text"], "prompt_embeds_llama3": cond["llama"].transpose(0, 1),
               "pooled_prompt_embeds": cond["pooled"], "negative_prompt_embeds_t5": empty["text"],
               "negative_prompt_embeds_llama3": empty["llama"].transpose(0, 1),
               "negative_pooled_prompt_embeds": empty["pooled"]}  # fmt: skip
    _piped("HiDreamImagePipeline", made, plan, parts, **prompts, latents=x, guidance_scale=SCALE, **_told(x))


def wan(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    _piped("WanPipeline", made, plan, (), **_prompts(cond, none), latents=x, guidance_scale=SCALE, **_film(x, 4, 8))


def ltx(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond, **more: Any) -> None:
    tokens = x.flatten(2).transpose(1, 2)
    _piped("LTXPipeline", made, plan, (), **_prompts(cond, none), latents=tokens, guidance_scale=SCALE,
           frame_rate=25, **_film(x, 8, 32), **more)  # fmt: skip


def hunyuan_video(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    _piped("HunyuanVideoPipeline", made, plan, ("text_encoder_2", "tokenizer_2"), **_prompts(cond, none), latents=x,
           true_cfg_scale=SCALE, guidance_scale=6.0, **_film(x, 4, 8))  # fmt: skip


def cogview4(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    _piped("CogView4Pipeline", made, plan, (), **_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


def prx(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    """Sample by sample: guided, it takes no more."""
    prompts = _prompts(cond, none)
    for row in range(ROWS):
        one = {key: value[row : row + 1] for key, value in prompts.items()}
        _piped("PRXPipeline", made, plan, (), **one, latents=x[row : row + 1], guidance_scale=SCALE,
               use_resolution_binning=False, **_told(x))  # fmt: skip


def mochi(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    _piped("MochiPipeline", made, plan, (), **_prompts(cond, none), latents=x, guidance_scale=SCALE, **_film(x, 6, 8))


def cosmos(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    _piped("Cosmos2TextToImagePipeline", made, plan, ("safety_checker",), **_prompts(cond, none), latents=x,
           guidance_scale=SCALE - 1, **_told(x))  # fmt: skip


def edm(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    """A loop as its schedulers ask for; no pipeline has them and a network without text."""
    plan.set_timesteps(STEPS)
    x = x * plan.init_noise_sigma
    for t in plan.timesteps:
        said = made(plan.scale_model_input(x, t), t).sample
        x = plan.step(said, t, x).prev_sample
