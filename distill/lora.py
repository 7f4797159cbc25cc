"""Low-rank adapters: a student that is its teacher's network and, in some layers, W + (alpha / rank) B A for W.

The adapted network is a tree of modules of its own over the teacher's very tensors, and only A and B are new. What the
teacher computes goes through none of it: the teacher is the adapters switched off, and there is no switch that could be
left in the wrong position. B is zero at first, so that such a student starts at its teacher bit for bit.
Hu et al., arXiv 2106.09685; adapters, their places and their product are peft's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from teachers.errors import InputError
from teachers.fields import require
from teachers.networks.base import in_its_precision
from teachers.space import Cond

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """rank: of B A; alpha: the size of what they add is alpha / rank; targets: patterns of the names of the layers that
    are adapted (as ``*.qkv``; * is any text), null for every linear and convolution layer of the network's blocks."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(
            self,
            rank=(self.rank >= 1, "must be at least 1"),
            alpha=(0 < self.alpha < math.inf, "must be above 0 and finite"),
            targets=(self.targets is None or len(self.targets) >= 1, "must be null or name at least one layer"),
        )

    def layers(self, network: nn.Module) -> list[str]:
        """The names of the layers of `network` that are adapted. Raises InputError where there are none."""
        there = _layers(network)
        kinds = ", ".join(sorted({_kind(name) for name in there}))
        if not there:
            raise InputError("this network has no layer that can be adapted (a linear one or a plain convolution)")
        if self.targets is None:
            return [name for name in there if _in_blocks(network, name)] or there
        for pattern in self.targets:
            if not any(fnmatchcase(name, pattern) for name in there):
                raise InputError(f"{pattern!r} fits no layer of this network; it has {kinds}")
        return [name for name in there if any(fnmatchcase(name, pattern) for pattern in self.targets)]


def installed() -> bool:
    """Whether there is peft; without importing it, which takes seconds."""
    return find_spec("peft") is not None


def _layers(network: nn.Module) -> list[str]:
    """Names of layers that peft can adapt: it adds to what torch's own do, knows no dilation and no padding but by
    zeros, and torch's own attention uses its layers' weights without calling them."""
    found, skipped = [], ""
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            skipped = f"{name}."
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        plain = plain or (
            isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            and type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
            and set(module.dilation) == {1}
            and module.groups == 1
            and module.padding_mode == "zeros"
        )
        if plain and name and not (skipped and name.startswith(skipped)):
            found.append(name)
    return found


def _in_blocks(network: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(network.get_submodule(".".join(parts[:n])), nn.ModuleList) for n in range(1, len(parts)))


def _kind(name: str) -> str:
    """Of a name in many blocks one pattern for all: ``blocks.*.up`` for ``blocks.3.up``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class Adapted(nn.Module):
    """A teacher's network with adapters, called as the network is. The teacher's tensors in it are the teacher's own:
    frozen, not part of its state, and shared by every `copied` one. What it is given may have another dtype than its
    weights, as the teachers of half precision need."""

    def __init__(self, base: nn.Module, lora: LoRA, seed: int) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        self._base = (base,)  # a tuple, so that torch does not register it
        self.network = deepcopy(base, _tensors(base))  # peft freezes what it adapts
        names = lora.layers(base)
        places = "|".join(name.replace(".", r"\.") for name in names)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=places)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.network)
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        for parameter in own.values():
            parameter.data = parameter.data.float()
        self.trained = frozenset(own)
        self.register_state_dict_post_hook(_only_trained)
        self.register_load_state_dict_pre_hook(_with_shared)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        depth: int = self.network.depth  # type: ignore[assignment]
        return depth

    def second_time(self) -> nn.Module:
        """The teacher's (see `teachers.networks.base.Network`), without adapters and in single precision."""
        further: nn.Module = self._base[0].second_time()  # type: ignore[operator]
        return in_precision(further)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None, **split: Any) -> Tensor:
        """See `teachers.networks.base.Network`."""
        return in_its_precision(self.network, x, t, cond, shift, **split)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The teacher's network with W + (alpha / rank) B A for W, memory of its own, in the adapters' precision. Its
        output is this one's up to the rounding of that sum."""
        plain = in_precision(deepcopy(self._base[0]), self.get_parameter(min(self.trained)).dtype)
        for name, layer in self.network.named_modules():
            if hasattr(layer, "get_delta_weight"):
                weight = plain.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                weight += layer.get_delta_weight("default").to(weight)
        return plain


def in_precision(network: M, dtype: torch.dtype = torch.float32) -> M:
    """The network, its weights in `dtype`, by default that in which students are trained; in place. One that has them
    so keeps its buffers, of whatever dtype they are."""
    return network if next(network.parameters()).dtype == dtype else network.to(dtype)


def _tensors(network: nn.Module) -> dict[int, Any]:
    """For deepcopy: what it is to take as it is."""
    return {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}


def copied(module: M) -> M:
    """A copy of a module that shares the teacher's tensors with it, where it has adapters; a whole one otherwise."""
    shared: dict[int, Any] = {}
    for part in module.modules():
        if isinstance(part, Adapted):
            base = part._base[0]
            shared |= {**_tensors(base), id(base): base}
    return deepcopy(module, shared)


def _only_trained(module: Adapted, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    del metadata
    for key in [k for k in state if k.startswith(prefix) and k.removeprefix(prefix) not in module.trained]:
        del state[key]


def _with_shared(
    module: Adapted, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """What is not in a state is there already: let torch find it; what is there twice must not reach the teacher."""
    del metadata, strict, missing, errors
    for key, tensor in module.network.state_dict(prefix=f"{prefix}network.", keep_vars=True).items():
        if key.removeprefix(prefix) not in module.trained:
            if key in state:
                unexpected.append(key)
            state[key] = tensor
