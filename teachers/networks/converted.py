"""A network behind its convention, as a velocity of the linear path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from teachers.networks.adm_unet import ADMUNetConfig
from teachers.networks.convention import Convention
from teachers.networks.conventions import ConventionConfig
from teachers.networks.dhariwal_unet import DhariwalUNetConfig
from teachers.networks.diffusers import DiffusersConfig
from teachers.networks.edm2_unet import EDM2UNetConfig
from teachers.networks.imeanflow import IMeanFlowConfig
from teachers.networks.jit import JiTConfig
from teachers.networks.lightning_dit import LightningDiTConfig
from teachers.networks.own import OwnConfig
from teachers.networks.shortcut import ShortcutConfig
from teachers.networks.sit import SiTConfig
from teachers.networks.song_unet import SongUNetConfig
from teachers.space import Cond, DataSpace

ForeignConfig = (
    SongUNetConfig
    | DhariwalUNetConfig
    | EDM2UNetConfig
    | SiTConfig
    | LightningDiTConfig
    | JiTConfig
    | IMeanFlowConfig
    | ShortcutConfig
    | ADMUNetConfig
    | DiffusersConfig
    | OwnConfig
)
FOREIGN: dict[str, type[ForeignConfig]] = {
    "sit": SiTConfig,
    "lightning_dit": LightningDiTConfig,
    "jit": JiTConfig,
    "imeanflow": IMeanFlowConfig,
    "shortcut": ShortcutConfig,
    "adm_unet": ADMUNetConfig,
    "song_unet": SongUNetConfig,
    "dhariwal_unet": DhariwalUNetConfig,
    "edm2_unet": EDM2UNetConfig,
    "diffusers": DiffusersConfig,
    "own": OwnConfig,
}
"""Networks of other families, which teachers have and students take from them."""


class Converted(nn.Module):
    """A network of another convention as a velocity of the linear path, from the time on that it knows.

    It is called as the network is, at times in [0, 1] of ``convention.path``; the network sees its own point and time.
    """

    def __init__(self, network: nn.Module, convention: Convention) -> None:
        super().__init__()
        self.network = network
        self.convention = convention

    @property
    def depth(self) -> int:
        """The number of blocks."""
        depth: int = self.network.depth  # type: ignore[assignment]
        return depth

    def second_time(self) -> nn.Module:
        """See `teachers.networks.base.Network`."""
        found: nn.Module = self.network.second_time()  # type: ignore[operator]
        return found

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None, **split: Any) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]`` in [0, 1] -> velocity ``[b, *shape]`` in x's dtype; see `Network.forward`."""
        first = self.convention.first
        t = first + (1 - first) * t.double()
        if "end" in split:
            split["end"] = self.convention.enter(x, first + (1 - first) * split["end"].double())[1]
        own, label = self.convention.enter(x, t)
        v = self.convention.leave(self.network(own, label, cond, shift, **split), x, t)
        return v if first == 0 else (1 - first) * v


@dataclass(frozen=True, kw_only=True)
class ConvertedConfig:
    """A network and how it sees points and times."""

    network: ForeignConfig
    convention: ConventionConfig

    @property
    def null_class(self) -> bool:
        """Whether the network knows "no class"."""
        return self.network.null_class

    @property
    def highest(self) -> float:
        """Radians a unit time of the fastest sinusoid."""
        return self.network.highest * self.convention.rate

    def check(self, space: DataSpace) -> None:
        """Raises FieldError as the network's own does."""
        self.network.check(space)

    def build(self, space: DataSpace) -> Converted:
        """A freshly initialised network for `space`. Raises as `check` does."""
        return Converted(self.network.build(space), self.convention)
