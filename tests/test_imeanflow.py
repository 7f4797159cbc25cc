"""Improved MeanFlow: never told the time, told of guidance, against what its own code made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import golden
from proof import batch, outline_reads_no_weights, what_starts_from
from torch import Tensor

import distill
from distill import finished
from teachers.adapters.imeanflow import LATENT, IMeanFlow
from teachers.adapters.jit import JiT
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.networks.imeanflow import IMeanFlowConfig
from teachers.solvers import euler, uniform_grid
from teachers.space import DataSpace

WEIGHTS, GOLDEN = golden("imeanflow")
COND = {"class": GOLDEN["class"]}


def near(got: Tensor, name: str, tolerance: float = 3e-6) -> None:
    torch.testing.assert_close(got, GOLDEN[name], atol=tolerance, rtol=0)


def saved(folder: Path, weights: dict[str, Tensor] = WEIGHTS) -> str:
    torch.save(weights, folder / "iMF-B-2.pth")
    return str(folder / "iMF-B-2.pth")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> IMeanFlow:
    path = saved(tmp_path_factory.mktemp("imeanflow"))
    return IMeanFlow(path=path, omega=8.0, interval=(0.4, 0.65), size=8, licence="MIT")


def test_the_diagonal_is_their_network_without_a_jump(config: IMeanFlow) -> None:
    teacher = config.load()
    for time in (0.1, 0.9):  # it never sees it
        near(-teacher(GOLDEN["x_0"], torch.full((3,), time, dtype=torch.float64), COND), "diagonal")
    assert (teacher(GOLDEN["x_0"], torch.zeros(3), COND) - GOLDEN["diagonal"]).abs().max() > 1
    near(euler(teacher, GOLDEN["x_0"], uniform_grid(8), COND), "euler8")
    assert teacher.latent == LATENT
    assert (teacher.space.shape, teacher.space.classes) == ((4, 8, 8), 10)
    assert teacher.info["told"] == {"omega": 8.0, "interval": [0.4, 0.65]}


def test_what_it_is_told_changes_it(config: IMeanFlow) -> None:
    t = torch.zeros(3, dtype=torch.float64)
    other = replace(config, omega=2.0, interval=(0.0, 1.0)).load()
    near(-other(GOLDEN["x_0"], t, COND), "other")
    assert (-other(GOLDEN["x_0"], t, COND) - GOLDEN["diagonal"]).abs().max() > 1e-3
    half = replace(config, omega=2.0).load()
    assert (-half(GOLDEN["x_0"], t, COND) - GOLDEN["other"]).abs().max() > 1e-4


def test_the_whole_is_a_student(config: IMeanFlow, tmp_path: Path) -> None:
    student = finished.student(config)
    s = torch.zeros(3, dtype=torch.float64)
    near(-student.mean_velocity(GOLDEN["x_0"], s, s + GOLDEN["h"].double(), COND), "u")
    assert (-student.mean_velocity(GOLDEN["x_0"], s, s, COND) - GOLDEN["u"]).abs().max() > 0.01
    folder = tmp_path / "export"
    finished.export(config, folder)
    loaded = distill.load(folder)
    for steps in (1, 2, 4):
        near(student.generate(GOLDEN["x_0"], steps, COND), f"sample{steps}")
        near(loaded.generate(GOLDEN["x_0"], steps, COND), f"sample{steps}")
    assert loaded.config["network"]["network"]["omega"] == 8.0


def test_what_starts_from_the_diagonal(config: IMeanFlow, tmp_path: Path) -> None:
    teacher = config.load()
    what_starts_from(teacher, tmp_path)


def test_it_is_not_guided_again(config: IMeanFlow) -> None:
    with pytest.raises(InputError, match="never saw a null condition"):
        guided(config.load(), 2.0, (0.0, 1.0))


def test_classes_are_needed_and_known(config: IMeanFlow) -> None:
    teacher = config.load()
    x, s, _, _ = batch(teacher)
    with pytest.raises(ValueError, match="conditioned on 10 classes"):
        teacher(x, s, None)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 10\]"):
        teacher(x, s, {"class": torch.full((4,), 11)})


def test_an_outline_reads_no_weights(config: IMeanFlow) -> None:
    outline_reads_no_weights(config)


def test_what_the_file_does_not_say_is_asked_for(config: IMeanFlow) -> None:
    with pytest.raises(FieldError, match=r"10\.5 and") as error:
        IMeanFlow(path=config.path).outline()
    assert set(error.value.problems) == {"omega", "interval", "size"}
    with pytest.raises(FieldError, match="interval must be two increasing"):
        replace(config, interval=(0.6, 0.4)).outline()
    with pytest.raises(FieldError, match="omega must be at least 1"):
        replace(config, omega=0.0).outline()
    with pytest.raises(FieldError, match="patch must divide the side"):
        IMeanFlowConfig(width=48, heads=3).check(DataSpace((4, 7, 7), 10))


def test_heads_of_its_training_are_left_aside(config: IMeanFlow, tmp_path: Path) -> None:
    """A file that has them has blocks for v beside those for u."""
    more = {k.replace("u_heads", "v_heads"): v + 1 for k, v in WEIGHTS.items() if "u_heads" in k}
    teacher = replace(config, path=saved(tmp_path, WEIGHTS | more)).load()
    near(-teacher(GOLDEN["x_0"], torch.zeros(3), COND), "diagonal")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("net.t_max_tokens"), r"missing: t_max_tokens"),
        (lambda w: w.update({"net.u_heads.1.x": torch.ones(1)}), r"unexpected: blocks.3.x"),
        (lambda w: w.update({"net.time_tokens": torch.ones(3, 40)}), r"time_tokens is \(3, 40\), expected \(3, 48\)"),
        (lambda w: w.pop("net.x_embedder.proj.weight"), r"has no x_embedder.proj.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, config: IMeanFlow, tmp_path: Path
) -> None:
    weights = dict(WEIGHTS)
    change(weights)
    bad = replace(config, path=saved(tmp_path, weights))
    for make in (bad.load, bad.outline, bad.two_time):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_a_cut_file_and_another_family_are_told(config: IMeanFlow, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"already distilled improved MeanFlow.*teacher.name: imeanflow"):
        JiT(path=config.path, noise_scale=1.0).outline()
    path = Path(saved(tmp_path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"iMF-B-2\.pth: cut short"):
        replace(config, path=str(path)).outline()
