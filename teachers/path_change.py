"""A teacher on another path: the same flow at another speed and another scale.

Points of two paths correspond where their noise levels, phi = atan2(sigma, alpha), agree. With the wanted path and its
time t, the teacher's path and its time r(t), phi(r) = phi_wanted(t), and norms N = sqrt(alpha^2 + sigma^2):

    x_wanted = c x,    c(t) = N_wanted(t) / N(r),    X_wanted_{s,t}(x) = c(t) X_{r(s),r(t)}(x / c(s))
    v_wanted(x, t) = (c' / c) x + c r' v(x / c, r),    r' = phi_wanted'(t) / phi'(r)

The angle keeps its digits at both ends; sigma / alpha, the usual form, loses two of them near the data.
Karras et al., arXiv 2206.00364 (time and scale of a flow); Shaul et al., arXiv 2310.19075 (of a learned one).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from teachers.path import Coefficients, Path, expand_like
from teachers.space import Cond
from teachers.velocity import Teacher, Velocity


def on_path(teacher: Teacher, path: Path) -> Teacher:
    """`teacher` on `path`: velocity and, where there is one, flow map; the teacher itself if it lives there already.

    Sampling gives the same data from the same noise, up to the scale of the ends. A noise level beyond those of the
    teacher's path (the very ends of [0, 1] for a teacher on vp or ve) is taken for the nearest of them: a point there
    changes its scale alone. The result has no `network` that a student could start from, for its output belongs to the
    old path; it is among the `parts`. On vp and linear_vp the velocity asks for times below 1 (see `teachers.path.VP`).
    """
    if path == teacher.path:
        return teacher
    if teacher.velocity is None:  # noise and samples, the ends, are all there is
        return replace(teacher, path=path)
    own_map = teacher.flow_map

    def flow_map(x_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        assert own_map is not None
        start, end = _match(teacher.path, path, s), _match(teacher.path, path, t)
        return expand_like(end.scale, x_s) * own_map(x_s / expand_like(start.scale, x_s), start.time, end.time)

    networks = (part for part in (teacher.network, teacher.velocity) if isinstance(part, nn.Module))
    return replace(
        teacher,
        velocity=_Velocity(teacher.velocity, teacher.path, path),
        path=path,
        network=None,
        network_config=None,
        flow_map=None if own_map is None else flow_map,
        parts=(*teacher.parts, *networks),
    )


@dataclass(frozen=True)
class _Velocity:
    """A `Velocity` on the path `wanted`."""

    velocity: Velocity
    own: Path
    wanted: Path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        match = _match(self.own, self.wanted, t)
        v = self.velocity(x_t / expand_like(match.scale, x_t), match.time, cond)
        return expand_like(match.growth, x_t) * x_t + expand_like(match.scale * match.speed, x_t) * v


@dataclass(frozen=True)
class _Match:
    """What belongs to a time t on the wanted path, all ``[b]`` float64: the teacher's time r, dr/dt, the scale c of a
    point over the teacher's, c' / c."""

    time: Tensor
    speed: Tensor
    scale: Tensor
    growth: Tensor


def _match(own: Path, wanted: Path, t: Tensor) -> _Match:
    new = wanted(t.double())
    reached = own.time_at(new.angle)
    time = reached.clamp(0, 1)
    old = own(time)
    # phi' = -delta / N^2
    speed = torch.where(time == reached, (new.delta / new.norm**2) / (old.delta / old.norm**2), 0.0)
    return _Match(time, speed, new.norm / old.norm, _growth(new) - speed * _growth(old))


def _growth(c: Coefficients) -> Tensor:
    """N' / N."""
    return (c.alpha * c.d_alpha + c.sigma_d_sigma) / c.norm**2
