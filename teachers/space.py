"""What a sample looks like, and what it may be conditioned on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from teachers.fields import require

Cond = Mapping[str, Tensor] | None
"""Conditioning by field name, e.g. ``{"class": int64 [b]}``; None for an unconditional model."""

Given = Tensor | Sequence[int] | int
"""What a field of the conditioning is asked for by."""


def cond_on(cond: Cond, device: torch.device) -> Cond:
    """Conditioning on a device."""
    return None if cond is None else {name: value.to(device) for name, value in cond.items()}


def _as_tuples(owner: object, *names: str) -> None:
    """Fields of a frozen dataclass that were given as lists as tuples, so that equal ones are equal."""
    for name in names:
        if isinstance(value := getattr(owner, name), list | tuple):
            object.__setattr__(owner, name, tuple(value))


def _are(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


@dataclass(frozen=True)
class Embedding:
    """A field of the conditioning that is a tensor: its name, its shape without the batch, its dtype (`float32` or
    `bool`). text ``[tokens, width]`` and text_mask ``[tokens]`` are a caption's, pooled ``[width]`` its summary."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _as_tuples(self, "shape")

    def rows(self, value: Given, n: int) -> Tensor:
        """A value for n samples, ``[n, *shape]``. Raises ValueError."""
        try:
            x = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"cond[{self.name!r}] must be a tensor, the embedding: {error}") from None
        if x.shape not in (self.shape, (n, *self.shape)):
            raise ValueError(
                f"cond[{self.name!r}] must be {list(self.shape)}, or {[n, *self.shape]}, got {list(x.shape)}"
            )
        return x.to(getattr(torch, self.dtype)).expand(n, *self.shape)


@dataclass(frozen=True)
class DataSpace:
    """The shape of a sample, its number of classes (None: unconditional), its range of values (None: unbounded, not an
    image), and the embeddings that it is conditioned on."""

    shape: tuple[int, ...]
    classes: int | None = None
    value_range: tuple[float, float] | None = None
    embeddings: tuple[Embedding, ...] = ()

    def __post_init__(self) -> None:
        _as_tuples(self, "shape", "value_range")
        sizes, span = self.shape, self.value_range
        require(
            self,
            shape=(_are(sizes, Integral) and len(sizes) >= 1 and min(sizes) >= 1,
                   "must be sizes of at least 1, as (2,) or (1, 28, 28)"),
            classes=(self.classes is None or self.classes >= 1, "must be None or at least 1"),
            value_range=(span is None or (_are(span, Real) and len(span) == 2
                                          and -math.inf < span[0] < span[1] < math.inf), "must be None or (low, high)"),
        )  # fmt: skip
        object.__setattr__(self, "embeddings", tuple(sorted(self.embeddings, key=lambda e: e.name)))

    def __str__(self) -> str:
        classes = "no classes" if self.classes is None else f"{self.classes} classes"
        span = "any value" if self.value_range is None else f"values in {list(self.value_range)}"
        given = "".join(f", {e.name} {list(e.shape)}" for e in self.embeddings)
        return f"shape {list(self.shape)}, {classes}, {span}{given}"

    @property
    def is_image(self) -> bool:
        """Whether a sample is [1 or 3, height, width] with a known range, hence a picture."""
        return len(self.shape) == 3 and self.shape[0] in (1, 3) and self.value_range is not None

    @property
    def conditions(self) -> list[str]:
        """The names of the fields of the conditioning."""
        return [*([] if self.classes is None else ["class"]), *(embedding.name for embedding in self.embeddings)]

    @property
    def null(self) -> Cond:
        """One row of conditioning that means "no class", without a batch dimension; None if there are no classes."""
        return None if self.classes is None else {"class": torch.tensor(self.classes)}

    def clamp(self, x: Tensor) -> Tensor:
        """Samples with what lies outside the range of values set to its ends: what is delivered and measured."""
        return x if self.value_range is None else x.clamp(*self.value_range)

    def pixels(self, x: Tensor) -> Tensor:
        """Images ``[..., c, h, w]`` as uint8 of the same shape. Raises ValueError for what is none of them."""
        if not self.is_image or self.value_range is None:
            raise ValueError(f"samples of shape {self.shape} with range {self.value_range} are not images")
        if x.shape[-3:] != self.shape:
            raise ValueError(f"images must be [..., {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        low, high = self.value_range
        return ((x.float() - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)

    def cond_for(self, first: int, count: int) -> Cond:
        """Conditioning of samples first .. first + count - 1 when none is asked for: the classes in turn. Raises
        ValueError where there are embeddings, which nothing stands for."""
        if self.embeddings:
            names = ", ".join(embedding.name for embedding in self.embeddings)
            raise ValueError(f"conditioned on {names}: pass them, e.g. cond={{{self.embeddings[0].name!r}: ...}}")
        if self.classes is None:
            return None
        return {"class": torch.arange(first, first + count, device="cpu") % self.classes}

    def cond_of(self, given: Mapping[str, Given], n: int) -> dict[str, Tensor]:
        """Conditioning of n samples from what is given for all of them, or for each. Raises ValueError."""
        names = self.conditions
        if set(given) != set(names):
            alone, said = "s " if len(names) > 1 else " ", ", ".join(map(str, given)) or "none"
            raise ValueError(f"cond must have the key{alone}{', '.join(map(repr, names))} alone, got {said}")
        found = {embedding.name: embedding.rows(given[embedding.name], n) for embedding in self.embeddings}
        return found if self.classes is None else {**found, "class": _label(self.classes, given["class"], n)}


def _label(classes: int, value: Given, n: int) -> Tensor:
    try:
        label = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"cond['class'] must be integers: {error}") from None
    if label.is_floating_point() or label.dtype == torch.bool:
        raise ValueError(f"cond['class'] must be integers, got {label.dtype}")
    label = label.long()
    if label.dim() > 1 or (label.dim() == 1 and len(label) != n):
        raise ValueError(f"cond['class'] must be one integer or {n} of them, got shape {tuple(label.shape)}")
    if label.min() < 0 or label.max() >= classes:
        raise ValueError(f"cond['class'] must be in [0, {classes - 1}], got {label.min()} to {label.max()}")
    return label.expand(n)


@dataclass(frozen=True, kw_only=True)
class Latent:
    """What a teacher works on, of an autoencoder's raw latents: z = (raw - shift) scale, or, by channel,
    (raw - mean) scale / std. autoencoder: its id; spread: about the standard deviation of z."""

    autoencoder: str
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    spread: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            scale=(0 < self.scale < math.inf, "must be above 0 and finite"),
            shift=(math.isfinite(self.shift), "must be finite"),
            mean=((self.mean is None) == (self.std is None), "must be given together with std, or neither"),
            std=(self.std is None or min(self.std) > 0, "must be above 0"),
            spread=(0 < self.spread < math.inf, "must be above 0 and finite"),
        )

    @staticmethod
    def of(autoencoder: Mapping[str, Any]) -> Latent:
        """Of what the manifest of shards says of its autoencoder."""
        return Latent(autoencoder=str(autoencoder["id"]), scale=autoencoder["scale"], shift=autoencoder["shift"])

    def to_latent(self, raw: Tensor) -> Tensor:
        """z of raw latents ``[b, c, ...]``."""
        mean, std = self._of(raw)
        return (raw - mean) * (self.scale / std)

    def from_latent(self, z: Tensor) -> Tensor:
        """The inverse of `to_latent`."""
        mean, std = self._of(z)
        return z * (std / self.scale) + mean

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            return x.new_tensor(self.shift), x.new_tensor(1.0)
        mean, std = (x.new_tensor(v).reshape(1, -1, *[1] * (x.dim() - 2)) for v in (self.mean, self.std))
        return mean, std
