"""MeanFlow files: the diagonal as a teacher, the whole as a student, against what their own code made."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import golden
from proof import outline_reads_no_weights, what_starts_from
from torch import Tensor

import distill
from distill import finished
from distill.flow_map import travel
from teachers.adapters.meanflow import MeanFlow
from teachers.adapters.sit import SiT
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.fill import Placement
from teachers.guidance import guided
from teachers.solvers import euler, uniform_grid
from teachers.space import Latent

WEIGHTS, GOLDEN = golden("meanflow")
COND = {"class": GOLDEN["class"]}
LATENT = Latent(autoencoder="stabilityai/sd-vae-ft-ema", scale=0.18125)


def near(got: Tensor, name: str, tolerance: float = 3e-6) -> None:
    torch.testing.assert_close(got, GOLDEN[name], atol=tolerance, rtol=0)


def saved(folder: Path, weights: dict[str, Tensor] = WEIGHTS, **args: Any) -> str:
    """As its train.py writes it: the averaged weights beside others."""
    said = Namespace(path_type="linear", num_classes=10, cfg_omega=1.0, **args)
    held = {"model": {k: v + 1 for k, v in weights.items()}, "ema": weights, "opt": {}, "args": said, "steps": 7}
    torch.save(held, folder / "0000007.pt")
    return str(folder / "0000007.pt")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MeanFlow:
    return MeanFlow(path=saved(tmp_path_factory.mktemp("meanflow")), heads=4, latent=LATENT, licence="MIT")


def test_the_diagonal_is_their_network_at_equal_times(config: MeanFlow) -> None:
    teacher = config.load()
    t = 1 - GOLDEN["t"].double()
    near(-teacher(GOLDEN["x_0"], t, COND), "diagonal")
    assert (-teacher(GOLDEN["x_0"], 1 - t, COND) - GOLDEN["diagonal"]).abs().max() > 0.05  # the twins
    assert (teacher(GOLDEN["x_0"], t, COND) - GOLDEN["diagonal"]).abs().max() > 0.5
    assert teacher.info["weights"] == "ema"
    assert teacher.info["trained_with"] == {"guidance_scale": 1.0}
    assert (teacher.space.shape, teacher.space.classes, teacher.space.value_range) == ((4, 8, 8), 10, None)


def test_guided_euler_is_theirs_step_by_step(config: MeanFlow) -> None:
    teacher = guided(config.load(), 2.5, (0.0, 1.0))
    near(euler(teacher, GOLDEN["x_0"], uniform_grid(8), COND), "euler8")


def test_the_whole_is_a_student(config: MeanFlow) -> None:
    student = finished.student(config)
    s, t = 1 - GOLDEN["t"].double(), 1 - GOLDEN["r"].double()
    near(-student.mean_velocity(GOLDEN["x_0"], s, t, COND), "u")
    assert (-student.mean_velocity(GOLDEN["x_0"], s, s, COND) - GOLDEN["u"]).abs().max() > 0.02
    for steps in (1, 2, 4):
        near(student.generate(GOLDEN["x_0"], steps, COND), f"sample{steps}")


def test_a_finished_student_is_exported_natively(config: MeanFlow, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    finished.export(config, folder)
    loaded = distill.load(folder)
    for steps in (1, 2, 4):
        near(travel(loaded, GOLDEN["x_0"], uniform_grid(steps), COND, loaded.path), f"sample{steps}")
    assert loaded.config["licence"] == "MIT"
    assert loaded.config["trained_on"] == {"steps": 0, "family": "meanflow", "weights": "ema"}
    assert loaded.sample(2, steps=1).shape == (2, 4, 8, 8)


def test_a_finished_student_on_the_cosine_path_jumps_in_its_own_points(tmp_path: Path) -> None:
    """Their sampler does not depend on the path: a jump is straight there. The teacher is on the linear path."""
    config = MeanFlow(path=saved(tmp_path), heads=4, latent=LATENT, path_type="cosine")
    student = finished.student(config)
    assert student.path.name == "cosine"
    near(student.generate(GOLDEN["x_0"], 4, COND), "sample4")
    teacher = config.load()
    assert teacher.path.name == "linear"
    t = torch.full((3,), 0.3, dtype=torch.float64)
    own = student.path(t)
    linear = own.alpha / (own.alpha + own.sigma)
    x = GOLDEN["x_0"] * (own.alpha + own.sigma)[:, None, None, None].float()
    w = student.mean_velocity(x, t, t, COND)
    c = {k: getattr(own, k)[:, None, None, None].float() for k in ("alpha", "sigma", "d_alpha", "d_sigma", "delta")}
    x_1 = (c["sigma"] * w - c["d_sigma"] * x) / c["delta"]
    x_0 = (c["d_alpha"] * x - c["alpha"] * w) / c["delta"]
    torch.testing.assert_close(teacher(GOLDEN["x_0"], linear, COND), x_1 - x_0, atol=2e-5, rtol=0)


def test_a_student_is_not_of_half_precision(config: MeanFlow) -> None:
    half = replace(config, placement=Placement(dtype="bfloat16"))
    t = 1 - GOLDEN["t"].double()
    near(-half.load()(GOLDEN["x_0"], t, COND), "diagonal", 0.1)
    with pytest.raises(CheckpointError, match=r"computes in float32; set teacher\.placement\.dtype: float32"):
        finished.student(half)


def test_what_starts_from_the_diagonal(config: MeanFlow, tmp_path: Path) -> None:
    teacher = config.load()
    what_starts_from(teacher, tmp_path)


def test_an_outline_reads_no_weights(config: MeanFlow) -> None:
    outline_reads_no_weights(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("r_embedder.mlp.2.bias"), r"r_embedder\.\*\).*missing: mlp.2.bias"),
        (lambda w: w.update({"r_embedder.mlp.3.bias": torch.ones(1)}), r"unexpected: mlp.3.bias"),
        (lambda w: w.update({"r_embedder.mlp.2.bias": torch.ones(1)}), r"wrong size: mlp.2.bias is \(1,\)"),
        (lambda w: w.update({"blocks.0.x": torch.ones(1)}), r"unexpected: blocks.0.x"),
        (lambda w: w.pop("t_embedder.mlp.2.bias"), r"missing: t_embedder.mlp.2.bias"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("r_")], "no r_embedder.*name it repa"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    weights = dict(WEIGHTS)
    change(weights)
    config = MeanFlow(path=saved(tmp_path, weights), heads=4, latent=LATENT)
    for make in (config.load, config.outline, config.two_time):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"0\.18125") as error:
        MeanFlow(path=saved(tmp_path), heads=4).load()
    assert set(error.value.problems) == {"latent"}
    torch.save(WEIGHTS, tmp_path / "flat.pt")
    with pytest.raises(FieldError) as error:
        MeanFlow(path=str(tmp_path / "flat.pt"), heads=4, latent=LATENT).outline()
    assert set(error.value.problems) == {"path_type"}


def test_named_as_a_family_of_one_time_it_is_told_apart(tmp_path: Path) -> None:
    config = SiT(path=saved(tmp_path))
    with pytest.raises(CheckpointError, match=r"already distilled.*r_embedder.*teacher.name: meanflow"):
        config.load()
