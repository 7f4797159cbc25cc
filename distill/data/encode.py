"""Shards -> shards with what a frozen network makes of them, so that training need not run it: latents of images by a
diffusers autoencoder, embeddings of captions by a transformers text encoder, both from a local folder.

What else a sample has goes along. Sample i depends on its own content alone and on the batch that it is in, which is
cut from its shard: any number of processes writes the same shards, and a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distill.data.build import Plan, write_shards
from distill.data.manifest import DataError, Field, Manifest
from distill.data.reader import to_float
from distill.data.samples import OpenShard, open_shard
from distill.data.sources.base import Members
from distill.data.store import Folder
from distill.parallel import device
from distill.rows import Rows
from teachers.checkpoints import sha256
from teachers.networks.diffusers import completed

Encode = Callable[[range, Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Numbers and values of samples -> tensors ``[b, ...]`` by the name of their field."""

LATENTS, EMBEDDINGS = "latent.safetensors", "text.safetensors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def build_latents(
    source: Folder, folder: Path, autoencoder: Path, *, sample: bool = False, flips: bool = False, seed: int = 0,
    dtype: str = "float32", batch: int = 32,
) -> Manifest:  # fmt: skip
    """Latents of the images of `source`: mean and standard deviation, or one sample of each; `flips`: of the mirrored
    images too. They are kept as the autoencoder gives them; its scale and shift are in the manifest, for the reader.

    Raises DataError for a folder that is no autoencoder with one scale and shift.
    """
    manifest = source.manifest()
    if "image" not in manifest.fields:
        raise DataError(f"{source}: no field 'image' to encode (fields: {', '.join(manifest.fields)})")
    network, config = _autoencoder(autoencoder)
    known = {
        "id": autoencoder.resolve().name,
        "digest": _digest(autoencoder),
        "scale": float(config.get("scaling_factor") or 1.0),
        "shift": float(config.get("shift_factor") or 0.0),
    }

    def encode(numbers: range, values: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        x = to_float(torch.stack([value["image"] for value in values]))
        x = x if x.shape[1] == config.get("in_channels", 3) else x.expand(-1, 3, -1, -1)
        found: dict[str, Tensor] = {}
        for name, images in {"latent": x, **({"latent_flip": x.flip(-1)} if flips else {})}.items():
            mean, std = _encoded(network, images.to(device()))
            noise = Rows(seed, name, 0, numbers.start, len(numbers), device())
            found[name] = mean + std * noise.normal(*mean.shape[1:]) if sample and std is not None else mean
            if std is not None and not sample:
                found[f"{name}_std"] = std
        return {name: value.to(_DTYPES[dtype]) for name, value in found.items()}

    made_from = {"builder": "latents", "autoencoder": known, "sample": sample, "flips": flips, "dtype": dtype,
                 "seed": seed, "batch": batch}  # fmt: skip
    return _encode(source, manifest, folder, "image", LATENTS, encode, made_from, batch, known)


def build_embeddings(source: Folder, folder: Path, encoder: Path, *, length: int = 77, batch: int = 32) -> Manifest:
    """Embeddings of the captions of `source`: `text` ``[length, d]``, `text_mask` ``[length]`` and, where the encoder
    has one, `pooled` ``[d]``. Raises DataError for a folder that is no text encoder with its tokenizer."""
    manifest = source.manifest()
    if "caption" not in manifest.fields:
        raise DataError(f"{source}: no field 'caption' to encode (fields: {', '.join(manifest.fields)})")
    network, tokenizer = _text_encoder(encoder)

    def encode(numbers: range, values: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [value["caption"] for value in values]
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        made = network(
            input_ids=tokens.input_ids.to(device()), attention_mask=tokens.attention_mask.to(device()), return_dict=True
        )
        found = {"text": made.last_hidden_state.float(), "text_mask": tokens.attention_mask.to(torch.bool)}
        pooled = getattr(made, "text_embeds", None)
        pooled = getattr(made, "pooler_output", None) if pooled is None else pooled
        return found if pooled is None else {**found, "pooled": pooled.float()}

    made_from = {"builder": "embeddings", "encoder": encoder.resolve().name, "digest": _digest(encoder),
                 "length": length, "batch": batch}  # fmt: skip
    return _encode(source, manifest, folder, None, EMBEDDINGS, encode, made_from, batch, manifest.autoencoder)


def _encode(
    source: Folder, manifest: Manifest, folder: Path, replaced: str | None, member: str, encode: Encode,
    made_from: Mapping[str, Any], batch: int, autoencoder: Mapping[str, Any] | None,
) -> Manifest:  # fmt: skip
    """Writes the samples of `source` again, shard by shard, with a further member and without the field `replaced`."""
    if member in {field.member for field in manifest.fields.values()}:
        raise DataError(f"{source}: has members .{member} already")
    starts = [0]
    for shard in manifest.shards:
        starts.append(starts[-1] + shard.samples)
    opened = lru_cache(4)(lambda number: _open(source, manifest, number))
    wanted = {name: field for name, field in manifest.fields.items() if name in ("image", "caption")}
    kept = {field.member for name, field in manifest.fields.items() if name != replaced}

    def read(number: int) -> tuple[str, Mapping[str, Any], Members]:
        shard = next(n for n in range(len(starts)) if starts[n + 1] > number)
        at: OpenShard = opened(shard)
        index = number - starts[shard]
        return at.key(index), at.read(index, wanted), {m: c for m, c in at.contents(index).items() if m in kept}

    @torch.no_grad()
    def make(rows: range) -> Iterator[tuple[str, Members]]:
        for first in range(rows.start, rows.stop, batch):
            numbers = range(first, min(first + batch, rows.stop))
            read_ = [read(number) for number in numbers]
            found = encode(numbers, [values for _, values, _ in read_])
            for i, (key, _, members) in enumerate(read_):
                tensors = {name: value[i].cpu().contiguous() for name, value in found.items()}
                yield key, {**members, member: safetensors.torch.save(tensors)}

    _, values, _ = read(0)
    with torch.no_grad():
        trial = encode(range(1), [values])
    fields = {name: field for name, field in manifest.fields.items() if name != replaced}
    for name, value in trial.items():
        fields[name] = Field(member, str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]))
    size = manifest.shards[0].samples
    about = {**{k: v for k, v in manifest.source.items() if k != "plan"}, "made from": manifest.digest}
    plan = Plan(
        manifest.name, manifest.split, manifest.samples, size, fields, about,
        {**made_from, "input": manifest.digest}, autoencoder,
    )  # fmt: skip
    return write_shards(folder, plan, make)


def _open(source: Folder, manifest: Manifest, number: int) -> OpenShard:
    opened = open_shard(source, manifest.shards[number])
    if opened.wrong:
        raise DataError(opened.wrong[0])
    return opened


def _digest(folder: Path) -> str:
    """Of the configuration and the weights."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name} {sha256(file)}\n".encode())
    return found.hexdigest()[:16]


def _config(folder: Path, what: str) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not the local folder of {what} ({error}); download it first") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: not a configuration")
    return found


def _autoencoder(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = _config(folder, "a diffusers autoencoder")
    name = str(config.get("_class_name"))
    diffusers = _library("diffusers", folder)
    config = dict(completed(config))
    if config.get("latents_mean") is not None:
        raise DataError(f"{folder}: {name} shifts and scales each channel on its own, which shards cannot state")
    if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
        raise DataError(f"{folder}: {name} is no autoencoder that diffusers {diffusers.__version__} knows")
    return _loaded(getattr(diffusers, name), folder), config


def _text_encoder(folder: Path) -> tuple[Any, Any]:
    config = _config(folder, "a transformers text encoder")
    name = str(next(iter(config.get("architectures") or []), ""))
    transformers = _library("transformers", folder)
    if not name.endswith(("EncoderModel", "TextModel", "TextModelWithProjection")) or not hasattr(transformers, name):
        raise DataError(f"{folder}: {name or 'an unnamed model'} is no text encoder (as CLIPTextModel, T5EncoderModel)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer beside the encoder ({str(error).splitlines()[0]})") from None
    return _loaded(getattr(transformers, name), folder), tokenizer


def _library(name: str, folder: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the folder
    try:
        return __import__(name)
    except ModuleNotFoundError:
        raise DataError(f"{folder}: needs {name}: install with the extra [diffusers]") from None


def _loaded(cls: Any, folder: Path) -> Any:
    try:
        network = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: cannot be loaded as safetensors ({str(error).splitlines()[0]})") from None
    return network.to(device()).eval().requires_grad_(False)


def _encoded(network: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the latents, or the latents and None."""
    made = network.encode(x)
    held = getattr(made, "latent_dist", None)
    return (made.latent, None) if held is None else (held.mean, held.std)
