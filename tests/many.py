"""Trains small jobs one after the other in each process of one launch; started by tests/test_many.py.

    python [-m torch.distributed.run --standalone --nproc-per-node N] many.py CASES OUT

CASES: a JSON list; a case is trained in OUT/<name>, on from the checkpoint that is there. It has a `recipe` and
`overrides`, or a `network`, one of `small_networks`, whose student learns from it as `trainer` says. `until`: the
checkpoints of later steps are removed again, as if the job had been killed. The first case that fails ends the launch.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from proof import conditioning
from rich.console import Console
from safetensors.torch import save_file
from small_networks import spread, teacher
from torch.distributed.tensor import DTensor

from distill.launch import whole
from distill.lora import LoRA
from distill.objectives.base import Batch
from distill.objectives.lagrangian import Lagrangian
from distill.parallel import agreed, is_main, on_main
from distill.parts import Job
from distill.recipe import load
from distill.rows import Rows
from distill.stages import train
from distill.student import Student, StudentConfig
from distill.training.config import TrackingConfig, TrainerConfig
from distill.training.fit import Fit
from distill.training.stops import Signals
from teachers.adapters.base import InDtype
from teachers.space import Cond, DataSpace

QUIET = Console(quiet=True)


class RandomData:
    """Noise under random conditioning; row i of step n is always the same. A `Reader`."""

    digest = "random"

    def __init__(self, space: DataSpace) -> None:
        self.space = space

    def batches(self, seed: int, batch: int, step: int, rows: range | None = None) -> Iterator[Batch]:
        rows = range(batch) if rows is None else rows
        while True:
            x_1 = Rows(seed, "data", step, rows.start, len(rows)).normal(*self.space.shape)
            cond = conditioning(self.space, batch, seed=step)
            cond = cond and {k: v[rows.start : rows.stop] for k, v in cond.items()}
            yield Batch(x_1, cond, tuple(map(str, rows)), rows.start, null=self.space.null)
            step += 1

    def cond_for(self, first: int, count: int) -> Cond:
        raise AssertionError("nothing is drawn")

    def everything(self) -> Any:
        raise AssertionError("nothing is measured")


def train_recipe(case: dict[str, Any], folder: Path) -> None:
    recipe = load(case["recipe"], case["overrides"])
    job = Job(folder, recipe, recipe.teacher.load() if recipe.teacher else None, QUIET)
    if job.reference is not None:
        job.reference.freeze()
    assert job.reader.digest  # which all processes open together
    with Signals() as signals, job.threads():
        train(job, signals, on_main(job.newest))


def train_network(case: dict[str, Any], folder: Path) -> None:
    with TemporaryDirectory() as saved:
        of = teacher(case["network"], Path(saved))
    assert of.network is not None
    if case.get("half"):
        of = replace(of, velocity=InDtype(of.network.to(torch.bfloat16)))
    lora = LoRA(rank=2) if case.get("lora") else None

    def student() -> Student:
        made = StudentConfig(lora=lora).build(of, of.space, 0)
        if lora is None:
            spread(made, 2)
        return made

    trainer = TrainerConfig(**case["trainer"])
    with Signals() as signals:
        Fit(
            folder=folder, student=student, objective=Lagrangian(), networks=dict, guidance=None, teacher=of,
            own_teacher=True, reader=RandomData(of.space), workers=0, seed=0, trainer=trainer,
            strategy=case["trainer"]["strategy"], identity={"recipe": "network"}, params={}, run_id=None,
            tracking=TrackingConfig(log_every=1, samples_every=trainer.steps, wandb="disabled"),
            draw_samples=gather, signals=signals, console=QUIET,
        )(None)  # fmt: skip


def gather(student: Student, picture: Path) -> dict[str, float]:
    """In place of a picture: all weights of the averaged student, put together by torch."""
    found = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in student.state_dict().items()}
    if is_main():
        picture.parent.mkdir(exist_ok=True)
        save_file({k: v.contiguous().clone() for k, v in found.items()}, picture.with_suffix(".safetensors"))
    return {}


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in cases:
        print(case["name"], flush=True)
        folder = out / case["name"]
        folder.mkdir(exist_ok=True, parents=True)
        (train_recipe if "recipe" in case else train_network)(case, folder)
        if is_main() and "until" in case:
            for path in (folder / "checkpoints").iterdir():
                if int(path.name.removeprefix("step-")) > case["until"]:
                    shutil.rmtree(path)
        agreed(lambda: None)


if __name__ == "__main__":
    whole(main)
