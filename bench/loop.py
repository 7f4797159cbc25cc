"""A bare training loop around the project's own training step, with its costs: CPU time, network evaluations, memory.

Evaluations are counted a row: a forward pass 1, its backward pass 2, a tangent carried along 1 and, where gradients
flow through the tangent, 2 more for it; the teacher, and a backward pass that only goes to the input, 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from distill.objectives.base import Batch, Objective
from distill.objectives.times import TimeLaw
from distill.recipe import Recipe
from distill.student import Student
from distill.training.config import TrainerConfig
from distill.training.module import DistillModule
from teachers.velocity import Teacher

Batches = Callable[[int], Batch]
"""step -> the batch of that step."""
DEVIATION = 1.2  # of the data that presets are for
IN_STEPS = ("over", "stage_steps", "start", "end", "warmup")  # what objectives and time laws count in training steps


class Bare(DistillModule):
    """The project's training step, clipping, optimizer and averages, without Lightning's trainer around them."""

    at = 0

    @property
    def global_step(self) -> int:
        """The step that comes next."""
        return self.at

    def advance(self, optimizer: Any, batch: Batch) -> None:
        """One step."""

        def gradients() -> None:
            loss = self.training_step(batch, self.at)
            optimizer.zero_grad()
            loss.backward()

        self.optimizer_step(0, self.at, optimizer, gradients)
        self.at += 1


def fitted(value: Any, share: float, sigma_data: float) -> Any:
    """A part of a preset with its schedules stretched by `share`, for data of that standard deviation: noise levels
    grow with it."""
    changes: dict[str, Any] = {}
    for name, old in vars(value).items():
        if name == "sigma_data":
            changes[name] = old * DEVIATION / sigma_data if isinstance(value, TimeLaw) else sigma_data
        elif name in IN_STEPS and old > 0:
            changes[name] = max(1, round(old * share))
        elif hasattr(old, "__dataclass_fields__"):
            changes[name] = fitted(old, share, sigma_data)
    return replace(value, **changes)


def assembled(recipe: Recipe, problem: Any, trainer: TrainerConfig, seed: int, teacher: Teacher | None = None) -> Bare:
    """The recipe's objective and student on a problem, before the first step."""
    share = trainer.steps / recipe.trainer.steps
    objective: Objective = fitted(recipe.objective, share, problem.sigma)
    config = replace(
        recipe.student,
        init=problem.init,
        network=problem.network,
        parameterisation=fitted(recipe.student.parameterisation, 1.0, problem.sigma),
    )
    teacher = teacher or problem.teacher
    space = problem.space

    def build(kind: Any, finest: int) -> Student:
        own = config if kind != "velocity" else replace(config, split=None)
        return own.build(teacher, space, seed, kind, finest)

    networks = {name: build("velocity", 1) for name in objective.networks}
    student = build(objective.kind, objective.finest)
    return Bare(student, objective, teacher, trainer, seed, {}, networks)


def train(
    module: Bare, batches: Batches, marks: int = 0, look: Callable[[Student], float] | None = None
) -> tuple[float, list[tuple[float, float]]]:
    """All steps. Returns their CPU seconds, the drawing of data left out, and at `marks` times on the way (CPU seconds
    so far, what `look` says)."""
    optimizer: Any = module.configure_optimizers()
    steps, spent, seen = module._config.steps, 0.0, []
    stops = {round(steps * (k + 1) / marks) for k in range(marks)}
    while module.at < steps:
        batch = batches(module.at)
        start = time.process_time()
        module.advance(optimizer, batch)
        spent += time.process_time() - start
        if look is not None and module.at in stops:
            seen.append((spent, look(module.averaged_student)))
    return spent, seen


# --- what a step costs


@dataclass(frozen=True)
class Cost:
    """Of a step: CPU seconds, network evaluations a row, bytes held at once beside the weights."""

    seconds: float
    evaluations: float
    bytes: int


def cost(build: Callable[[Teacher | None], Bare], batches: list[Batch], teacher: Teacher, rounds: int) -> Cost:
    """Measured on `rounds` steps spread evenly over the schedule, of students that are thrown away; drawing the data
    is left out."""
    module = build(None)
    optimizer: Any = module.configure_optimizers()
    steps = module._config.steps
    for batch in batches:
        module.advance(optimizer, batch)
    start = time.process_time()
    for k in range(rounds):
        module.at = int((k + 0.5) / rounds * steps)
        module.advance(optimizer, batches[k % len(batches)])
    seconds = (time.process_time() - start) / rounds
    held = []
    for share in (0.25, 0.75):
        module.at = int(share * steps)
        held.append(_peak(lambda: module.advance(optimizer, batches[0])))
    rows: list[float] = []
    module = build(replace(teacher, velocity=_counting(teacher, rows)))
    optimizer = module.configure_optimizers()
    with _counted(module, rows):
        for k, batch in enumerate(batches):
            module.at = int((k + 0.5) / len(batches) * steps)
            module.advance(optimizer, batch)
    return Cost(seconds, sum(rows) / sum(len(batch.x_1) for batch in batches), max(held))


def _peak(step: Callable[[], None]) -> int:
    """The largest sum of what a step has allocated at any one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _factor(x: Tensor, trained: bool) -> int:
    """Evaluations of one row of a network call with the input x."""
    passes = 2 if forward_ad._current_level >= 0 else 1
    if not torch.is_grad_enabled():
        return passes
    if trained:
        return 3 * passes
    return 2 * passes if x.requires_grad else passes


def _counting(teacher: Teacher, rows: list[float]) -> Callable[..., Tensor]:
    def velocity(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        rows.append(len(x) * _factor(x, trained=False))
        return teacher.velocity(x, t, cond)

    return velocity


@contextmanager
def _counted(module: Bare, rows: list[float]) -> Iterator[None]:
    def hook(network: nn.Module, inputs: tuple[Any, ...]) -> None:
        trained = next(network.parameters()).requires_grad
        rows.append(len(inputs[0]) * _factor(inputs[0], trained))

    students = [module.student, *module.networks.values(), *([module.target] if module.target is not None else [])]
    handles = [student.network.register_forward_pre_hook(hook) for student in students]  # type: ignore[union-attr]
    yield
    for handle in handles:
        handle.remove()
