"""LightningDiT (MIT): a modern SiT on the latents of a VA-VAE, t = 0 noise, velocity on the linear path.

Yao, Yang and Wang, arXiv 2501.01423. All of its options are read from the tensors; the statistics of its latents are a
file of their own, latents_stats.pt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teachers.adapters.base import Foreign, assemble, heads_of, opened
from teachers.adapters.sit import EMA
from teachers.checkpoints import Checkpoint, read
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.fill import fill
from teachers.networks.conventions import Flow
from teachers.networks.lightning_dit import LightningDiTConfig
from teachers.space import DataSpace, Latent
from teachers.velocity import Rule, Teacher

_STATS = "latents_stats.pt"
_SAMPLER = {"solver": "euler", "steps": 249, "shift": 0.3, "guidance": 6.7, "interval": [0.125, 1.0]}
"""Of the published 800 epochs (64 epochs: guidance 10 from 0.10 on): 250 points t <- shift t / (1 + (shift - 1) t)."""


@dataclass(frozen=True, kw_only=True)
class LightningDiT(Foreign):
    """A LightningDiT. latent: the map to its latents, null to make it of stats and multiplier. stats: the file of their
    mean and standard deviation by channel, null for latents_stats.pt beside the weights; multiplier: what they were
    multiplied by then, null to take it from the configuration in a training checkpoint; heads: null to take them from
    the tables of rope."""

    heads: int | None = None
    latent: Latent | None = None
    stats: str | None = None
    multiplier: float | None = None

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "lightningdit", EMA)
        said = checkpoint.about.get("config", {})
        network, space = _sizes(checkpoint, self.heads, said)
        latent = self.latent or self._latent(checkpoint, space.shape[0], said)
        backbone = fill(lambda: network.build(space), checkpoint, self.placement, weights=weights)
        null = space.null if network.null_class else None
        return assemble(
            self, checkpoint, "lightningdit", backbone, network, Flow(), space,
            null=null, rule=Rule(channels=3), latent=latent, sampler=_SAMPLER | _sampling(said),
        )  # fmt: skip

    def _latent(self, checkpoint: Checkpoint, channels: int, said: Mapping[str, Any]) -> Latent:
        data = said.get("data", {})
        # its code takes 0.18215 where a configuration says nothing
        own = data.get("latent_multiplier", 0.18215) if data else None
        multiplier = self.multiplier or own
        stats = Path(self.stats).expanduser() if self.stats else checkpoint.files[0].parent / _STATS
        missing = {}
        if not stats.is_file():
            missing["stats"] = f"is needed: there is no {stats}, which holds mean and std of its latents by channel"
        if multiplier is None:
            missing["multiplier"] = (
                f"is needed: {checkpoint.source} does not say it (1.0 in the published configuration, 0.18215 where a "
                "configuration leaves it out)"
            )
        if multiplier is None or missing:
            raise FieldError("LightningDiT", missing)
        mean, std = _statistics(stats, channels)
        name = said.get("vae", {}).get("model_name", "vavae_f16d32")
        return Latent(autoencoder=name, scale=float(multiplier), mean=mean, std=std)


def _sampling(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a training configuration says of sampling."""
    sample, found = said.get("sample", {}), {}
    for key, name in (("shift", "timestep_shift"), ("guidance", "cfg_scale")):
        if name in sample:
            found[key] = sample[name]
    if "num_sampling_steps" in sample:
        found["steps"] = sample["num_sampling_steps"] - 1
    if "cfg_interval_start" in sample:
        found["interval"] = [sample["cfg_interval_start"], 1.0]
    return found


def _statistics(file: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel. Raises CheckpointError."""
    held = read(str(file))
    means, stds = (held.tensors.get(name, torch.empty(0)).double().flatten() for name in ("mean", "std"))
    if set(held.tensors) != {"mean", "std"} or len(means) != channels or len(stds) != channels:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in held.tensors.items())
        raise CheckpointError(f"{file}: must hold mean and std [1, {channels}, 1, 1] of the latents, holds {shapes}")
    return tuple(means.tolist()), tuple(stds.tolist())


def _sizes(checkpoint: Checkpoint, heads: int | None, said: Mapping[str, Any]) -> tuple[LightningDiTConfig, DataSpace]:
    width, channels, patch, _ = checkpoint.shape("x_embedder.proj.weight", 4)
    side = patch * round(checkpoint.shape("pos_embed", 3)[1] ** 0.5)
    rows = checkpoint.shape("y_embedder.embedding_table.weight", 2)[0]
    features = checkpoint.shape("final_layer.linear.weight", 2)[0] // patch**2
    classes = said.get("data", {}).get("num_classes", rows - 1)
    held = checkpoint.tensors
    rope, qk_norm, swiglu = "feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.w3.weight"
    told = next((checkpoint.shape(name)[-1] for name in (rope, qk_norm) if name in held), None)
    config = LightningDiTConfig(
        patch=patch,
        width=width,
        depth=checkpoint.count("blocks."),
        heads=heads_of(checkpoint, width, width // told if told else heads),
        hidden=checkpoint.shape(swiglu, 2)[1] if swiglu in held else None,
        rms="blocks.0.norm1.weight" in held,
        rope=rope in held,
        qk_norm=qk_norm in held,
        shift=checkpoint.shape("blocks.0.adaLN_modulation.1.weight")[0] == 6 * width,
        null_class=rows > classes,
        sigma=features == 2 * channels,
    )
    return config, DataSpace((channels, side, side), classes)
