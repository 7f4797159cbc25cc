"""What adapters share: what a recipe says of a file, and the teacher that a filled network makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from teachers.checkpoints import Checkpoint, read
from teachers.errors import CheckpointError
from teachers.fields import FieldError, require
from teachers.fill import Placement
from teachers.networks import AnyConfig, to_entry
from teachers.networks.base import in_its_precision
from teachers.networks.conventions import ConventionConfig, Flow
from teachers.networks.converted import Converted, ConvertedConfig
from teachers.space import Cond, DataSpace, Latent
from teachers.velocity import Rule, Teacher


@dataclass(frozen=True, kw_only=True)
class Foreign(ABC):
    """What a recipe says of any checkpoint. path: its file or folder; weights: which of a training checkpoint's, null
    for the family's best (averaged ones first); licence: of the weights, which students inherit; placement: where
    they go."""

    path: str
    weights: str | None = None
    licence: str = "unknown"
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        require(self, path=(bool(self.path), "must name a file or a folder"))

    def load(self) -> Teacher:
        """The frozen teacher. Raises CheckpointError, and FieldError for keys that the file does not answer."""
        return self._teacher(weights=True)

    def outline(self) -> Teacher:
        """The same without weights: everything is checked, nothing can be computed."""
        return self._teacher(weights=False)

    @abstractmethod
    def _teacher(self, weights: bool) -> Teacher:
        """With its weights or without them; raises as `load` does."""


def require_said(config: Foreign, checkpoint: Checkpoint, **values: object) -> None:
    """Raises FieldError for every key that neither the recipe nor the file's own arguments answer (None or empty)."""
    missing = {
        key: f"is needed: {checkpoint.source} does not say it (it holds no training arguments beside its weights)"
        for key, value in values.items()
        if value is None or value == ""
    }
    if missing:
        raise FieldError(type(config).__name__, missing)


def known(config: Foreign, checkpoint: Checkpoint, key: str, values: Sequence[str]) -> Any:
    """The recipe's value of a key, or else that of the file's own arguments, or None. Raises CheckpointError for one of
    the file's that is none of `values`."""
    told = checkpoint.arguments.get(key)
    if getattr(config, key) is not None or told is None:
        return getattr(config, key)
    if str(told).lower() not in values:
        raise CheckpointError(
            f"{checkpoint.source}: was trained with {key} {told}, which is not read here (known: {', '.join(values)}); "
            f"if it is one of these by another name, set teacher.{key}"
        )
    return str(told).lower()


_MARKS: dict[str, tuple[str, str]] = {
    "r_embedder.mlp.0.weight": ("an already distilled MeanFlow, whose teacher is its diagonal", "meanflow"),
    "feat_rope.freqs_cos": ("a LightningDiT", "lightningdit"),
    "DiTBlock_0.Dense_0.kernel": ("a shortcut model in the layout of flax", "shortcut_models"),
    "net.in_context_posemb": ("a JiT", "jit"),
    "net.h_embedder.mlp.0._flax_linear.weight": (
        "an already distilled improved MeanFlow, whose teacher is its diagonal",
        "imeanflow",
    ),
}
"""A tensor that one family alone has: what it is then, and its name."""


def refuse_others(checkpoint: Checkpoint, family: str) -> None:
    """Raises CheckpointError for a file that is plainly of another family than the recipe says."""
    for mark, (what, name) in _MARKS.items():
        if name != family and any(f".{tensor}".endswith(f".{mark}") for tensor in checkpoint.tensors):
            raise CheckpointError(f"{checkpoint.source}: is {what} (it has {mark}); set teacher.name: {name}")


def opened(config: Foreign, family: str, prefer: Sequence[str]) -> Checkpoint:
    """The file of a recipe's teacher. Raises CheckpointError, also if it is plainly of another family."""
    checkpoint = read(config.path, prefer, config.weights)
    refuse_others(checkpoint, family)
    return checkpoint


def image_space(
    checkpoint: Checkpoint, channels: int, side: int, classes: int | None, latent: Latent | None, example: str
) -> DataSpace:
    """Squares of pixels in [-1, 1], or of latents. example: of their key. Raises FieldError for latents of no known
    autoencoder."""
    if latent is None and channels not in (1, 3):
        raise FieldError("teacher", {"latent": (
            f"is needed: {checkpoint.source} works on {channels} channels, which are latents, and does not say of "
            f"which autoencoder ({example})"
        )})  # fmt: skip
    return DataSpace((channels, side, side), classes, (-1.0, 1.0) if latent is None else None)


def heads_of(checkpoint: Checkpoint, width: int, told: int | None) -> int:
    """Heads of attention: those that are told, or those of the published sizes. Raises FieldError where there are none
    or they do not divide the width."""
    if told is None and (width == 1152 or width % 64 == 0):
        told = 16 if width == 1152 else width // 64
    if told is None:
        raise FieldError("teacher", {"heads": (
            f"is needed: {checkpoint.source} does not say it, and its width of {width} is none of the published sizes"
        )})  # fmt: skip
    if told < 1 or width % told:
        raise FieldError("teacher", {"heads": f"must divide the width of {checkpoint.source}, {width}, got {told}"})
    return told


def assemble(
    config: Foreign,
    checkpoint: Checkpoint,
    family: str,
    backbone: nn.Module,
    network: Any,
    convention: ConventionConfig,
    space: DataSpace,
    *,
    null: Cond = None,
    rule: Rule | None = None,
    latent: Latent | None = None,
    sampler: Mapping[str, Any] | None = None,
    said: Mapping[str, Any] | None = None,
) -> Teacher:
    """The teacher of a `backbone` that was filled from `checkpoint` and is described by `network`, behind `convention`.

    null, rule, latent: see `Teacher`. sampler: its family's usual solver, steps and guidance; said: further facts for
    `distill teachers info` and for the exports of students. Both are plain data.
    """
    channels = len(latent.mean or latent.std or ()) if latent else 0
    if channels not in (0, space.shape[0]):
        raise FieldError("teacher", {"latent": (
            f"has mean and std of {channels} channels, {checkpoint.source} works on {space.shape[0]}"
        )})  # fmt: skip
    plain = convention == Flow()
    module = backbone if plain else Converted(backbone, convention).eval()
    entry: AnyConfig = network if plain else ConvertedConfig(network=network, convention=convention)
    dtype = next(backbone.parameters()).dtype
    unread = any(parameter.is_meta for parameter in backbone.parameters())
    return Teacher(
        velocity=module if dtype == torch.float32 else InDtype(module),
        space=space,
        path=convention.path,
        network=module,
        network_config=to_entry(entry),
        null=null,
        rule=rule or Rule(),
        latent=latent,
        info={
            "id": config.path,
            "family": family,
            "digest": "not read" if unread else checkpoint.digest,
            "weights": checkpoint.weights,
            "licence": config.licence,
            "latent": asdict(latent) if latent else None,
            "sampler": dict(sampler or {}),
            **(said or {}),
        },
    )


class InDtype(nn.Module):
    """A velocity whose network computes in another dtype than its points have; times stay as they are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See `teachers.velocity.Velocity`."""
        return in_its_precision(self.network, x_t, t, cond)
