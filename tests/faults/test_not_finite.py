"""What is not finite, in one process: in the data, in the teacher, in bfloat16. Planted, left out, counted, named."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import JOB, RUN, Child, on, points, shards
from helpers import checkpoints, verified
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

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


def _teacher(steps: tuple[int, ...], value: float) -> None:
    """Plant: at these steps the teacher says `value` for its second point, in the second part of the batch."""
    from distill.objectives.lagrangian import Lagrangian
    from teachers.velocity import Teacher

    now, draw, call = [-1, 0], Lagrangian.draw, Teacher.__call__

    def drawn(self: Any, batch: Any, path: Any, generator: Any, step: int) -> Any:
        now[1] = 1 if step != now[0] else now[1] + 1
        now[0] = step if len(batch.x_1) == 8 else -1
        return draw(self, batch, path, generator, step)

    def said(self: Any, x_t: Any, t: Any, cond: Any = None) -> Any:
        v = call(self, x_t, t, cond)
        if now[0] in steps and now[1] == 2 and len(v) > 1:
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
