"""Embeddings of time and position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from teachers.networks.exact import exact


class TimeEmbedding(nn.Module):
    """A scalar in [0, 1] -> width: cosines and sines of low frequencies, then Linear, SiLU, Linear.

    Frequencies run geometrically from pi/4 to `highest` (radians a unit time). They are kept low (4 pi by default)
    because a flow map is differentiated in time: a tangent grows with the highest frequency.
    """

    def __init__(self, width: int, frequencies: int = 16, highest: float = 4 * math.pi) -> None:
        super().__init__()
        self.omega: Tensor
        low = math.log(math.pi / 4)
        self.register_buffer("omega", torch.linspace(low, math.log(highest), frequencies).exp(), persistent=False)
        self.hidden = nn.Linear(2 * frequencies, width)
        self.out = nn.Linear(width, width)

    @exact
    def forward(self, t: Tensor) -> Tensor:
        """``t: [b]`` -> ``[b, width]`` in the dtype of the weights; the angles are computed in t's dtype."""
        angle = t[:, None] * self.omega.to(t.dtype)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.out.weight.dtype)
        return self.out(nn.functional.silu(self.hidden(features)))


def position_embedding(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the row in the first half of the features, of the column in the second.

    -> float32 ``[rows columns, width]``, row by row; `width` is a multiple of 4. Frequencies run from 1 down towards
    1/10000. Vaswani et al., arXiv 1706.03762, for two dimensions as in Peebles and Xie, arXiv 2212.09748.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (row, column)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1).float()


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines of t at frequencies 10000^(-i / half), i < half = width / 2: what most diffusion networks
    are given of time. ``t: [b]`` -> ``[b, width]`` in t's dtype."""
    half = width // 2
    # in float32, as every network of this kind was trained
    omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None] * omega.to(t.dtype)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Rope(nn.Module):
    """Turns queries and keys by their place: axial, each pair of neighbouring features by an angle of its own.

    The first half of the features turns with the row, the second with the column, at frequencies 10000^(-2i / half).
    Su et al., arXiv 2104.09864. stored: whether checkpoints hold the tables.
    """

    def __init__(self, rows: int, columns: int, features: int, stored: bool = True) -> None:
        super().__init__()
        half = features // 2
        omega = 1.0 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half)
        row, column = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
        angles = torch.cat([place.reshape(-1, 1) * omega for place in (row, column)], -1).repeat_interleave(2, -1)
        self.freqs_cos: Tensor
        self.freqs_sin: Tensor
        self.register_buffer("freqs_cos", angles.cos(), persistent=stored)
        self.register_buffer("freqs_sin", angles.sin(), persistent=stored)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, heads, tokens, features]``; the places are those of the last tokens, what is before them stays."""
        before = x.shape[-2] - len(self.freqs_cos)
        first, last = x[..., :before, :], x[..., before:, :]
        even, odd = last.unflatten(-1, (-1, 2)).unbind(-1)
        turned = last * self.freqs_cos + torch.stack([-odd, even], -1).flatten(-2) * self.freqs_sin
        return turned if before == 0 else torch.cat([first, turned], -2)
