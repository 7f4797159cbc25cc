"""The student: a backbone, a second time, and the path it lives on; it starts exactly at its teacher.

u(x, s, t) = network(x, s, shift = gap(t - s)). The gap embedding is a copy of the network's own time embedding whose
LAST layer alone is zero: u(x, s, t) = v(x, s) bit for bit for every t, and gradients reach it at the first step (with
every layer at zero they never would).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.flow_map import compose, jump
from distill.rows import noise
from teachers.networks import NETWORKS, NetworkConfig
from teachers.networks.embeddings import TimeEmbedding
from teachers.path import PATHS, Path
from teachers.solvers import euler, uniform_grid
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

Kind = Literal["flow_map", "velocity"]
SUPPORTS = {"flow_map": "0 <= s <= t <= 1", "velocity": "s = t"}
_CHUNK = 500  # samples made at once


class Student(nn.Module):
    """A `FlowMap` of kind `flow_map` (any 0 <= s <= t <= 1), or of kind `velocity`: a teacher in training, which knows
    the diagonal u(x, t, t) = v(x, t) alone and whose jump is an Euler step.

    ``config`` is what its export says of it (see `distill.load`); empty while it is trained.
    """

    def __init__(self, network: nn.Module, space: DataSpace, path: Path, kind: Kind = "flow_map") -> None:
        super().__init__()
        self.config: Mapping[str, Any] = {}
        self.network = network
        self.space = space
        self.path = path
        self.kind: Kind = kind
        self.gap = _second_time(network) if kind == "flow_map" else None

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """u(x_s, s, t). ``x_s: [b, *shape]``, ``s, t: [b]`` (float32 or float64) -> ``[b, *shape]`` in x_s's dtype.

        An exported student raises ValueError for times that it does not support.
        """
        if self.config and not self.supports(s, t).all():
            raise ValueError(f"this student is made for {SUPPORTS[self.kind]}: s and t are outside of it")
        shift = None if self.gap is None else self.gap(t - s)
        u: Tensor = self.network(x_s, s, cond, shift)
        return u

    def forward(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """X_{s,t}(x_s) = x_s + (t - s) u(x_s, s, t). Shapes and errors as `mean_velocity`."""
        return jump(x_s, s, t, self.mean_velocity(x_s, s, t, cond))

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        """bool ``[b]``: whether this student is made to go from s to t (see `SUPPORTS`)."""
        if self.kind == "velocity":
            return (s == t) & (s >= 0) & (t <= 1)
        return (s >= 0) & (s <= t) & (t <= 1)

    def generate(self, x_0: Tensor, steps: int, cond: Cond = None) -> Tensor:
        """Noise ``x_0: [b, *shape]`` -> data, in `steps` equal jumps (Euler steps of a velocity); nfe = steps.

        Raises ValueError if steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if self.kind == "velocity":
            return euler(self._velocity, x_0, uniform_grid(steps, x_0.device), cond)
        return compose(self, x_0, uniform_grid(steps, x_0.device), cond)

    def _velocity(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.mean_velocity(x_t, t, t, cond)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int | None = None,
        seed: int = 0,
        cond: Mapping[str, Tensor | Sequence[int] | int] | None = None,
    ) -> Tensor:
        """``n`` samples ``[n, *shape]``, float32, in the data's range; sample i starts from the noise of (seed, i).

        steps: network calls a sample; by default the first of the export's recommendation, 1 for a flow map.
        cond: e.g. ``{"class": 3}`` or ``{"class": [0, 1, 2]}`` (n entries); without it classes are taken in turn.
        Raises ValueError for arguments that make no sense to this student.
        """
        steps = int(self.config.get("steps", [1])[0]) if steps is None else steps
        if not all(isinstance(value, int) for value in (n, steps, seed)) or n < 1 or steps < 1:
            raise ValueError(f"n, steps and seed must be integers, n and steps at least 1: got {n}, {steps}, {seed}")
        given = self._conditioning(n, cond)
        device = next(self.parameters()).device
        parts = []
        for first in range(0, n, _CHUNK):
            count = min(_CHUNK, n - first)
            c = self.space.cond_for(first, count) if given is None else _rows(given, first, count)
            c = None if c is None else {k: v.to(device) for k, v in c.items()}
            parts.append(self.generate(noise(seed, first, count, self.space.shape, device), steps, c))
        return self.space.clamp(torch.cat(parts))

    def images(self, x: Tensor) -> Tensor:
        """Samples ``[n, c, h, w]`` as uint8 pixels of the same shape. Raises ValueError if they are not images."""
        return self.space.pixels(x)

    def _conditioning(self, n: int, cond: Mapping[str, Tensor | Sequence[int] | int] | None) -> Cond:
        if cond is None:
            return None
        classes = self.space.classes
        if classes is None:
            raise ValueError(f"this student is unconditional, it takes no cond (got {', '.join(cond)})")
        if set(cond) != {"class"}:
            raise ValueError(f"cond must have the key 'class' alone, got {', '.join(cond) or 'none'}")
        try:
            label = torch.as_tensor(cond["class"]).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"cond['class'] must be integers: {error}") from None
        if label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(f"cond['class'] must be integers, got {label.dtype}")
        label = label.long()
        if label.dim() > 1 or (label.dim() == 1 and len(label) != n):
            raise ValueError(f"cond['class'] must be one integer or {n} of them, got shape {tuple(label.shape)}")
        if label.min() < 0 or label.max() >= classes:
            raise ValueError(f"cond['class'] must be in [0, {classes - 1}], got {label.min()} to {label.max()}")
        return {"class": label.expand(n)}


def _rows(cond: Mapping[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    return {k: v[first : first + count] for k, v in cond.items()}


def _second_time(network: nn.Module) -> nn.Module:
    embedding = deepcopy(network.time_embedding)
    assert isinstance(embedding, TimeEmbedding)
    nn.init.zeros_(embedding.out.weight)
    nn.init.zeros_(embedding.out.bias)
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
