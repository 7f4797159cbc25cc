"""py-meanflow's files: the diagonal as a teacher, the whole as a student, against what their own code made."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import golden
from proof import derivatives_are_exact, export_keeps, learner
from torch import Tensor

import distill
from distill import finished
from teachers.adapters.edm import EDM
from teachers.adapters.py_meanflow import PyMeanFlow
from teachers.errors import CheckpointError, InputError
from teachers.guidance import guided
from teachers.networks.song_unet import SongUNetConfig
from teachers.solvers import euler, uniform_grid

SHAPED, GOLDEN = golden("py_meanflow")


def weights() -> dict[str, Tensor]:
    """Of one network."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    filters = ("enc.4x4_down.conv0", "enc.4x4_down.skip", "dec.8x8_up.conv0", "dec.8x8_up.skip")
    return {k: v.clone() for k, v in SHAPED.items()} | {
        f"{f}.resample_filter": torch.outer(row, row)[None, None] for f in filters
    }


def saved(folder: Path, own: dict[str, Tensor] | None = None, **further: Tensor) -> str:
    """As its train.py writes it."""
    own = weights() if own is None else own
    parts = {"net": 1.0, "net_ema": 0.0, "net_ema1": 2.0, "net_ema2": 3.0}
    model = {f"{name}.{k}": v + shift for name, shift in parts.items() for k, v in own.items()}
    model |= {"num_updates": torch.tensor(7), **further}
    held = {"model": model, "optimizer": {}, "lr_schedule": {}, "epoch": 3, "args": Namespace(arch="unet")}
    torch.save(held, folder / "checkpoint-last.pth")
    return str(folder / "checkpoint-last.pth")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PyMeanFlow:
    return PyMeanFlow(path=saved(tmp_path_factory.mktemp("meanflow")))


def near(got: Tensor, name: str, tolerance: float = 1e-5) -> None:  # sums move with the alignment of memory
    torch.testing.assert_close(got, GOLDEN[name], atol=tolerance, rtol=0)


def test_the_diagonal_is_their_network_at_equal_times(config: PyMeanFlow) -> None:
    teacher = config.load()
    t = 1 - GOLDEN["t"].double()
    near(-teacher(GOLDEN["x"], t, None), "diagonal")
    assert (-teacher(GOLDEN["x"], 1 - t, None) - GOLDEN["diagonal"]).abs().max() > 0.01  # the twins
    assert (teacher(GOLDEN["x"], t, None) - GOLDEN["diagonal"]).abs().max() > 1
    near(euler(teacher, GOLDEN["noise"], uniform_grid(4)), "euler4")
    assert (teacher.info["weights"], teacher.info["licence"]) == ("net_ema", "CC-BY-NC-SA-4.0")
    assert (teacher.space.shape, teacher.space.classes, teacher.space.value_range) == ((3, 8, 8), None, (-1.0, 1.0))


def test_the_whole_is_a_student(config: PyMeanFlow) -> None:
    student = finished.student(config)
    s, t = 1 - GOLDEN["t"].double(), 1 - GOLDEN["r"].double()
    near(-student.mean_velocity(GOLDEN["x"], s, t), "u")
    assert (-student.mean_velocity(GOLDEN["x"], s, s) - GOLDEN["u"]).abs().max() > 0.05
    for steps in (1, 4):
        near(student.generate(GOLDEN["noise"], steps), f"sample{steps}")
    assert (student.generate(GOLDEN["noise"], 4) - GOLDEN["euler4"]).abs().max() > 0.01


def test_a_finished_student_is_exported_natively(config: PyMeanFlow, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    finished.export(config, folder)
    loaded = distill.load(folder)
    for steps in (1, 4):
        near(loaded.generate(GOLDEN["noise"], steps), f"sample{steps}")
    assert loaded.config["licence"] == "CC-BY-NC-SA-4.0"
    assert loaded.config["trained_on"] == {"steps": 0, "family": "py_meanflow", "weights": "net_ema"}
    assert loaded.sample(2).shape == (2, 3, 8, 8)


def test_what_starts_from_the_diagonal(config: PyMeanFlow, tmp_path: Path) -> None:
    teacher = config.load()
    student, learning = learner(teacher)
    assert student.gap is not None
    assert learning == {name for name, _ in student.gap.named_parameters()}  # one layer, which is the last
    derivatives_are_exact(student, teacher)
    export_keeps(student, teacher, tmp_path / "export")


def test_another_of_its_averages(config: PyMeanFlow, tmp_path: Path) -> None:
    own = weights()
    file = saved(tmp_path, own)
    other = PyMeanFlow(path=file, weights="net_ema2").load()
    assert other.info["weights"] == "net_ema2"
    conv = other.network.network.enc["8x8_conv"].weight  # type: ignore[union-attr,index]
    assert torch.equal(conv, own["enc.8x8_conv.weight"] + 3)
    torch.save(own, tmp_path / "one.pt")
    alone = PyMeanFlow(path=str(tmp_path / "one.pt")).load()
    near(-alone(GOLDEN["x"], 1 - GOLDEN["t"].double(), None), "diagonal")


def test_an_outline_reads_no_weights(config: PyMeanFlow) -> None:
    outline = config.outline()
    assert all(p.is_meta for p in outline.network.parameters())  # type: ignore[union-attr]
    assert (outline.space, outline.network_config) == (config.load().space, config.load().network_config)


def test_it_has_no_guidance(config: PyMeanFlow) -> None:
    with pytest.raises(InputError, match="never saw a null condition"):
        guided(config.load(), 2.0, (0.0, 1.0))


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda w: w.pop("map_layer1.bias"), r"\(net_ema\.\*\).*missing: map_layer1.bias"),
    "no bias": (lambda w: w.pop("map_layer0.bias"), "missing: map_layer0.bias"),
    "extra": (lambda w: w.update({"map_layer2.bias": torch.ones(1)}), "unexpected: map_layer2.bias"),
    "size": (lambda w: w.update({"map_layer1.bias": torch.ones(3)}), r"wrong size: map_layer1.bias is \(3,\)"),
    "one time": (lambda w: w.update({"map_layer0.weight": torch.ones(32, 8)}), "8 features of time.*name it edm"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    change, said = WRONG[what]
    own = weights()
    change(own)
    config = PyMeanFlow(path=saved(tmp_path, own))
    for make in (config.load, config.outline, config.two_time):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_what_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"net_ema9 is needed \(choose another with teacher.weights\)"):
        PyMeanFlow(path=saved(tmp_path), weights="net_ema9").load()
    with pytest.raises(CheckpointError, match="holds net, net_ema, net_ema1, net_ema2, num_updates, other, where"):
        PyMeanFlow(path=saved(tmp_path, **{"other.x": torch.ones(1)})).load()
    with pytest.raises(CheckpointError, match=r"has no levels enc\.NxN_"):
        EDM(path=saved(tmp_path), weights="model", preconditioning="edm").load()


def test_the_second_time_enters_where_it_is_told() -> None:
    assert SongUNetConfig().joins == "late"
    with pytest.raises(ValueError, match="joins must be late or early"):
        SongUNetConfig(joins="middle")  # type: ignore[arg-type]
