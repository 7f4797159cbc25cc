"""The student: a backbone, a second time, and the path it lives on; it starts exactly at its teacher.

u(x, s, t) = network(x, s, shift = gap(t - s)). The gap embedding is a copy of the network's own time embedding whose
LAST layer alone is zero: u(x, s, t) = v(x, s) bit for bit for every t, and gradients reach it at the first step (with
every layer at zero they never would). With a depth split (decoupled MeanFlow, arXiv 2510.24474) there is no gap: the
first blocks see s, the others t. A scale of guidance is embedded as the gap is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.calls import are_numbers, check_call, check_rows, fields_of
from distill.flow_map import SUPPORTS, Fresh, Kind, check_steps, equal_steps, jump, supported, travel
from distill.guidance import GuidanceInput, with_guidance
from distill.lora import Adapted, LoRA, copied, in_precision
from distill.parameterisation import MeanVelocity, Parameterisation
from distill.rows import fresh_noise, noise
from teachers.fields import require
from teachers.guidance import HIGH, LOW, SCALE, plain
from teachers.networks import AnyConfig, NetworkConfig, from_entry
from teachers.networks.base import in_its_precision
from teachers.path import PATHS, Path, PathName
from teachers.solvers import euler
from teachers.space import Cond, DataSpace, Given, cond_on
from teachers.velocity import Teacher

_CHUNK = 500  # samples made at once


class Student(nn.Module):
    """A `FlowMap` of some `Kind`; a velocity, which knows the diagonal u(x, t, t) = v(x, t) alone, is a teacher in
    training, and its jump an Euler step.

    finest: of the grid of kinds `shortcut` and `grid`. parameterisation: what the network predicts; own_output: whether
    it does so itself, or predicts a velocity, as a teacher does, that is converted. split: the number of blocks that
    see the start time, where the second time enters by depth. guidance: the scales it knows.
    ``config`` is what its export says of it (see `distill.load`); empty while it is trained.
    """

    def __init__(
        self,
        network: nn.Module,
        space: DataSpace,
        path: Path,
        kind: Kind = "flow_map",
        *,
        finest: int = 1,
        parameterisation: Parameterisation | None = None,
        own_output: bool = False,
        split: int | None = None,
        guidance: GuidanceInput | None = None,
    ) -> None:
        super().__init__()
        self.config: Mapping[str, Any] = {}
        self.network = network
        self.space = space
        self.path = path
        self.kind: Kind = kind
        self.finest = finest
        self.parameterisation = parameterisation or MeanVelocity()
        self.own_output = own_output
        self.split = split
        self.guidance = guidance
        two = kind in ("flow_map", "shortcut", "grid") and split is None
        further: Callable[[], nn.Module] = network.second_time  # type: ignore[assignment]
        self.gap = further() if two else None
        self.guide = None if guidance is None else nn.ModuleDict({n: further() for n in guidance.names})

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """u(x_s, s, t). ``x_s: [b, *shape]``, ``s, t: [b]`` (float32 or float64) -> ``[b, *shape]`` in x_s's dtype.

        An exported student raises ValueError for other shapes, and for times and scales that it does not support.
        """
        if self.config:
            check_call(self.space, self.guidance, x_s, s, t, cond)
            if not self.supports(s, t).all():
                raise ValueError(f"this student is made for {self.support}: s and t are outside of it")
        p, path = self.parameterisation, self.path
        split = {} if self.split is None else {"end": t, "split": self.split}
        point = p.network_input(path, x_s, s) if self.own_output else x_s
        network: Callable[..., Tensor] = self.network
        if self.config and x_s.dtype == torch.float32:  # an export may have been put in another precision than that
            network = partial(in_its_precision, self.network)
        said = network(point, s, plain(cond), self._shift(s, t, cond), **split)
        if isinstance(p, MeanVelocity):
            return said.to(x_s.dtype)
        return p.mean_velocity(path, said if self.own_output else p.from_velocity(path, said, x_s, s), x_s, s, t)

    def _shift(self, s: Tensor, t: Tensor, cond: Cond) -> Tensor | None:
        shift: Tensor | None = None if self.gap is None else self.gap(t - s)
        if self.guide is None:
            return shift
        assert self.guidance is not None
        for name, embedding in self.guide.items():
            value = (cond or {}).get(name)
            value = torch.full_like(s, self.guidance.usual[name]) if value is None else value
            more = embedding(1 / value if name == SCALE else value)  # 1 / scale: in (0, 1] like a time
            shift = more if shift is None else shift + more
        return shift

    def forward(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """X_{s,t}(x_s) = x_s + (t - s) u(x_s, s, t). Shapes and errors as `mean_velocity`."""
        return jump(x_s, s, t, self.mean_velocity(x_s, s, t, cond))

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        """bool ``[b]``: whether this student is made to go from s to t (see `support`)."""
        return supported(self.kind, self.finest, s, t)

    @property
    def support(self) -> str:
        """`supports` in words."""
        return SUPPORTS[self.kind].format(finest=self.finest)

    def generate(
        self,
        x_0: Tensor,
        steps: int,
        cond: Cond = None,
        *,
        times: Sequence[float] | None = None,
        gamma: float = 0.0,
        fresh: Fresh | None = None,
    ) -> Tensor:
        """Standard normal noise ``x_0: [b, *shape]`` -> data in `steps` network calls, equally long or cut at `times`.

        A flow map composes jumps; with gamma in (0, 1] each but the last goes beyond and is noised back (see
        `distill.flow_map.travel`), for which `fresh` gives the noise. A consistency student always goes to the data and
        back, gamma = 1; a shortcut student takes powers of two of steps; a velocity takes Euler steps.
        Raises ValueError for steps, times or a gamma that this student is not made for, and for noise of another shape.
        """
        check_rows(x_0, self.space.shape, "x_0")
        check_steps(self.kind, self.finest, steps)
        if not 0 <= gamma <= 1 or (gamma and self.kind not in ("flow_map", "consistency")):
            raise ValueError(f"gamma must be in [0, 1], and above 0 for a flow_map student alone, got {gamma}")
        if times is not None and self.kind in ("shortcut", "grid"):
            raise ValueError(f"times cannot be chosen: this student is made for {self.support}")
        grid = equal_steps(steps, times, x_0.device)
        x = self.path.start(x_0)
        if self.kind == "velocity":
            return euler(self.velocity, x, grid, cond)
        gamma = 1.0 if self.kind == "consistency" else gamma
        if gamma and steps > 1 and fresh is None:
            raise ValueError("this student is noised again between its steps: pass fresh, or use Student.sample")
        return travel(self, x, grid, cond, self.path, gamma, fresh)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """u(x_t, t, t), as a `Velocity`."""
        return self.mean_velocity(x_t, t, t, cond)

    def merged(self) -> Student:
        """Without adapters: what they add is part of the weights, up to rounding. One that has none is returned."""
        if not isinstance(self.network, Adapted):
            return self
        found = copied(self)
        found.network = self.network.merged()
        return found.train(self.training)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int | None = None,
        seed: int = 0,
        cond: Mapping[str, Given] | None = None,
        *,
        times: Sequence[float] | None = None,
        gamma: float = 0.0,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """``n`` samples ``[n, *shape]``, float32, in the data's range; sample i starts from the noise of (seed, i).

        steps: network calls a sample; by default the first of the export's recommendation, 1 for a flow map.
        cond: e.g. ``{"class": 3}`` or ``{"class": [0, 1, 2]}`` (n entries); without it classes are taken in turn.
        Embeddings, of a student that is conditioned on them, are always needed: one for all samples, or n.
        times, gamma: see `generate`. guidance, interval: of a student that was trained on a range of them.
        Raises ValueError for arguments that make no sense to this student.
        """
        steps = int(self.config.get("steps", [1])[0]) if steps is None else steps
        if not all(isinstance(value, Integral) for value in (n, steps, seed)) or n < 1 or steps < 1:
            raise ValueError(f"n, steps and seed must be integers, n and steps at least 1: got {n}, {steps}, {seed}")
        if cond is not None and not self.space.conditions:
            said = ", ".join(map(str, fields_of(cond)))
            raise ValueError(f"this student is unconditional, it takes no cond (got {said})")
        given = None if cond is None else self.space.cond_of(fields_of(cond), n)
        asked = self._guidance(guidance, interval)
        device = next(self.parameters()).device
        parts = []
        for first in range(0, n, _CHUNK):
            count = min(_CHUNK, n - first)
            c = self.space.cond_for(first, count) if given is None else _rows(given, first, count)
            c = with_guidance(cond_on(c, device), count, device, **asked)
            where = (seed, first, count, self.space.shape, device)
            parts.append(self.generate(noise(*where), steps, c, times=times, gamma=gamma, fresh=fresh_noise(*where)))
        return self.space.clamp(torch.cat(parts))

    def _guidance(self, scale: float | None, interval: tuple[float, float] | None) -> dict[str, float | None]:
        if scale is None and interval is None:
            return {}
        own = self.guidance
        if own is None:
            raise ValueError("this student was trained for one guidance: it takes no guidance and no interval")
        if scale is not None and not (are_numbers(scale) and own.low <= scale <= own.high):
            raise ValueError(f"guidance must be in [{own.low}, {own.high}], got {scale!r}")
        pair = isinstance(interval, Sequence) and len(interval) == 2 and are_numbers(*interval)
        if interval is not None and not (own.intervals and pair and 0 <= interval[0] < interval[1] <= 1):
            allowed = "two increasing times in [0, 1]" if own.intervals else f"left out (it is {list(own.interval)})"
            raise ValueError(f"interval must be {allowed}, got {interval!r}")
        low, high = interval or (None, None)
        return {SCALE: scale, LOW: low, HIGH: high}

    def images(self, x: Tensor) -> Tensor:
        """Samples ``[n, c, h, w]`` as uint8 pixels of the same shape. Raises ValueError if they are not images."""
        return self.space.pixels(x)


def _rows(cond: Mapping[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    return {k: v[first : first + count] for k, v in cond.items()}


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """init: from the teacher's weights, or random; network: null for the teacher's; path: null for the teacher's
    (linear without one), another has the teacher converted; parameterisation: what the network predicts; split: null,
    or the number of blocks that see the start time while the others see the end (decoupled MeanFlow); lora: null, or
    adapters, which alone are trained beside the second time while the weights stay the teacher's."""

    init: Literal["teacher", "random"] = "teacher"
    network: NetworkConfig | None = None
    path: PathName | None = None
    parameterisation: Parameterisation = field(default_factory=MeanVelocity)
    split: int | None = None
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        taken = self.lora is None or self.init == "teacher"
        require(self, lora=(taken, "adapts the teacher's network: set student.init to teacher, or remove it"))

    def build(
        self,
        teacher: Teacher | None,
        space: DataSpace,
        seed: int,
        kind: Kind = "flow_map",
        finest: int = 1,
        guidance: GuidanceInput | None = None,
    ) -> Student:
        """The student at step 0; kind and finest are its objective's. The caller has checked that what is null can be
        had from the teacher."""
        return Student(
            self.new_network(teacher, space, seed),
            space,
            self.path_of(teacher),
            kind,
            finest=finest,
            parameterisation=self.parameterisation,
            own_output=self.init == "random",
            split=self.split,
            guidance=guidance,
        )

    def path_of(self, teacher: Teacher | None) -> Path:
        """The path the student lives on."""
        return PATHS[self.path]() if self.path else teacher.path if teacher else PATHS["linear"]()

    def new_network(self, teacher: Teacher | None, space: DataSpace, seed: int) -> nn.Module:
        """The network at step 0: the teacher's, or a random one."""
        if self.init == "teacher":
            assert teacher is not None and teacher.network is not None
            if self.lora is not None:
                return Adapted(teacher.network, self.lora, seed)
            return in_precision(deepcopy(teacher.network).train().requires_grad_(True))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network_config(teacher).build(space)

    def network_config(self, teacher: Teacher | None) -> AnyConfig:
        """The network's entry, from the recipe or else from the teacher."""
        if self.network is not None:
            return self.network
        assert teacher is not None and teacher.network_config is not None
        return from_entry(teacher.network_config)
