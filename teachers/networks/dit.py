"""A diffusion transformer for images: patches as tokens, blocks of attention and MLP modulated by the conditioning.

adaLN-Zero blocks: Peebles and Xie, arXiv 2212.09748; layers that do not start at zero start as torch's own. Queries and
keys are normalised (RMS, with a learned scale): Esser et al., arXiv 2403.03206. Attention is torch's fused one, so that
forward-mode derivatives have to be taken under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import Network, embed, modulated_norm, muted, rms_norm, zeroed
from teachers.networks.embeddings import TimeEmbedding, position_embedding
from teachers.space import Cond, DataSpace


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.project(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        query, key = rms_norm(query) * self.query_scale, rms_norm(key) * self.key_scale
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.attention = _Attention(width, heads)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        first, second = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        shift, scale, gate = first.chunk(3, dim=-1)
        h = h + gate * self.attention(modulated_norm(h, shift, scale))
        shift, scale, gate = second.chunk(3, dim=-1)
        return h + gate * self.down(nn.functional.gelu(self.up(modulated_norm(h, shift, scale)), approximate="tanh"))


class DiT(Network):
    """x, t, cond -> an image of x's shape; see `DiTConfig` for the arguments and `Network` for the call."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int | None,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        frequencies: int,
        highest: float,
        null_class: bool,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.time_embedding = TimeEmbedding(width, frequencies, highest)
        self.class_embedding = None if classes is None else nn.Embedding(classes + null_class, width)
        self.shape = shape
        self.patch = patch
        channels, height, breadth = shape
        features = channels * patch * patch
        self.position: Tensor
        positions = position_embedding(height // patch, breadth // patch, width)
        self.register_buffer("position", positions, persistent=False)
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.leave_modulation = zeroed(nn.Linear(width, 2 * width))
        self.leave = zeroed(nn.Linear(width, features))

    def second_time(self) -> nn.Module:
        """See `Network`."""
        return muted(self.time_embedding, "out")

    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        embedding = embed(self.time_embedding, self.class_embedding, t, cond, shift, self.classes)
        return nn.functional.silu(embedding)

    def _enter(self, x: Tensor) -> Tensor:
        return self.enter(patchify(x, self.patch)) + self.position

    def _leave(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = modulated_norm(h, *self.leave_modulation(embedding)[:, None].chunk(2, dim=-1))
        return unpatchify(self.leave(h), self.shape, self.patch)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Images ``[b, c, h, w]`` -> patches row by row ``[b, (h / patch) (w / patch), c patch patch]``."""
    b, c, h, w = x.shape
    rows, columns = h // patch, w // patch
    x = x.reshape(b, c, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, rows * columns, c * patch * patch)


def unpatchify(tokens: Tensor, shape: tuple[int, int, int], patch: int) -> Tensor:
    """The inverse of `patchify`: tokens -> images ``[b, *shape]``."""
    b, (c, h, w) = tokens.shape[0], shape
    x = tokens.reshape(b, h // patch, w // patch, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, h, w)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Side of a patch; width, depth and attention heads of the residual stream; number and highest of the time
    frequencies (radians a unit time); whether there is a class id for "no class", as classifier-free guidance needs."""

    patch: int = 2
    width: int = 128
    depth: int = 4
    heads: int = 4
    frequencies: int = 16
    highest: float = 4 * math.pi
    null_class: bool = False

    def __post_init__(self) -> None:
        divides = self.width % math.lcm(4, max(self.heads, 1)) == 0
        require(
            self,
            patch=(self.patch >= 1, "must be at least 1"),
            width=(self.width >= 1 and divides, "must be a multiple of 4 (for positions) and of heads"),
            depth=(self.depth >= 1, "must be at least 1"),
            heads=(self.heads >= 1, "must be at least 1"),
            frequencies=(self.frequencies >= 2, "must be at least 2"),
            highest=(math.pi / 4 < self.highest < math.inf, "must be above pi/4, the lowest frequency, and finite"),
        )

    def check(self, space: DataSpace) -> None:
        """Raises FieldError for samples that cannot be cut into patches, and for a null class where there are no
        classes."""
        shape = space.shape
        images = len(shape) == 3 and shape[1] % self.patch == shape[2] % self.patch == 0
        require(
            self,
            patch=(images, f"must divide height and width of samples [channels, height, width], here {list(shape)}"),
            null_class=(not self.null_class or space.classes is not None, "must be false without classes"),
        )

    def build(self, space: DataSpace) -> DiT:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        channels, height, width = space.shape
        with torch.device("cpu"):
            return DiT(
                (channels, height, width),
                space.classes,
                self.patch,
                self.width,
                self.depth,
                self.heads,
                self.frequencies,
                self.highest,
                self.null_class,
            )
