"""The transformer of SiT, DiT and REPA: a DiT under the names of their checkpoints.

Peebles and Xie, arXiv 2212.09748; Ma et al., arXiv 2401.08740. Unlike `teachers.networks.dit` it has queries and keys
as they are, a sinusoid of 256 numbers for the time, a stored table of positions, and may predict a variance beside its
output, which is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import Network, embed, modulated_norm, muted, require_patches, zeroed
from teachers.networks.embeddings import position_embedding, sinusoid
from teachers.networks.exact import exact
from teachers.space import Cond, DataSpace

FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """A time ``[b]`` -> ``[b, width]``: a sinusoid, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    @exact
    def forward(self, t: Tensor) -> Tensor:
        """Angles are computed in t's dtype."""
        features = sinusoid(t, FREQUENCIES)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """The table of the classes, the last row of which may mean "none"."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)


class PatchEmbed(nn.Module):
    """Images ``[b, c, h, w]`` -> tokens ``[b, (h / patch) (w / patch), width]``, row by row."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # contiguous: torch multiplies other tokens in another order with gradients than without, and rounds otherwise
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class HeadNorm(nn.Module):
    """Layer norm of each head's queries or keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        # apart from torch's own scale and shift, whose forward-mode derivative cannot be compiled
        return nn.functional.layer_norm(x, self.weight.shape) * self.weight + self.bias


class Attention(nn.Module):
    """Self-attention by torch's fused function, all heads of queries, then of keys, then of values in `qkv`. qk_norm:
    queries and keys are normalised."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = nn.functional.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear, four times as wide between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(h), approximate="tanh"))


def modulation(width: int, count: int) -> nn.Sequential:
    """What gives `count` shifts, scales and gates; its SiLU, which all blocks share, is applied before."""
    return nn.Sequential(nn.Identity(), zeroed(nn.Linear(width, count * width)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        first, second = self.adaLN_modulation(embedding)[:, None].chunk(2, dim=-1)
        shift, scale, gate = first.chunk(3, dim=-1)
        h = h + gate * self.attn(modulated_norm(h, shift, scale))
        shift, scale, gate = second.chunk(3, dim=-1)
        return h + gate * self.mlp(modulated_norm(h, shift, scale))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.linear = zeroed(nn.Linear(width, features))
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.linear(modulated_norm(h, *self.adaLN_modulation(embedding)[:, None].chunk(2, dim=-1)))


class SiT(Network):
    """x, t, cond -> an image of x's shape; see `SiTConfig` for the arguments and `Network` for the call."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        null_class: bool,
        sigma: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        channels, rows, columns = shape
        self.patch, self.classes, self.channels = patch, classes, channels
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes + null_class, width)
        positions = position_embedding(rows // patch, columns // patch, width)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", positions[None])
        self.blocks = nn.ModuleList(_Block(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = _FinalLayer(width, patch * patch * channels * (2 if sigma else 1))

    def second_time(self) -> nn.Module:
        """See `Network`."""
        return muted(self.t_embedder, "mlp.2")

    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        table = self.y_embedder.embedding_table
        return nn.functional.silu(embed(self.t_embedder, table, t, cond, shift, self.classes))

    def _enter(self, x: Tensor) -> Tensor:
        return self.x_embedder(x) + self.pos_embed

    def _leave(self, h: Tensor, embedding: Tensor) -> Tensor:
        return unpatchify_last(self.final_layer(h, embedding), self.patch)[:, : self.channels]


def unpatchify_last(tokens: Tensor, patch: int) -> Tensor:
    """Tokens of a square ``[b, n n, patch patch c]``, pixels before channels -> images ``[b, c, side, side]``."""
    side = int(tokens.shape[1] ** 0.5)
    x = tokens.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class SiTConfig:
    """Side of a patch; width, depth and attention heads; whether there is a class id for "no class"; whether it
    predicts a variance too, which is dropped; whether queries and keys are normalised."""

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    null_class: bool = True
    sigma: bool = False
    qk_norm: bool = False

    highest = 1.0
    """Radians a unit time: times are fed as they are."""

    def __post_init__(self) -> None:
        divides = self.width % 4 == 0 and self.width % max(self.heads, 1) == 0
        require(
            self,
            patch=(self.patch >= 1, "must be at least 1"),
            width=(self.width >= 1 and divides, "must be a multiple of 4 (for positions) and of heads"),
            depth=(self.depth >= 1, "must be at least 1"),
            heads=(self.heads >= 1, "must be at least 1"),
        )

    def check(self, space: DataSpace) -> None:
        """See `teachers.networks.base.require_patches`."""
        require_patches(self, space)

    def build(self, space: DataSpace) -> SiT:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        assert space.classes is not None
        channels, rows, columns = space.shape
        shape = (channels, rows, columns)
        with torch.device("cpu"):
            return SiT(
                shape,
                space.classes,
                self.patch,
                self.width,
                self.depth,
                self.heads,
                self.null_class,
                self.sigma,
                self.qk_norm,
            )
