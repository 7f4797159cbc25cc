"""The plan of a job: what each GPU holds and what a step sends, found without allocating a network.

Under FSDP2 the outline of the job is really sharded, in a fake group of as many processes as are asked for, and what
the first of them holds is counted. docs/plan.md says what is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import cast

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from distill.data.loader import Loader
from distill.data.manifest import DataError
from distill.memory import Held, held, replica_bytes
from distill.one_step import TIMED, Measured
from distill.outline import Outline, Step, followed, outlined
from distill.parts import Objectives, RunError, shared
from distill.recipe import Recipe
from distill.training.config import StrategyName
from teachers.velocity import Teacher

MEMORY = 80 * 10**9
"""Bytes of a GPU, where none is here to be asked."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one process; under FSDP2 of the first, whose shards are the largest. whole: bytes of the parts of networks
    that are put together from their shards at a time. step: None where the loss has an operation, `unknown`, whose
    memory depends on values, which there are none of. caution: what keeps the job from running like that as yet."""

    recipe: Recipe
    processes: int
    strategy: StrategyName
    held: Held
    whole: int
    step: Step | None
    unknown: str = ""
    caution: str = ""

    @property
    def rows(self) -> int:
        """That a GPU trains on at a time."""
        return self.recipe.trainer.batch // self.processes // self.recipe.trainer.accumulate

    @property
    def total(self) -> int | None:
        """Bytes of a GPU at most."""
        return None if self.step is None else self.held.total + self.whole + self.step.loss

    @property
    def sent(self) -> int | None:
        """Bytes that a GPU sends in a step; it receives as many."""
        others, accumulate = self.processes - 1, self.recipe.trainer.accumulate
        if self.strategy != "fsdp2":
            return 2 * others * self.held.gradients // self.processes if self.strategy == "ddp" else 0
        if self.step is None:
            return None
        # it keeps the sums of its own shard of the gradients and sends those of all others, after each part of a step
        return accumulate * (others * self.step.gathered // self.processes + others * self.held.gradients)


def make_plan(
    recipe: Recipe, processes: int = 1, *, teacher: Teacher | None = None, objectives: Objectives | None = None
) -> Plan:
    """The plan of a recipe's job on so many GPUs. teacher, objectives: as `distill.run` takes them; the teacher stays
    as it is. Nothing is written and no data are built. Raises RunError for a batch that cannot be shared,
    CheckpointError for a teacher that cannot be read, DerivativeError for a loss that has no derivative."""
    outline = outlined(recipe, teacher, objectives)
    strategy = _strategy(outline, processes)
    step, unknown = followed(outline, recipe.trainer.batch // processes // recipe.trainer.accumulate)
    if strategy == "fsdp2":
        _shard(outline, processes)
    return Plan(
        recipe=recipe,
        processes=processes,
        strategy=strategy,
        held=held(
            outline.module.trained,
            outline.module.ema,
            outline.module.target,
            outline.frozen,
            optimizer=recipe.trainer.optimizer,
        ),
        whole=_whole(outline),
        step=step,
        unknown=unknown,
        caution=_readers(outline, processes),
    )


def _strategy(outline: Outline, processes: int) -> StrategyName:
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else MEMORY
    student, *further = outline.module.trained
    return shared(
        outline.job.recipe,
        processes,
        lambda: replica_bytes(
            student,
            further,
            outline.frozen,
            target=bool(outline.target),
            optimizer=outline.job.recipe.trainer.optimizer,
        ),
        memory,
    )


def _readers(outline: Outline, processes: int) -> str:
    """Why the data are not enough for so many processes, if they are not."""
    recipe = outline.job.recipe
    workers = getattr(recipe.data, "workers", 0)
    try:
        Loader(outline.job.reader, 0, recipe.trainer.batch, world=processes, workers=workers)
    except DataError as error:
        return str(error)
    return ""


def _shard(outline: Outline, processes: int) -> None:
    with _fake_group(processes):
        names = ("data_parallel", "tensor_parallel")
        # as Lightning's strategy does
        outline.module._device_mesh = init_device_mesh("cpu", (processes, 1), mesh_dim_names=names)
        outline.module.configure_model()


@contextmanager
def _fake_group(processes: int) -> Iterator[None]:
    """Inside, this is the first of so many processes, which do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RunError("a plan is made in one process: start it without torchrun, with --nodes and --gpus")
    torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _whole(outline: Outline) -> int:
    """Bytes of the two largest units that FSDP2 puts together, the one in use and the next, and of their gradients."""
    passed = [*outline.module.trained, *outline.target, *outline.frozen]
    units = {id(m): m for part in passed for m in part.modules() if isinstance(m, FSDPModule)}
    weights, gradients = [0], [0]
    for unit in cast(Iterable[nn.Module], units.values()):
        inner = {id(p) for m in unit.modules() if m is not unit and id(m) in units for p in m.parameters()}
        own = [p for p in unit.parameters() if id(p) not in inner]
        weights.append(sum(p.nbytes for p in own))
        gradients.append(sum(p.nbytes for p in own if p.requires_grad))
    return sum(sorted(weights)[-2:]) + sum(sorted(gradients)[-2:])


# --- as it is printed


def show(plan: Plan, console: Console, measured: Measured | None = None, seconds: float | None = None) -> None:
    """Print a plan. seconds: of a step, as the user says; measured: by `one_step`. Without either there are no days."""
    trainer = plan.recipe.trainer
    auto = f" (the choice of auto for a GPU of {_size(MEMORY)})" if _guessed(plan) else ""
    lines = [f"{plan.recipe.name} on {plan.processes} GPU{'s' * (plan.processes > 1)}: {plan.strategy}{auto}"]
    console.print(lines[0], markup=False, highlight=False)
    console.print(_memory(plan))
    sent = "not known" if plan.sent is None else _size(plan.sent)
    parts = f", in {trainer.accumulate} parts of {plan.rows}" if trainer.accumulate > 1 else ""
    told = [
        f"a step sends {sent} from each GPU",
        f"a batch of {trainer.batch:,}, {trainer.batch // plan.processes:,} a GPU{parts}; {trainer.steps:,} steps, "
        f"{trainer.steps * trainer.batch:,} samples",
    ]
    if measured is not None:
        told.append(
            f"measured on {measured.device}, alone with {measured.rows:,} rows: {measured.seconds:.3g} s a step (mean "
            f"of {TIMED} after one to warm up), {_size(measured.memory)}"
        )
        seconds = measured.seconds if seconds is None else seconds
    if seconds is not None:
        told.append(f"{trainer.steps * seconds / 86400:.3g} days at {seconds:.3g} s a step")
    if plan.caution:
        told.append(f"caution: {plan.caution}")
    for line in told:
        console.print(line, markup=False, highlight=False)


def _memory(plan: Plan) -> Table:
    table = Table("memory of a GPU", "", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for spec in fields(plan.held):
        table.add_row(spec.name, _size(getattr(plan.held, spec.name)))
    if plan.strategy == "fsdp2":
        table.add_row("whole at a time", _size(plan.whole))
    step = plan.step
    why = f"not known: {plan.unknown} depends on values"
    table.add_row("activations, with derivatives", why if step is None else _size(step.loss))
    table.add_row("total", "not known" if plan.total is None else _size(plan.total), style="bold", end_section=True)
    if step is not None:
        table.add_row("activations of the student alone, without", _size(step.plain), style="dim")
    return table


def _guessed(plan: Plan) -> bool:
    return plan.recipe.trainer.strategy == "auto" and plan.processes > 1 and not torch.cuda.is_available()


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"
