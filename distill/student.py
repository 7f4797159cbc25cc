"""The student: a backbone, a second time, and the path it lives on; it starts exactly at its teacher.

u(x, s, t) = network(x, s, shift = gap(t - s)). The gap embedding is a copy of the network's own time embedding whose
LAST layer alone is zero: u(x, s, t) = v(x, s) bit for bit for every t, and gradients reach it at the first step (with
every layer at zero they never would).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distill.flow_map import jump
from teachers.networks import NETWORKS, NetworkConfig
from teachers.path import PATHS, Path
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

Kind = Literal["flow_map", "velocity"]
SUPPORTS = {"flow_map": "0 <= s <= t <= 1", "velocity": "s = t"}


class Student(nn.Module):
    """A `FlowMap` of kind `flow_map` (any 0 <= s <= t <= 1), or of kind `velocity`: a teacher in training, which knows
    the diagonal u(x, t, t) = v(x, t) alone and whose jump is an Euler step."""

    def __init__(self, network: nn.Module, space: DataSpace, path: Path, kind: Kind = "flow_map") -> None:
        super().__init__()
        self.network = network
        self.space = space
        self.path = path
        self.kind: Kind = kind
        self.gap = _second_time(network) if kind == "flow_map" else None

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """u(x_s, s, t). ``x_s: [b, *shape]``, ``s, t: [b]`` (float32 or float64) -> ``[b, *shape]`` in x_s's dtype."""
        shift = None if self.gap is None else self.gap(t - s)
        u: Tensor = self.network(x_s, s, cond, shift)
        return u

    def forward(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """X_{s,t}(x_s) = x_s + (t - s) u(x_s, s, t). Shapes as `mean_velocity`."""
        return jump(x_s, s, t, self.mean_velocity(x_s, s, t, cond))

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        """bool ``[b]``: whether this student is made to go from s to t (see `SUPPORTS`)."""
        if self.kind == "velocity":
            return (s == t) & (s >= 0) & (t <= 1)
        return (s >= 0) & (s <= t) & (t <= 1)


def _second_time(network: nn.Module) -> nn.Module:
    embedding = deepcopy(network.time_embedding)
    last = embedding.out
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert isinstance(embedding, nn.Module)
    return embedding.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """kind: flow_map, or velocity for a model that is to become a teacher; init: from the teacher's weights, or random;
    network: null for the teacher's; path: null for the teacher's (linear without one)."""

    kind: Kind = "flow_map"
    init: Literal["teacher", "random"] = "teacher"
    network: NetworkConfig | None = None
    path: Literal["linear", "cosine"] | None = None

    def build(self, teacher: Teacher | None, space: DataSpace, seed: int) -> Student:
        """The student at step 0. The caller has checked that what is null can be had from the teacher."""
        path = PATHS[self.path]() if self.path else teacher.path if teacher else PATHS["linear"]()
        if self.init == "teacher":
            assert teacher is not None and teacher.network is not None
            network = deepcopy(teacher.network).train().requires_grad_(True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = self.network_config(teacher).build(space)
        return Student(network, space, path, self.kind)

    def network_config(self, teacher: Teacher | None) -> NetworkConfig:
        """The network's entry, from the recipe or else from the teacher."""
        if self.network is not None:
            return self.network
        assert teacher is not None and teacher.network_config is not None
        arguments = dict(teacher.network_config)
        return NETWORKS[arguments.pop("name")](**arguments)
