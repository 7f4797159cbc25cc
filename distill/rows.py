"""Random numbers as a pure function of (seed, purpose, step, global row).

Noise, times and labels are drawn for a global batch of which each process keeps its rows: whoever holds row 17 of step
900 draws the same numbers for it, on any number of processes and after any restart. No random state is ever saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 32  # rows that share one seeded generator: seeding costs more than drawing


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def chosen(count: int, of: int) -> Tensor:
    """`count` of the numbers 0 .. of - 1, always the same, in their order; drawn, since evenly taken ones may all be of
    one class where classes come in turn."""
    generator = torch.Generator().manual_seed(derived_seed("chosen", of))
    return torch.randperm(of, generator=generator, device="cpu")[:count].sort().values


class Rows:
    """Draws for rows first .. first + count - 1 of the global batch of (seed, purpose, step).

    Successive calls give independent numbers: the n-th call on one process matches the n-th call on any other. Numbers
    are drawn on the CPU, so that they do not depend on the device, and moved to `device`.
    """

    def __init__(
        self, seed: int, purpose: str, step: int, first: int, count: int, device: torch.device | str = "cpu"
    ) -> None:
        self.count = count
        self._key = (seed, purpose, step)
        self._first = first
        self._device = device
        self._calls = 0

    def normal(self, *dims: int) -> Tensor:
        """Standard normal ``[count, *dims]``, float32."""
        return self._draw(torch.randn, dims, torch.float32)

    def uniform(self, *dims: int) -> Tensor:
        """Uniform on [0, 1), ``[count, *dims]``, float64: fit for times."""
        return self._draw(torch.rand, dims, torch.float64)

    def _draw(self, draw: object, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start, stop = self._first // _BLOCK, -(-(self._first + self.count) // _BLOCK)
        blocks = []
        for block in range(start, stop):
            generator = torch.Generator().manual_seed(derived_seed(*self._key, self._calls, block))
            # said, since torch may be set to another device
            blocks.append(draw(_BLOCK, *dims, generator=generator, dtype=dtype, device="cpu"))  # type: ignore[operator]
        self._calls += 1
        offset = self._first - start * _BLOCK
        return torch.cat(blocks)[offset : offset + self.count].to(self._device)


def noise(seed: int, first: int, count: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Noise of samples first .. first + count - 1 ``[count, *shape]``, float32: sample i's is that of (seed, i)."""
    return Rows(seed, "sample", 0, first, count, device).normal(*shape)


def fresh_noise(
    seed: int, first: int, count: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Callable[[int], Tensor]:
    """k -> noise ``[count, *shape]`` of the k-th time that the samples of `noise` are noised again."""
    return lambda k: Rows(seed, "sample again", k, first, count, device).normal(*shape)
