"""Guidance of a velocity: away from a negative one, by a scale, inside an interval of times.

    v_scale = v_negative + scale (v - v_negative)

The negative velocity is the same network's without conditioning (classifier-free guidance: Ho and Salimans, arXiv
2207.12598) or a weaker model's, with it or of no conditioning (autoguidance: Karras et al., arXiv 2406.02507). Outside
of the interval the scale is 1: Kynkaanniemi et al., arXiv 2404.07724. It is linear, so the same in velocity, data and
noise predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from teachers.errors import InputError
from teachers.path import expand_like
from teachers.space import Cond, DataSpace
from teachers.velocity import Rule, Teacher, Velocity

SCALE, LOW, HIGH = "guidance", "guidance_low", "guidance_high"
"""Fields of the conditioning, ``[b]`` each, that carry a row's own scale and interval."""


def plain(cond: Cond) -> Cond:
    """The conditioning without guidance fields, for a model that knows nothing of them."""
    if cond is None:
        return None
    return {k: v for k, v in cond.items() if k not in (SCALE, LOW, HIGH)} or None


def in_interval(t: Tensor, cond: Cond, interval: tuple[float, float], open: bool = False) -> Tensor:
    """bool ``[b]``: whether a row's time is inside its own interval, or else in the given one. open: see `Rule`."""
    low, high = ((cond or {}).get(name, end) for name, end in zip((LOW, HIGH), interval, strict=True))
    if open:
        return ((t > low) | (torch.as_tensor(low) == 0)) & (t < high)
    return (t >= low) & (t <= high)


@dataclass(frozen=True)
class Guided:
    """A `Velocity`. null: one row of conditioning that means "none", or None if the negative is `weak` with the same
    conditioning. `scale` and `interval` hold unless the conditioning has fields of its own (see `SCALE`). `rule` is the
    teacher's family's."""

    velocity: Velocity
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    null: Mapping[str, Tensor] | None = None
    weak: Velocity | None = None
    rule: Rule = Rule()  # noqa: RUF009  # frozen

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        own = plain(cond)
        scale = torch.full_like(t, self.scale) if cond is None or SCALE not in cond else cond[SCALE].to(t)
        scale = expand_like(torch.where(in_interval(t, cond, self.interval, self.rule.open), scale, 1.0), x_t)
        v = self.velocity(x_t, t, own)
        if self.weak is not None:
            negative = self.weak(x_t, t, own)
        else:
            assert self.null is not None
            none = {k: n.to(x_t.device).expand(len(x_t), *n.shape) for k, n in self.null.items()}
            negative = self.velocity(x_t, t, {**(own or {}), **none})
        push = v - negative
        if self.rule.channels is not None:
            push = torch.cat([push[:, : self.rule.channels], torch.zeros_like(push[:, self.rule.channels :])], dim=1)
        # at scale 1 exactly v
        return _renormed(v + (scale - 1) * push, v, self.rule)


def _renormed(v: Tensor, conditioned: Tensor, rule: Rule) -> Tensor:
    if rule.renorm is None:
        return v
    ratio = _length(conditioned, rule) / _length(v, rule).clamp_min(torch.finfo(v.dtype).tiny)
    return v * (ratio.clamp_max(1) if rule.renorm == "cap" else ratio)


def _length(v: Tensor, rule: Rule) -> Tensor:
    """``[b, c, ..., h, w]`` -> of the parts that the rule speaks of, broadcast to v."""
    if rule.renorm == "width":
        return torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    if rule.renorm == "deviation":
        v = v - v.mean(dim=tuple(range(1, v.dim())), keepdim=True)
    if rule.renorm in ("cap", "deviation"):
        return torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)
    squares = v.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    length = torch.linalg.vector_norm(squares, dim=(1, -3, -1), keepdim=True)
    return length.expand_as(squares).flatten(-2).flatten(-3, -2)


def _asked(weak: Teacher, teacher: Teacher) -> DataSpace:
    """The weak teacher's samples as it is asked for them: one without classes leaves the class aside."""
    space = weak.space
    return replace(space, classes=teacher.space.classes) if space.classes is None else space


def _refuse(teacher: Teacher, weak: Teacher | None) -> None:
    """Raises InputError where there is nothing to guide, or to guide by."""
    name = teacher.info.get("id")
    for model in (teacher, weak):
        if model is not None and model.velocity is None:
            raise InputError(
                f"teacher {model.info.get('id')} makes samples and has no velocity to guide: remove the section "
                "guidance; where it guides itself, that is a key of its own (teacher.guidance)"
            )
    if weak is None and teacher.null is None:
        raise InputError(
            f"teacher {name} comes without the embedding of the empty prompt, which its guidance needs: name a file "
            "that holds it (teacher.null), or guide it by a weaker teacher (guidance.weak)"
            if teacher.space.embeddings
            else f"teacher {name} never saw a null condition, so it has no classifier-free guidance: use a teacher "
            "trained with dropped labels (objective.drop), or guide it by a weaker teacher (guidance.weak)"
        )
    if weak is not None and (_asked(weak, teacher), weak.path) != (teacher.space, teacher.path):
        raise InputError(
            f"the weak teacher {weak.info.get('id')} makes {weak.space} on the {weak.path.name} path, teacher {name} "
            f"{teacher.space} on {teacher.path.name}: autoguidance needs two models of the same task"
        )


def guided(teacher: Teacher, scale: float, interval: tuple[float, float], weak: Teacher | None = None) -> Teacher:
    """The teacher under guidance; its network stays what a student starts from. Raises InputError if it cannot be.

    The exact map and the law of the data, where it has them, are those of the unguided teacher and are left out.
    """
    _refuse(teacher, weak)
    assert teacher.velocity is not None
    own = (teacher.velocity,) if isinstance(teacher.velocity, nn.Module) else ()
    said = {"scale": scale, "interval": list(interval), "weak": weak.info.get("digest") if weak else None}
    return replace(
        teacher,
        velocity=Guided(
            teacher.velocity,
            scale,
            interval,
            None if weak else teacher.null,
            weak.velocity if weak else None,
            Rule() if weak else teacher.rule,
        ),
        flow_map=None,
        generator=None,
        calls=teacher.calls + (weak.calls if weak else teacher.calls),
        parts=(*teacher.parts, *own, *(weak.modules() if weak else ())),
        info={**teacher.info, "guidance": said},
    )
