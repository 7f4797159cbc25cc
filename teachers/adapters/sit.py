"""SiT, REPA and DiT: one transformer, three conventions.

    SiT   t = 0 noise, velocity, noise or score on the linear, GVP or VP path     arXiv 2401.08740   (MIT)
    REPA  t = 1 noise, velocity on the linear or cosine path                      arXiv 2410.06940   (MIT)
    DiT   1000 levels of a diffusion, noise                                       arXiv 2212.09748   (CC-BY-NC 4.0)

Sizes are read from the tensors' shapes; what their files do not say, path and prediction above all, the recipe must.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from teachers.adapters.base import Foreign, assemble, heads_of, image_space, known, opened, require_said
from teachers.checkpoints import Checkpoint
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.fill import fill
from teachers.networks.conventions import ConventionConfig, Discrete, Flow
from teachers.networks.sit import SiTConfig
from teachers.path import PathName
from teachers.space import DataSpace, Latent
from teachers.velocity import Rule, Teacher

EMA = ("ema", "model")


@dataclass(frozen=True, kw_only=True)
class ImageTransformer(Foreign):
    """Of all three. heads: of attention, which no file tells (null: as in the published sizes); classes: how many, null
    as the file says, or else one fewer than it embeds, the last being "no class"; latent: the map to the latents that
    it was trained on, null for pixels in [-1, 1]."""

    heads: int | None = None
    classes: int | None = None
    latent: Latent | None = None


@dataclass(frozen=True, kw_only=True)
class SiT(ImageTransformer):
    """A SiT. path_type, prediction: as it was trained with, null to take them from the file's own arguments."""

    path_type: Literal["linear", "gvp", "vp"] | None = None
    prediction: Literal["velocity", "noise", "score"] | None = None

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "sit", EMA)
        native: dict[str, PathName] = {"linear": "linear", "gvp": "cosine", "vp": "vp"}
        path = known(self, checkpoint, "path_type", list(native))
        prediction = known(self, checkpoint, "prediction", ("velocity", "noise", "score"))
        require_said(self, checkpoint, path_type=path, prediction=prediction)
        # as its samplers start: noise and scores say nothing at pure noise, which the VP path never reaches
        margin = 0.0 if prediction == "velocity" or path == "vp" else 1e-3
        flow = Flow(native=native[path], prediction=prediction, margin=margin)
        sampler = {"solver": "euler", "steps": 250, "guidance": 4.0}
        return image_transformer(self, checkpoint, "sit", flow, Rule(channels=3), sampler, weights, _latent(checkpoint))


@dataclass(frozen=True, kw_only=True)
class REPA(ImageTransformer):
    """A SiT trained with REPA. path_type: as it was trained with, null to take it from the file's own arguments;
    encoder_depth: blocks before the projectors, of old files which count those behind them anew."""

    path_type: Literal["linear", "cosine"] | None = None
    encoder_depth: int | None = None

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "repa", EMA)
        path = known(self, checkpoint, "path_type", ("linear", "cosine"))
        late = checkpoint.count("decoder_blocks.")
        first: Any = self.encoder_depth or checkpoint.arguments.get("encoder_depth")
        require_said(self, checkpoint, path_type=path, **({"encoder_depth": first} if late else {}))
        if late:
            checkpoint = checkpoint.renamed(
                lambda name: re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", name)
            )
        flow = Flow(native=path, noise_time=1)
        sampler = {"solver": "euler", "steps": 50, "guidance": 1.8, "interval": [0.3, 1.0]}
        return image_transformer(self, checkpoint, "repa", flow, Rule(), sampler, weights, None)


@dataclass(frozen=True, kw_only=True)
class DiT(ImageTransformer):
    """A DiT as its authors publish it. (diffusers' is not the same function of the same weights: use the family
    diffusers for a folder of diffusers.)"""

    licence: str = "CC-BY-NC-4.0"

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "dit", EMA)
        if "path_type" in checkpoint.arguments:
            raise CheckpointError(
                f"{checkpoint.source}: was trained as a flow (path_type {checkpoint.arguments['path_type']}), which is "
                "no DiT though its tensors have the same names; set teacher.name: sit (time 0 is noise) or repa (time "
                "1 is)"
            )
        sampler = {"solver": "ddim", "steps": 250, "guidance": 4.0}
        latent = _latent(checkpoint)
        return image_transformer(self, checkpoint, "dit", Discrete(), Rule(channels=3), sampler, weights, latent)


def _latent(checkpoint: Checkpoint) -> Latent | None:
    """Of training arguments that name their autoencoder."""
    said = checkpoint.arguments
    return Latent(autoencoder=f"stabilityai/sd-vae-ft-{said['vae']}", scale=0.18215) if said.get("vae") else None


def image_transformer(
    config: ImageTransformer,
    checkpoint: Checkpoint,
    family: str,
    convention: ConventionConfig,
    rule: Rule,
    sampler: Mapping[str, object],
    weights: bool,
    latent: Latent | None,
) -> Teacher:
    """The teacher of a checkpoint in SiT's names, behind `convention`; latent: what the file itself says of it."""
    latent = config.latent or latent
    network, space = _sizes(checkpoint, config.heads, config.classes, latent)
    ignore = (r"projectors\..*",) if family == "repa" else ()
    backbone = fill(lambda: network.build(space), checkpoint, config.placement, ignore=ignore, weights=weights)
    null = space.null if network.null_class else None
    return assemble(config, checkpoint, family, backbone, network, convention, space,
                    null=null, rule=rule, latent=latent, sampler=sampler)  # fmt: skip


def _sizes(
    checkpoint: Checkpoint, heads: int | None, classes: int | None, latent: Latent | None
) -> tuple[SiTConfig, DataSpace]:
    width, channels, patch, _ = checkpoint.shape("x_embedder.proj.weight", 4)
    tokens = checkpoint.shape("pos_embed", 3)[1]
    side = patch * round(tokens**0.5)
    rows = checkpoint.shape("y_embedder.embedding_table.weight", 2)[0]
    features = checkpoint.shape("final_layer.linear.weight", 2)[0] // patch**2
    if classes not in (None, rows, rows - 1):
        raise FieldError("teacher", {"classes": (
            f"must be {rows - 1}, or {rows} where it was trained without dropping labels: {checkpoint.source} embeds "
            f"{rows}, got {classes}"
        )})  # fmt: skip
    classes = checkpoint.arguments.get("num_classes", rows - 1) if classes is None else classes
    space = image_space(checkpoint, channels, side, classes, latent,
                        "e.g. {autoencoder: sd-vae-ft-ema, scale: 0.18215}")  # fmt: skip
    qk_norm = "blocks.0.attn.q_norm.weight" in checkpoint.tensors
    if qk_norm:
        heads = heads or width // checkpoint.shape("blocks.0.attn.q_norm.weight", 1)[0]
    config = SiTConfig(
        patch=patch,
        width=width,
        depth=checkpoint.count("blocks."),
        heads=heads_of(checkpoint, width, heads),
        null_class=rows > classes,
        sigma=features == 2 * channels,
        qk_norm=qk_norm,
    )
    return config, space
