"""The U-Net of DDPM++ and NCSN++ as EDM has it, under the names of its checkpoints.

Song et al., arXiv 2011.13456; Karras et al., arXiv 2206.00364. DDPM++: sinusoids of time, plain down- and upsampling.
NCSN++: random frequencies of time, smoother filters, and the image itself, halved, added on the way down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import class_of, require_levels, zeroed
from teachers.networks.edm_blocks import Block, Labels, Resample, ResampledConv, Style, Taps, group_norm
from teachers.networks.exact import exact
from teachers.space import Cond, DataSpace


class Sinusoid(nn.Module):
    """Sines, then cosines of a time ``[b]`` at frequencies 10000^(-i / (half - 1)) -> ``[b, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        """In t's dtype."""
        half = self.width // 2
        # in float32, as it was trained
        powers = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
        return _waves(t, (1 / 10000) ** powers)


class Fourier(nn.Module):
    """Sines, then cosines of a time ``[b]`` at stored frequencies, in turns -> ``[b, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.freqs: Tensor
        # of a generator of its own: making a network to be filled shall not move the global one
        self.register_buffer("freqs", 16 * torch.randn(width // 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, t: Tensor) -> Tensor:
        """In t's dtype."""
        return _waves(t, 2 * math.pi * self.freqs)


def _waves(t: Tensor, omega: Tensor) -> Tensor:
    angle = t[:, None] * omega.to(t.dtype)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class SecondTime(nn.Module):
    """A time ``[b]`` -> ``[b, width]``: features, Linear, and (unless `early`) SiLU, Linear. The last layer is zero."""

    def __init__(self, features: nn.Module, first: nn.Linear, second: nn.Linear | None) -> None:
        super().__init__()
        layers = [first] if second is None else [first, nn.SiLU(), second]
        self.features = deepcopy(features)
        self.layers = nn.Sequential(*(deepcopy(layer) for layer in layers)).requires_grad_(True)
        zeroed(cast(nn.Linear, self.layers[-1]))

    @exact
    def forward(self, t: Tensor) -> Tensor:
        """Angles are computed in t's dtype."""
        return self.layers(self.features(t).to(self.layers[0].weight.dtype))


class SongUNet(nn.Module):
    """x, t, cond -> an image of x's shape; see `SongUNetConfig` for the arguments."""

    def __init__(self, shape: tuple[int, int, int], classes: int | None, config: SongUNetConfig) -> None:
        super().__init__()
        channels, _, side = shape
        self.channels, self.joins = channels, config.joins
        self.map_noise = (Fourier if config.fourier else Sinusoid)(config.features)
        self.map_label = None
        if classes is not None:
            self.map_label = Labels(classes, config.features, True, math.sqrt(classes), config.null_class)
        self.map_layer0 = nn.Linear(config.features, config.embedding)
        self.map_layer1 = nn.Linear(config.embedding, config.embedding)
        style = Style(config.embedding, config.taps, 1e-6, scale_shift=False, damped=True, skip_conv=True,
                      head_width=None)  # fmt: skip
        self.enc = nn.ModuleDict(dict(_encoder(config, channels, side, style)))
        leaving = channels * (2 if config.sigma else 1)
        self.dec = nn.ModuleDict(dict(_decoder(config, leaving, side, style)))

    def second_time(self) -> nn.Module:
        """A number ``[b]`` in [0, 1] -> what `forward` takes as shift: 0 at first, by its last layer alone."""
        second = self.map_layer1 if self.joins == "late" else None
        return SecondTime(self.map_noise, self.map_layer0, second)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]``, ``cond["class"]: int64 [b]``, ``shift: [b, embedding]`` -> ``[b, *shape]``.

        Raises ValueError for classes that are missing or, on a CPU, unknown.
        """
        embedding = self._embedding(t, cond, shift)
        h = image = x
        skips: list[Tensor] = []
        for name, module in self.enc.items():
            if "aux_down" in name:
                image = module(image)
            elif "aux_skip" in name:
                h = skips[-1] = h + module(image)
            elif "aux_residual" in name:
                h = skips[-1] = image = (h + module(image)) * 0.5**0.5
            else:
                h = module(h, embedding) if isinstance(module, Block) else module(h)
                skips.append(h)
        said: Tensor | None = None
        normed = h
        for name, module in self.dec.items():
            if "aux_up" in name:
                said = module(said)
            elif "aux_norm" in name:
                normed = nn.functional.silu(module(h))
            elif "aux_conv" in name:
                said = module(normed) if said is None else said + module(normed)
            else:
                h = module(torch.cat([h, skips.pop()], dim=1) if "block" in name else h, embedding)
        assert said is not None
        return said[:, : self.channels]

    @exact
    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        features = self.map_noise(t).to(self.map_layer0.weight.dtype)
        if self.map_label is not None:
            features = features + self.map_label(class_of(cond, self.map_label.in_features))
        first = self.map_layer0(features)
        if shift is not None and self.joins == "early":
            first = first + shift
        second = self.map_layer1(nn.functional.silu(first))
        if shift is not None and self.joins == "late":
            second = second + shift
        return nn.functional.silu(second)


def _encoder(config: SongUNetConfig, channels: int, side: int, style: Style) -> Iterator[tuple[str, nn.Module]]:
    yield f"{side}x{side}_conv", nn.Conv2d(channels, config.width, 3, padding=1)
    width, image = config.width, channels
    for level, leaving in enumerate(config.widths):
        place = f"{side >> level}x{side >> level}"
        if level:
            yield f"{place}_down", Block(width, width, style, "down")
            if config.encoder == "skip":
                yield f"{place}_aux_down", Resample("down", config.taps)
                yield f"{place}_aux_skip", nn.Conv2d(image, width, 1)
            elif config.encoder == "residual":
                yield f"{place}_aux_residual", ResampledConv(image, width, 3, "down", config.taps, late=True)
                image = width
        for number in range(config.blocks):
            yield f"{place}_block{number}", Block(width, leaving, style, attention=level in config.attention)
            width = leaving


def _decoder(config: SongUNetConfig, leaving: int, side: int, style: Style) -> Iterator[tuple[str, nn.Module]]:
    skips, last = skip_widths(config.width, config.widths, config.blocks), len(config.widths) - 1
    width = config.widths[-1]
    for level in range(last, -1, -1):
        place = f"{side >> level}x{side >> level}"
        if level == last:
            yield f"{place}_in0", Block(width, width, style, attention=True)
            yield f"{place}_in1", Block(width, width, style)
        else:
            yield f"{place}_up", Block(width, width, style, "up")
        for number in range(config.blocks + 1):
            attention = number == config.blocks and level in config.attention
            entering, width = width + skips.pop(), config.widths[level]
            yield f"{place}_block{number}", Block(entering, width, style, attention=attention)
        if config.decoder == "skip" or level == 0:
            if level < last and config.decoder == "skip":
                yield f"{place}_aux_up", Resample("up", config.taps)
            yield f"{place}_aux_norm", group_norm(width, 1e-6)
            yield f"{place}_aux_conv", zeroed(nn.Conv2d(width, leaving, 3, padding=1))


def skip_widths(width: int, widths: tuple[int, ...], blocks: int) -> list[int]:
    """Channels of all that the way down keeps for the way up, in order."""
    skips = [width]
    for level, leaving in enumerate(widths):
        skips += ([widths[level - 1]] if level else []) + [leaving] * blocks
    return skips


@dataclass(frozen=True, kw_only=True)
class SongUNetConfig:
    """width: of the first convolution; widths: channels of each level, from the whole image down; blocks: residual
    ones a level; attention: the levels that have it, from 0; features, embedding: of time, before and after its layers;
    fourier: random frequencies of it; encoder, decoder: whether the image is added on the way down, and put together on
    the way up; taps: of the filters; null_class: whether there is a class id for "no class"; sigma: whether it predicts
    a variance too, which is dropped; joins: where a second time is added, after both layers or after the first."""

    width: int = 128
    widths: tuple[int, ...] = (256, 256, 256)
    blocks: int = 4
    attention: tuple[int, ...] = (1,)
    features: int = 128
    embedding: int = 512
    fourier: bool = False
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    taps: Taps = (1, 1)
    null_class: bool = False
    sigma: bool = False
    joins: Literal["late", "early"] = "late"

    @property
    def highest(self) -> float:
        """Radians a unit time: random frequencies have a spread of 16 turns."""
        return 300.0 if self.fourier else 1.0

    def __post_init__(self) -> None:
        grouped = bool(self.widths) and all(width >= 1 and fits(width) for width in (self.width, *self.widths))
        require(
            self,
            widths=(grouped, "must be multiples of 4, of 32 above 128, one a level"),
            blocks=(self.blocks >= 1, "must be at least 1"),
            attention=(all(level in range(len(self.widths)) for level in self.attention), "must be levels, from 0"),
            features=(self.features >= 4 and self.features % 2 == 0, "must be even and at least 4"),
            embedding=(self.embedding >= 1, "must be at least 1"),
            encoder=(self.encoder in ("standard", "skip", "residual"), "must be standard, skip or residual"),
            decoder=(self.decoder in ("standard", "skip"), "must be standard or skip"),
            taps=(len(self.taps) >= 2 and len(self.taps) % 2 == 0 and sum(self.taps) > 0, "must be an even number"),
            joins=(self.joins in ("late", "early"), "must be late or early"),
        )

    def check(self, space: DataSpace) -> None:
        """See `teachers.networks.base.require_levels`."""
        require_levels(self, space)

    def build(self, space: DataSpace) -> SongUNet:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        channels, rows, columns = space.shape
        with torch.device("cpu"):
            return SongUNet((channels, rows, columns), space.classes, self)


def fits(width: int) -> bool:
    """Whether its groups are equally large."""
    return width >= 4 and width % min(32, width // 4) == 0
