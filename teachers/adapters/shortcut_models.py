"""shortcut-models (MIT, JAX): a SiT in flax's names, told of the number of steps besides the time.

    X_{s, s + 1/n}(x) = x + F(x, s, log2 n) / n,  v(x, t) = F(x, t, log2 finest)

Frans et al., arXiv 2410.12557. t = 0 is noise, of which its path keeps 1e-5 at the data, which is neglected here. Its
files are pickles, read without running anything. Its attention divides by the features of a head where others divide by
their root: queries are scaled to make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from teachers.adapters.base import Foreign, assemble, heads_of, opened
from teachers.adapters.two_time import TwoTime, centred, part
from teachers.checkpoints import Checkpoint
from teachers.errors import CheckpointError
from teachers.fields import FieldError, require
from teachers.fill import fill
from teachers.networks.conventions import Flow
from teachers.networks.embeddings import position_embedding
from teachers.networks.shortcut import ShortcutConfig
from teachers.networks.sit import SiTConfig, TimestepEmbedder
from teachers.space import DataSpace, Latent
from teachers.velocity import Teacher

LATENT = Latent(autoencoder="stabilityai/sd-vae-ft-mse", scale=0.18215)
"""Of all that work on four channels."""
_LAYERS = {
    "PatchEmbed_0.Conv_0": "x_embedder.proj",
    "TimestepEmbedder_0.Dense_0": "t_embedder.mlp.0",
    "TimestepEmbedder_0.Dense_1": "t_embedder.mlp.2",
    "TimestepEmbedder_1.Dense_0": "steps.mlp.0",
    "TimestepEmbedder_1.Dense_1": "steps.mlp.2",
    "FinalLayer_0.Dense_0": "final_layer.adaLN_modulation.1",
    "FinalLayer_0.Dense_1": "final_layer.linear",
}
_OF_BLOCK = {
    "Dense_0": "adaLN_modulation.1",
    "Dense_4": "attn.proj",
    "MlpBlock_0.Dense_0": "mlp.fc1",
    "MlpBlock_0.Dense_1": "mlp.fc2",
}
_QKV = ("Dense_2", "Dense_1", "Dense_3")
_TABLE = "LabelEmbedder_0.Embed_0.embedding"
_UNUSED = "Embed_0.embedding"


@dataclass(frozen=True, kw_only=True)
class ShortcutModels(Foreign):
    """A shortcut model, as a teacher at its finest steps (the averaged weights, or `params`). size: side of what it
    works on (32 for latents of 256 pixels); finest: the number of steps that stands for no length, 1 for a plain flow
    trained by the same code; heads: null for those of 64 features (16 at width 1152); latent: null for that of the
    published weights. A file with one class is of a model without classes: it was trained on "no class" alone."""

    size: int | None = None
    finest: int = 128
    heads: int | None = None
    latent: Latent | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.finest
        require(self, finest=(n >= 1 and n & (n - 1) == 0, "must be a power of two"))

    def _teacher(self, weights: bool) -> Teacher:
        return self._parts(weights)[0]

    def two_time(self) -> TwoTime:
        """See `teachers.adapters.two_time.Finished`."""
        diagonal, embedder = self._parts(weights=True, finest=self.finest)
        gap = centred(embedder, _level(self.finest))[1]
        steps = tuple(n for n in (1, 4, 128) if n <= self.finest)
        return TwoTime(diagonal=diagonal, gap=gap, kind="shortcut", finest=self.finest, steps=steps)

    def _parts(self, weights: bool, finest: int | None = None) -> tuple[Teacher, nn.Module]:
        """The diagonal, with a second time that is a number of steps if `finest`; and the embedder of that."""
        found = opened(self, "shortcut_models", ("params_ema", "params"))
        if not weights:
            found = replace(found, tensors={k: torch.empty_like(v, device="meta") for k, v in found.tensors.items()})
        network, space = self._sizes(found)
        tensors = _renamed(found, network, space.shape[1] // network.patch)
        under, rest = part(replace(found, tensors=tensors), "steps.")
        embedder = fill(lambda: TimestepEmbedder(network.width), under, weights=weights)
        tensors = dict(rest.tensors)
        if space.classes is None:  # the row of "no class" is the only one that was trained
            tensors["y_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"][-1:]
        if weights and "t_embedder.mlp.2.bias" in tensors:
            value, _ = centred(embedder, _level(self.finest))
            tensors["t_embedder.mlp.2.bias"] = tensors["t_embedder.mlp.2.bias"] + value
        config = ShortcutConfig(network=network, finest=finest)
        own = replace(found, tensors={f"network.{name}": tensor for name, tensor in tensors.items()})
        backbone = fill(lambda: config.build(space), own, self.placement, weights=weights)
        sampler = {"solver": "euler", "steps": self.finest}
        latent = self.latent or (LATENT if space.shape[0] == 4 else None)
        return assemble(
            self, found, "shortcut_models", backbone, config, Flow(), space,
            null=space.null if network.null_class else None, latent=latent, sampler=sampler,
        ), embedder  # fmt: skip

    def _sizes(self, checkpoint: Checkpoint) -> tuple[SiTConfig, DataSpace]:
        patch, _, channels, width = checkpoint.shape("PatchEmbed_0.Conv_0.kernel", 4)
        if self.size is None:
            raise FieldError("ShortcutModels", {"size": (
                f"is needed: {checkpoint.source} does not say the side of what it works on (32 for latents of 256 "
                "pixels)"
            )})  # fmt: skip
        rows = checkpoint.shape("LabelEmbedder_0.Embed_0.embedding", 2)[0]
        classes = rows - 1 if rows > 2 else None
        config = SiTConfig(
            patch=patch,
            width=width,
            depth=checkpoint.count("DiTBlock_"),
            heads=heads_of(checkpoint, width, self.heads),
            null_class=classes is not None,
        )
        span = (-1.0, 1.0) if channels in (1, 3) else None
        return config, DataSpace((channels, self.size, self.size), classes, span)


def _level(finest: int) -> float:
    return float(finest.bit_length() - 1)


def _renamed(checkpoint: Checkpoint, network: SiTConfig, side: int) -> dict[str, Tensor]:
    """The tensors in a SiT's names and layout, and ``steps.*``. Raises CheckpointError for other names than theirs."""
    blocks = {f"DiTBlock_{i}.": f"blocks.{i}." for i in range(network.depth)}
    layers = _LAYERS | {a + layer: b + _OF_BLOCK[layer] for a, b in blocks.items() for layer in _OF_BLOCK}
    attention = {a: tuple(a + layer for layer in _QKV) for a in blocks}
    of_both = [*layers, *(layer for three in attention.values() for layer in three)]
    expected = {_TABLE, *(f"{layer}.{kind}" for layer in of_both for kind in ("kernel", "bias"))}
    missing, extra = expected - checkpoint.tensors.keys(), checkpoint.tensors.keys() - expected - {_UNUSED}
    if missing or extra:
        parts = [f"{word}: {', '.join(sorted(names)[:8])}" for word, names in
                 (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise CheckpointError(
            f"{checkpoint.source}: is no shortcut model of {network.depth} blocks; {'; '.join(parts)}"
        )
    tensors = {"y_embedder.embedding_table.weight": checkpoint.tensors[_TABLE].float()}
    for layer, ours in layers.items():
        tensors[f"{ours}.weight"], tensors[f"{ours}.bias"] = _laid_out(checkpoint, layer)
    scale = (network.width // network.heads) ** -0.5
    for block, three in attention.items():
        query, key, value = (_laid_out(checkpoint, layer) for layer in three)
        for kind, q, k, v in zip(("weight", "bias"), query, key, value, strict=True):
            tensors[f"{blocks[block]}attn.qkv.{kind}"] = torch.cat([q * scale, k, v])
    row, column = position_embedding(side, side, network.width).chunk(2, dim=-1)
    tensors["pos_embed"] = torch.cat([column, row], dim=-1)[None]  # theirs begins with the column
    return tensors


def _laid_out(checkpoint: Checkpoint, layer: str) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float32: of [..., in, out] as [out, in, ...]."""
    kernel = checkpoint.tensors[f"{layer}.kernel"]
    order = (3, 2, 0, 1) if kernel.dim() == 4 else tuple(reversed(range(kernel.dim())))
    return kernel.permute(order).contiguous().float(), checkpoint.tensors[f"{layer}.bias"].float()
