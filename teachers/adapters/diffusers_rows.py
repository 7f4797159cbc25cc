"""ROWS: how a family of diffusers sees time, guides and samples. One row a class of networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from teachers.networks.conventions import ConventionConfig, Discrete, Flow
from teachers.velocity import Rule

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """noise: where the network's own time has the noise, None for a diffusion, whose scheduler says all; scale: of that
    time, None for the scheduler's number of levels; sized: whether the config's sample_size is the samples'; tokens:
    of a sample, which a scheduler may shift its grid by; steps, guidance: usual ones; rule: of guidance."""

    noise: Literal[0, 1] | None
    scale: float | None = None
    sized: bool = True
    tokens: Callable[[Settings, tuple[int, ...]], int] = lambda s, shape: (
        shape[-2] // s["patch_size"] * (shape[-1] // s["patch_size"])
    )
    steps: int = 50
    guidance: float = 1.0
    rule: Rule = Rule()  # noqa: RUF009  # frozen


def _squares(settings: Settings, shape: tuple[int, ...]) -> int:
    return shape[-2] // 2 * (shape[-1] // 2)


def _levels(scheduler: Settings, name: str) -> Discrete:
    betas = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    prediction = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data"}
    said = {key: scheduler.get(key, default) for key, default in
            (("beta_schedule", "linear"), ("prediction_type", "epsilon"))}  # fmt: skip
    if scheduler.get("trained_betas") is not None or said["beta_schedule"] not in betas:
        raise ValueError(f"beta_schedule {said['beta_schedule']} (known: {', '.join(betas)}, no trained_betas)")
    if said["prediction_type"] not in prediction:
        raise ValueError(f"prediction_type {said['prediction_type']} (known: {', '.join(prediction)})")
    return Discrete(
        betas=betas[said["beta_schedule"]],  # type: ignore[arg-type]
        beta_start=scheduler.get("beta_start", 1e-4),
        beta_end=scheduler.get("beta_end", 0.02),
        steps=scheduler.get("num_train_timesteps", 1000),
        zero_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        prediction=prediction[said["prediction_type"]],  # type: ignore[arg-type]
    )


def is_flow(scheduler: Settings) -> bool:
    """Whether a scheduler's noise levels are those of a flow on the linear path."""
    return (
        str(scheduler.get("_class_name", "")).startswith("FlowMatch")
        or scheduler.get("prediction_type") == "flow_prediction"
        or bool(scheduler.get("use_flow_sigmas"))
    )


def convention(row: Row, settings: Settings, scheduler: Settings) -> ConventionConfig:
    """How a network sees points and times. Raises ValueError for a scheduler that is none of the row's."""
    name = scheduler.get("_class_name")
    if row.noise is not None or is_flow(scheduler):
        if scheduler and not is_flow(scheduler):
            raise ValueError(f"{name}, whose noise levels are not those of the flow that this network was trained on")
        scale = row.scale or float(scheduler.get("num_train_timesteps", 1000))
        return Flow(noise_time=1 if row.noise is None else row.noise, scale=scale * settings.get("timestep_scale", 1.0))
    if not scheduler:
        raise ValueError("nothing, and without a scheduler it is not known which noise levels a network was trained on")
    return _levels(scheduler, str(name))


ROWS: dict[str, Row] = {
    "SD3Transformer2DModel": Row(noise=1, steps=28, guidance=7.0),
    "FluxTransformer2DModel": Row(noise=1, scale=1.0, sized=False, tokens=_squares, steps=28, guidance=3.5),
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
}
