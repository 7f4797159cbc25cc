"""Noise -> samples of a teacher or a student, in fixed batches spread over processes.

Batches are cut by sample index and each is made whole on one process: how many there are does not change the samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from distill.flow_map import Fresh
from distill.parallel import device, spread
from distill.rows import fresh_noise, noise
from distill.student import Student
from teachers.solvers import euler, uniform_grid
from teachers.space import Cond, DataSpace, cond_on
from teachers.velocity import Teacher

Generator = Callable[[Tensor, Cond, Fresh], Tensor]
"""Noise ``[b, *shape]``, conditioning, and more noise for what is noised again -> samples ``[b, *shape]``."""

Conditions = Callable[[int, int], Cond]
"""first, count -> the conditioning of samples first .. first + count - 1."""


@dataclass(frozen=True)
class Samples:
    """``x: [n, *shape]`` on the CPU in the order of their index, and the seconds one takes (median over batches)."""

    x: Tensor
    seconds_per_sample: float


def teacher_generator(teacher: Teacher, steps: int) -> Generator:
    """Euler in `steps` uniform steps: the reference of every comparison. A teacher without velocity has its own way."""
    if teacher.velocity is None:
        assert teacher.generator is not None
        own = teacher.generator
        return lambda x_0, cond, fresh: own(x_0, cond)
    return lambda x_0, cond, fresh: euler(teacher, teacher.path.start(x_0), uniform_grid(steps, x_0.device), cond)


def student_generator(student: Student, steps: int) -> Generator:
    """Its samples in `steps` steps."""
    return lambda x_0, cond, fresh: student.generate(x_0, steps, cond, fresh=fresh)


@torch.no_grad()
def generate(
    generator: Generator, space: DataSpace, n: int, batch: int, seed: int, conditions: Conditions | None = None
) -> Samples:
    """Samples 0 .. n - 1 from the noise of (seed, i), conditioned by `conditions` or else the classes in turn, clamped
    to the data's range as `Student.sample` delivers them. The clock runs for the generator alone."""
    on = device()

    def work(first: int) -> tuple[Tensor, float]:
        count = min(batch, n - first)
        where = (seed, first, count, space.shape, on)
        cond = cond_on((conditions or space.cond_for)(first, count), on)
        x_0, fresh = noise(*where), fresh_noise(*where)
        start = now(on)
        x = generator(x_0, cond, fresh)
        seconds = (now(on) - start) / count
        return space.clamp(x).cpu(), seconds

    parts = spread(range(0, n, batch), work)
    return Samples(torch.cat([x for x, _ in parts]), median(seconds for _, seconds in parts))


def now(on: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter()
