"""ROWS: how a family of diffusers sees time, guides and samples. One row a class of networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from teachers.networks.conventions import ConventionConfig, Discrete, Flow
from teachers.networks.noise_levels import NoiseLevels
from teachers.velocity import Rule

Settings = Mapping[str, Any]


def _linear(scheduler: Settings, tokens: int) -> float:
    """mu of most schedulers."""
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    return float(low + (tokens - few) * (high - low) / (many - few))


def _patches(settings: Settings, shape: tuple[int, ...]) -> int:
    side = settings.get("patch_size", 1)
    return shape[-2] // side * (shape[-1] // side)


@dataclass(frozen=True, kw_only=True)
class Row:
    """noise: where the network's own time has the noise, None for a diffusion, whose scheduler says all; scale: of that
    time, None for the scheduler's number of levels; sample_size: whether the config's is the samples'; tokens:
    of a sample, and mu of these, by which a scheduler may shift its grid; unshifted: whether the network is told the
    time before that shift; steps, guidance: usual ones; rule: of guidance."""

    noise: Literal[0, 1] | None
    scale: float | None = None
    sample_size: bool = True
    tokens: Callable[[Settings, tuple[int, ...]], int] = _patches
    mu: Callable[[Settings, int], float] = _linear
    unshifted: bool = False
    steps: int = 50
    guidance: float = 1.0
    rule: Rule = Rule()  # noqa: RUF009  # frozen


def _squares(settings: Settings, shape: tuple[int, ...]) -> int:
    return shape[-2] // 2 * (shape[-1] // 2)


def _latents(settings: Settings, shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def shift(row: Row, scheduler: Settings, tokens: int) -> float:
    """s of the grid sigma <- s sigma / (1 + (s - 1) sigma) that a scheduler of flows makes for samples of `tokens`."""
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)
    mu = row.mu(scheduler, tokens)
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)


_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data"}


def _levels(scheduler: Settings) -> Discrete:
    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")
    if missing := [key for key in keys if key not in scheduler]:
        raise ValueError(f"{scheduler.get('_class_name')}, without {', '.join(missing)}")
    betas, prediction = scheduler["beta_schedule"], scheduler["prediction_type"]
    if scheduler.get("trained_betas") is not None or betas not in _BETAS:
        raise ValueError(f"beta_schedule {betas} (known: {', '.join(_BETAS)}, and no trained_betas)")
    name = scheduler.get("_class_name")
    if scheduler.get("predict_epsilon") is False and prediction == "epsilon":  # a word of old versions
        raise ValueError(
            f"{name} with predict_epsilon false, an old word for networks that predict the data, and prediction_type "
            "epsilon; if it does predict them, write prediction_type sample"
        )
    if scheduler.get("snr_shift_scale", 1.0) != 1.0:
        raise ValueError(f"{name} with snr_shift_scale, which changes its noise levels and is not read here")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction_type {prediction} (known: {', '.join(_PREDICTIONS)})")
    return Discrete(
        betas=_BETAS[betas],  # type: ignore[arg-type]
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        steps=scheduler["num_train_timesteps"],
        zero_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        prediction=_PREDICTIONS[prediction],  # type: ignore[arg-type]
    )


def is_edm(scheduler: Settings) -> bool:
    """Whether a scheduler dresses its network as EDM does; one that predicts a velocity then says the opposite."""
    return str(scheduler.get("_class_name", "")).startswith("EDM")


def is_flow(scheduler: Settings) -> bool:
    """Whether a scheduler's noise levels are those of a flow on the linear path."""
    return (
        str(scheduler.get("_class_name", "")).startswith("FlowMatch")
        or scheduler.get("prediction_type") == "flow_prediction"
        or bool(scheduler.get("use_flow_sigmas"))
    )


def convention(row: Row, settings: Settings, scheduler: Settings, tokens: int) -> ConventionConfig:
    """How a network sees points and times. Raises ValueError for a scheduler that is none of the row's."""
    name = scheduler.get("_class_name")
    if row.noise is not None or is_flow(scheduler):
        if scheduler and not is_flow(scheduler):
            raise ValueError(f"{name}, whose noise levels are not those of the flow that this network was trained on")
        if not scheduler and row.unshifted:
            raise ValueError("nothing, and this network is told times that depend on its scheduler's shift")
        scale = row.scale or float(scheduler.get("num_train_timesteps", 1000))
        return Flow(
            noise_time=1 if row.noise is None else row.noise,
            scale=scale * settings.get("timestep_scale", 1.0),
            shift=shift(row, scheduler, tokens) if row.unshifted else 1.0,
        )
    if not scheduler:
        raise ValueError("nothing, and without a scheduler it is not known which noise levels a network was trained on")
    if is_edm(scheduler):
        return NoiseLevels(**{key: scheduler[key] for key in ("sigma_data", "sigma_min", "sigma_max")})
    return _levels(scheduler)


def _square_root(scheduler: Settings, tokens: int) -> float:
    """mu of CogView4."""
    few, low, high = scheduler.get("base_image_seq_len", 256), scheduler["base_shift"], scheduler["max_shift"]
    return float(low + high * math.sqrt(tokens / few))


def _at_50_steps(scheduler: Settings, tokens: int) -> float:
    """mu of Flux2, which depends on the number of steps too."""
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else few + (many - few) * (50 - 10) / (200 - 10)


ROWS: dict[str, Row] = {
    "SD3Transformer2DModel": Row(noise=1, steps=28, guidance=7.0),
    "FluxTransformer2DModel": Row(noise=1, scale=1.0, sample_size=False, tokens=_squares, steps=28, guidance=3.5),
    "SanaTransformer2DModel": Row(noise=1, steps=20, guidance=4.5),
    "Lumina2Transformer2DModel": Row(
        noise=0,
        scale=1.0,
        tokens=lambda s, shape: shape[0],  # as its pipeline counts
        steps=30,
        guidance=4.0,
        rule=Rule(renorm="width"),
    ),
    "DiTTransformer2DModel": Row(noise=None, steps=25, guidance=4.0),
    "PixArtTransformer2DModel": Row(noise=None, steps=20, guidance=4.5),
    "UNet2DModel": Row(noise=None, steps=50),
    "UNet2DConditionModel": Row(noise=None, steps=50, guidance=7.5),
    "Flux2Transformer2DModel": Row(
        noise=1, scale=1.0, sample_size=False, tokens=_latents, mu=_at_50_steps, steps=50, guidance=4.0
    ),
    "ChromaTransformer2DModel": Row(noise=1, scale=1.0, sample_size=False, tokens=_squares, steps=35, guidance=5.0),
    "QwenImageTransformer2DModel": Row(
        noise=1, scale=1.0, sample_size=False, tokens=_squares, steps=50, guidance=4.0, rule=Rule(renorm="token")
    ),
    "AuraFlowTransformer2DModel": Row(noise=1, scale=1.0, steps=50, guidance=3.5),
    "ZImageTransformer2DModel": Row(noise=0, scale=1.0, sample_size=False, tokens=_squares, steps=50, guidance=6.0),
    "HiDreamImageTransformer2DModel": Row(noise=1, sample_size=False, steps=50, guidance=5.0),
    "WanTransformer3DModel": Row(noise=1, sample_size=False, tokens=_latents, steps=50, guidance=5.0),
    "LTXVideoTransformer3DModel": Row(noise=1, sample_size=False, tokens=_latents, steps=50, guidance=3.0),
    "HunyuanVideoTransformer3DModel": Row(noise=1, sample_size=False, tokens=_latents, steps=50, guidance=6.0),
    "CogView4Transformer2DModel": Row(noise=1, mu=_square_root, unshifted=True, steps=50, guidance=5.0),
    "PRXTransformer2DModel": Row(noise=1, scale=1.0, sample_size=False, steps=28, guidance=4.0),
    "MochiTransformer3DModel": Row(noise=0, sample_size=False, tokens=_latents, steps=64, guidance=4.5),
    "CosmosTransformer3DModel": Row(noise=1, scale=1.0, sample_size=False, tokens=_latents, steps=35, guidance=8.0),
}
