"""The U-Net of ADM under the names of its checkpoints: residual blocks that time and class modulate, attention between.

Dhariwal and Nichol, arXiv 2105.05233. It is what torchcfm and the image examples of flow_matching train. They differ in
how queries, keys and values lie in a projection, in what the embedding does to a block, and in how it is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import GroupNorm, embed, muted
from teachers.networks.embeddings import sinusoid
from teachers.networks.exact import exact
from teachers.space import Cond, DataSpace

GROUPS = 32  # of every norm

Resample = Literal["conv", "pool", "block"]
Order = Literal["legacy", "new"]


class TimeEmbedding(nn.Sequential):
    """A time ``[b]`` -> ``[b, 4 width]``: a sinusoid, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.width = width

    @exact
    def forward(self, t: Tensor) -> Tensor:
        """Angles are computed in t's dtype."""
        return super().forward(sinusoid(t, self.width).to(next(self.parameters()).dtype))


class Down(nn.Module):
    """Half the side, by a convolution or by the mean of two by two."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    """Twice the side, every pixel four times, and a convolution if there is one."""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions and the embedding, beside a skip; both are resampled by `change`, where there is one.

    scale_shift: the embedding scales and shifts what the second norm gives, instead of being added before it.
    """

    def __init__(
        self, entering: int, leaving: int, embedding: int, scale_shift: bool, change: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.change = change or nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm(entering, GROUPS), nn.SiLU(), nn.Conv2d(entering, leaving, 3, padding=1)
        )
        # the SiLU before it is every block's, and applied once; identities keep the numbers of the files
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(embedding, (1 + scale_shift) * leaving))
        self.out_layers = nn.Sequential(
            GroupNorm(leaving, GROUPS), nn.SiLU(), nn.Identity(), nn.Conv2d(leaving, leaving, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if entering == leaving else nn.Conv2d(entering, leaving, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(self.change(activation(norm(x))))
        said = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = said.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + said)
        return self.skip_connection(self.change(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention of the pixels beside a skip. order: `legacy` has each head's query, key and value together in the
    projection, `new` the queries of all heads, then their keys, then their values."""

    def __init__(self, channels: int, heads: int, order: Order) -> None:
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = GroupNorm(channels, GROUPS)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2)
        qkv = self.qkv(self.norm(h))
        if self.order == "legacy":
            parts = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        else:
            parts = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        query, key, value = (part.transpose(-1, -2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return (h + self.proj_out(attended.transpose(-1, -2).flatten(1, 2))).reshape(x.shape)


class Stage(nn.ModuleList):
    """Modules one after the other; residual blocks are given the embedding."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for module in self:
            h = module(h, embedding) if isinstance(module, ResBlock) else module(h)
        return h


class ADMUNet(nn.Module):
    """x, t, cond -> an image of x's shape; see `ADMUNetConfig` for the arguments."""

    def __init__(self, channels: int, classes: int | None, config: ADMUNetConfig) -> None:
        super().__init__()
        self.classes = classes
        widths, last = config.widths, len(config.widths) - 1
        embedding = 4 * config.width
        self.time_embed = TimeEmbedding(config.width)
        self.label_emb = None if classes is None else nn.Embedding(classes + config.null_class, embedding)

        def block(entering: int, leaving: int, change: nn.Module | None = None) -> ResBlock:
            return ResBlock(entering, leaving, embedding, config.scale_shift, change)

        def resampled(width: int, by: type[Down | Up]) -> nn.Module:
            if config.resample == "block":
                return block(width, width, by(width, False))
            return by(width, config.resample == "conv")

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, config.heads_of(width), config.order)

        stages = [Stage([nn.Conv2d(channels, widths[0], 3, padding=1)])]
        skips = [widths[0]]
        for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
            for number in range(config.blocks):
                modules: list[nn.Module] = [block(width if number else before, width)]
                if level in config.attention:
                    modules.append(attention(width))
                stages.append(Stage(modules))
            skips += [width] * config.blocks
            if level < last:
                stages.append(Stage([resampled(width, Down)]))
                skips.append(width)
        self.input_blocks = nn.ModuleList(stages)
        width = widths[-1]
        self.middle_block = Stage([block(width, width), attention(width), block(width, width)])
        stages = []
        for level in range(last, -1, -1):
            for number in range(config.blocks + 1):
                modules = [block(width + skips.pop(), widths[level])]
                width = widths[level]
                if level in config.attention:
                    modules.append(attention(width))
                if level and number == config.blocks:
                    modules.append(resampled(width, Up))
                stages.append(Stage(modules))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(GroupNorm(width, GROUPS), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def second_time(self) -> nn.Module:
        """A number ``[b]`` in [0, 1] -> what `forward` takes as shift: 0 at first, by its last layer alone."""
        return muted(self.time_embed, "2")

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]``, ``cond["class"]: int64 [b]``, ``shift: [b, 4 width]`` -> ``[b, *shape]``.

        Raises ValueError for classes that are missing or, on a CPU, unknown.
        """
        embedding = nn.functional.silu(embed(self.time_embed, self.label_emb, t, cond, shift, self.classes))
        h, skips = x, []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)


@dataclass(frozen=True, kw_only=True)
class ADMUNetConfig:
    """width: of the sinusoid of time; widths: channels of each level, from the whole image down; blocks: residual ones
    a level; attention: the levels that have it, from 0; heads: of each attention, unless all are `head_width` wide;
    order: of queries, keys and values, see `AttentionBlock`; scale_shift: see `ResBlock`; resample: between levels, by
    convolutions, pooling or residual blocks; null_class: whether there is a class id for "no class"."""

    width: int = 128
    widths: tuple[int, ...] = (128, 256, 256, 256)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    heads: int = 1
    head_width: int | None = None
    order: Order = "legacy"
    scale_shift: bool = False
    resample: Resample = "conv"
    null_class: bool = False

    highest = 1.0
    """Radians a unit time: times are fed as they are."""

    def __post_init__(self) -> None:
        grouped = len(self.widths) >= 1 and all(width >= 1 and width % GROUPS == 0 for width in self.widths)
        levels = range(len(self.widths))
        attended = {self.widths[level] for level in (*self.attention, -1) if level in (*levels, -1)} if grouped else ()
        part = self.head_width or self.heads
        divides = part >= 1 and all(width % part == 0 for width in attended)
        heads = "must divide the channels of the levels with attention and of the last"
        require(
            self,
            width=(self.width >= 2 and self.width % 2 == 0, "must be even"),
            widths=(grouped, f"must be multiples of {GROUPS}, one a level"),
            blocks=(self.blocks >= 1, "must be at least 1"),
            attention=(all(level in levels for level in self.attention), "must be levels, counted from 0"),
            heads=(self.head_width is not None or divides, heads),
            head_width=(self.head_width is None or divides, heads),
            order=(self.order in ("legacy", "new"), "must be legacy or new"),
            resample=(self.resample in ("conv", "pool", "block"), "must be conv, pool or block"),
        )

    def heads_of(self, width: int) -> int:
        """The number of heads of an attention of so many channels."""
        return self.heads if self.head_width is None else width // self.head_width

    def check(self, space: DataSpace) -> None:
        """Raises FieldError for samples that cannot be halved often enough, and for a null class where there are no
        classes."""
        factor = 2 ** (len(self.widths) - 1)
        fits = len(space.shape) == 3 and all(side % factor == 0 for side in space.shape[1:])
        require(
            self,
            widths=(fits, f"have {len(self.widths)} levels, so height and width of samples must be multiples of "
                          f"{factor}, here {list(space.shape)}"),
            null_class=(not self.null_class or space.classes is not None, "must be false without classes"),
        )  # fmt: skip

    def build(self, space: DataSpace) -> ADMUNet:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        with torch.device("cpu"):
            return ADMUNet(space.shape[0], space.classes, self)
