"""What a recipe says of its shards against what their manifest says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.data.build import name_of
from distill.data.manifest import IMAGES, DataError, Manifest
from distill.data.sources import mark
from distill.data.store import Folder

if TYPE_CHECKING:
    from distill.data.shards import Shards


def _is_built(manifest: Manifest) -> bool:
    """Whether a source is what these shards were built from: pairs and latents are made otherwise."""
    return manifest.source.get("plan", {}).get("builder") in ("digits", "files")


def _check_source(config: Shards, folder: Folder, manifest: Manifest) -> None:
    """Raises DataError for shards of other data than the recipe would build them from."""
    if config.source is None or not _is_built(manifest):
        return
    asked = name_of(config.source), config.split
    if (manifest.name, manifest.split) != asked:
        raise DataError(
            f"{folder}: holds {manifest.name!r}, split {manifest.split!r}, and the recipe's source is {asked[0]!r}, "
            f"split {asked[1]!r}: set path to a folder that is not there yet, or source to null to use it",
            "path",
        )


def check_files(config: Shards, folder: Folder, manifest: Manifest) -> None:
    """Raises DataError for shards that were built from other files than the recipe's source has. For a job that begins:
    the source of one that goes on may have changed since."""
    held = manifest.source.get("files")
    if not held or config.source is None or not _is_built(manifest):
        return
    there = mark(config.source, config.split)
    if there and held != there:
        raise DataError(
            f"{folder}: was built from other files than are in the recipe's source {config.source}: set path to a "
            "folder that is not there yet, or source to null to use it",
            "path",
        )


def check(config: Shards, folder: Folder, manifest: Manifest, cond: Sequence[str]) -> None:
    """Raises DataError where the manifest is not what the recipe expects."""
    held, latent = manifest.fields, manifest.autoencoder
    _check_source(config, folder, manifest)
    for key, names in (("field", (config.field,)), ("cond", cond)):
        if absent := [name for name in names if name not in held]:
            there = ", ".join(held)
            raise DataError(f"{folder}: no field {absent[0]!r} (fields: {there}); set data.{key}", key)
    field = held[config.field]
    if field.member.rpartition(".")[2] in ("txt", "json", "cls"):
        raise DataError(f"{folder}: the field {config.field!r} is no array; set data.field to one to train on", "field")
    if config.shape is not None and config.shape != field.shape:
        raise DataError(f"{folder}: {config.field} has the shape {list(field.shape)}, data.shape says "
                        f"{list(config.shape)}", "shape")  # fmt: skip
    if (config.field == "latent") != (config.autoencoder is not None):
        say = f"set data.autoencoder to {latent['id']}" if latent and config.field == "latent" else "remove it"
        raise DataError(f"{folder}: data.autoencoder is for latents and must name theirs: {say}", "autoencoder")
    if config.field == "latent":
        if latent is None or config.shape is None:
            missing = f"set data.shape to {list(field.shape)}" if latent else "its manifest names no autoencoder"
            raise DataError(f"{folder}: the field 'latent': {missing}", *(["shape"] if latent else ["field"]))
        if config.autoencoder not in (latent["id"], latent.get("digest")):
            raise DataError(f"{folder}: latents of the autoencoder {latent['id']} ({latent.get('digest')}), "
                            f"data.autoencoder says {config.autoencoder}", "autoencoder")  # fmt: skip
    flippable = "latent_flip" in held if config.field == "latent" else field.member in IMAGES
    if config.flip and not flippable:
        raise DataError(f"{folder}: data.flip, but only images, and latents that were made with --flips, have "
                        "mirror images", "flip")  # fmt: skip
