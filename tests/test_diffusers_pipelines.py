"""Folders of diffusers against diffusers' own pipelines: every step of the sampler, under the family's guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_models import module, recorded, said, save, scheduler
from proof import conditioning
from torch import Tensor, nn

from teachers.guidance import guided
from teachers.networks.conventions import Flow
from teachers.networks.converted import Converted
from teachers.networks.diffusers_calls import pack, unpack
from teachers.path import LinearFrom
from teachers.velocity import Rule, Teacher

# of numpy, at diffusers' schedulers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
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


def _sd3(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(transformer=made, scheduler=plan, vae=None, **dict.fromkeys(names))
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


def _told(x: Tensor, pixels: int = 8) -> dict[str, Any]:
    height, width = x.shape[-2:]
    return {"height": pixels * height, "width": pixels * width, "num_inference_steps": STEPS, "output_type": "latent"}


def _flux(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.FluxPipeline(transformer=made, scheduler=plan, vae=None, **dict.fromkeys(names))
    pipe(**_prompts(cond, none), latents=pack(x), guidance_scale=3.5, true_cfg_scale=SCALE, **_told(x))


def _sana(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.SanaPipeline(transformer=made, scheduler=plan, vae=None, text_encoder=None, tokenizer=None)
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, use_resolution_binning=False, negative_prompt=None,
         **_told(x, 32))  # fmt: skip


def _lumina2(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.Lumina2Pipeline(transformer=made, scheduler=plan, vae=None, text_encoder=None, tokenizer=None)
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


def _dit(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.DiTPipeline(transformer=made, vae=_vae(), scheduler=plan)
    pipe(cond["class"].tolist(), SCALE, torch.Generator().manual_seed(0), STEPS, output_type="np")


def _pixart(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    pipe = diffusers.PixArtAlphaPipeline(transformer=made, scheduler=plan, vae=None, text_encoder=None, tokenizer=None)
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, use_resolution_binning=False, negative_prompt=None,
         **_told(x))  # fmt: skip


def _ddim(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    plan.set_timesteps(STEPS)  # the pipeline takes a copy
    diffusers.DDIMPipeline(made, plan)(ROWS, torch.Generator().manual_seed(0), num_inference_steps=STEPS)


def _sd(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = diffusers.StableDiffusionPipeline(
        unet=made, scheduler=plan, vae=None, requires_safety_checker=False, **dict.fromkeys(names)
    )
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


def _sdxl(made: nn.Module, plan: Any, x: Tensor, cond: Cond, none: Cond) -> None:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=made, scheduler=plan, vae=None, add_watermarker=False, **dict.fromkeys(names)
    )
    pipe(**_prompts(cond, none), latents=x, guidance_scale=SCALE, **_told(x))


@dataclass(frozen=True)
class Case:
    """A class of networks, the pipeline that runs it, what differs from `TINY`, the error allowed beside the largest
    number."""

    cls: str
    pipeline: Callable[..., None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 3e-6


_NOISE = {"prediction_type": "epsilon"}
_SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34}
CASES = {
    "sd3": Case("SD3Transformer2DModel", _sd3),
    "flux": Case("FluxTransformer2DModel", _flux),
    "sana": Case("SanaTransformer2DModel", _sana),
    "lumina2": Case("Lumina2Transformer2DModel", _lumina2),
    "dit": Case("DiTTransformer2DModel", _dit),
    "pixart": Case("PixArtTransformer2DModel", _pixart),
    "ddim-noise": Case("UNet2DModel", _ddim),
    "ddim-velocity": Case("UNet2DModel", _ddim, scheduler={"prediction_type": "v_prediction"}),
    "ddim-data": Case("UNet2DModel", _ddim, scheduler={"prediction_type": "sample"}, tolerance=3e-5),
    "ddim-cosine": Case("UNet2DModel", _ddim, scheduler={"beta_schedule": "squaredcos_cap_v2"}),
    # its levels, and points up to 4096 times as large as ours, are float32
    "sd-velocity": Case("UNet2DConditionModel", _sd, tolerance=3e-5),
    "sd-noise": Case("UNet2DConditionModel", _sd, scheduler=_NOISE),
    "sd-zero-snr": Case("UNet2DConditionModel", _sd, scheduler={"rescale_betas_zero_snr": True}, tolerance=1e-4),
    "sdxl": Case("UNet2DConditionModel", _sdxl, _SDXL, _NOISE),
}


def _levels(plan: Any) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Our times of a scheduler's steps, its own samples as points of the linear path."""
    if type(plan).__name__.startswith("FlowMatch"):
        return 1 - plan.sigmas.double(), lambda x, t: x
    if type(plan).__name__ == "EulerDiscreteScheduler":  # x = data + sigma noise
        return 1 / (1 + plan.sigmas.double()), lambda x, t: t.float() * x
    kept = torch.cat([plan.alphas_cumprod[plan.timesteps], plan.final_alpha_cumprod[None]]).double()
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    return alpha / (alpha + sigma), lambda x, t: ((t**2 + (1 - t) ** 2).sqrt()).float() * x


def _euler(teacher: Teacher, x: Tensor, times: Tensor, cond: Cond) -> list[Tensor]:
    path, points = teacher.path, []
    first = path.first if isinstance(path, LinearFrom) else 0.0
    own = (times - first) / (1 - first)
    for now, then in pairwise(own):
        x = x + (then - now).float() * teacher(x, now.clamp(0, 1).expand(len(x)), cond)
        points.append(x)
    return points


def _compared(name: str, folder: Path, change: Callable[[Teacher], Teacher] = lambda teacher: teacher) -> float:
    """The largest difference between the pipeline's samples and those of our Euler steps on the same grid, beside the
    largest number. change: of the teacher."""
    case = CASES[name]
    made, plan = module(case.cls, **case.settings), scheduler(case.cls, **case.scheduler)
    teacher = change(said(case.cls, save(case.cls, folder, made, plan)).load())
    cond, none = conditioning(teacher.space, ROWS) or {}, dict(teacher.null or {})
    x = torch.randn(ROWS, *teacher.space.shape, generator=torch.Generator().manual_seed(0))
    with recorded(plan) as steps:
        case.pipeline(made, plan, x, cond, none)
    if name == "flux":
        steps = [unpack(step, x) for step in steps]
    if name == "dit":
        steps = [step[:ROWS] for step in steps]  # both halves hold the same samples
    times, as_ours = _levels(plan)
    start = x * plan.init_noise_sigma if isinstance(plan, diffusers.EulerDiscreteScheduler) else x
    steer = guided(teacher, SCALE, (0.0, 1.0)) if none else teacher
    theirs = [as_ours(step, t) for step, t in zip(steps, times[1:], strict=True)]
    ours = _euler(steer, as_ours(start, times[0]), times, cond)
    assert len(ours) == STEPS
    off = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(theirs, ours, strict=True))
    print(name, off, max(float(a.abs().max()) for a in theirs))
    return off


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    assert _compared(name, tmp_path) <= CASES[name].tolerance


def _convention(**changed: Any) -> Callable[[Teacher], Teacher]:
    """A teacher whose network is told points and times in another way."""

    def change(teacher: Teacher) -> Teacher:
        network: Any = teacher.network
        seen, inner = (network.convention, network.network) if isinstance(network, Converted) else (Flow(), network)
        return replace(teacher, velocity=Converted(inner, replace(seen, **changed)))

    return change


def _sign(teacher: Teacher) -> Teacher:
    return replace(teacher, velocity=lambda x, t, cond: -teacher(x, t, cond))


def _turned(teacher: Teacher) -> Teacher:
    return replace(teacher, velocity=lambda x, t, cond: teacher(x, 1 - t, cond))


def _rule(**changed: Any) -> Callable[[Teacher], Teacher]:
    return lambda teacher: replace(teacher, rule=Rule(**changed))


def _told_otherwise(**changed: Any) -> Callable[[Teacher], Teacher]:
    def change(teacher: Teacher) -> Teacher:
        inner = teacher.network.network  # type: ignore[union-attr]
        inner.config = replace(inner.config, **changed)
        return teacher

    return change


WRONG: dict[str, tuple[str, Callable[[Teacher], Teacher]]] = {
    "sd3, the other sign": ("sd3", _sign),
    "sd3, time turned": ("sd3", _turned),
    "sd3, time not times 1000": ("sd3", _convention(scale=1.0)),
    "flux, time times 1000 twice": ("flux", _convention(scale=1000.0)),
    "flux, another embedded guidance": ("flux", _told_otherwise(guidance=1.0)),
    "lumina2, as the others": ("lumina2", _convention(noise_time=1)),
    "lumina2, guidance without its norm": ("lumina2", _rule()),
    "lumina2, the norm over squares": ("lumina2", _rule(renorm="token")),
    "dit, guidance on three channels": ("dit", _rule(channels=3)),
    "pixart, another picture": ("pixart", _told_otherwise(pixels=(32, 32))),
    "sd, other levels": ("sd-noise", _convention(betas="linear")),
    "sd, another prediction": ("sd-velocity", _convention(prediction="noise")),
    "sdxl, another picture": ("sdxl", _told_otherwise(pixels=(16, 16))),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_shows(what: str, tmp_path: Path) -> None:
    name, change = WRONG[what]
    assert _compared(name, tmp_path, change) > 1e-2
