"""What a convention is: how a network of another family sees our points and times, and how its answer is a velocity."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from teachers.path import Linear, LinearFrom, Path


class Convention(ABC):
    """How a network sees points and times of the linear path. Times are float64 ``[b]``, points ``[b, *dims]``."""

    @property
    @abstractmethod
    def first(self) -> float:
        """The earliest time of the linear path that the network knows."""

    @property
    @abstractmethod
    def std(self) -> float:
        """The standard deviation of the noise there."""

    @abstractmethod
    def enter(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's point and time."""

    @abstractmethod
    def leave(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the linear path, from what the network says of the point x at t."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """How much its own time changes, about, while ours goes from 0 to 1."""

    @property
    def path(self) -> Path:
        """The linear path, as far as the network knows it."""
        return Linear() if self.first == 0 else LinearFrom(first=self.first, std=self.std)


def place(levels: Tensor, wanted: Tensor) -> Tensor:
    """Where numbers ``[b]`` lie among rising `levels` ``[K]``: 0 to K - 1, linear between two, at the ends beyond."""
    wanted = wanted.clamp(levels[0].item(), levels[-1].item())
    above = torch.searchsorted(levels, wanted.detach()).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return above - 1 + (wanted - low) / (high - low)
