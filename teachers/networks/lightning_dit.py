"""The transformer of LightningDiT and of JiT's blocks: a SiT with modern parts, each of which may be left out.

RMS norms with a learned scale, SwiGLU, rotary positions beside the added ones, normalised queries and keys, modulation
without shifts. Yao, Yang and Wang, arXiv 2501.01423. Modules carry the names of its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import Network, embed, modulated_norm, muted, require_patches, rms_norm, zeroed
from teachers.networks.embeddings import Rope, position_embedding
from teachers.networks.sit import LabelEmbedder, Mlp, PatchEmbed, TimestepEmbedder, modulation, unpatchify_last
from teachers.space import Cond, DataSpace


class RMSNorm(nn.Module):
    """x over the root of its mean square in the last dimension, times a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x) * self.weight


class SwiGLU(nn.Module):
    """Linear, SiLU of the first half times the second, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.w12(h).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


class RotaryAttention(nn.Module):
    """Self-attention by torch's fused function whose queries and keys may be normalised, then turned."""

    def __init__(self, width: int, heads: int, norm: type[nn.Module] | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Identity() if norm is None else norm(width // heads)
        self.k_norm = nn.Identity() if norm is None else norm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor, rope: Rope | None) -> Tensor:
        query, key, value = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = rope(query), rope(key)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


def modulated(norm: nn.Module | None, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(h), or a layer norm without parameters, under modulation."""
    if norm is None:
        return modulated_norm(h, shift, scale)
    return norm(h) * (1 + scale) + shift


class RotaryBlock(nn.Module):
    """Attention and MLP, each modulated, gated and added."""

    def __init__(self, width: int, heads: int, hidden: int | None, rms: bool, qk_norm: bool, shift: bool) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = RMSNorm(width) if rms else None
        self.norm2 = RMSNorm(width) if rms else None
        self.attn = RotaryAttention(width, heads, (RMSNorm if rms else nn.LayerNorm) if qk_norm else None)
        self.mlp = Mlp(width) if hidden is None else SwiGLU(width, hidden)
        self.adaLN_modulation = modulation(width, 6 if shift else 4)

    def forward(self, h: Tensor, embedding: Tensor, rope: Rope | None) -> Tensor:
        first, second = self.adaLN_modulation(embedding)[:, None].chunk(2, dim=-1)
        shift, scale, gate = self._three(first)
        h = h + gate * self.attn(modulated(self.norm1, h, shift, scale), rope)
        shift, scale, gate = self._three(second)
        return h + gate * self.mlp(modulated(self.norm2, h, shift, scale))

    def _three(self, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate."""
        if self.shift:
            shift, scale, gate = said.chunk(3, dim=-1)
            return shift, scale, gate
        scale, gate = said.chunk(2, dim=-1)
        return torch.zeros_like(scale), scale, gate


class RotaryFinalLayer(nn.Module):
    """A modulated norm and a linear layer to the patches."""

    def __init__(self, width: int, features: int, rms: bool) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width) if rms else None
        self.linear = zeroed(nn.Linear(width, features))
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(embedding)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(self.norm_final, h, shift, scale))


class LightningDiT(Network):
    """x, t, cond -> an image of x's shape; see `LightningDiTConfig` for the arguments and `Network` for the call."""

    def __init__(self, config: LightningDiTConfig, space: DataSpace) -> None:
        super().__init__()
        assert space.classes is not None
        self.channels, rows, columns = space.shape
        self.patch, self.classes, width = config.patch, space.classes, config.width
        rows, columns = rows // config.patch, columns // config.patch
        self.x_embedder = PatchEmbed(self.channels, config.patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(space.classes + config.null_class, width)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_embedding(rows, columns, width)[None])
        self.feat_rope = Rope(rows, columns, width // config.heads) if config.rope else None
        self.blocks = nn.ModuleList(
            RotaryBlock(width, config.heads, config.hidden, config.rms, config.qk_norm, config.shift)
            for _ in range(config.depth)
        )
        features = config.patch**2 * self.channels * (2 if config.sigma else 1)
        self.final_layer = RotaryFinalLayer(width, features, config.rms)

    def second_time(self) -> nn.Module:
        """See `Network`."""
        return muted(self.t_embedder, "mlp.2")

    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        table = self.y_embedder.embedding_table
        return nn.functional.silu(embed(self.t_embedder, table, t, cond, shift, self.classes))

    def _enter(self, x: Tensor) -> Tensor:
        return self.x_embedder(x) + self.pos_embed

    def _block(self, number: int, h: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        return self.blocks[number](h, embedding, self.feat_rope)

    def _leave(self, h: Tensor, embedding: Tensor) -> Tensor:
        return unpatchify_last(self.final_layer(h, embedding), self.patch)[:, : self.channels]


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig:
    """Side of a patch; width, depth and attention heads; hidden width of its SwiGLU, null for an MLP with GELU; whether
    norms are RMS norms with a scale, positions rotary too, queries and keys normalised, modulation has shifts; whether
    there is a class id for "no class"; whether it predicts a variance too, which is dropped."""

    patch: int = 1
    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int | None = 1024
    rms: bool = True
    rope: bool = True
    qk_norm: bool = False
    shift: bool = True
    null_class: bool = True
    sigma: bool = False

    highest = 1.0
    """Radians a unit time: times are fed as they are."""

    def __post_init__(self) -> None:
        divides = self.width % 4 == 0 and self.width % max(self.heads, 1) == 0
        turns = not self.rope or (divides and self.width // max(self.heads, 1) % 4 == 0)
        require(
            self,
            patch=(self.patch >= 1, "must be at least 1"),
            width=(self.width >= 1 and divides and turns,
                   "must be a multiple of 4 (for positions) and of heads (four times that for rope)"),
            depth=(self.depth >= 1, "must be at least 1"),
            heads=(self.heads >= 1, "must be at least 1"),
            hidden=(self.hidden is None or self.hidden >= 1, "must be null or at least 1"),
        )  # fmt: skip

    def check(self, space: DataSpace) -> None:
        """See `teachers.networks.base.require_patches`."""
        require_patches(self, space)

    def build(self, space: DataSpace) -> LightningDiT:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        with torch.device("cpu"):
            return LightningDiT(self, space)
