"""What several tests share: laws with an exact flow map, the students these make, and wrong students beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from distill.flow_map import FlowMap, jump, travel
from teachers.analytic import Gaussian, Law, Mixture
from teachers.gaussian_mixture import GaussianMixture
from teachers.path import PATHS, Linear, Path, expand_like
from teachers.space import Cond


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def gaussian(d: int = 3, path: str = "linear", seed: int = 0) -> Gaussian:
    """A full random covariance with eigenvalues between 0.3 and 4, and a random mean."""
    basis = torch.linalg.qr(normal(d, d, seed=seed)).Q
    covariance = basis * uniform(d, low=0.3, high=4.0, seed=seed + 1) @ basis.T
    covariance = (covariance + covariance.T) / 2
    return Gaussian(
        mean=tuple(normal(d, seed=seed + 2).tolist()), covariance=tuple(map(tuple, covariance.tolist())), path=path
    )


def mixture(path: str = "linear") -> Mixture:
    """Two dimensions of three overlapping components each."""
    return Mixture(
        weights=((0.2, 0.5, 0.3), (0.6, 0.3, 0.1)),
        means=((-1.5, 0.2, 1.8), (-1.0, 0.5, 2.0)),
        stds=((0.4, 0.6, 0.5), (0.5, 0.7, 0.4)),
        path=path,
    )


def gaussian_mixture(path: str = "linear") -> GaussianMixture:
    """Two dimensions, three components: long, round and tilted."""
    return GaussianMixture(
        weights=(0.3, 0.5, 0.2),
        means=((-1.5, 0.5), (1.0, 1.0), (0.5, -1.5)),
        covariances=(((1.0, 0.2), (0.2, 0.15)), ((0.3, 0.0), (0.0, 0.3)), ((0.4, -0.3), (-0.3, 0.5))),
        path=path,
    )


LAWS: dict[str, Callable[[str], Gaussian | Mixture]] = {
    "gaussian": lambda path: gaussian(path=path),
    "mixture": mixture,
}


def data(law: Law, count: int, seed: int = 0) -> Tensor:
    """``[count, d]`` float64 samples of the law."""
    d = law.load().space.shape[0]
    return law.data(normal(count, d, seed=seed), uniform(count, d, seed=seed + 1))


def on_path(law: Law, t: Tensor, seed: int = 0) -> Tensor:
    """Points ``[b, d]`` of the marginals at ``t: [b]``: where a flow map is asked."""
    path: Path = PATHS[law.path]()
    x_1 = data(law, len(t), seed)
    return path.point(normal(*x_1.shape, seed=seed + 7), x_1, t)


def near(got: Tensor, expected: Tensor | float, tolerance: float) -> None:
    """`got` is `expected` up to `tolerance` of the largest entry of its row (or of 1): points of ve are of size 80."""
    expected = torch.as_tensor(expected, dtype=got.dtype).expand_as(got)
    size = expected.abs().reshape(len(got), -1).amax(1).clamp(min=1).reshape(-1, *[1] * (got.dim() - 1))
    torch.testing.assert_close(got / size, expected / size, atol=tolerance, rtol=0)


def central(function: Callable[[Tensor], Tensor], t: Tensor, h: float = 1e-5) -> Tensor:
    """d function / dt by central differences, error O(h^2)."""
    return (function(t + h) - function(t - h)) / (2 * h)


class Exact:
    """The true flow map of an analytic law as a student; its mean velocity is smooth up to and on the diagonal."""

    def __init__(self, law: Law) -> None:
        self.law = law

    def __call__(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.law.flow_map(x_s, s, t)

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.law.mean_velocity(x_s, s, t)

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        return s <= t


class Wave:
    """phi(x, s, t) = sin(W x + 1.3 s + 0.7 t^2), a smooth error with derivatives known by hand."""

    def __init__(self, d: int) -> None:
        self.w = normal(d, d, seed=11)

    def angle(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return x @ self.w.to(x).T + expand_like(1.3 * s + 0.7 * t**2, x)

    def __call__(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return torch.sin(self.angle(x, s, t))

    def d_t(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return expand_like(1.4 * t, x) * torch.cos(self.angle(x, s, t))

    def along(self, x: Tensor, s: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """d/ds phi + (v . grad) phi."""
        return (v @ self.w.to(x).T + 1.3) * torch.cos(self.angle(x, s, t))


class Changed:
    """A student whose mean velocity is ``change(u, x, s, t)`` of another's."""

    def __init__(self, student: FlowMap, change: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.student, self.change = student, change

    def __call__(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return jump(x_s, s, t, self.mean_velocity(x_s, s, t, cond))

    def mean_velocity(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.change(self.student.mean_velocity(x_s, s, t, cond), x_s, s, t)

    def supports(self, s: Tensor, t: Tensor) -> Tensor:
        return s <= t


def compose(flow_map: FlowMap, x: Tensor, grid: Tensor, cond: Cond = None) -> Tensor:
    """X_{t_{n-1},t_n} o ... o X_{t_0,t_1} for the times ``grid: [n + 1]``."""
    return travel(flow_map, x, grid, cond, Linear())


def written(folder: FilePath, values: Mapping[str, Any]) -> FilePath:
    """A recipe file of these values."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return file


def problems(recipe: str | FilePath, *overrides: str, **given: Any) -> list[str]:
    """What is wrong with a recipe, a line each; none if it loads."""
    from distill.recipe import load
    from distill.recipe_files import RecipeError

    try:
        load(recipe, overrides, **given)
    except RecipeError as error:
        found = [str(problem) for problem in error.problems]
        if not found:
            pytest.fail("refused without a reason")
        return found
    return []


# --- jobs

ROOT = FilePath(__file__).resolve().parents[1]
FAST = (
    "trainer.steps=12",
    "trainer.batch=16",
    "trainer.checkpoint_every=4",
    "evaluation.samples=100",
    "evaluation.steps=[1,2]",
    "evaluation.reference_steps=4",
    "evaluation.bootstrap=5",
    "tracking.wandb=disabled",
    "tracking.samples_every=0",
    "tracking.log_every=2",
)
"""A job of about a second."""
TINY = ("student.network={name: mlp, width: 16, depth: 1}", "data.samples=300", *FAST)
"""The same for toy/lagrangian."""


def files(folder: FilePath) -> dict[str, bytes]:
    """Every file below `folder` by its path in it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def checkpoints(run: FilePath) -> list[FilePath]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").iterdir())


def verified(checkpoint: FilePath) -> int:
    """The step of a checkpoint, after it was found whole."""
    from distill.training.checkpoint import verify

    verify(checkpoint)
    return int(checkpoint.name.removeprefix("step-"))


def trained(run: FilePath) -> dict[str, bytes]:
    """Student, EMA, optimizer and what else a run's newest checkpoint holds: the bytes of every tensor by file and
    name."""
    newest = checkpoints(run)[-1]
    found = {f"{file.stem}/{name}": tensor.numpy().tobytes() for file in newest.glob("*.safetensors")
             for name, tensor in load_file(file).items()}  # fmt: skip
    assert {name.partition("/")[0] for name in found} >= {"student", "ema", "optimizer"}
    return {**found, "step": newest.name.encode()}


def logged(run: FilePath) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without speed and waiting, which differ from run to run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row.pop("images_per_second") > 0 for row in rows)
    assert all(0 < row.pop("waiting_for_data") < 1 for row in rows)
    return rows


def timeless(file: FilePath) -> dict[str, Any]:
    """An evaluation without what depends on the clock."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in ("seconds_per_sample", "speedup")}
        return value

    found = kept(json.loads(file.read_text()))
    assert isinstance(found, dict) and found["student"]
    return found


def environment(**more: str) -> dict[str, str]:
    """For a subprocess: this checkout's code, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def data_in(folder: FilePath, recipe: str) -> list[str]:
    """Overrides for a shipped recipe whose data need not be on this machine: files of their names stand in `folder`."""
    if "fashion" not in recipe:
        return []
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").touch()
    return [f"{key}={folder}" for key in ("data.source", "evaluation.data.source")]
