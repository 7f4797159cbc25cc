"""What objectives are compared on: a teacher, its data, and where its flow takes given points.

mixture       8 independent 1-D mixtures: exact velocity, exact map; students start at random
checkerboard  2-D, a flow-matching teacher that is trained here; students start from it
digits        the teacher that ships with the project, class-conditional; students start from it
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from loop import assembled, train
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from distill.objectives.base import Batch
from distill.objectives.flow_matching import FlowMatching
from distill.recipe import Recipe
from distill.rows import Rows, noise
from distill.training.config import TrainerConfig
from teachers.adapters.native import Native
from teachers.analytic import Mixture
from teachers.networks.mlp import MLPConfig
from teachers.solvers import euler, rk4, uniform_grid
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "bench" / "objectives"
COUNT = 1024  # points that everything is measured on
SEED = 0
NETWORK = MLPConfig(width=64)  # of students and of the teacher trained here; the digits teacher has width 128


@dataclass(frozen=True, eq=False)
class Problem:
    """teacher, and data ``draw(rows) -> (x_1, cond)``; sigma: the data's standard deviation; init: of students, with
    `network` where that is random; reach: Runge-Kutta steps of the reference from 0 to 1, None: the map is exact."""

    name: str
    title: str
    teacher: Teacher
    draw: Callable[[Rows], tuple[Tensor, Cond]]
    sigma: float
    init: str
    network: MLPConfig | None
    reach: int | None

    @property
    def space(self) -> DataSpace:
        return self.teacher.space

    def batch(self, size: int, step: int, seed: int = SEED) -> Batch:
        """The batch of a training step."""
        x_1, cond = self.draw(Rows(seed, "bench", step, 0, size))
        return Batch(x_1, cond, ("",) * size)

    @torch.no_grad()
    def flow_map(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Where the teacher's flow takes ``x: [b, *dims]`` from s to t ``[b]``."""
        if self.reach is None:
            assert self.teacher.flow_map is not None
            return self.teacher.flow_map(x, s, t)
        share = torch.linspace(0, 1, self.reach + 1, dtype=torch.float64)[:, None]
        return rk4(self.teacher.velocity, x, s + share * (t - s), cond)


@dataclass(frozen=True)
class Probe:
    """Points of the path at s and where the flow has them at t; m is a time between. All ``[n, ...]``."""

    x_s: Tensor
    s: Tensor
    m: Tensor
    t: Tensor
    x_t: Tensor


@dataclass(frozen=True)
class Reference:
    """Noise and its ends, ends of other noise, points on the way for each kind of map, and the teacher's Euler steps
    from the same noise by their number."""

    noise: Tensor
    cond: Cond
    end: Tensor
    other: Tensor
    probes: dict[str, Probe]
    euler: dict[int, Tensor]


EULER = (1, 4, 16)


@cache
def reference(problem: Problem) -> Reference:
    """Made once and kept in the folder."""
    file = FOLDER / f"reference-{problem.name}.safetensors"
    if not file.exists():
        _keep(_reference(problem), file)
    kept = load_file(file)
    probes = {kind: Probe(*(kept[f"{kind}/{part}"] for part in _PARTS)) for kind in _KINDS}
    steps = {n: kept[f"euler/{n}"] for n in EULER}
    cond = problem.space.cond_for(0, COUNT)
    return Reference(kept["noise"], cond, kept["end"], kept["other"], probes, steps)


_PARTS = ("x_s", "s", "m", "t", "x_t")
_KINDS = ("flow_map", "shortcut", "consistency")


def _keep(tensors: dict[str, Tensor], file: Path) -> None:
    """Whole or not at all, also when two processes make the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_suffix(f".{os.getpid()}")
    save_file(tensors, begun)
    begun.replace(file)


@torch.no_grad()
def _reference(problem: Problem) -> dict[str, Tensor]:
    space, cond = problem.space, problem.space.cond_for(0, COUNT)
    zero = torch.zeros(COUNT, dtype=torch.float64)
    z = noise(SEED, 0, COUNT, space.shape)
    kept = {"noise": z, "end": problem.flow_map(z, zero, zero + 1, cond)}
    kept["other"] = problem.flow_map(noise(SEED + 1, 0, COUNT, space.shape), zero, zero + 1, cond)
    for n in EULER:
        kept[f"euler/{n}"] = euler(problem.teacher.velocity, z, uniform_grid(n), cond)
    for kind in _KINDS:
        rows = Rows(SEED, f"probe {kind}", 0, 0, COUNT)
        a, b = torch.stack([rows.uniform(), rows.uniform()]).sort(0).values
        if kind == "shortcut":
            gap = 2.0 ** -(rows.uniform() * 4).floor()  # 1, 1/2, 1/4, 1/8
            a = (a / gap).floor() * gap
            b = a + gap
        if kind == "consistency":
            a, b = rows.uniform(), torch.ones_like(a)
        middle = a + (0.5 if kind == "shortcut" else rows.uniform()) * (b - a)
        x_1, _ = problem.draw(rows) if cond is None else _of_classes(rows, cond)
        x_s = problem.teacher.path.point(rows.normal(*space.shape), x_1, a)
        parts = (x_s, a, middle, b, problem.flow_map(x_s, a, b, cond))
        kept |= {f"{kind}/{part}": value.contiguous() for part, value in zip(_PARTS, parts, strict=True)}
    return kept


def _of_classes(rows: Rows, cond: Cond) -> tuple[Tensor, Cond]:
    """Data of given classes, in the order in which they are asked for."""
    images, labels = _digits()
    assert cond is not None
    pick = torch.stack(
        [
            (labels == label).nonzero().flatten()[int(u * int((labels == label).sum()))]
            for label, u in zip(cond["class"], rows.uniform(), strict=True)
        ]
    )
    return images[pick], cond


# --- the problems


def mixture() -> Problem:
    """Two or three humps a dimension, of different weights, places and widths."""
    weights = ((0.5, 0.5), (0.35, 0.65), (0.6, 0.4), (0.5, 0.5), (0.3, 0.7), (0.45, 0.55), (0.65, 0.35), (0.5, 0.5))
    means = ((-1.0, 1.0), (-1.2, 0.7), (-0.8, 1.1), (-1.1, 0.9), (-1.3, 0.6), (-0.9, 1.0), (-0.7, 1.3), (-1.0, 0.8))
    stds = ((0.5, 0.5), (0.45, 0.55), (0.5, 0.4), (0.55, 0.45), (0.5, 0.5), (0.4, 0.5), (0.5, 0.6), (0.5, 0.4))
    teacher = Mixture(weights=weights, means=means, stds=stds).load()
    assert teacher.data is not None
    data = teacher.data

    def draw(rows: Rows) -> tuple[Tensor, Cond]:
        return data(rows.normal(8), rows.uniform(8)), None

    return Problem("mixture", "8-dimensional product of mixtures", teacher, draw, 1.06, "random", NETWORK, None)


def checkerboard() -> Problem:
    """The 8 dark squares of a 4 x 4 board on [-2, 2]^2."""

    def draw(rows: Rows) -> tuple[Tensor, Cond]:
        u = rows.uniform(3)
        column, row = (u[:, 0] * 4).floor(), (u[:, 1] * 2).floor()
        corner = torch.stack([column, 2 * row + column % 2], 1)
        inside = torch.stack([(u[:, 0] * 4) % 1, u[:, 2]], 1)
        return (corner + inside - 2).float(), None

    return Problem("checkerboard", "2-D checkerboard", _taught(draw), draw, 1.15, "teacher", None, 200)


def _taught(draw: Callable[[Rows], tuple[Tensor, Cond]]) -> Teacher:
    """A flow-matching teacher of 2-D data, trained once and kept in the folder."""
    network, space = NETWORK, DataSpace((2,))
    built = network.build(space)
    file = FOLDER / "teacher-checkerboard.safetensors"
    teacher = Teacher(
        velocity=lambda x, t, cond: built(x, t, cond),
        space=space,
        network=built,
        network_config={"name": "mlp"} | vars(network),
    )
    if not file.exists():
        trainer = TrainerConfig(steps=5000, batch=512, lr=3e-3, ema=0.999)
        recipe = Recipe(name="teacher", objective=FlowMatching(), trainer=trainer)
        board = Problem("checkerboard", "", teacher, draw, 1.15, "random", network, 200)
        module = assembled(recipe, board, trainer, SEED)
        module._teacher = (None,)  # from data
        train(module, lambda step: board.batch(trainer.batch, step))
        _keep(module.averaged_student.network.state_dict(), file)  # type: ignore[union-attr]
    built.load_state_dict(load_file(file))
    teacher.freeze()
    return teacher


@cache
def _digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


def digits() -> Problem:
    """scikit-learn's 1,797 images of 8 x 8, in [-1, 1]."""
    images, labels = _digits()
    teacher = Native(path="digits").load()
    teacher.freeze()

    def draw(rows: Rows) -> tuple[Tensor, Cond]:
        pick = (rows.uniform() * len(images)).long()
        return images[pick], {"class": labels[pick]}

    return Problem("digits", "8 x 8 digits", teacher, draw, 0.75, "teacher", None, 100)


PROBLEMS: dict[str, Callable[[], Problem]] = {"mixture": mixture, "checkerboard": checkerboard, "digits": digits}
