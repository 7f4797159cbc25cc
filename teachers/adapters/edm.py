"""EDM, its baselines, and EDM2: denoisers of pixels or latents at noise levels sigma.

    edm     U-Nets of DDPM++, NCSN++ and ADM, dressed as EDM, VP, VE or iDDPM   arXiv 2206.00364   (CC-BY-NC-SA 4.0)
    edm2    a U-Net of normalised layers, dressed as EDM                        arXiv 2312.02696   (CC-BY-NC-SA 4.0)

Their ``.pkl`` files are programs; they are read as data (see `teachers.pickles`), or converted once. Sizes are read
from the tensors' shapes. Neither was trained without a class: EDM2 is guided by a second network (guidance.weak).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from teachers.adapters.base import Foreign, assemble, image_space, opened, require_said
from teachers.checkpoints import Checkpoint
from teachers.errors import CheckpointError
from teachers.fields import FieldError, require
from teachers.fill import Placement, fill
from teachers.networks.dhariwal_unet import DhariwalUNetConfig
from teachers.networks.edm2_unet import EDM2UNetConfig
from teachers.networks.noise_levels import Form, NoiseLevels
from teachers.networks.song_unet import SongUNetConfig
from teachers.space import DataSpace, Latent
from teachers.velocity import Teacher

_FORMS: dict[str, Form] = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
_SIZES = {  # arguments that the shapes tell, and those of training alone
    "img_resolution", "img_channels", "label_dim", "model_type", "augment_dim", "model_channels", "channel_mult",
    "channel_mult_emb", "num_blocks", "attn_resolutions", "embedding_type", "channel_mult_noise", "encoder_type",
    "decoder_type", "resample_filter", "use_fp16", "dropout", "label_dropout", "logvar_channels", "sigma_min",
    "sigma_max", "sigma_data",
}  # fmt: skip
_BALANCES = {"label_balance", "concat_balance", "res_balance", "attn_balance"}


@dataclass(frozen=True, kw_only=True)
class NoiseLevelTeacher(Foreign):
    """Of both. sigma_max: the noise that sampling starts from, no more than the network knows; latent: the map to the
    latents that it was trained on, null for pixels in [-1, 1] and for those that the file names."""

    licence: str = "CC-BY-NC-SA-4.0"
    sigma_max: float = 80.0
    latent: Latent | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, sigma_max=(0.002 < self.sigma_max < float("inf"), "must be above 0.002 and finite"))

    def _levels(self, form: Form, init: Mapping[str, Any]) -> NoiseLevels:
        known = 100.0 if form == "ve" else float("inf")
        levels = NoiseLevels(
            form=form,
            sigma_data=float(init.get("sigma_data", 0.5)),
            sigma_min=max(0.002, float(init.get("sigma_min", 0))),
            sigma_max=min(self.sigma_max, float(init.get("sigma_max", known))),
        )
        return replace(levels, sigma_max=levels.nearest(levels.sigma_max)) if form == "iddpm" else levels


@dataclass(frozen=True, kw_only=True)
class EDM(NoiseLevelTeacher):
    """A network of EDM's code. preconditioning: how it is dressed, null to take it from the file."""

    preconditioning: Form | None = None

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "edm", ("ema",))
        init = _init(checkpoint, _SIZES)
        form = _FORMS.get(str(checkpoint.about.get("class"))) or ("iddpm" if "u" in checkpoint.tensors else None)
        if form and self.preconditioning not in (None, form):
            raise FieldError(
                "EDM", {"preconditioning": f"is {self.preconditioning}, but {checkpoint.source} says {form}: remove it"}
            )
        form = form or self.preconditioning
        require_said(self, checkpoint, preconditioning=form)
        assert form is not None
        inner = checkpoint.renamed(lambda name: name.removeprefix("model."))
        network, space = edm_network(inner, self.latent, bool(init.get("label_dropout")))
        placement = _whole(self.placement, inner)
        ignore = (r"map_augment\.weight", r"u")
        backbone = fill(lambda: network.build(space), inner, placement, ignore=ignore, weights=weights)
        adm = isinstance(network, DhariwalUNetConfig)
        steps = 256 if adm else 18 if space.shape[-1] <= 32 else 40
        return assemble(
            self, inner, "edm", backbone, network, self._levels(form, init), space,
            null=space.null if network.null_class else None, latent=self.latent,
            sampler={"solver": "heun", "grid": "edm", "rho": 7, "steps": steps},
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EDM2(NoiseLevelTeacher):
    """A network of EDM2's code, which knows one condition: guide it by another, `guidance.weak`."""

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "edm2", ("ema",))
        init = _init(checkpoint, _SIZES | _BALANCES)
        latent = self.latent or _encoder(checkpoint)
        inner = checkpoint.renamed(lambda name: name.removeprefix("unet."))
        inner = replace(inner, tensors={k: v if v.dim() else v.reshape(1) for k, v in inner.tensors.items()})  # gains
        network, space = _of_edm2(inner, latent, {k: v for k, v in init.items() if k in _BALANCES})
        placement = _whole(self.placement, inner)
        backbone = fill(lambda: network.build(space), inner, placement, ignore=(r"logvar_.*",), weights=weights)
        range_ = {"autoencoder_range": [0.0, 1.0]} if latent is not None and self.latent is None else {}
        return assemble(
            self, inner, "edm2", backbone, network, self._levels("edm", init), space, latent=latent,
            sampler={"solver": "heun", "grid": "edm", "rho": 7, "steps": 32}, said=range_,
        )  # fmt: skip


def _init(checkpoint: Checkpoint, known: set[str]) -> Mapping[str, Any]:
    """The arguments that the network was made with, as far as the file says. Raises CheckpointError for one that would
    make another network of it."""
    init: Mapping[str, Any] = checkpoint.about.get("init", {})
    if strange := sorted(set(init) - known):
        raise CheckpointError(
            f"{checkpoint.source}: its network was made with {', '.join(f'{k}={init[k]!r}' for k in strange)}, which "
            "no published one of its family has and which is not known here"
        )
    return init


def _whole(placement: Placement, checkpoint: Checkpoint) -> Placement:
    """In float32 unless asked for otherwise: halves are how they are stored, not how they compute."""
    halves = any(v.dtype in (torch.float16, torch.bfloat16) for v in checkpoint.tensors.values())
    return replace(placement, dtype="float32") if halves and placement.dtype is None else placement


def _encoder(checkpoint: Checkpoint) -> Latent | None:
    """What the file says of the autoencoder (which was run on images in [0, 1])."""
    encoder = checkpoint.about.get("encoder")
    if not isinstance(encoder, Mapping) or encoder.get("class") != "StabilityVAEEncoder":
        return None
    said = {"vae_name": "stabilityai/sd-vae-ft-mse", "raw_mean": [5.81, 3.25, 0.12, -2.15],
            "raw_std": [4.17, 4.62, 3.71, 3.28], "final_mean": 0, "final_std": 0.5} | dict(encoder["init"])  # fmt: skip
    if said["final_mean"] != 0:
        raise CheckpointError(f"{checkpoint.source}: its latents have the mean {said['final_mean']}; 0 is known here")
    return Latent(autoencoder=said["vae_name"], scale=said["final_std"],
                  mean=tuple(said["raw_mean"]), std=tuple(said["raw_std"]), spread=said["final_std"])  # fmt: skip


@dataclass(frozen=True)
class _Levels:
    """What the names and shapes of both U-Nets tell."""

    side: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]


def _levels(checkpoint: Checkpoint, last: str, attention: str) -> _Levels:
    """last: of a block's convolutions; attention: what a block has that has attention."""
    found = {int(m[1]) for m in (re.match(r"enc\.(\d+)x\1_", name) for name in checkpoint.tensors) if m}
    sides = sorted(found, reverse=True)
    if not sides or sides != [sides[0] >> level for level in range(len(sides))]:
        raise CheckpointError(
            f"{checkpoint.source}: has no levels enc.NxN_..., each half of the one before (found: {sides or 'none'}), "
            "so it is not of this family; name the family that it is of: distill ls --teachers"
        )
    first = [f"enc.{side}x{side}_block0." for side in sides]
    return _Levels(
        side=sides[0],
        widths=tuple(checkpoint.shape(f"{block}{last}.weight")[0] for block in first),
        blocks=checkpoint.count(f"enc.{sides[0]}x{sides[0]}_block"),
        attention=tuple(n for n, block in enumerate(first) if f"{block}{attention}.weight" in checkpoint.tensors),
    )


def _space(checkpoint: Checkpoint, channels: int, side: int, classes: int | None, latent: Latent | None) -> DataSpace:
    own = ("of EDM2's own: {autoencoder: stabilityai/sd-vae-ft-mse, scale: 0.5, mean: [5.81, 3.25, 0.12, -2.15], "
           "std: [4.17, 4.62, 3.71, 3.28], spread: 0.5}")  # fmt: skip
    return image_space(checkpoint, channels, side, classes, latent, own)


def edm_network(
    checkpoint: Checkpoint, latent: Latent | None, null: bool
) -> tuple[SongUNetConfig | DhariwalUNetConfig, DataSpace]:
    """Which network of EDM's code has these tensors, by their names and shapes, and what it makes.

    Raises CheckpointError for those of another, and FieldError for latents of no known autoencoder.
    """
    levels = _levels(checkpoint, "conv1", "qkv")
    embedding, features = checkpoint.shape("map_layer0.weight", 2)
    width, channels = checkpoint.shape(f"enc.{levels.side}x{levels.side}_conv.weight", 4)[:2]
    classes = checkpoint.shape("map_label.weight", 2)[1] if "map_label.weight" in checkpoint.tensors else None
    space = _space(checkpoint, channels, levels.side, classes, latent)
    common: dict[str, Any] = {
        "widths": levels.widths, "blocks": levels.blocks, "attention": levels.attention, "embedding": embedding,
        "null_class": null and classes is not None,
    }  # fmt: skip
    if "out_conv.weight" in checkpoint.tensors:
        leaving = checkpoint.shape("out_conv.weight")[0]
        return DhariwalUNetConfig(width=features, sigma=leaving == 2 * channels, **common), space
    leaving = checkpoint.shape(f"dec.{levels.side}x{levels.side}_aux_conv.weight")[0]
    names = set(checkpoint.tensors)
    residual, skip = (any(f"_aux_{kind}" in n for n in names if n[:4] == "enc.") for kind in ("residual", "skip"))
    return SongUNetConfig(
        width=width,
        features=features,
        fourier="map_noise.freqs" in names,
        encoder="residual" if residual else "skip" if skip else "standard",
        decoder="skip" if any("_aux_up" in name for name in names) else "standard",
        taps=_taps(checkpoint),
        sigma=leaving == 2 * channels,
        **common,
    ), space


def _taps(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Of the filters, which are stored; here their number alone matters."""
    sides = {tuple(v.shape) for name, v in checkpoint.tensors.items() if name.endswith("resample_filter")}
    known: dict[tuple[int, ...], tuple[int, ...]] = {(1, 1, 2, 2): (1, 1), (1, 1, 4, 4): (1, 3, 3, 1)}
    if len(sides) > 1 or not sides <= known.keys():
        raise CheckpointError(f"{checkpoint.source}: has filters of the shapes {sorted(sides)}; 2 or 4 are known here")
    return known[sides.pop()] if sides else (1, 1)


def _of_edm2(
    checkpoint: Checkpoint, latent: Latent | None, balances: Mapping[str, float]
) -> tuple[EDM2UNetConfig, DataSpace]:
    levels = _levels(checkpoint, "conv_res1", "attn_qkv")
    embedding, features = checkpoint.shape("emb_noise.weight", 2)
    channels = checkpoint.shape("out_conv.weight")[0]
    classes = checkpoint.shape("emb_label.weight", 2)[1] if "emb_label.weight" in checkpoint.tensors else None
    network = EDM2UNetConfig(widths=levels.widths, blocks=levels.blocks, attention=levels.attention,
                             features=features, embedding=embedding, **balances)  # fmt: skip
    return network, _space(checkpoint, channels, levels.side, classes, latent)
