"""JiT: pixels, data prediction, tokens in context, against what its own code made."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import golden
from proof import outline_reads_no_weights, what_starts_from
from torch import Tensor

from teachers.adapters.jit import JiT
from teachers.adapters.sit import SiT
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.guidance import guided, in_interval
from teachers.networks.jit import JiTConfig
from teachers.solvers import euler, heun, uniform_grid
from teachers.space import DataSpace
from teachers.velocity import Teacher

WEIGHTS, GOLDEN = golden("jit")
COND = {"class": GOLDEN["class"]}
KEPT = (1, 2, 5, 10)


def saved(folder: Path, weights: dict[str, Tensor] = WEIGHTS, **args: Any) -> str:
    """As its save_model writes it, where the second average and the raw weights are others."""
    held = {"model": {k: v - 1 for k, v in weights.items()}, "model_ema1": weights, "epoch": 3,
            "model_ema2": {k: v + 1 for k, v in weights.items()}, "args": Namespace(class_num=10, **args)}  # fmt: skip
    torch.save(held, folder / "checkpoint-last.pth")
    return str(folder / "checkpoint-last.pth")


def loaded(folder: Path, **keys: Any) -> Teacher:
    return JiT(path=saved(folder), **{"noise_scale": 1.0, "in_context_start": 1, **keys}).load()


def test_the_velocity_is_made_of_their_data(tmp_path: Path) -> None:
    """Up to where the denominator is held at 0.05."""
    teacher, t = loaded(tmp_path), GOLDEN["t"].double()
    gap = torch.tensor([0.9, 0.05]).reshape(-1, 1, 1, 1)  # of 1 - t = 0.9, 0.03
    expected = (GOLDEN["data"] - GOLDEN["x"]) / gap
    torch.testing.assert_close(teacher(GOLDEN["x"], t, COND), expected, atol=5e-5, rtol=0)
    for wrong in (teacher(GOLDEN["x"], 1 - t, COND), -teacher(GOLDEN["x"], t, COND), GOLDEN["data"]):
        assert (wrong - expected).abs().max() > 0.5
    assert (teacher.space.shape, teacher.space.classes, teacher.space.value_range) == ((3, 8, 8), 10, (-1.0, 1.0))
    assert teacher.info["weights"] == "model_ema1"


def trajectory(teacher: Teacher, grid: Tensor, solver: Callable[..., Tensor]) -> list[Tensor]:
    """Guided by 3 inside their interval, the last step Euler's."""
    under, points = guided(teacher, 3.0, tuple(teacher.info["sampler"]["interval"])), [GOLDEN["x"]]
    for k in range(len(grid) - 1):
        step = solver if k < len(grid) - 2 else euler
        points.append(step(under, points[-1], grid[k : k + 2], COND))
    return points


def test_their_sampler_is_heun_and_does_not_guide_at_the_ends(tmp_path: Path) -> None:
    """Its grid meets t = 0.1, which is outside of (0.1, 1)."""
    teacher = loaded(tmp_path)
    points = trajectory(teacher, uniform_grid(10), heun)
    torch.testing.assert_close(torch.stack([points[k] for k in KEPT]), GOLDEN["heun"], atol=2e-5, rtol=0)
    assert teacher.rule.open
    under = guided(teacher, 3.0, (0.1 - 1e-9, 1.0))
    closed = heun(under, points[1], uniform_grid(10)[1:3], COND)
    assert (closed - GOLDEN["heun"][1]).abs().max() > 0.01


def test_wide_noise_is_the_same_flow_of_unit_noise(tmp_path: Path) -> None:
    teacher, r = loaded(tmp_path, noise_scale=2.0), uniform_grid(10)
    points = trajectory(teacher, r / (r + 2 * (1 - r)), euler)
    back = [x * (r[k] + 2 * (1 - r[k])).float() for k, x in zip(KEPT, [points[k] for k in KEPT], strict=True)]
    torch.testing.assert_close(torch.stack(back), GOLDEN["wide"], atol=3e-5, rtol=0)
    assert (trajectory(loaded(tmp_path), r, euler)[-1] - GOLDEN["wide"][-1]).abs().max() > 0.05


def test_an_interval_without_its_ends() -> None:
    t = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    assert in_interval(t, None, (0.1, 1.0), open=True).tolist() == [False, False, True, False]
    assert in_interval(t, None, (0.0, 1.0), open=True).tolist() == [True, True, True, False]
    assert in_interval(t, None, (0.1, 1.0)).tolist() == [False, True, True, True]
    low = {"guidance_low": torch.tensor([0.0, 0.0, 0.5, 0.0])}
    assert in_interval(t, low, (0.1, 2.0), open=True).tolist() == [True, True, False, True]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_starts_from_it(scale: float, tmp_path: Path) -> None:
    teacher = loaded(tmp_path, noise_scale=scale)
    what_starts_from(teacher, tmp_path)


def test_the_arguments_in_the_file_answer(tmp_path: Path) -> None:
    config = JiT(path=saved(tmp_path, noise_scale=2.0, t_eps=0.1), in_context_start=1)
    convention = (config.load().network_config or {})["convention"]
    assert (convention["noise_std"], convention["floor"]) == (2.0, 0.1)
    other = JiT(path=config.path, in_context_start=1, weights="model_ema2").load()
    assert other.info["weights"] == "model_ema2"
    assert not torch.equal(next(other.network.parameters()), next(config.load().network.parameters()))  # type: ignore[union-attr]


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"checkpoint-last\.pth does not say.*2\.0 at 512") as error:
        JiT(path=saved(tmp_path), in_context_start=1).outline()
    assert set(error.value.problems) == {"noise_scale"}
    with pytest.raises(FieldError, match="which of its 3 blocks") as error:
        JiT(path=saved(tmp_path), noise_scale=1.0).outline()
    assert set(error.value.problems) == {"in_context_start"}
    with pytest.raises(FieldError, match="start must be the number of a block"):
        JiT(path=saved(tmp_path), noise_scale=1.0, in_context_start=3).outline()
    with pytest.raises(FieldError, match="noise_scale must be null or above 0"):
        JiT(path="x", noise_scale=0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("net.blocks.1.attn.k_norm.weight"), r"missing: blocks.1.attn.k_norm.weight"),
        (lambda w: w.update({"net.x": torch.ones(1)}), r"unexpected: x\b"),
        (lambda w: w.update({"net.x_embedder.proj2.bias": torch.ones(3)}), r"proj2.bias is \(3,\), expected \(64,\)"),
        (lambda w: w.pop("net.x_embedder.proj1.weight"), r"has no x_embedder.proj1.weight"),
        (lambda w: w.update({"pos_embed": torch.ones(1)}), r"two of its names mean the same"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    weights = dict(WEIGHTS)
    change(weights)
    config = JiT(path=saved(tmp_path, weights), noise_scale=1.0, in_context_start=1)
    for make in (config.load, config.outline):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_a_cut_file_and_another_family_are_told(tmp_path: Path) -> None:
    path = Path(saved(tmp_path))
    with pytest.raises(CheckpointError, match=r"is a JiT \(it has net.in_context_posemb\); set teacher.name: jit"):
        SiT(path=str(path), weights="model_ema1").outline()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"checkpoint-last\.pth: cut short"):
        JiT(path=str(path), noise_scale=1.0, in_context_start=1).outline()


def test_an_outline_reads_no_weights(tmp_path: Path) -> None:
    config = JiT(path=saved(tmp_path), noise_scale=1.0, in_context_start=1)
    outline_reads_no_weights(config)


def test_a_network_without_tokens_in_context() -> None:
    network = JiTConfig(width=32, depth=1, heads=2, hidden=8, tokens=0, start=0).build(DataSpace((3, 8, 8), 4))
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert network(x, t, {"class": torch.tensor([0, 4])}).shape == x.shape
    assert network.in_context_posemb is None
