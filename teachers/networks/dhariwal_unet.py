"""The U-Net of ADM as EDM has it, under the names of its checkpoints (not those of ADM's own code).

Dhariwal and Nichol, arXiv 2105.05233; Karras et al., arXiv 2206.00364.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import class_of, require_levels, zeroed
from teachers.networks.edm_blocks import Block, Labels, Style, group_norm
from teachers.networks.embeddings import sinusoid
from teachers.networks.exact import exact
from teachers.networks.song_unet import fits, skip_widths
from teachers.space import Cond, DataSpace

_HEAD = 64


class SecondTime(nn.Module):
    """A time ``[b]`` -> ``[b, embedding]``: a sinusoid, Linear, SiLU, Linear. The last layer is zero."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = deepcopy(first).requires_grad_(True), deepcopy(second).requires_grad_(True)
        zeroed(self.second)

    @exact
    def forward(self, t: Tensor) -> Tensor:
        """Angles are computed in t's dtype."""
        features = sinusoid(t, self.first.in_features).to(self.first.weight.dtype)
        return self.second(nn.functional.silu(self.first(features)))


class DhariwalUNet(nn.Module):
    """x, t, cond -> an image of x's shape; see `DhariwalUNetConfig` for the arguments."""

    def __init__(self, shape: tuple[int, int, int], classes: int | None, config: DhariwalUNetConfig) -> None:
        super().__init__()
        channels, _, side = shape
        self.channels = channels
        self.map_layer0 = nn.Linear(config.width, config.embedding)
        self.map_layer1 = nn.Linear(config.embedding, config.embedding)
        self.map_label = None
        if classes is not None:
            self.map_label = Labels(classes, config.embedding, False, 1.0, config.null_class)
        style = Style(config.embedding, (1, 1), 1e-5, scale_shift=True, damped=False, skip_conv=False,
                      head_width=_HEAD)  # fmt: skip
        self.enc = nn.ModuleDict(dict(_encoder(config, channels, side, style)))
        self.dec = nn.ModuleDict(dict(_decoder(config, side, style)))
        self.out_norm = group_norm(config.widths[0], 1e-5)
        leaving = channels * (2 if config.sigma else 1)
        self.out_conv = zeroed(nn.Conv2d(config.widths[0], leaving, 3, padding=1))

    def second_time(self) -> nn.Module:
        """A number ``[b]`` in [0, 1] -> what `forward` takes as shift: 0 at first, by its last layer alone."""
        return SecondTime(self.map_layer0, self.map_layer1)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]``, ``cond["class"]: int64 [b]``, ``shift: [b, embedding]`` -> ``[b, *shape]``.

        Raises ValueError for classes that are missing or, on a CPU, unknown.
        """
        embedding = self._embedding(t, cond, shift)
        h, skips = x, []
        for module in self.enc.values():
            h = module(h, embedding) if isinstance(module, Block) else module(h)
            skips.append(h)
        for name, module in self.dec.items():
            h = module(torch.cat([h, skips.pop()], dim=1) if "block" in name else h, embedding)
        return self.out_conv(nn.functional.silu(self.out_norm(h)))[:, : self.channels]

    @exact
    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        features = sinusoid(t, self.map_layer0.in_features).to(self.map_layer0.weight.dtype)
        embedding = self.map_layer1(nn.functional.silu(self.map_layer0(features)))
        if shift is not None:
            embedding = embedding + shift
        if self.map_label is not None:
            embedding = embedding + self.map_label(class_of(cond, self.map_label.in_features))
        return nn.functional.silu(embedding)


def _encoder(config: DhariwalUNetConfig, channels: int, side: int, style: Style) -> Iterator[tuple[str, nn.Module]]:
    width = config.widths[0]
    yield f"{side}x{side}_conv", nn.Conv2d(channels, width, 3, padding=1)
    for level, leaving in enumerate(config.widths):
        place = f"{side >> level}x{side >> level}"
        if level:
            yield f"{place}_down", Block(width, width, style, "down")
        for number in range(config.blocks):
            yield f"{place}_block{number}", Block(width, leaving, style, attention=level in config.attention)
            width = leaving


def _decoder(config: DhariwalUNetConfig, side: int, style: Style) -> Iterator[tuple[str, nn.Module]]:
    skips, last = skip_widths(config.widths[0], config.widths, config.blocks), len(config.widths) - 1
    width = config.widths[-1]
    for level in range(last, -1, -1):
        place = f"{side >> level}x{side >> level}"
        if level == last:
            yield f"{place}_in0", Block(width, width, style, attention=True)
            yield f"{place}_in1", Block(width, width, style)
        else:
            yield f"{place}_up", Block(width, width, style, "up")
        for number in range(config.blocks + 1):
            entering, width = width + skips.pop(), config.widths[level]
            yield f"{place}_block{number}", Block(entering, width, style, attention=level in config.attention)


@dataclass(frozen=True, kw_only=True)
class DhariwalUNetConfig:
    """width: of the sinusoid of time; widths: channels of each level, from the whole image down; blocks: residual ones
    a level; attention: the levels that have it, from 0; embedding: of time and class; null_class: whether there is a
    class id for "no class"; sigma: whether it predicts a variance too, which is dropped."""

    width: int = 192
    widths: tuple[int, ...] = (192, 384, 576, 768)
    blocks: int = 3
    attention: tuple[int, ...] = (1, 2, 3)
    embedding: int = 768
    null_class: bool = False
    sigma: bool = False

    highest = 1.0
    """Radians a unit of its own time."""

    def __post_init__(self) -> None:
        grouped = bool(self.widths) and all(width >= 1 and fits(width) for width in self.widths)
        require(
            self,
            width=(self.width >= 2 and self.width % 2 == 0, "must be even"),
            widths=(grouped, "must be multiples of 4, of 32 above 128, one a level"),
            blocks=(self.blocks >= 1, "must be at least 1"),
            attention=(all(level in range(len(self.widths)) for level in self.attention), "must be levels, from 0"),
            embedding=(self.embedding >= 1, "must be at least 1"),
        )

    def check(self, space: DataSpace) -> None:
        """See `teachers.networks.base.require_levels`."""
        require_levels(self, space)

    def build(self, space: DataSpace) -> DhariwalUNet:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        channels, rows, columns = space.shape
        with torch.device("cpu"):
            return DhariwalUNet((channels, rows, columns), space.classes, self)
