"""What EDM's two U-Nets are made of, under the names of their checkpoints.

Song et al., arXiv 2011.13456 (DDPM++, NCSN++); Dhariwal and Nichol, arXiv 2105.05233 (ADM); Karras et al., arXiv
2206.00364.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from teachers.networks.base import GroupNorm, zeroed

Change = Literal["up", "down"]
Taps = tuple[int, ...]
"""Of the filter that doubles or halves the side: its rows and columns, up to a factor."""


def resampled(x: Tensor, kernel: Tensor, change: Change, pad: int) -> Tensor:
    """Twice or half the side, each channel by the same kernel ``[1, 1, k, k]``, whose sum is 1."""
    channels = x.shape[1]
    kernel = kernel.to(x.dtype).expand(channels, -1, -1, -1)
    if change == "down":
        return nn.functional.conv2d(x, kernel, stride=2, padding=pad, groups=channels)
    return nn.functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=channels)


def _kernel(taps: Taps) -> Tensor:
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]


class Resample(nn.Module):
    """Twice or half the side."""

    def __init__(self, change: Change, taps: Taps) -> None:
        super().__init__()
        self.change: Change = change
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", _kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        return resampled(x, self.resample_filter, self.change, (self.resample_filter.shape[-1] - 1) // 2)


class ResampledConv(nn.Conv2d):
    """A convolution of the resampled image, or (`late`) the halved convolution of the image."""

    def __init__(self, entering: int, leaving: int, side: int, change: Change, taps: Taps, late: bool = False) -> None:
        super().__init__(entering, leaving, side, padding=side // 2)
        self.change: Change = change
        self.late = late
        self.resample_filter: Tensor
        self.register_buffer("resample_filter", _kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.resample_filter
        pad = (kernel.shape[-1] - 1) // 2
        if not self.late:
            return super().forward(resampled(x, kernel, self.change, pad))
        assert self.bias is not None
        x = nn.functional.conv2d(x, self.weight, padding=self.kernel_size[0] // 2 + pad)
        return resampled(x, kernel, self.change, 0) + self.bias[:, None, None]


def group_norm(channels: int, eps: float) -> GroupNorm:
    """In groups of at least 4 channels, at most 32 of them."""
    return GroupNorm(channels, min(32, channels // 4), eps)


@dataclass(frozen=True)
class Style:
    """In what the blocks of the two differ. scale_shift: the embedding scales and shifts what the second norm gives,
    instead of being added before it; damped: sums are over sqrt(2); skip_conv: of a skip that is resampled; head_width:
    of attention, None for one head."""

    embedding: int
    taps: Taps
    eps: float
    scale_shift: bool
    damped: bool
    skip_conv: bool
    head_width: int | None


class Block(nn.Module):
    """Two convolutions and the embedding, beside a skip; then attention of the pixels, beside another."""

    def __init__(
        self, entering: int, leaving: int, style: Style, change: Change | None = None, attention: bool = False
    ) -> None:
        super().__init__()
        self.scale_shift, self.scale = style.scale_shift, 0.5**0.5 if style.damped else 1.0
        self.heads = 0 if not attention else leaving // style.head_width if style.head_width else 1
        self.norm0 = group_norm(entering, style.eps)
        self.conv0 = _conv(entering, leaving, 3, change, style.taps)
        self.affine = nn.Linear(style.embedding, leaving * (2 if style.scale_shift else 1))
        self.norm1 = group_norm(leaving, style.eps)
        self.conv1 = zeroed(nn.Conv2d(leaving, leaving, 3, padding=1))
        self.skip: nn.Module = nn.Identity()
        if entering != leaving or (change and style.skip_conv):
            self.skip = _conv(entering, leaving, 1, change, style.taps)
        elif change:
            self.skip = Resample(change, style.taps)
        if self.heads:
            self.norm2 = group_norm(leaving, style.eps)
            self.qkv = nn.Conv2d(leaving, 3 * leaving, 1)
            self.proj = zeroed(nn.Conv2d(leaving, leaving, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x: [b, entering, h, w]``, ``embedding: [b, width]`` after its SiLU."""
        silu = nn.functional.silu
        h = self.conv0(silu(self.norm0(x)))
        said = self.affine(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = said.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + said)
        h = (self.conv1(silu(h)) + self.skip(x)) * self.scale
        return (self.proj(self._attended(self.norm2(h))) + h) * self.scale if self.heads else h

    def _attended(self, h: Tensor) -> Tensor:
        # each head's channels, and each channel's query, key and value side by side
        parts = self.qkv(h).flatten(2).unflatten(1, (self.heads, -1, 3)).unbind(3)
        query, key, value = (part.transpose(-1, -2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(-1, -2).reshape(h.shape)


def _conv(entering: int, leaving: int, side: int, change: Change | None, taps: Taps) -> nn.Module:
    if change:
        return ResampledConv(entering, leaving, side, change, taps)
    return nn.Conv2d(entering, leaving, side, padding=side // 2)


class Labels(nn.Linear):
    """The linear map of a class's one-hot vector, times `scale`. null: the class behind the last means "none", and its
    vector is 0."""

    def __init__(self, classes: int, width: int, bias: bool, scale: float, null: bool) -> None:
        super().__init__(classes, width, bias=bias)
        self.scale, self.null = scale, null

    def forward(self, classes: Tensor) -> Tensor:
        """int64 ``[b]`` -> ``[b, width]``. Raises ValueError for an unknown class on a CPU."""
        table = self.scale * self.weight.t()
        if self.null:
            table = torch.cat([table, torch.zeros_like(table[:1])])
        try:
            found = nn.functional.embedding(classes, table)
        except IndexError:  # asking before would make a GPU wait
            raise ValueError(f"classes must be in [0, {len(table) - 1}]") from None
        return found if self.bias is None else found + self.bias
