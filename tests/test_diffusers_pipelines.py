"""Folders of diffusers against diffusers' own pipelines: every step of the sampler, under the family's guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers_pipelines as pipelines
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from diffusers_models import module, recorded, said, save, scheduler
from diffusers_pipelines import ROWS, SCALE, STEPS, Cond
from proof import conditioning
from torch import Tensor

from teachers.guidance import guided
from teachers.networks.conventions import Flow
from teachers.networks.converted import Converted
from teachers.networks.diffusers_calls import unpack
from teachers.path import LinearFrom
from teachers.velocity import Rule, Teacher

# of diffusers itself: at its schedulers, Chroma's network, Mochi's
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:.LoraLoaderMixin. is deprecated:FutureWarning"),
]


@dataclass(frozen=True)
class Case:
    """A class of networks, the pipeline that runs it, what differs from `TINY` (said: in the recipe), the error
    allowed beside the largest number."""

    cls: str
    pipeline: Callable[..., None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 3e-6


_EDM = {"class": "EDMEulerScheduler"}
_NOISE = {"prediction_type": "epsilon"}
_SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34}
CASES = {
    "sd3": Case("SD3Transformer2DModel", pipelines.sd3),
    "flux": Case("FluxTransformer2DModel", pipelines.flux),
    "sana": Case("SanaTransformer2DModel", pipelines.sana),
    "lumina2": Case("Lumina2Transformer2DModel", pipelines.lumina2),
    "dit": Case("DiTTransformer2DModel", pipelines.dit),
    "pixart": Case("PixArtTransformer2DModel", pipelines.pixart),
    "ddim-noise": Case("UNet2DModel", pipelines.ddim),
    "ddim-velocity": Case("UNet2DModel", pipelines.ddim, scheduler={"prediction_type": "v_prediction"}),
    "ddim-data": Case("UNet2DModel", pipelines.ddim, scheduler={"prediction_type": "sample"}, tolerance=3e-5),
    "ddim-cosine": Case("UNet2DModel", pipelines.ddim, scheduler={"beta_schedule": "squaredcos_cap_v2"}),
    # its levels, and points up to 4096 times as large as ours, are float32
    "sd-velocity": Case("UNet2DConditionModel", pipelines.sd, tolerance=3e-5),
    "sd-noise": Case("UNet2DConditionModel", pipelines.sd, scheduler=_NOISE),
    "sd-zero-snr": Case(
        "UNet2DConditionModel", pipelines.sd, scheduler={"rescale_betas_zero_snr": True}, tolerance=1e-4
    ),
    "sdxl": Case("UNet2DConditionModel", pipelines.sdxl, _SDXL, scheduler=_NOISE),
    "edm": Case("UNet2DModel", pipelines.edm, scheduler=_EDM),
    "edm-velocity": Case("UNet2DModel", pipelines.edm, scheduler={**_EDM, "prediction_type": "v_prediction"}),
    "flux2": Case("Flux2Transformer2DModel", pipelines.flux2),
    "chroma": Case("ChromaTransformer2DModel", pipelines.chroma),
    "qwen": Case("QwenImageTransformer2DModel", pipelines.qwen),
    "aura_flow": Case("AuraFlowTransformer2DModel", pipelines.aura_flow),
    "z_image": Case("ZImageTransformer2DModel", pipelines.z_image),
    "z_image-cap": Case(
        "ZImageTransformer2DModel", partial(pipelines.z_image, cfg_normalization=1.0), said={"renorm": "cap"}
    ),
    "hidream": Case("HiDreamImageTransformer2DModel", pipelines.hidream),
    "wan": Case("WanTransformer3DModel", pipelines.wan),
    "ltx": Case("LTXVideoTransformer3DModel", pipelines.ltx),
    "ltx-deviation": Case(
        "LTXVideoTransformer3DModel", partial(pipelines.ltx, guidance_rescale=1.0), said={"renorm": "deviation"}
    ),
    "hunyuan_video": Case("HunyuanVideoTransformer3DModel", pipelines.hunyuan_video),
    "cogview4": Case("CogView4Transformer2DModel", pipelines.cogview4),
    "prx": Case("PRXTransformer2DModel", pipelines.prx),
    "mochi": Case("MochiTransformer3DModel", pipelines.mochi),
    "cosmos": Case("CosmosTransformer3DModel", pipelines.cosmos),
}


def _levels(plan: Any) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Our times of a scheduler's steps, its own samples as points of the linear path."""
    sigma = getattr(plan, "sigmas", torch.zeros(1)).double()
    if type(plan).__name__.startswith("FlowMatch") and sigma.max() <= 1:
        return sigma if plan.config.invert_sigmas else 1 - sigma, lambda x, t: x
    if hasattr(plan, "sigmas"):  # x = data + sigma noise
        return 1 / (1 + sigma), lambda x, t: t.float() * x
    kept = torch.cat([plan.alphas_cumprod[plan.timesteps], plan.final_alpha_cumprod[None]]).double()
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    return alpha / (alpha + sigma), lambda x, t: ((t**2 + (1 - t) ** 2).sqrt()).float() * x


def _first(name: str, plan: Any, x: Tensor) -> Tensor:
    """The pipeline's own sample that it starts from."""
    if name == "cosmos":
        return x * plan.config.sigma_max
    return x * getattr(plan, "init_noise_sigma", 1.0)


def _whole(step: Tensor, x: Tensor) -> Tensor:
    """Tokens as samples of x's shape."""
    if step.dim() > 3:
        return step[: len(x)]  # DiT's hold the same samples twice
    if step.shape[1] == x[0, 0].numel():
        return step.transpose(1, 2).unflatten(2, x.shape[2:])
    return unpack(step, x)


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
    teacher = change(said(case.cls, save(case.cls, folder, made, plan), **case.said).load())
    cond, none = conditioning(teacher.space, ROWS) or {}, dict(teacher.null or {})
    x = torch.randn(ROWS, *teacher.space.shape, generator=torch.Generator().manual_seed(0))
    with recorded(plan) as steps:
        case.pipeline(made, plan, x, cond, none)
    if len(steps) == ROWS * STEPS:
        steps = [torch.cat(steps[i::STEPS]) for i in range(STEPS)]
    times, as_ours = _levels(plan)
    start = _first(name, plan, x)
    steer = guided(teacher, SCALE, (0.0, 1.0)) if none and name != "flux2" else teacher
    theirs = [as_ours(_whole(step, x), t) for step, t in zip(steps, times[1:], strict=True)]
    ours = _euler(steer, as_ours(start, times[0]), times, cond)
    assert len(ours) == STEPS
    off = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(theirs, ours, strict=True))
    return off


class _Transforms:
    """Of torchvision, which Cosmos' own network resizes its mask with."""

    InterpolationMode = SimpleNamespace(NEAREST="nearest")
    functional = SimpleNamespace(
        resize=lambda x, size, interpolation: torch.nn.functional.interpolate(x, size, mode=interpolation)
    )


@pytest.fixture(autouse=True)
def _torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_cosmos, "transforms", _Transforms, raising=False)


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
    "edm, the other sign": ("edm-velocity", _told_otherwise(negative=False)),
    "qwen, guidance without its norm": ("qwen", _rule()),
    "cogview4, the shifted time": ("cogview4", _convention(shift=1.0)),
    "z_image, as the others": ("z_image", _convention(noise_time=1)),
    "mochi, as the others": ("mochi", _convention(noise_time=1)),
    "z_image, guidance without its cap": ("z_image-cap", _rule()),
    "ltx, guidance without its rescaling": ("ltx-deviation", _rule()),
    "ltx, another rate": ("ltx", _told_otherwise(frame_rate=1.0)),
    "hunyuan_video, another embedded guidance": ("hunyuan_video", _told_otherwise(guidance=1.0)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_shows(what: str, tmp_path: Path) -> None:
    name, change = WRONG[what]
    assert _compared(name, tmp_path, change) > 5e-3
