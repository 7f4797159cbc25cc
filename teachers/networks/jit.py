"""JiT, just image transformers: large patches of pixels through a bottleneck, and tokens of the class in context.

Li and He, arXiv 2511.13720. Its blocks are those of LightningDiT with normalised queries and keys. From one block on,
tokens of the class stand before those of the image; they have no place, and are dropped at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import Network, embed, muted, require_patches
from teachers.networks.embeddings import Rope, position_embedding
from teachers.networks.lightning_dit import RotaryBlock, RotaryFinalLayer
from teachers.networks.sit import LabelEmbedder, TimestepEmbedder, unpatchify_last
from teachers.space import Cond, DataSpace


class BottleneckEmbed(nn.Module):
    """Images ``[b, c, h, w]`` -> tokens ``[b, (h / patch) (w / patch), width]``, through few features."""

    def __init__(self, channels: int, patch: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2).contiguous()  # as of `teachers.networks.sit`


class JiT(Network):
    """x, t, cond -> an image of x's shape; see `JiTConfig` for the arguments and `Network` for the call."""

    def __init__(self, config: JiTConfig, space: DataSpace) -> None:
        super().__init__()
        assert space.classes is not None
        channels, rows, columns = space.shape
        rows, columns = rows // config.patch, columns // config.patch
        self.patch, self.classes, width = config.patch, space.classes, config.width
        self.tokens, self.start = config.tokens, config.start
        self.x_embedder = BottleneckEmbed(channels, config.patch, config.bottleneck, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(space.classes + config.null_class, width)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_embedding(rows, columns, width)[None])
        self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, config.tokens, width)) if config.tokens else None
        self.feat_rope = Rope(rows, columns, width // config.heads, stored=False)
        self.blocks = nn.ModuleList(
            RotaryBlock(width, config.heads, config.hidden, rms=True, qk_norm=True, shift=True)
            for _ in range(config.depth)
        )
        self.final_layer = RotaryFinalLayer(width, config.patch**2 * channels, rms=True)

    def second_time(self) -> nn.Module:
        """See `Network`."""
        return muted(self.t_embedder, "mlp.2")

    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        table = self.y_embedder.embedding_table
        return nn.functional.silu(embed(self.t_embedder, table, t, cond, shift, self.classes))

    def _enter(self, x: Tensor) -> Tensor:
        return self.x_embedder(x) + self.pos_embed

    def _block(self, number: int, h: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        if number == self.start and self.in_context_posemb is not None:
            assert cond is not None  # it was needed for the embedding
            label = self.y_embedder.embedding_table(cond["class"])
            h = torch.cat([label[:, None] + self.in_context_posemb, h], dim=1)
        return self.blocks[number](h, embedding, self.feat_rope)

    def _leave(self, h: Tensor, embedding: Tensor) -> Tensor:
        return unpatchify_last(self.final_layer(h[:, self.tokens :], embedding), self.patch)


@dataclass(frozen=True, kw_only=True)
class JiTConfig:
    """Side of a patch and features that it becomes first; width, depth and attention heads; hidden width of its SwiGLU;
    tokens of the class, and the block that they come before; whether there is a class id for "no class"."""

    patch: int = 4
    bottleneck: int = 32
    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1024
    tokens: int = 32
    start: int = 4
    null_class: bool = True

    highest = 1.0
    """Radians a unit time: times are fed as they are."""

    def __post_init__(self) -> None:
        divides = self.heads >= 1 and self.width % (4 * self.heads) == 0
        require(
            self,
            patch=(self.patch >= 1, "must be at least 1"),
            bottleneck=(self.bottleneck >= 1, "must be at least 1"),
            width=(self.width >= 1 and divides, "must be a multiple of 4 times heads (for rope)"),
            depth=(self.depth >= 1, "must be at least 1"),
            heads=(self.heads >= 1, "must be at least 1"),
            hidden=(self.hidden >= 1, "must be at least 1"),
            tokens=(self.tokens >= 0, "must be at least 0"),
            start=(0 <= self.start < self.depth or not self.tokens, "must be the number of a block, below depth"),
        )

    def check(self, space: DataSpace) -> None:
        """See `teachers.networks.base.require_patches`."""
        require_patches(self, space)

    def build(self, space: DataSpace) -> JiT:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        with torch.device("cpu"):
            return JiT(self, space)
