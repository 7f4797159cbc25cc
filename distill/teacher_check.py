"""Is this teacher the velocity of this data, as it was declared? Asked of real samples before a job starts.

The flow-matching loss of the teacher, relative to that of predicting nothing, E|v(x_t, t) - (x_1 - x_0)|^2 / E|x_1 -
x_0|^2 on the linear path, is compared with that of rivals: the time or the sign flipped, both, times scaled by 1000 or
1/1000, latents scaled. The declared one has to win. Of latents the standard deviation is compared with what networks
of latents are trained on. Shapes and values at the ends of the path cannot tell any of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.objectives.base import Batch
from distill.rows import Rows
from teachers.adapters.base import InDtype
from teachers.errors import InputError
from teachers.networks.conventions import Flow
from teachers.networks.converted import Converted
from teachers.path import LinearFrom
from teachers.space import Cond
from teachers.velocity import NO_VELOCITY, Teacher, Velocity

TIMES = (0.1, 0.3, 0.7, 0.9)
MARGIN = 0.98
"""A rival wins whose loss is below this share of the declared one's, and of that of predicting nothing."""
SPREAD = 1.5
"""The factor by which the standard deviation of latents may be off."""
ROWS = 64
_SCALES = (0.5, 0.7, 1.4, 2.0)


class TeacherError(InputError):
    """A teacher that is not the velocity of the data: the message has the numbers that show it."""


@dataclass(frozen=True)
class Verdict:
    """losses: of the declared teacher, first, and of its rivals, relative to predicting nothing (1); mean and std of
    the samples; wrong: why the job must not start, None if it may; caution: what may be wrong."""

    losses: Mapping[str, float]
    mean: float
    std: float
    wrong: str | None = None
    caution: str | None = None

    def __str__(self) -> str:
        width = max(map(len, self.losses))
        lines = [f"data: mean {self.mean:.3f}, std {self.std:.3f}"]
        lines += [f"{name:{width}}  {loss:.4g}" for name, loss in self.losses.items()]
        return "\n".join([*lines, *(text for text in (self.wrong, self.caution) if text)])


def check_teacher(teacher: Teacher, batch: Batch, seed: int) -> Verdict:
    """The verdict on an unguided teacher from real samples ``batch.x_1: [b, *shape]`` and noise of `seed`."""
    if teacher.velocity is None:
        raise TeacherError(f"teacher {teacher.info.get('id')} {NO_VELOCITY}")
    x_1, cond = batch.x_1.float(), batch.cond
    mean, std = x_1.double().mean().item(), x_1.double().std().item()
    rivals = _rivals(teacher)
    with torch.no_grad():
        losses = {name: _loss(v, teacher, x_1 * scale, cond, seed) for name, (v, scale) in rivals.items()}
    declared, *others = losses
    best = min(others, key=lambda name: losses[name])
    wrong, caution = None, None
    latent = teacher.latent
    if latent is not None and not 1 / SPREAD <= std / latent.spread <= SPREAD:
        wrong = (
            f"the latents have a standard deviation of {std:.3g} where this teacher has about {latent.spread:g}: they "
            f"are not scaled as it was trained ({latent}); set teacher.latent, or make them with its autoencoder"
        )
    elif not math.isfinite(losses[declared]) and (times := _not_finite(teacher, x_1, cond, seed)):
        wrong = (
            f"its velocity is not finite at t = {', '.join(f'{time:g}' for time in times)} of this data: look for "
            "weights that are not, values that half precision does not hold, and a division by zero"
        )
    elif losses[best] < MARGIN * min(1.0, losses[declared]):
        wrong = (
            f"the teacher fits this data better otherwise than it is declared: {best} has a relative loss of "
            f"{losses[best]:.3g}, as declared {losses[declared]:.3g} (predicting nothing has 1): correct the teacher's "
            "section, or use the data it was trained on"
        )
    elif not losses[declared] < 1:
        caution = (
            f"the teacher predicts this data no better than nothing does (relative loss {losses[declared]:.3g}, nothing"
            " has 1): is it trained, on this data, with its path and prediction as declared?"
        )
    return Verdict(losses, mean, std, wrong, caution)


def _rivals(teacher: Teacher) -> dict[str, tuple[Velocity, float]]:
    """The declared velocity and its rivals, each with a scale for the data."""
    v: Velocity = teacher
    found: dict[str, tuple[Velocity, float]] = {
        "as declared": (v, 1.0),
        "time flipped": (lambda x, t, cond: v(x, 1 - t, cond), 1.0),
        "sign flipped": (lambda x, t, cond: -v(x, t, cond), 1.0),
        "time and sign flipped": (lambda x, t, cond: -v(x, 1 - t, cond), 1.0),
    }
    for factor in (1000.0, 0.001):
        if (rescaled := _rescaled(teacher, factor)) is not None:
            found[f"times x {factor:g}"] = (rescaled, 1.0)
    if teacher.latent is not None:
        found |= {f"latents x {scale:g}": (v, scale) for scale in _SCALES}
    return found


def _rescaled(teacher: Teacher, factor: float) -> Velocity | None:
    """The velocity with its network's time scaled, where that is known."""
    network, velocity = teacher.network, teacher.velocity
    if network is None:
        return None
    if isinstance(network, Converted):
        convention = network.convention
        if not isinstance(convention, Flow):
            return None
        network, factor = Converted(network.network, replace(convention, scale=factor * convention.scale)), 1.0
    call: Velocity = InDtype(network) if isinstance(velocity, InDtype) else network
    return lambda x, t, cond: call(x, factor * t, cond)


def _loss(velocity: Velocity, teacher: Teacher, x_1: Tensor, cond: Cond, seed: int) -> float:
    """Relative to predicting nothing, over `TIMES`."""
    off, size = 0.0, 0.0
    for x_0, t in _points(x_1, seed):
        truth = teacher.path.conditional_velocity(x_0, x_1, t).double()
        found = velocity(teacher.path.point(x_0, x_1, t), t, cond).double()
        off += (found - truth).square().sum().item()
        size += truth.square().sum().item()
    return off / size if size else float("inf")


def _points(x_1: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise ``[b, *shape]`` and times ``[b]``, for each of `TIMES`."""
    for step, time in enumerate(TIMES):
        x_0 = Rows(seed, "teacher check", step, 0, len(x_1)).normal(*x_1.shape[1:]).to(x_1)
        yield x_0, torch.full((len(x_1),), time, dtype=torch.float64)


def _not_finite(teacher: Teacher, x_1: Tensor, cond: Cond, seed: int) -> list[float]:
    """The times at which it is not, of samples that are."""
    whole = x_1.flatten(1).isfinite().all(1)
    with torch.no_grad():
        return [
            t[0].item()
            for x_0, t in _points(x_1, seed)
            if not teacher(teacher.path.point(x_0, x_1, t), t, cond)[whole].isfinite().all()
        ]


def describe(teacher: Teacher) -> str:
    """All that is known of a teacher, a line each."""
    path, space = teacher.path, teacher.space
    info = {name: value for name, value in teacher.info.items() if name != "latent"}
    parts = {id(p): p for m in (teacher.network, teacher.velocity, *teacher.parts) if isinstance(m, nn.Module)
             for p in m.parameters()}  # fmt: skip
    times = "all of [0, 1]"
    if isinstance(path, LinearFrom):
        times = f"from {path.first:.6f} on, where noise has the standard deviation {path.std:.6f}"
    rule = "all channels" if teacher.rule.channels is None else f"the first {teacher.rule.channels} channels alone"
    said = {
        **{name: info.pop(name, "unknown") for name in ("id", "family", "digest", "weights", "licence")},
        "parameters": f"{sum(p.numel() for p in parts.values()):,}",
        "samples": str(space),
        "conditioning": ", ".join(space.conditions) or "none",
        "no condition": "known" if teacher.null else "never seen: cannot be guided by itself",
        "path": f"{path.name}; times known: {times}",
        "convention": "none: it makes samples and has no velocity"
        if teacher.velocity is None
        else str((teacher.network_config or {}).get("convention") or "ours: v = dx/dt, t = 1 is data"),
        "guidance": f"v_none + scale (v - v_none), {rule}",
        "latents": str(teacher.latent or "none: samples are what is made"),
        "student": "starts at this network" if teacher.network is not None else "starts at random",
        **info,
    }
    return "\n".join(f"{name:13} {value}" for name, value in said.items())
