"""What is not finite, in one process: in the data, in the teacher, in bfloat16. Planted, left out, counted, named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import JOB, RUN, Child, ended, finish, launch, on, points, same, shards
from helpers import checkpoints, verified
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EVERY = ("trainer.checkpoint_every=1", "trainer.keep=100", "trainer.steps=12", "tracking.samples_every=0")
NAN = 37  # the sample that is not a number


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{f.stem}/{k}": v for f in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(f).items()}


def all_finite(run: Path) -> bool:
    """Whether every number of every checkpoint is finite."""
    return all(bool(v.isfinite().all()) for path in checkpoints(run) for v in tensors(path).values())


def left_out(run: Path) -> list[int]:
    """The steps after which student, average and optimizer are, bit for bit, what they were before."""
    states = {verified(path): tensors(path) for path in checkpoints(run)}
    return [step for step in states if step - 1 in states
            and all(torch.equal(v, states[step - 1][k]) for k, v in states[step].items())]  # fmt: skip


def counted(run: Path) -> dict[int, int]:
    """skipped_steps by the step, where there are any."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["skipped_steps"] for row in rows if "skipped_steps" in row}


def poisoned(folder: Path) -> Path:
    """Shards with one point that is not a number."""
    x = points(90)
    x[NAN] = float("nan")
    folder.mkdir()
    shards(x, folder)
    return folder / "shards"


def test_a_sample_that_is_not_a_number(place: Path, tally: Callable[..., None]) -> None:
    data = poisoned(place / "data")
    child = Child(place, "run", "toy/lagrangian", on(data), *JOB, *EVERY)
    assert child.code() == 0, child.said()
    steps = left_out(place / RUN)
    assert len(steps) == 3  # epochs of 3.75 steps, 12 of them
    for step in steps:
        assert f"step {step - 1} was left out: the loss is nan for sample 0000000{NAN}" in child.said()
    assert counted(place / RUN)[12] == 3 and min(counted(place / RUN)) == steps[0]
    assert all_finite(place / RUN)
    for _ in steps:
        tally("a NaN among the data, one process")
        tally("a NaN among the data, one process", held=True)


def _teacher(steps: Sequence[int], value: float, rank: str = "0") -> None:
    """Plant: at these steps the teacher says `value` for its second point, in the second part of the batch, on one
    process."""
    if os.environ.get("RANK", "0") != rank:
        return
    from distill.objectives.lagrangian import Lagrangian
    from teachers.velocity import Teacher

    now, draw, call = [-1, 0], Lagrangian.draw, Teacher.__call__

    def drawn(self: Any, batch: Any, path: Any, generator: Any, step: int) -> Any:
        now[1] = now[1] + 1 if step == now[0] else 1
        now[0] = step
        return draw(self, batch, path, generator, step)

    def said(self: Any, x_t: Any, t: Any, cond: Any = None) -> Any:
        v = call(self, x_t, t, cond)
        if now[0] in steps and now[1] == 2:
            v = v.clone()
            v[1] = value
        return v

    Lagrangian.draw, Teacher.__call__ = drawn, said  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_teacher_that_is_not_finite_at_times(
    value: float, few: Path, place: Path, tally: Callable[..., None]
) -> None:
    child = Child(place, "run", "toy/lagrangian", on(few), *JOB, *EVERY, plant=partial(_teacher, (3, 7), value))
    assert child.code() == 0, child.said()
    assert left_out(place / RUN) == [4, 8]
    assert counted(place / RUN) == {4: 1, 5: 1, 6: 1, 7: 1} | dict.fromkeys(range(8, 13), 2)
    assert child.said().count("was left out: the loss is") == 2
    assert all_finite(place / RUN)
    tally("a teacher that says NaN, inf or 1e38 at times")
    tally("a teacher that says NaN, inf or 1e38 at times", held=True)


def _loss(steps: Sequence[int], rank: str) -> None:
    """Plant: at these steps one row's loss is not a number on one process, though every gradient is finite."""
    if os.environ["RANK"] != rank:
        return
    from distill.objectives.lagrangian import Lagrangian

    now, draw, loss = [-1], Lagrangian.draw, Lagrangian.loss

    def drawn(self: Any, batch: Any, path: Any, generator: Any, step: int) -> Any:
        now[0] = step
        return draw(self, batch, path, generator, step)

    def broken(self: Any, *args: Any) -> Any:
        found = loss(self, *args)
        bad = torch.zeros(len(found.per_sample), dtype=torch.bool)
        bad[1] = now[0] in steps
        return replace(found, per_sample=torch.where(bad, torch.nan, found.per_sample))

    Lagrangian.draw, Lagrangian.loss = drawn, broken  # type: ignore[method-assign]


def _products(steps: Sequence[int]) -> None:
    """Plant: at these steps one point's hidden values are so large that products in bfloat16 overflow."""
    from distill.training.module import DistillModule

    started = DistillModule.on_fit_start

    def planted(self: Any) -> None:
        started(self)

        def larger(layer: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            assert torch.is_autocast_enabled("cpu")
            scale = torch.ones(len(given[0]), 1)
            scale[1] = 1e38 if self.global_step in steps else 1.0
            assert (given[0] * scale).isfinite().all()
            return (given[0] * scale, *given[1:])

        self.student.network.enter.register_forward_pre_hook(larger)

    DistillModule.on_fit_start = planted  # type: ignore[method-assign]


def test_products_in_bfloat16_that_overflow(few: Path, place: Path, tally: Callable[..., None]) -> None:
    child = Child(place, "run", "toy/lagrangian", on(few), *JOB, *EVERY, "trainer.precision=bfloat16",
                  plant=partial(_products, (4, 5)))  # fmt: skip
    assert child.code() == 0, child.said()
    assert left_out(place / RUN) == [5, 6]
    assert child.said().count("was left out") == 2 and counted(place / RUN)[12] == 2
    assert all_finite(place / RUN)
    tally("products in bfloat16 that overflow")
    tally("products in bfloat16 that overflow", held=True)


PLANTS = {"teacher": partial(_teacher, (3, 7), float("nan"), "1"), "loss": partial(_loss, (3, 7), "1")}


@pytest.mark.parametrize(("strategy", "where"), [("ddp", "loss"), ("ddp", "teacher"), ("fsdp2", "teacher")])
def test_one_process_has_a_nan(strategy: str, where: str, few: Path, place: Path, tally: Callable[..., None]) -> None:
    plant = PLANTS[where]
    started = launch(place, 2, "run", "toy/lagrangian", on(few), *JOB, *EVERY, f"trainer.strategy={strategy}",
                     plant=plant)  # fmt: skip
    tally("a NaN on one of two processes")
    assert ended(started) == [0, 0], started[0].said() + started[1].said()
    assert left_out(place / RUN) == [4, 8]
    assert counted(place / RUN)[12] == 2
    said = started[0].said()
    assert "step 3 was left out: the loss is nan for sample" in said and "on process 1" in said
    assert all_finite(place / RUN)
    tally("a NaN on one of two processes", held=True)


@pytest.mark.parametrize("processes", [0, 2])
def test_too_many_end_it(
    processes: int, few: Path, job: tuple[str, ...], place: Path, tally: Callable[..., None]
) -> None:
    what = "more steps that are not finite than trainer.skip"
    arguments = (*job, "trainer.skip=2", "tracking.samples_every=0")
    plant = partial(_teacher, range(8, 30), float("nan"), "1" if processes else "0")
    started = launch(place, 2, *arguments, plant=plant) if processes else [Child(place, *arguments, plant=plant)]
    tally(what)
    assert ended(started) == [78] * len(started), started[0].said()
    said, run = " ".join(child.said() for child in started), place / RUN
    assert "step 8 was left out" in said and "step 9 was left out" in said
    assert f"going back to {RUN}/checkpoints/step-00000006" in said
    assert "step 10: the loss is nan for sample" in said and "trainer.skip allows 2" in said
    assert "Traceback" not in said
    assert [verified(path) for path in checkpoints(run)] == [6] and all_finite(run)
    undisturbed = place / "undisturbed"
    undisturbed.mkdir()
    finish(undisturbed, *arguments, processes=processes)
    finish(place, "resume", str(RUN), processes=processes)  # once it is mended
    same(run, undisturbed / RUN)
    tally(what, held=True)
