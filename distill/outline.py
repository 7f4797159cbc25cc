"""A job without values: everything in it as large as it will be, and nothing of it in memory.

Its networks are on the meta device, built by the code that trains: the teacher without its weights, the student and its
copies. What a step takes on top is followed through one real loss and its backward pass on torch's fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from distill.cautions import unread
from distill.data.empty import NoData
from distill.data.mixture import Mixture
from distill.data.reader import ShardReader
from distill.data.shards import Shards
from distill.memory import Alive, tensors
from distill.objectives.base import Batch, Draw
from distill.parts import Job, Objectives
from distill.recipe import Recipe
from distill.rows import Rows
from distill.student import Student
from distill.training.module import DistillModule
from distill.training.precision import mixed
from teachers.guidance import guided
from teachers.path_change import on_path
from teachers.space import DataSpace
from teachers.velocity import Teacher

T = TypeVar("T")

DIGITS = DataSpace((1, 8, 8), 10, (-1.0, 1.0))
"""What the data are that a recipe has built for itself."""


@dataclass(frozen=True)
class Outline:
    """A job, what training makes of it, and its teacher as it is distilled: guided, on the student's path."""

    job: Job
    module: DistillModule
    teacher: Teacher | None

    @property
    def target(self) -> list[nn.Module]:
        """The slow copy, if there is one."""
        return [] if self.module.target is None else [self.module.target]

    @property
    def frozen(self) -> list[nn.Module]:
        """The teacher's networks."""
        return [] if self.teacher is None else self.teacher.modules()

    @property
    def sharded(self) -> list[nn.Module]:
        """What passes lead through that FSDP2 shards, in the order in which it does."""
        students = [*self.module.trained[: 1 + len(self.module.networks)], *self.target]
        parts = [child for student in students for child in student.children()]
        return parts + (self.frozen if self.job.recipe.teacher is not None else [])


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the rows that are trained on at a time take on top, in bytes: `plain` for the student's forward and backward
    pass alone, `loss` for the objective's own, with its derivatives and what it asks of the teacher. gathered: bytes of
    all the weights that are passed through, forward and backward, those of a network each time anew."""

    plain: int
    loss: int
    gathered: int


def outlined(recipe: Recipe, teacher: Teacher | None = None, objectives: Objectives | None = None) -> Outline:
    """The outline of a recipe's job, on the meta device. teacher, objectives: as `distill.run` takes them; the teacher
    stays as it is. Raises CheckpointError, and InputError where the recipe's parts do not go together."""
    if teacher is not None:
        recipe = replace(recipe, teacher=None)
    job = _job(recipe, teacher, objectives or {})
    with _OnMeta():
        student, networks = job.new_student(), job.new_networks()
    module = DistillModule(
        student, recipe.objective, job.reference, recipe.trainer, recipe.seed, {}, networks, recipe.guidance,
        share_teacher=recipe.teacher is not None,
    )  # fmt: skip
    return _without_values(Outline(job, module, job.reference))


def _job(recipe: Recipe, given: Teacher | None, objectives: Objectives) -> Job:
    teacher = _on_meta(given or (None if recipe.teacher is None else unread(recipe.teacher)))
    job = Job(Path(), recipe, teacher, Console(quiet=True), objectives)
    reader = recipe.data.check() if isinstance(recipe.data, Shards | Mixture) else None
    job.reader = reader or NoData(DIGITS if teacher is None else teacher.space)
    if teacher is not None:
        guide, seen = recipe.guidance, on_path(teacher, recipe.student.path_of(teacher))
        if guide is not None:
            weak = None if guide.weak is None else _on_meta(unread(guide.weak))
            seen = guided(seen, guide.scale, guide.interval, weak and on_path(weak, seen.path))
        job.reference = seen
    return job


def _on_meta(teacher: Teacher | None) -> Teacher | None:
    if teacher is None:
        return None
    found = deepcopy(teacher, _memo(teacher.modules()))
    found.freeze()
    return found


def _without_values(outline: Outline, fake: FakeTensorMode | None = None) -> Outline:
    """A copy with tensors on the meta device, or with fake ones of the CPU; those that were shared still are."""
    memo = _memo([outline.module, *outline.frozen], fake)
    module, teacher = deepcopy((outline.module, outline.teacher), memo)
    return Outline(outline.job, module, teacher)


def _memo(modules: Iterable[nn.Module], fake: FakeTensorMode | None = None) -> dict[int, Any]:
    """For deepcopy: what takes the place of the modules' tensors."""
    memo: dict[int, Any] = {}
    with fake or torch.device("meta"):
        for tensor in (t for module in modules for t in (*module.parameters(), *module.buffers())):
            own = isinstance(tensor, nn.Parameter)
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if own else empty
    return memo


class _OnMeta(TorchFunctionMode):
    """Inside, new tensors are made on the meta device, whatever device is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Adds the device where one can be given."""
        more = {"device": "meta"} if func in _device_constructors() else {}
        return func(*args, **{**(kwargs or {}), **more})


# --- a step


def followed(outline: Outline, rows: int) -> tuple[Step | None, str]:
    """What so many rows take; None, and the operation, where that depends on values. Raises DerivativeError."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=[]):
        draw = _draw(outline.job, rows, fake)
        try:
            return _step(_without_values(outline, fake), draw), ""
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            return None, str(error.func)


def _draw(job: Job, rows: int, fake: FakeTensorMode) -> Draw:
    """Of a batch in which whole numbers and truth values are real, since networks look at them, and the rest is not."""
    space, recipe = job.space, job.recipe
    cond = {e.name: torch.ones(rows, *e.shape, dtype=torch.bool) for e in space.embeddings if e.dtype == "bool"}
    with fake:
        x_1 = torch.empty(rows, *space.shape)
        cond |= {e.name: torch.empty(rows, *e.shape) for e in space.embeddings if e.dtype != "bool"}
    if space.classes is not None:
        cond["class"] = torch.zeros(rows, dtype=torch.int64)
    paired = isinstance(job.reader, ShardReader) and job.reader.config.field == "x_1"
    given = cond or None
    if recipe.guidance is not None:
        given = cast(Any, recipe.guidance.condition(given, Rows(recipe.seed, "guidance", 0, 0, rows)))
    batch = Batch(x_1, given, ("",) * rows, x_0=torch.empty_like(x_1) if paired else None, null=space.null)
    path = recipe.student.path_of(job.teacher)
    draw = recipe.objective.draw(batch, path, Rows(recipe.seed, "train", 0, 0, rows), 0)

    def faked(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return fake.from_tensor(value)
        return {k: faked(v) for k, v in value.items()} if isinstance(value, dict) else value

    return replace(draw, **{spec.name: faked(getattr(draw, spec.name)) for spec in fields(draw)})


def _step(outline: Outline, draw: Draw) -> Step:
    module, recipe = outline.module, outline.job.recipe
    drawn = [t for spec in fields(draw) for t in _tensors_of(getattr(draw, spec.name))]
    known = [*tensors([module, *outline.frozen]), *_gradients(outline), *drawn]
    batch = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in drawn}.values())

    def peak(loss: Any) -> int:
        with Alive(known) as alive:
            with mixed(recipe.trainer.precision, torch.device("cpu")):
                value = loss(outline, draw)
            value.backward()
        return batch + alive.peak

    plain, passes = peak(_plain), _Passes(outline.sharded)
    return Step(plain=plain, loss=peak(_loss), gathered=passes.bytes)


def _plain(outline: Outline, draw: Draw) -> Tensor:
    return outline.module.student.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond).square().mean()


def _loss(outline: Outline, draw: Draw) -> Tensor:
    module, objective = outline.module, outline.job.recipe.objective
    networks = {name: cast(Student, network).velocity for name, network in module.networks.items()}
    target = module.student if module.target is None else module.target
    loss = cast(Any, objective).loss(module.student, target, outline.teacher, draw, **networks)
    return torch.stack([value.mean() for value in loss.summands.values()]).sum()


def _gradients(outline: Outline) -> Iterable[Tensor]:
    """Of what is trained, made here: what adds to them takes nothing."""
    for parameter in (p for part in outline.module.trained for p in part.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
        yield parameter.grad


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return list(value.values())
    return [value] if isinstance(value, Tensor) else []


class _Passes:
    """Counts the bytes of weights that are passed through: forward, and backward where there is a gradient."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self.bytes = 0
        seen: set[int] = set()
        for part in parts:
            for root in part.children() if isinstance(part, nn.ModuleDict) else [part]:
                own = {id(p): p.nbytes for p in root.parameters() if id(p) not in seen}
                seen.update(own)
                if own:
                    root.register_forward_pre_hook(self._entered(sum(own.values())))

    def _entered(self, size: int) -> Any:
        def enter(root: nn.Module, args: tuple[Any, ...]) -> None:
            given = (t for t in (*root.parameters(), *args) if isinstance(t, Tensor))
            self.bytes += size * (2 if torch.is_grad_enabled() and any(t.requires_grad for t in given) else 1)

        return enter
