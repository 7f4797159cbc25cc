"""A few real training steps on this machine without a run folder: the seconds of one, and what memory it takes."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from distill.data.base import cut
from distill.data.loader import Loader
from distill.parallel import device
from distill.parts import Job
from distill.sampling import now
from distill.training.module import DistillModule

TIMED = 3


@dataclass(frozen=True, kw_only=True)
class Measured:
    """seconds: of a step, the mean of `TIMED` after one to warm up; memory: bytes, of a GPU the most that tensors took,
    of a CPU by how much the process grew; device: where; rows: of the step."""

    seconds: float
    memory: int
    device: str
    rows: int


def one_step(job: Job, processes: int = 1) -> Measured:
    """Train a new student of a job on the share of its batches that the first of so many processes has, alone: nothing
    is sent, nothing is written. Uses the job's own data and teacher, and raises as these do; Diverged if a step is not
    finite."""
    recipe, trainer = job.recipe, job.recipe.trainer
    on = device(trainer.device)
    before = _grown()
    module = DistillModule(
        job.new_student(), recipe.objective, job.reference, trainer, recipe.seed, {}, job.new_networks(),
        recipe.guidance,
    ).to(on)  # fmt: skip
    module.on_fit_start()
    optimizer = module.configure_optimizers()
    workers = getattr(recipe.data, "workers", 0)
    batches = iter(Loader(job.reader, recipe.seed, trainer.batch, world=processes, workers=workers))

    def gradients() -> None:
        optimizer.zero_grad()
        for part in cut(next(batches), trainer.accumulate):
            part = module.transfer_batch_to_device(part, on, 0)
            (module.training_step(part, 0) / trainer.accumulate).backward()

    start = 0.0
    for number in range(1 + TIMED):
        if number == 1:
            start = now(on)
        module.optimizer_step(0, number, optimizer, gradients)
    seconds = (now(on) - start) / TIMED
    memory = torch.cuda.max_memory_allocated(on) if on.type == "cuda" else _grown() - before
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else "this CPU"
    return Measured(seconds=seconds, memory=memory, device=name, rows=trainer.batch // processes)


def _grown() -> int:
    """The most bytes that were resident in this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
