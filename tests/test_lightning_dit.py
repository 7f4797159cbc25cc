"""LightningDiT with each of its options, against what its own code made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import golden
from proof import outline_reads_no_weights, what_starts_from
from torch import Tensor

from teachers.adapters.lightning_dit import LightningDiT
from teachers.adapters.sit import SiT
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.networks import from_entry
from teachers.networks.embeddings import Rope
from teachers.solvers import euler, uniform_grid
from teachers.velocity import Teacher

FORMS = ("lightningdit", "lightningdit_other", "lightningdit_third")
STATS = {"mean": torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1), "std": torch.linspace(1, 2, 8).reshape(1, 8, 1, 1)}


def made(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights and tables as the file has them, inputs and outputs)."""
    weights, outputs = golden(name)
    return weights | {k: v for k, v in outputs.items() if k.startswith("feat_rope")}, outputs


def saved(folder: Path, name: str = "lightningdit", change: Callable[[dict[str, Tensor]], object] = bool) -> str:
    weights = made(name)[0]
    change(weights)
    torch.save(STATS, folder / "latents_stats.pt")
    torch.save(weights, folder / "lightningdit.pt")
    return str(folder / "lightningdit.pt")


def loaded(folder: Path, name: str = "lightningdit", **keys: Any) -> Teacher:
    return LightningDiT(path=saved(folder, name), **{"multiplier": 1.0, "heads": 4, **keys}).load()


@pytest.mark.parametrize("name", FORMS)
def test_the_velocity_is_theirs(name: str, tmp_path: Path) -> None:
    teacher, out = loaded(tmp_path, name, heads=None if name != "lightningdit_third" else 4), made(name)[1]
    cond, t = {"class": out["class"]}, out["t"].double()
    torch.testing.assert_close(teacher(out["x"], t, cond), out["v"], atol=3e-6, rtol=0)
    for wrong in (teacher(out["x"], 1 - t, cond), -teacher(out["x"], t, cond), teacher(out["x"], 1000 * t, cond)):
        assert (wrong - out["v"]).abs().max() > 0.1
    assert teacher.space.shape == (8, 4, 4)


def test_the_guided_trajectory_is_theirs_on_their_grid(tmp_path: Path) -> None:
    """250 points of a warped grid, guidance of three channels from a time on."""
    teacher, out = loaded(tmp_path), made("lightningdit")[1]
    sampler = teacher.info["sampler"]
    r = uniform_grid(8)
    grid = sampler["shift"] * r / (1 + (sampler["shift"] - 1) * r)
    cond = {"class": out["class"]}
    under = guided(teacher, sampler["guidance"], tuple(sampler["interval"]))
    x = everywhere = plain = out["x"]
    for k in range(8):
        x = euler(under, x, grid[k : k + 2], cond)
        plain = euler(teacher, plain, grid[k : k + 2], cond)
        everywhere = euler(guided(teacher, 6.7, (0.0, 1.0)), everywhere, grid[k : k + 2], cond)
        torch.testing.assert_close(x, out["trajectory"][k + 1], atol=2e-5, rtol=0)
        torch.testing.assert_close(plain, out["plain"][k + 1], atol=2e-5, rtol=0)
    assert (everywhere - out["trajectory"][-1]).abs().max() > 0.05
    assert (euler(under, out["x"], uniform_grid(8), cond) - out["trajectory"][-1]).abs().max() > 0.05
    assert teacher.rule.channels == 3


def test_tables_of_rope_are_made_as_theirs() -> None:
    out = made("lightningdit")[1]
    rope = Rope(4, 4, 16)
    torch.testing.assert_close(rope.freqs_cos, out["feat_rope.freqs_cos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(rope.freqs_sin, out["feat_rope.freqs_sin"], atol=1e-6, rtol=0)
    x = torch.randn(2, 3, 18, 16)
    assert torch.equal(rope(x)[..., :2, :], x[..., :2, :])
    assert torch.equal(rope(x)[..., 2:, :], rope(x[..., 2:, :]))


def test_the_options_are_read_from_the_tensors(tmp_path: Path) -> None:
    options = ("hidden", "rms", "rope", "qk_norm", "shift", "sigma", "heads", "patch")
    said = {name: loaded(tmp_path, name).network_config or {} for name in FORMS}
    assert [[entry[key] for key in options] for entry in said.values()] == [
        [170, True, True, False, True, False, 4, 1],
        [None, False, True, True, False, True, 4, 2],
        [170, True, False, True, False, False, 4, 2],
    ]


@pytest.mark.parametrize("name", FORMS)
def test_what_starts_from_it(name: str, tmp_path: Path) -> None:
    teacher = loaded(tmp_path, name)
    what_starts_from(teacher, tmp_path)
    entry = teacher.network_config or {}
    assert from_entry(entry).build(teacher.space).depth == 2


def test_latents_by_channel(tmp_path: Path) -> None:
    latent = loaded(tmp_path, multiplier=0.5).latent
    assert latent is not None
    raw = torch.randn(2, 8, 4, 4)
    z = latent.to_latent(raw)
    torch.testing.assert_close(z, (raw - STATS["mean"]) / STATS["std"] * 0.5)
    torch.testing.assert_close(latent.from_latent(z), raw)


def test_a_training_checkpoint_says_the_rest(tmp_path: Path) -> None:
    weights = made("lightningdit")[0]
    said = {
        "data": {"num_classes": 10, "latent_norm": True}, "vae": {"model_name": "mine"},
        "sample": {"num_sampling_steps": 50, "cfg_scale": 3.0, "timestep_shift": 0.0, "cfg_interval_start": 0.1},
    }  # fmt: skip
    raw = {k: v + 1 for k, v in weights.items()}
    torch.save({"model": raw, "ema": weights, "opt": {"state": {0: torch.ones(2)}}, "config": said}, tmp_path / "7.pt")
    (tmp_path / "other").mkdir()
    torch.save(STATS, tmp_path / "other" / "stats.pt")
    teacher = LightningDiT(path=str(tmp_path / "7.pt"), stats=str(tmp_path / "other" / "stats.pt")).load()
    assert teacher.latent is not None
    assert (teacher.latent.scale, teacher.latent.autoencoder) == (0.18215, "mine")
    assert teacher.info["weights"] == "ema"
    assert teacher.info["sampler"] == {
        "solver": "euler", "steps": 49, "shift": 0.0, "guidance": 3.0, "interval": [0.1, 1.0],
    }  # fmt: skip
    out = made("lightningdit")[1]
    got = teacher(out["x"], out["t"].double(), {"class": out["class"]})
    torch.testing.assert_close(got, out["v"], atol=3e-6, rtol=0)


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(FieldError, match=r"1\.0 in the published") as error:
        LightningDiT(path=path).outline()
    assert set(error.value.problems) == {"multiplier"}
    (tmp_path / "latents_stats.pt").unlink()
    with pytest.raises(FieldError, match=r"latents_stats\.pt") as error:
        LightningDiT(path=path).outline()
    assert set(error.value.problems) == {"stats", "multiplier"}
    torch.save({"mean": torch.ones(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, tmp_path / "latents_stats.pt")
    with pytest.raises(CheckpointError, match=r"must hold mean and std \[1, 8, 1, 1\].*mean \[1, 4, 1, 1\]"):
        LightningDiT(path=path, multiplier=1.0).outline()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("blocks.1.norm2.weight"), r"missing: blocks.1.norm2.weight"),
        (lambda w: w.update({"blocks.1.mlp.fc1.weight": torch.ones(1)}), r"unexpected: blocks.1.mlp.fc1.weight"),
        (lambda w: w.update({"feat_rope.freqs_sin": torch.ones(3, 16)}), r"freqs_sin is \(3, 16\), expected \(16, 16"),
        (lambda w: w.pop("x_embedder.proj.weight"), r"has no x_embedder.proj.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    config = LightningDiT(path=saved(tmp_path, change=change), multiplier=1.0)
    for make in (config.load, config.outline):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_a_cut_file_and_another_family_are_told(tmp_path: Path) -> None:
    path = Path(saved(tmp_path))
    with pytest.raises(CheckpointError, match=r"is a LightningDiT \(it has feat_rope.freqs_cos\).*lightningdit"):
        SiT(path=str(path)).outline()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"lightningdit\.pt: cut short"):
        LightningDiT(path=str(path), multiplier=1.0).outline()


def test_an_outline_reads_no_weights(tmp_path: Path) -> None:
    config = LightningDiT(path=saved(tmp_path), multiplier=1.0)
    outline_reads_no_weights(config)
