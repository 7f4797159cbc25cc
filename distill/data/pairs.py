"""A teacher's solutions -> shards: noise x_0, the sample x_1 that the ODE carries it to, perhaps points between.

Pair i is a function of (teacher, solver, steps, seed, i); any number of processes writes the same bytes up to what the
device computes. Liu, Gong, Liu: Flow straight and fast, arXiv 2209.03003, section 2 (reflow pairs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from distill.data.build import Plan, default_shard_size, write_shards
from distill.data.manifest import DataError, Field, Manifest
from distill.parallel import device
from distill.rows import Rows
from teachers.fields import require
from teachers.solvers import SOLVERS, STAGES, uniform_grid
from teachers.space import Cond, cond_on
from teachers.velocity import Teacher

MEMBER = "pair.safetensors"


@dataclass(frozen=True, kw_only=True)
class PairsPlan:
    """samples: how many; solver: euler, heun, midpoint, rk4, or own for the teacher's own generator; steps: of the
    solver; points: how many points between are kept, at equal times; seed: of the noise; batch: pairs made at once."""

    samples: int
    solver: str = "midpoint"
    steps: int = 100
    points: int = 0
    seed: int = 0
    batch: int = 256

    def __post_init__(self) -> None:
        solvers = (*SOLVERS, "own")
        require(
            self,
            samples=(self.samples >= 1, "must be at least 1"),
            solver=(self.solver in solvers, f"must be one of {', '.join(solvers)}"),
            steps=(self.steps >= 1, "must be at least 1"),
            points=(self.points >= 0 and self.steps % (self.points + 1) == 0, "plus 1 must divide steps"),
            seed=(0 <= self.seed < 2**63, "must be in [0, 2^63)"),
            batch=(self.batch >= 1, "must be at least 1"),
        )


def build_pairs(
    folder: Path,
    teacher: Teacher,
    config: PairsPlan,
    shard_size: int | None = None,
    conditions: Callable[[int, int], Cond] | None = None,
    conditioned_on: str | None = None,
) -> Manifest:
    """Write the pairs of `teacher`, as it is distilled, to `folder`; goes on where an earlier call stopped. conditions:
    first, count -> the conditioning of these pairs, by default the classes in turn; conditioned_on: the digest of the
    data that it is from.

    Raises DataError if the folder holds anything else, or the teacher has no generator of its own.
    """
    if config.solver != "own" and teacher.velocity is None:
        raise DataError(f"teacher {teacher.info.get('id')} has no velocity to solve, but makes samples: --solver own")
    if config.solver == "own" and (teacher.generator is None or config.points):
        raise DataError("--solver own needs a teacher with a generator of its own, and keeps no points between")
    shape, info = teacher.space.shape, dict(teacher.info)
    fields = {name: Field(MEMBER, "float32", shape, range=teacher.space.value_range) for name in ("x_0", "x_1")}
    if config.points:
        fields["points"] = Field(MEMBER, "float32", (config.points, *shape))
    for embedding in teacher.space.embeddings:
        fields[embedding.name] = Field(MEMBER, embedding.dtype, embedding.shape)
    if teacher.space.classes is not None:
        fields["class"] = Field("cls", "int64", (), teacher.space.classes)
    own = config.solver == "own"
    nfe = 1 if own else config.steps * STAGES[config.solver] * teacher.calls
    guidance = {"guidance": info["guidance"]} if "guidance" in info else {}
    about = {
        "title": f"pairs of {info.get('id', 'a teacher')}",
        "teacher": {"id": info.get("id"), "digest": info.get("digest"), "calls": teacher.calls} | guidance,
        "path": teacher.path.name,
        "solver": config.solver, "steps": config.steps, "nfe": nfe, "seed": config.seed,
        "licence": info.get("licence", "unknown"),
    }  # fmt: skip
    made_from = {"builder": "pairs", **about, "points": config.points, "batch": config.batch}
    if conditioned_on is not None:
        made_from["conditioned on"] = conditioned_on
    size = default_shard_size(config.samples) if shard_size is None else shard_size
    plan = Plan("pairs", "train", config.samples, size, fields, about, made_from)
    return write_shards(folder, plan, lambda rows: _pairs(rows, teacher, config, conditions))


def _pairs(
    rows: range, teacher: Teacher, config: PairsPlan, conditions: Callable[[int, int], Cond] | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    on = device()
    teacher.to(on)
    for first in range(rows.start, rows.stop, config.batch):
        count = min(config.batch, rows.stop - first)
        x_0 = Rows(config.seed, "pairs", 0, first, count, on).normal(*teacher.space.shape)
        cond = (conditions or teacher.space.cond_for)(first, count)
        with torch.no_grad():
            x_1, points = _solved(x_0, cond_on(cond, on), teacher, config)
        for i in range(count):
            tensors = {"x_0": x_0[i], "x_1": x_1[i]} | ({"points": points[i]} if config.points else {})
            held = {name: value.float().cpu().contiguous() for name, value in tensors.items()}
            held |= {e.name: cond[e.name][i].cpu().contiguous() for e in teacher.space.embeddings if cond is not None}
            members = {MEMBER: safetensors.torch.save(held)}
            if cond is not None and "class" in cond:
                members["cls"] = str(int(cond["class"][i])).encode()
            yield f"{first + i:09d}", members


def _solved(x_0: Tensor, cond: Cond, teacher: Teacher, config: PairsPlan) -> tuple[Tensor, Tensor]:
    """x_1 ``[b, *shape]`` and the points between ``[b, points, *shape]``."""
    if config.solver == "own":
        assert teacher.generator is not None
        return teacher.generator(x_0, cond), x_0.new_empty(len(x_0), 0)
    x, kept = teacher.path.start(x_0), []
    grid, per = uniform_grid(config.steps, x_0.device), config.steps // (config.points + 1)
    for start in range(0, config.steps, per):
        x = SOLVERS[config.solver](teacher, x, grid[start : start + per + 1], cond)
        kept.append(x)
    return x, torch.stack(kept[:-1], 1) if kept[:-1] else x.new_empty(len(x), 0)
