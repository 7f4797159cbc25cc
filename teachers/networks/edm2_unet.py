"""The U-Net of EDM2, under the names of its checkpoints: every layer keeps the size of what goes through it.

Karras et al., arXiv 2312.02696, whose equations are named below. Weights are normalised where they are used; nothing
else of its training, which also writes them back normalised, happens here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fields import require
from teachers.networks.base import class_of, require_levels
from teachers.networks.edm_blocks import resampled
from teachers.networks.exact import exact
from teachers.networks.song_unet import skip_widths
from teachers.space import Cond, DataSpace

_EPS, _HEAD, _CLIP = 1e-4, 64, 256.0


def unit(x: Tensor, *dim: int) -> Tensor:
    """x over the root of its mean square in some dimensions (equation 30)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / (_EPS + norm / math.sqrt(math.prod(x.shape[d] for d in dim)))


def silu(x: Tensor) -> Tensor:
    """Of the size of x (equation 81)."""
    return nn.functional.silu(x) / 0.596


def mixed(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Of the size of a and b (equation 88)."""
    return (a + balance * (b - a)) / math.hypot(1 - balance, balance)


def joined(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """The channels of both, each as much as `balance` says (equation 103)."""
    size = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - balance) ** 2 + balance**2))
    return torch.cat(
        [a * (size * (1 - balance) / math.sqrt(a.shape[1])), b * (size * balance / math.sqrt(b.shape[1]))], dim=1
    )


class Fourier(nn.Module):
    """Cosines of a time ``[b]`` at stored frequencies and phases -> ``[b, width]`` (equation 75)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.freqs: Tensor
        self.phases: Tensor
        # of a generator of its own: making a network to be filled shall not move the global one
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width, generator=generator))

    def forward(self, t: Tensor) -> Tensor:
        """In t's dtype."""
        return (t[:, None] * self.freqs.to(t.dtype) + self.phases.to(t.dtype)).cos() * math.sqrt(2)


class Layer(nn.Module):
    """A convolution, or with side 0 a linear map, without bias, its weights normalised (equation 47)."""

    def __init__(self, entering: int, leaving: int, side: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(leaving, entering, *[side] * (2 if side else 0)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Times `gain`."""
        w = unit(self.weight, *range(1, self.weight.dim()))
        w = w * (gain / math.sqrt(w[0].numel()))
        return nn.functional.conv2d(x, w, padding=w.shape[-1] // 2) if w.dim() == 4 else nn.functional.linear(x, w)


class SecondTime(nn.Module):
    """A time ``[b]`` -> ``[b, embedding]``, through a copy of the first's layer and a gain that starts at 0: with
    normalised weights no layer could be zero and learn."""

    def __init__(self, features: Fourier, layer: Layer) -> None:
        super().__init__()
        self.features = deepcopy(features)
        self.layer = deepcopy(layer).requires_grad_(True)
        self.gain = nn.Parameter(torch.zeros(1))  # of one entry: what has no dimension cannot be sharded

    @exact
    def forward(self, t: Tensor) -> Tensor:
        """Angles are computed in t's dtype."""
        return self.layer(self.features(t).to(self.layer.weight.dtype)) * self.gain


class Block(nn.Module):
    """Two convolutions beside what entered, and attention of the pixels beside that (figure 21)."""

    def __init__(
        self, entering: int, leaving: int, config: EDM2UNetConfig, down: bool, change: bool = False,
        attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.down, self.change, self.attended = down, change, attention and leaving >= _HEAD
        self.heads, self.balances = leaving // _HEAD, (config.res_balance, config.attn_balance)
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.conv_res0 = Layer(leaving if down else entering, leaving, 3)
        self.emb_linear = Layer(config.embedding, leaving)
        self.conv_res1 = Layer(leaving, leaving, 3)
        self.conv_skip = Layer(entering, leaving, 1) if entering != leaving else nn.Identity()
        if self.attended:
            self.attn_qkv = Layer(leaving, 3 * leaving, 1)
            self.attn_proj = Layer(leaving, leaving, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x: [b, entering, h, w]``, ``embedding: [b, embedding]``."""
        if self.change:
            kernel = torch.full((1, 1, 2, 2), 0.25, dtype=x.dtype, device=x.device)
            x = resampled(x, kernel, "down" if self.down else "up", 0)
        if self.down:
            x = unit(self.conv_skip(x), 1)
        h = self.conv_res0(silu(x))
        h = silu(h * (1 + self.emb_linear(embedding, self.emb_gain))[:, :, None, None])
        if not self.down:
            x = self.conv_skip(x)
        x = mixed(x, self.conv_res1(h), self.balances[0])
        if self.attended:
            x = mixed(x, self.attn_proj(self._attention(self.attn_qkv(x), x.shape)), self.balances[1])
        return x.clamp(-_CLIP, _CLIP)

    def _attention(self, qkv: Tensor, shape: torch.Size) -> Tensor:
        # each head's channels, and each channel's query, key and value side by side
        parts = unit(qkv.flatten(2).unflatten(1, (self.heads, -1, 3)), 2).unbind(3)
        query, key, value = (part.transpose(-1, -2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(-1, -2).reshape(shape)


class EDM2UNet(nn.Module):
    """x, t, cond -> an image of x's shape; see `EDM2UNetConfig` for the arguments."""

    def __init__(self, shape: tuple[int, int, int], classes: int | None, config: EDM2UNetConfig) -> None:
        super().__init__()
        channels, _, side = shape
        self.label_balance, self.concat_balance = config.label_balance, config.concat_balance
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.emb_fourier = Fourier(config.features)
        self.emb_noise = Layer(config.features, config.embedding)
        self.emb_label = None if classes is None else Layer(classes, config.embedding)
        self.enc = nn.ModuleDict(dict(_encoder(config, channels, side)))
        self.dec = nn.ModuleDict(dict(_decoder(config, side)))
        self.out_conv = Layer(config.widths[0], channels, 3)

    def second_time(self) -> nn.Module:
        """A number ``[b]`` in [0, 1] -> what `forward` takes as shift: 0 at first, by its last factor alone."""
        return SecondTime(self.emb_fourier, self.emb_noise)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]``, ``cond["class"]: int64 [b]``, ``shift: [b, embedding]`` -> ``[b, *shape]``.

        Raises ValueError for classes that are missing or, on a CPU, unknown.
        """
        embedding = self._embedding(t, cond, shift)
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for module in self.enc.values():
            h = module(h, embedding) if isinstance(module, Block) else module(h)
            skips.append(h)
        for name, module in self.dec.items():
            h = module(joined(h, skips.pop(), self.concat_balance) if "block" in name else h, embedding)
        return self.out_conv(h, self.out_gain)

    @exact
    def _embedding(self, t: Tensor, cond: Cond, shift: Tensor | None) -> Tensor:
        embedding = self.emb_noise(self.emb_fourier(t).to(self.emb_noise.weight.dtype))
        if shift is not None:
            embedding = embedding + shift
        if self.emb_label is not None:
            embedding = mixed(embedding, self._label(self.emb_label, cond), self.label_balance)
        return silu(embedding)

    @staticmethod
    def _label(layer: Layer, cond: Cond) -> Tensor:
        """Of one-hot vectors of the size sqrt(classes)."""
        count = layer.weight.shape[1]
        classes = class_of(cond, count)
        if classes.device.type == "cpu" and not ((classes >= 0) & (classes < count)).all():
            raise ValueError(f"classes must be in [0, {count - 1}]")
        hot = classes[:, None] == torch.arange(count, device=classes.device)
        return layer(hot.to(layer.weight.dtype) * math.sqrt(count))


def _encoder(config: EDM2UNetConfig, channels: int, side: int) -> Iterator[tuple[str, nn.Module]]:
    width = config.widths[0]
    yield f"{side}x{side}_conv", Layer(channels + 1, width, 3)
    for level, leaving in enumerate(config.widths):
        place = f"{side >> level}x{side >> level}"
        if level:
            yield f"{place}_down", Block(width, width, config, True, change=True)
        for number in range(config.blocks):
            yield f"{place}_block{number}", Block(width, leaving, config, True, attention=level in config.attention)
            width = leaving


def _decoder(config: EDM2UNetConfig, side: int) -> Iterator[tuple[str, nn.Module]]:
    skips, last = skip_widths(config.widths[0], config.widths, config.blocks), len(config.widths) - 1
    width = config.widths[-1]
    for level in range(last, -1, -1):
        place = f"{side >> level}x{side >> level}"
        if level == last:
            yield f"{place}_in0", Block(width, width, config, False, attention=True)
            yield f"{place}_in1", Block(width, width, config, False)
        else:
            yield f"{place}_up", Block(width, width, config, False, change=True)
        for number in range(config.blocks + 1):
            entering, width = width + skips.pop(), config.widths[level]
            yield f"{place}_block{number}", Block(entering, width, config, False, attention=level in config.attention)


@dataclass(frozen=True, kw_only=True)
class EDM2UNetConfig:
    """widths: channels of each level, from the whole image down; blocks: residual ones a level; attention: the levels
    that have it, from 0; features, embedding: of time, before and after its layer; the balances: how much the second of
    two things counts that are put together."""

    widths: tuple[int, ...] = (192, 384, 576, 768)
    blocks: int = 3
    attention: tuple[int, ...] = (2, 3)
    features: int = 192
    embedding: int = 768
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3

    null_class = False
    highest = 20.0
    """Radians a unit of its own time: random frequencies have a spread of one turn."""

    def __post_init__(self) -> None:
        attended = {self.widths[level] for level in (*self.attention, -1) if level < len(self.widths)}
        heads = all(width < _HEAD or width % _HEAD == 0 for width in attended)
        balances = ("label_balance", "concat_balance", "res_balance", "attn_balance")
        require(
            self,
            widths=(bool(self.widths) and min(self.widths) >= 1 and heads,
                    f"must be at least 1, with attention multiples of {_HEAD}, one a level"),
            blocks=(self.blocks >= 1, "must be at least 1"),
            attention=(all(level in range(len(self.widths)) for level in self.attention), "must be levels, from 0"),
            features=(self.features >= 1, "must be at least 1"),
            embedding=(self.embedding >= 1, "must be at least 1"),
            **{name: (0 < getattr(self, name) < 1, "must be in (0, 1)") for name in balances},
        )  # fmt: skip

    def check(self, space: DataSpace) -> None:
        """See `teachers.networks.base.require_levels`."""
        require_levels(self, space)

    def build(self, space: DataSpace) -> EDM2UNet:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        channels, rows, columns = space.shape
        with torch.device("cpu"):
            return EDM2UNet((channels, rows, columns), space.classes, self)
