"""What the entries of TEACHERS are and what their files look like; free of torch, for `distill ls --teachers`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The teachers that ship with the project, a folder each."""


@dataclass(frozen=True)
class Family:
    """One kind of teacher: what its file looks like, and where the licence of its weights stands."""

    file: str
    licence: str


FAMILIES: dict[str, Family] = {
    "native": Family(
        "folder with config.json (kind: velocity) and model.safetensors", "the field licence of config.json"
    ),
    "gaussian": Family("none: mean and covariance in the recipe, exact flow map", "no weights"),
    "mixture": Family("none: 1-D mixtures in the recipe, exact flow map", "no weights"),
    "gaussian_mixture": Family(
        "none: weights, means and covariances in the recipe, flow map by Runge-Kutta", "no weights"
    ),
    "sit": Family(
        "SiT-XL-2-256.pt, or a checkpoint of its train.py (model, ema, args)", "MIT; of the weights: their model card"
    ),
    "repa": Family("last.pt, or a checkpoint of its train.py", "MIT; of the weights: their model card"),
    "dit": Family("DiT-XL-2-256x256.pt, or a checkpoint of its train.py", "CC-BY-NC-4.0, code and weights"),
    "lightningdit": Family(
        "lightningdit-xl-imagenet256-800ep.pt and latents_stats.pt, or a checkpoint of its train.py",
        "MIT; of the weights: their model card",
    ),
    "jit": Family(
        "checkpoint-last.pth of JiT (model, model_ema1, model_ema2, args)", "MIT; of the weights: their model card"
    ),
    "torchcfm": Family(
        "otcfm_cifar10_weights_step_400000.pt (ema_model, net_model)", "MIT; of the weights: their release"
    ),
    "flow_matching": Family(
        "checkpoint-*.pth of its image examples (model, args)", "CC-BY-NC-4.0, code; weights are not published"
    ),
    "edm": Family(
        "edm-cifar10-32x32-cond-vp.pkl and its like, read as data, or converted", "CC-BY-NC-SA-4.0, code and weights"
    ),
    "edm2": Family(
        "edm2-img512-*.pkl, edm2-img64-*.pkl, read as data, or converted", "CC-BY-NC-SA-4.0, code and weights"
    ),
    "diffusers": Family(
        "folder of diffusers (model_index.json, transformer or unet, scheduler, vae)", "the model card, README.md"
    ),
    "meanflow": Family(
        "0400000.pt of zhuyu-cs/MeanFlow (model, ema, args): already distilled", "MIT; of the weights: their model card"
    ),
    "imeanflow": Family(
        "iMF-XL-2.pth of imeanflow's torch branch: already distilled", "MIT; of the weights: their model card"
    ),
    "py_meanflow": Family(
        "checkpoint-last.pth of py-meanflow's train.py (model, args): already distilled",
        "CC-BY-NC-SA-4.0, code and weights",
    ),
    "shortcut_models": Family(
        "pickle of shortcut-models' train.py (train_state: params, params_ema): already distilled",
        "MIT; of the weights: their authors' page",
    ),
    "tarflow": Family(
        "afhq_model_8_768_8_8_0.07.pth, or another state dict of its train.py: samples, no velocity",
        "Apple's own (LICENSE of apple/ml-tarflow), which names code alone",
    ),
}


def shipped() -> dict[str, dict[str, object]]:
    """name -> config of each native teacher in `WEIGHTS`."""
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(WEIGHTS.glob("*/config.json"))}
