"""Folders of the diffusers package: one adapter, a row for each class of networks.

The class and its config say how the network is called (teachers.networks.diffusers), the scheduler's config how it sees
points and times, the autoencoder's config what its latents are. The shift of a scheduler belongs to the grid of its
sampler, not to the network: it stands in ``info["sampler"]``. Esser et al., arXiv 2403.03206.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from teachers.adapters.base import Foreign, assemble
from teachers.adapters.diffusers_folder import Folder
from teachers.adapters.diffusers_rows import ROWS, convention, is_edm, is_flow, shift
from teachers.checkpoints import read
from teachers.errors import CheckpointError
from teachers.fields import FieldError, require
from teachers.fill import fill
from teachers.networks.diffusers import DiffusersConfig
from teachers.space import Cond, DataSpace, Embedding, Latent
from teachers.velocity import Rule, Teacher


@dataclass(frozen=True, kw_only=True)
class Diffusers(Foreign):
    """A folder that diffusers saved: model_index.json, transformer or unet, scheduler, vae.

    weights: null, a variant of the file (fp16), or another folder of the network (unet_ema). size: of the samples
    [height, width], or of films [frames, height, width], null if the config says it; tokens: of a caption; null: file
    with the embedding of the empty prompt (one row of text, text_mask, pooled); embedded_guidance: the scale that a
    network which embeds one is told; pixels: [height, width] of the pictures, where the network is told of them, null
    if the vae says it; frame_rate: of films, likewise; latent: where the folder has no vae; renorm: see `Rule`, null
    as the family's pipeline has it by default; distilled: true to take a model that was distilled already.
    """

    size: tuple[int, ...] | None = None
    tokens: int | None = None
    null: str | None = None
    embedded_guidance: float | None = None
    pixels: tuple[int, int] | None = None
    frame_rate: float | None = None
    latent: Latent | None = None
    renorm: Literal["none", "width", "token", "cap", "deviation"] | None = None
    distilled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            size=(self.size is None or min(self.size, default=0) >= 1, "must be sizes of at least 1"),
            tokens=(self.tokens is None or self.tokens >= 1, "must be at least 1"),
        )

    def _teacher(self, weights: bool) -> Teacher:
        folder = Folder.at(Path(self.path).expanduser(), self.weights)
        self._refuse(folder)
        row, latent = ROWS[folder.name], self.latent or folder.latent
        network = self._network(folder)
        space = self._space(folder, network, latent)
        if network.form.sized(network.full):
            network = replace(network, pixels=self._pixels(folder, space))
        if is_edm(folder.scheduler):
            network = replace(network, negative=folder.scheduler.get("prediction_type") == "v_prediction")
        try:
            network.check(space)
            tokens = row.tokens(network.full, space.shape)
            seen = convention(row, network.full, folder.scheduler, tokens)
        except FieldError as error:
            if self.size is not None and "settings" in error.problems:
                text = error.problems["settings"].partition(", got ")[0]
                raise FieldError("Diffusers", {"size": f"does not fit: {folder.part / 'config.json'} {text}"}) from None
            raise CheckpointError(f"{folder.part / 'config.json'}: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{folder.root / 'scheduler' / 'scheduler_config.json'}: is of {error}") from None
        checkpoint = replace(read(str(folder.weights(self.weights))), weights=folder.part.name)
        try:
            module = fill(network.bare, checkpoint, self.placement, weights=weights)
        except FieldError as error:
            raise CheckpointError(f"{folder.part / 'config.json'}: {error}; copy it again") from None
        sampler = {"solver": "euler", "steps": row.steps, "guidance": row.guidance}
        if is_flow(folder.scheduler):
            sampler["shift"] = shift(row, folder.scheduler, tokens)
        licence = self.licence if self.licence != "unknown" else folder.licence or "unknown"
        return assemble(
            replace(self, licence=licence),
            checkpoint,
            "diffusers",
            network.wrap(module),
            network,
            seen,
            space,
            null=self._null(network, space),
            rule=row.rule if self.renorm is None else Rule(renorm=None if self.renorm == "none" else self.renorm),
            latent=latent,
            sampler=sampler,
            said={"class": folder.name, "embedded_guidance": network.guidance},
        )

    def _refuse(self, folder: Folder) -> None:
        """Raises CheckpointError for a class that is not read here, FieldError for a model of few steps."""
        if folder.name not in ROWS:
            raise CheckpointError(
                f"{folder.part / 'config.json'}: is of class {folder.name}, which is not read here; known: "
                f"{', '.join(sorted(ROWS))}"
            )
        if not self.distilled and folder.few_steps is not None:
            raise FieldError("Diffusers", {"distilled": (
                f"is false, but {folder.root} was distilled to few steps already ({folder.few_steps}), so what it says "
                "is not the velocity of a flow: distil its own teacher, or set distilled: true"
            )})  # fmt: skip

    def _network(self, folder: Folder) -> DiffusersConfig:
        try:
            network = DiffusersConfig(backbone=folder.name, settings=folder.settings)
        except FieldError as error:
            raise CheckpointError(f"{folder.part / 'config.json'}: {error}") from None
        embeds = bool(network.full.get("guidance_embeds"))
        if embeds and self.embedded_guidance is None:
            raise FieldError("Diffusers", {"embedded_guidance": (
                f"is needed: {folder.name} is told a scale of guidance ({ROWS[folder.name].guidance} is usual), which "
                "its student then keeps"
            )})  # fmt: skip
        if network.form.filmed and self.frame_rate is None:
            raise FieldError("Diffusers", {"frame_rate": (
                f"is needed: {folder.name} is told how many frames a second its films have (25 is usual)"
            )})  # fmt: skip
        return replace(
            network,
            guidance=self.embedded_guidance if embeds else None,
            frame_rate=self.frame_rate if network.form.filmed else None,
        )

    def _space(self, folder: Folder, network: DiffusersConfig, latent: Latent | None) -> DataSpace:
        config = folder.part / "config.json"
        said = network.full.get("sample_size") if ROWS[folder.name].sample_size else None
        size = self.size or ((said, said) if isinstance(said, int) else said)
        fields = network.form.fields(network.full)
        channels = network.form.channels(network.full)
        missing = {}
        if size is None:
            missing["size"] = f"is needed: {config} does not say it ([height, width], of films [frames, height, width])"
        if self.tokens is None and any(None in shape for shape in fields.values()):
            missing["tokens"] = f"is needed: {config} does not say how many tokens the embedding of a caption has"
        if latent is None and channels not in (1, 3):
            missing["latent"] = (
                f"is needed: {folder.root} has no vae, and {channels} channels are latents (e.g. {{autoencoder: name, "
                "scale: 0.18215})"
            )
        if missing:
            raise FieldError("Diffusers", missing)
        assert size is not None
        shapes = {n: tuple(self.tokens or 0 if d is None else d for d in shape) for n, shape in fields.items()}
        classes = shapes.pop("class", (None,))[0]
        return DataSpace(
            (channels, *size),
            classes,
            (-1.0, 1.0) if latent is None else None,
            tuple(Embedding(n, s, "bool" if n.endswith("mask") else "float32") for n, s in shapes.items()),
        )

    def _pixels(self, folder: Folder, space: DataSpace) -> tuple[int, int]:
        if self.pixels is not None:
            return self.pixels
        if folder.reduction is None:
            raise FieldError("Diffusers", {"pixels": (
                f"is needed: {folder.name} is told [height, width] of its pictures, and {folder.root} has no vae that "
                "says how large a latent's are"
            )})  # fmt: skip
        height, width = space.shape[-2:]
        return height * folder.reduction, width * folder.reduction

    def _null(self, network: DiffusersConfig, space: DataSpace) -> Cond:
        if space.classes is not None:
            null = network.form.null_class(network.full)
            return None if null is None else {"class": torch.tensor(null)}
        if self.null is None:
            return None
        held = read(self.null).tensors
        wanted = {e.name: e for e in space.embeddings}
        off = [*(n for n, e in wanted.items() if n not in held or tuple(held[n].shape) != e.shape),
               *(held.keys() - wanted.keys())]  # fmt: skip
        if off:
            raise FieldError("Diffusers", {"null": (
                f"names {self.null}, which is wrong in {', '.join(off)}: it must hold one row of each of "
                f"{', '.join(f'{n} {list(e.shape)}' for n, e in wanted.items())}, the embedding of the empty prompt"
            )})  # fmt: skip
        return {n: held[n].to(getattr(torch, e.dtype)) for n, e in wanted.items()}
