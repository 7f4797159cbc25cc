"""Every objective on the same teachers, network and budget: writes docs/objectives.md.

    python bench/objectives.py                    everything that is not there yet, then the page
    python bench/objectives.py --report           the page alone, from docs/objectives/results.json
    python bench/objectives.py --only mixture     runs whose name contains this

Several of these may run at once: each takes the runs that no other has taken. Results are one JSON file a run in
runs/bench/objectives/; delete it to run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import Bare, Cost, assembled, cost, train
from measures import generated, measured, of_teacher, rms
from objectives_report import collect, write
from problems import FOLDER, PROBLEMS, Problem, reference

from distill.recipe import load
from distill.training.config import TrainerConfig
from distill.training.stops import Diverged

SECONDS, EVALUATIONS = 16.0, 6000.0  # the budgets of a run: CPU seconds of one thread, or evaluations a row
TRAINER = TrainerConfig(steps=1, batch=256)
RATES = {"mixture": (1e-2, 2e-3), "checkerboard": (3e-3, 6e-4), "digits": (3e-3, 6e-4)}  # every objective tries both
SETTING = {"seconds": SECONDS, "evaluations": EVALUATIONS, "batch": TRAINER.batch, "rates": RATES}
PROBE = 800  # steps of the schedule on which a step's cost is measured


@dataclass(frozen=True)
class Run:
    """One student. seconds or evaluations: its budget; changes: to the preset, as a recipe's overrides; lr: None for
    the rate that served the preset better in `SECONDS`; asks: the question of an experiment."""

    name: str
    problem: str
    preset: str
    seconds: float | None = None
    evaluations: float | None = None
    changes: tuple[str, ...] = ()
    lr: float | None = None
    seed: int = 0
    asks: str = ""

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.json"

    @property
    def budget(self) -> str:
        return "seconds" if self.seconds is not None else "evaluations"


def presets() -> list[str]:
    """The recipes in recipes/toy."""
    return sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "recipes" / "toy").glob("*.yaml"))


def comparison() -> Iterator[Run]:
    """Every preset on every problem, by either budget."""
    for problem, preset in product(PROBLEMS, presets()):
        yield from _timed(problem, preset)
    for problem, preset in product(PROBLEMS, presets()):
        yield Run(f"{problem}-evaluations-{preset}", problem, preset, evaluations=EVALUATIONS)


def _timed(problem: str, preset: str) -> list[Run]:
    return [Run(f"{problem}-seconds-{preset}-{lr:g}", problem, preset, SECONDS, lr=lr) for lr in RATES[problem]]


def better_rate(problem: str, preset: str) -> float:
    """The learning rate with the smaller one-step error after `SECONDS`; waits for a run that another process does."""
    found = []
    for run in _timed(problem, preset):
        while not run.file.exists():
            time.sleep(1)
        found.append((json.loads(run.file.read_text()).get("map_1", math.inf), run.lr or 0.0))
    return min(found)[1]


def experiments() -> Iterator[Run]:
    """What explains the presets that fall short: one thing is changed at a time."""
    slow = "Is the slow copy too slow for a short run?"
    yield from _asked(slow, "ctm", "mixture checkerboard", "objective.decay=0.9")
    yield from _asked(slow, "shortcut-published", "mixture checkerboard", "objective.decay=0.95")
    data = "Is it the pair's velocity in place of the teacher's, its weight, the budget, or the law of its times?"
    triangle = "objective.times={name: uniform_triangle, diagonal: 0.25}"
    for preset in ("meanflow", "improved-meanflow", "alpha-flow"):
        yield from _asked(data, preset, "checkerboard", "objective.source=teacher")
        yield from _asked(data, preset, "checkerboard", "objective.weight.power=0")
        yield from _asked(data, preset, "checkerboard", seconds=4 * SECONDS)
        yield from _asked(data, preset, "checkerboard", triangle)
    yield from _asked(data, "meanflow", "checkerboard", triangle, "objective.source=teacher")
    yield from _asked(data, "alpha-flow", "digits", triangle)
    transport = "What does the transport equation alone lack on the mixture, where students start at random?"
    for preset in ("eulerian", "ayf"):
        yield from _asked(transport, preset, "mixture", lr=5e-4)
        yield from _asked(transport, preset, "mixture", "objective.times.diagonal=0.75")
        yield from _asked(transport, preset, "mixture", seconds=4 * SECONDS)
    even = "objective.weight.gap=0"
    yield from _asked(transport, "ayf", "mixture", even)
    yield from _asked(transport, "ayf", "mixture", "objective.tangent.normalise=false")
    yield from _asked(transport, "ayf", "mixture", even, lr=2e-3)
    yield from _asked(transport, "ayf", "mixture", even, seconds=4 * SECONDS, lr=2e-3)
    yield from _asked(transport, "ayf", "mixture", even, "objective.times.diagonal=0.5", seconds=4 * SECONDS, lr=2e-3)
    own = "Does a student that drives itself along need a slow copy, or a smaller rate?"
    yield from _asked(own, "esd", "digits", "objective.source=target", seconds=4 * SECONDS)
    yield from _asked(own, "esd", "digits", seconds=4 * SECONDS, lr=1e-4)
    pair = "Is it the pair's neighbour in place of the teacher's step?"
    for preset in ("ect", "ict"):
        yield from _asked(pair, preset, "digits", "objective.solver=heun")
        yield from _asked(pair, preset, "digits", "objective.solver=heun", seconds=4 * SECONDS)
    yield from _asked(pair, "cd-growing", "digits", "objective.times.final=80", seconds=4 * SECONDS)
    correction = "What does FreeFlow's correction do?"
    yield from _asked(correction, "freeflow", "checkerboard", "objective.corrected=0.0")
    yield from _asked(correction, "freeflow", "checkerboard", seconds=4 * SECONDS)
    short = "Is the run too short?"
    late = "shortcut cd-growing ect ict lsd esd dmf lmd-full freeflow rcm scd sct alpha-flow"
    for preset in late.split():
        yield from _asked(short, preset, "digits", seconds=4 * SECONDS)
    rate = "Is the rate too high for images?"
    for preset in ("lmd-full", "rcm", "scd", "sct"):
        yield from _asked(rate, preset, "digits", lr=1e-4)
    long = "How near do the best come to the exact map?"
    for preset in ("lagrangian", "lmd-full", "cd", "shortcut"):
        yield from _asked(long, preset, "mixture", seconds=4 * SECONDS)


def _asked(
    asks: str, preset: str, problems: str, *changes: str, seconds: float = SECONDS, lr: float | None = None
) -> Iterator[Run]:
    for problem in problems.split():
        name = "-".join([problem, preset, *changes, f"{seconds:g}", *([f"{lr:g}"] if lr else [])])
        yield Run(f"experiment-{name}", problem, preset, seconds, changes=changes, lr=lr, asks=asks)


@cache
def _problem(name: str) -> Problem:
    return PROBLEMS[name]()


def steps_of(run: Run, problem: Problem) -> tuple[int, Cost]:
    """How many steps the budget pays for, and what one costs."""
    trainer = _trainer(run, PROBE)
    batches = [problem.batch(TRAINER.batch, k) for k in range(8)]
    found = cost(lambda teacher: _module(run, problem, trainer, teacher), batches, problem.teacher, 32)
    steps = run.seconds / found.seconds if run.seconds is not None else (run.evaluations or 0) / found.evaluations
    return max(20, round(steps)), found


def _trainer(run: Run, steps: int) -> TrainerConfig:
    return replace(TRAINER, steps=steps, lr=run.lr or TRAINER.lr, warmup=min(200, steps // 10))


def _module(run: Run, problem: Problem, trainer: TrainerConfig, teacher: Any = None) -> Bare:
    recipe = load(f"toy/{run.preset}", run.changes)
    return assembled(recipe, problem, trainer, run.seed, teacher)


def perform(run: Run) -> dict[str, Any]:
    """Train and measure."""
    problem = _problem(run.problem)
    ref = reference(problem)
    if run.lr is None:
        run = replace(run, lr=better_rate(run.problem, run.preset))
    steps, step = steps_of(run, problem)
    module = _module(run, problem, _trainer(run, steps))
    result: dict[str, Any] = {
        **asdict(run),
        "budget": run.budget,
        "steps": steps,
        "step": asdict(step),
        "diverged": None,
    }
    first = ref.noise[:512], ref.end[:512]
    cond = ref.cond and {k: v[:512] for k, v in ref.cond.items()}
    zero = torch.zeros(512, dtype=torch.float64)

    @torch.no_grad()
    def one_step(student: Any) -> float:
        return rms(student(first[0], zero, zero + 1, cond) - first[1])

    try:
        spent, curve = train(module, lambda k: problem.batch(TRAINER.batch, k, seed=1 + run.seed), 10, one_step)
    except Diverged as error:
        return result | {"diverged": str(error)}
    student = module.averaged_student.eval()
    samples = generated(student, ref, 1)
    assert samples is not None
    np.save(run.file.with_suffix(".npy"), samples.numpy().astype(np.float16))
    found = {"seconds_spent": spent, "curve": curve, **measured(student, problem, ref)}
    return result | found | {"kind": student.kind, "diverged": None}


def take(run: Run) -> bool:
    """Whether this process is the one to do a run."""
    taken = run.file.with_suffix(".taken")
    if taken.exists() and not Path(f"/proc/{taken.read_text()}").exists():
        taken.unlink(missing_ok=True)  # by a process that was killed
    try:
        with taken.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    if run.file.exists():
        taken.unlink()
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="A fair comparison of all objectives.")
    parser.add_argument("--report", action="store_true", help="write the page alone")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = [run for run in (*comparison(), *experiments()) if options.only in run.name]
    for run in [] if options.report else runs:
        if not take(run):
            continue
        began = time.process_time()
        try:
            result = perform(run)
            begun = run.file.with_suffix(".begun")
            begun.write_text(json.dumps(result))
            begun.replace(run.file)
        finally:
            run.file.with_suffix(".taken").unlink()
        shown = result["diverged"] or f"one step {result['map_1']:.4f}, W2 {result['w2_1']:.4f}"
        print(f"{run.name}: {result['steps']} steps, {shown}, {time.process_time() - began:.0f} s", flush=True)
    if not options.report:
        done = {run.file: run.asks for run in (*comparison(), *experiments()) if run.file.exists()}
        for name in PROBLEMS:
            np.save(FOLDER / f"teacher-{name}.npy", reference(_problem(name)).end.numpy().astype(np.float16))
        teachers = {name: of_teacher(_problem(name), reference(_problem(name))) for name in PROBLEMS}
        collect(done, teachers, SETTING)
    write(lambda name: FOLDER / f"{name}.npy")


if __name__ == "__main__":
    main()
