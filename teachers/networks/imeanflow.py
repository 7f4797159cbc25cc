"""The transformer of improved MeanFlow: all it is told stands before the image as tokens.

Geng et al., arXiv 2512.02012. It is given the length of a jump, never the time itself; its scale and interval of
guidance, which it is given too, are fixed here. Tokens turn by their place in the whole row of tokens. Positions,
norms and MLPs are those of large language models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import embedded, muted, require_patches, zeroed
from teachers.networks.lightning_dit import RMSNorm
from teachers.networks.sit import LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify_last
from teachers.space import Cond, DataSpace


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def forward(self, h: Tensor, turn: Tensor) -> Tensor:
        query, key, value = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _turned(self.q_norm(query), turn), _turned(self.k_norm(key), turn)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """``x: [b, heads, tokens, features]``, each pair of neighbouring features by its angle. ``turn: [2, tokens,
    features / 2]``, cosines and sines."""
    (even, odd), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), turn.to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class _SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(h)) * self.w3(h))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = _Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = _SwiGLU(width, hidden)
        self.attn_scale = nn.Parameter(torch.zeros(width))
        self.mlp_scale = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, turn: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h), turn) * self.attn_scale
        return h + self.mlp(self.norm2(h)) * self.mlp_scale


class _FinalLayer(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = zeroed(nn.Linear(width, features))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.norm(h))


class IMeanFlow(nn.Module):
    """x, t, cond -> an image of x's shape: the mean velocity of a jump, of no length without `shift`.

    ``x: [b, c, n, n]``, ``t: [b]``, of which nothing depends, ``cond["class"]: int64 [b]``; ``shift: [b, width]`` is
    added to the embedding of the length 0. See `IMeanFlowConfig` for the arguments.
    """

    def __init__(self, config: IMeanFlowConfig, space: DataSpace) -> None:
        super().__init__()
        assert space.classes is not None
        channels, rows, columns = space.shape
        self.patch, self.classes, width = config.patch, space.classes, config.width
        self.omega, self.interval = config.omega, config.interval
        self.x_embedder = PatchEmbed(channels, config.patch, width)
        self.h_embedder, self.omega_embedder = TimestepEmbedder(width), TimestepEmbedder(width)
        self.cfg_t_start_embedder, self.cfg_t_end_embedder = TimestepEmbedder(width), TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(space.classes + config.null_class, width)
        counts = (*config.tokens[:3], config.tokens[2], config.tokens[3])
        for name, count in zip(_TOKENS, counts, strict=True):
            setattr(self, f"{name}_tokens", nn.Parameter(torch.randn(count, width) / width**0.5))
        self.prefix = sum(counts)
        self.blocks = nn.ModuleList(_Block(width, config.heads, config.hidden) for _ in range(config.depth))
        self.final_layer = _FinalLayer(width, config.patch**2 * channels)
        tokens = self.prefix + (rows // config.patch) * (columns // config.patch)
        self.turn: Tensor
        self.register_buffer("turn", _angles(tokens, width // config.heads), persistent=False)

    def second_time(self) -> nn.Module:
        """See `teachers.networks.base.Network`."""
        return muted(self.h_embedder, "mlp.2")

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """Raises ValueError for classes that are missing or, on a CPU, unknown."""
        h = torch.cat([*self._told(t, cond, shift), self.x_embedder(x)], dim=1)
        for block in self.blocks:
            h = block(h, self.turn)
        return unpatchify_last(self.final_layer(h[:, self.prefix :]), self.patch)

    def _told(self, t: Tensor, cond: Cond, shift: Tensor | None) -> list[Tensor]:
        """The tokens of class, guidance, interval and length, ``[b, count, width]`` each."""
        length = self.h_embedder(torch.zeros_like(t))
        said = {
            "class": embedded(self.y_embedder.embedding_table, cond, self.classes),
            "omega": self.omega_embedder(torch.full_like(t, 1 - 1 / self.omega)),
            "t_min": self.cfg_t_start_embedder(torch.full_like(t, self.interval[0])),
            "t_max": self.cfg_t_end_embedder(torch.full_like(t, self.interval[1])),
            "time": length if shift is None else length + shift,
        }
        return [getattr(self, f"{name}_tokens") + said[name][:, None] for name in _TOKENS]


_TOKENS = ("class", "omega", "t_min", "t_max", "time")
"""In the order in which they stand."""


def _angles(tokens: int, features: int) -> Tensor:
    """Cosines and sines ``[2, tokens, features / 2]`` of places times 10000^(-2i / features)."""
    omega = 1.0 / 10000.0 ** (torch.arange(0, features, 2, dtype=torch.float32) / features)
    angle = torch.outer(torch.arange(tokens, dtype=torch.float32), omega)
    return torch.stack([angle.cos(), angle.sin()])


@dataclass(frozen=True, kw_only=True)
class IMeanFlowConfig:
    """Side of a patch; width, depth and attention heads; hidden width of its SwiGLU; tokens of class, guidance, each
    end of its interval, and length; the guidance scale and interval (of its own time, 1 at the noise) that it is told;
    whether there is a class id for "no class"."""

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1024
    tokens: tuple[int, int, int, int] = (8, 4, 2, 4)
    omega: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    null_class: bool = True

    highest = 1.0
    """Radians a unit time: lengths are fed as they are."""

    def __post_init__(self) -> None:
        divides = self.heads >= 1 and self.width % (2 * self.heads) == 0
        low, high = self.interval
        require(
            self,
            patch=(self.patch >= 1, "must be at least 1"),
            width=(self.width >= 1 and divides, "must be a multiple of 2 times heads (for rope)"),
            depth=(self.depth >= 1, "must be at least 1"),
            heads=(self.heads >= 1, "must be at least 1"),
            hidden=(self.hidden >= 1, "must be at least 1"),
            tokens=(len(self.tokens) == 4 and min(self.tokens) >= 1, "must be four numbers of at least 1"),
            omega=(self.omega >= 1, "must be at least 1"),
            interval=(0 <= low <= high <= 1, "must be two increasing times in [0, 1]"),
        )

    def check(self, space: DataSpace) -> None:
        """See `teachers.networks.base.require_patches`."""
        require_patches(self, space)

    def build(self, space: DataSpace) -> IMeanFlow:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        with torch.device("cpu"):
            return IMeanFlow(self, space)
