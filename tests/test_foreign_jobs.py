"""Whole jobs from a recipe alone, with teachers in the files of other families: distil, evaluate, export, sample."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import golden, weights
from helpers import problems
from safetensors.torch import save_file
from torch import Tensor

import distill
from distill import cli, recipe
from distill.data.encode import build_embeddings, build_latents
from distill.data.shards import Shards
from distill.data.store import LocalFolder
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.pieces import Tangent
from teachers.errors import InputError
from teachers.networks.sit import SiTConfig
from teachers.space import DataSpace, Latent
from teachers.velocity import Teacher

SHORT: dict[str, Any] = {
    "trainer": {"steps": 4, "batch": 8, "lr": 1e-3, "warmup": 0, "checkpoint_every": 2, "threads": 1},
    "tracking": {"samples_every": 0, "wandb": "disabled"},
    "evaluation": {"samples": 16, "batch": 8, "steps": [1, 2], "reference_steps": 4},
}


def job(sections: Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Writes the recipe and runs it."""
    file = Path(f"{sections['name']}.yaml")
    file.write_text(yaml.safe_dump({**SHORT, **sections}))
    return distill.run(file, overrides)


@pytest.fixture(scope="session")
def latents(photos: Path, autoencoder: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of the photos with embeddings of their captions, made by the networks' own classes."""
    root = tmp_path_factory.mktemp("latents")
    vae = Path(shutil.copytree(autoencoder, root / "tiny-vae"))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))  # of unit variance
    build_latents(LocalFolder(photos), root / "latents", vae)
    build_embeddings(LocalFolder(root / "latents"), root / "text", encoder, length=12)
    return root / "text"


LATENTS = {"name": "shards", "field": "latent", "autoencoder": "tiny-vae", "shape": [4, 8, 8]}
LATENT = {"autoencoder": "tiny-vae", "scale": 1.0, "shift": 0.25}


def sit_file(folder: Path, classes: int = 2) -> Path:
    """A small SiT in the file of its train.py."""
    network = SiTConfig(width=32, depth=2, heads=2, sigma=True).build(DataSpace((4, 8, 8), classes))
    state = network.state_dict()
    made = {**state, **weights({k: v.shape for k, v in state.items() if k != "pos_embed"})}
    torch.save({"model": made, "ema": made, "opt": {}}, folder / "sit.pt")
    return folder / "sit.pt"


def sit(folder: Path, latents: Path) -> dict[str, Any]:
    teacher = {"name": "sit", "path": str(sit_file(folder)), "heads": 2, "licence": "MIT", "latent": LATENT,
               "path_type": "linear", "prediction": "velocity"}  # fmt: skip
    return {"name": "sit", "teacher": teacher, "objective": {"name": "lagrangian"},
            "data": {**LATENTS, "path": str(latents), "cond": ["class"]}}  # fmt: skip


def test_a_sit_becomes_a_student(cwd: Path, latents: Path) -> None:
    run = job(sit(cwd, latents))
    student = distill.load(run / "export")
    assert student.config["licence"] == "MIT"
    assert student.config["teacher"]["family"] == "sit" and student.config["teacher"]["weights"] == "ema"
    assert student.config["teacher"]["latent"]["scale"] == 1.0
    x = student.sample(4, steps=2, cond={"class": [0, 1, 1, 0]})
    assert x.shape == (4, 4, 8, 8) and x.isfinite().all()


def test_a_guided_sit_keeps_its_rule(cwd: Path, latents: Path) -> None:
    run = job({**sit(cwd, latents), "guidance": {"scale": 3.0}})
    assert distill.load(run / "export").config["teacher"]["guidance"]["scale"] == 3.0


def test_latents_are_scaled_as_the_teacher_was_trained(latents: Path) -> None:
    shards = Shards(path=str(latents), field="latent", autoencoder="tiny-vae", shape=(4, 8, 8))
    by_channel = Latent(autoencoder="tiny-vae", scale=2.0, mean=(1.0, 2.0, 3.0, 4.0), std=(1.0, 2.0, 4.0, 8.0))
    teacher = Teacher(velocity=lambda x, t, cond: x, space=DataSpace((4, 8, 8), 2), latent=by_channel)
    ours, theirs = (next(shards.open(given).batches(0, 8, 0)).x_1 for given in (None, teacher))
    raw = ours + 0.25
    expected = torch.stack([(raw[:, c] - by_channel.mean[c]) * 2 / by_channel.std[c] for c in range(4)], 1)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_channel.from_latent(theirs), raw, atol=1e-5, rtol=1e-5)


def test_raw_latents_stop_the_job(cwd: Path, latents: Path) -> None:
    sections = sit(cwd, latents)
    by_channel = {"autoencoder": "tiny-vae", "mean": [0.0] * 4, "std": [0.2] * 4}
    with pytest.raises(InputError, match=r"standard deviation of 5\.\d+ where this teacher has about 1"):
        job({**sections, "teacher": {**sections["teacher"], "latent": by_channel}})
    assert not Path("runs").exists()


def test_latents_of_another_autoencoder_are_refused(cwd: Path, latents: Path) -> None:
    sections = sit(cwd, latents)
    sections["teacher"] = {**sections["teacher"], "latent": {**LATENT, "scale": 0.18215}}
    Path("sit.yaml").write_text(yaml.safe_dump({**SHORT, **sections}))
    (found,) = problems("sit.yaml")
    assert "data: latents of tiny-vae are scaled by 1" in found and "0.18215" in found


def test_a_velocity_of_latents_is_given_the_latents_of_its_own_teacher(cwd: Path, latents: Path) -> None:
    """The export of a straightened teacher, as the next job's teacher: its data is checked as the first one's is."""
    sections = sit(cwd, latents)
    first = {**sections["teacher"], "latent": {**LATENT, "scale": 0.18215}}
    reflow = {"name": "reflow", "pairs": {"solver": "euler", "steps": 2}}
    run = job({**sections, "teacher": first, "objective": reflow, "data": None})
    second = {"name": "native", "path": str(run / "export")}
    Path("second.yaml").write_text(yaml.safe_dump({**SHORT, **sections, "teacher": second}))
    (found,) = problems("second.yaml")
    assert "data: latents of tiny-vae are scaled by 1" in found and "0.18215" in found


def test_a_torchcfm_u_net_becomes_a_student(cwd: Path) -> None:
    held, _ = golden("torchcfm")
    torch.save({"net_model": held, "ema_model": held, "sched": {}, "optim": {}, "step": 3}, "cfm.pt")
    teacher = {"name": "torchcfm", "path": "cfm.pt", "variant": "otcfm", "size": 8, "head_width": 8}
    save_pixels(Path("x.npy"))
    assert cli.main(["shards", "build", "x.npy", "data/x"]) == 0
    run = job({"name": "cfm", "teacher": teacher, "objective": {"name": "semigroup"},
               "data": {"name": "shards", "path": "data/x"}})  # fmt: skip
    student = distill.load(run / "export")
    x = student.sample(3)
    assert x.shape == (3, 3, 8, 8) and x.abs().max() <= 1
    assert student.images(x).dtype == torch.uint8


def save_pixels(file: Path) -> None:
    import numpy as np

    np.save(file, np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8))


def test_a_u_net_has_no_depth_to_split(cwd: Path) -> None:
    held, _ = golden("torchcfm")
    torch.save({"ema_model": held}, "cfm.pt")
    teacher = {"name": "torchcfm", "path": "cfm.pt", "variant": "otcfm", "size": 8, "head_width": 8}
    sections = {"name": "x", "teacher": teacher, "student": {"split": 1}, "objective": {"name": "lagrangian"},
                "data": {"name": "shards", "path": "data/digits", "source": "digits"}}  # fmt: skip
    Path("x.yaml").write_text(yaml.safe_dump({**SHORT, **sections}))
    assert any("student.split: is for networks made of a row of blocks" in line for line in problems("x.yaml"))


def test_a_finished_student_becomes_an_export(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held, expected = golden("meanflow")
    torch.save({"ema": held, "args": argparse.Namespace(path_type="linear", num_classes=10, cfg_omega=1.0)}, "x.pt")
    command = ["teachers", "convert", "meanflow", "out", "path=x.pt", "heads=4", "licence=MIT"]
    assert cli.main(command) == 2 and "latent" in capsys.readouterr().err and not Path("out").exists()
    assert cli.main(["teachers", "convert", "meanflow", "out", "path=y.pt"]) == 2
    assert "y.pt: no such file (in . there are: x.pt)" in capsys.readouterr().err
    command.append("latent={autoencoder: sd-vae-ft-ema, scale: 0.18125}")
    assert cli.main(command) == 0
    student = distill.load("out")
    assert student.kind == "flow_map" and student.config["licence"] == "MIT"
    x = student.generate(expected["x_0"], 1, {"class": expected["class"]})
    torch.testing.assert_close(x, expected["sample1"], atol=1e-5, rtol=0)
    capsys.readouterr()
    assert cli.main(command) == 2 and "out: exists" in capsys.readouterr().err
    assert cli.main(["teachers", "convert", "x.pt", "y.safetensors"]) == 0
    assert cli.main(["teachers", "convert", "x.pt", "y.safetensors"]) == 2
    assert cli.main(["teachers", "convert", "x.pt", "z.safetensors", "heads=4"]) == 2


# --- text


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 in the folder that its pipeline saves."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd3")
    network.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        '{"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],'
        ' "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}'
    )
    return folder


CAPTION = ["text", "pooled"]


def text_job(sd3: Path, latents: Path, **more: Any) -> dict[str, Any]:
    teacher = {"name": "diffusers", "path": str(sd3), "tokens": 12, "latent": LATENT, **more}
    return {"name": "sd3", "teacher": teacher, "objective": {"name": "lagrangian"},
            "data": {**LATENTS, "path": str(latents), "cond": CAPTION}}  # fmt: skip


def embeddings(latents: Path, count: int) -> dict[str, Tensor]:
    shards = Shards(path=str(latents), field="latent", autoencoder="tiny-vae", shape=(4, 8, 8), cond=("text", "pooled"))
    found = shards.open(None).cond_for(0, count)
    assert found is not None
    return dict(found)


def test_a_folder_of_stable_diffusion_3_becomes_a_student(cwd: Path, latents: Path, sd3: Path) -> None:
    run = job(text_job(sd3, latents))
    student = distill.load(run / "export")
    cond = embeddings(latents, 3)
    x = student.sample(3, steps=2, cond=cond)
    assert x.shape == (3, 4, 8, 8)
    again = student.sample(3, steps=2, cond={**cond, "text": cond["text"].roll(1, 0)})
    assert not torch.equal(x, again)
    one = student.sample(2, cond={name: value[0] for name, value in cond.items()})  # one caption for all
    torch.testing.assert_close(one[:1], student.sample(1, cond={n: v[:1] for n, v in cond.items()}))
    for wrong, said in (
        (None, "conditioned on pooled, text: pass them"),
        ({"text": cond["text"]}, "cond must have the keys 'pooled', 'text' alone, got text"),
        ({**cond, "text": cond["text"][:, :5]}, r"cond\['text'\] must be \[12, 8\], or \[3, 12, 8\], got \[3, 5, 8\]"),
    ):
        with pytest.raises(ValueError, match=said):
            student.sample(3, cond=wrong)


def test_samples_of_captions_from_the_command_line(cwd: Path, latents: Path, sd3: Path) -> None:
    run = job(text_job(sd3, latents))
    save_file(embeddings(latents, 4), "captions.safetensors")
    assert cli.main(["sample", str(run), "-n", "4", "--cond", "captions.safetensors", "--out", "x.npy"]) == 0
    assert cli.main(["sample", str(run), "-n", "4", "--out", "y.npy"]) == 2
    assert cli.main(["sample", str(run), "-n", "3", "--cond", "captions.safetensors", "--out", "y.npy"]) == 2


def test_a_guided_job_needs_the_empty_prompt(cwd: Path, latents: Path, sd3: Path) -> None:
    sections = {**text_job(sd3, latents), "guidance": {"scale": 4.0}}
    Path("sd3.yaml").write_text(yaml.safe_dump({**SHORT, **sections}))
    (found,) = problems("sd3.yaml")
    assert "guidance: teacher" in found and "null" in found
    save_file({name: value[0].clone() for name, value in embeddings(latents, 1).items()}, "empty.safetensors")
    run = job({**text_job(sd3, latents, null="empty.safetensors"), "guidance": {"scale": 4.0}})
    assert distill.load(run / "export").config["teacher"]["guidance"]["scale"] == 4.0


def test_pairs_of_captions(cwd: Path, latents: Path, sd3: Path) -> None:
    Path("sd3.yaml").write_text(yaml.safe_dump({**SHORT, **text_job(sd3, latents)}))
    assert cli.main(["shards", "pairs", "sd3.yaml", "data/pairs", "--samples", "12", "--steps", "2"]) == 0
    reader = Shards(path="data/pairs", field="x_1", cond=("text", "pooled")).open(None)
    batch = next(reader.batches(0, 4, 0))
    assert batch.cond is not None and batch.cond["text"].shape == (4, 12, 8) and batch.x_0 is not None
    run = job({**text_job(sd3, latents), "name": "endpoint", "objective": {"name": "endpoint"},
               "data": {"name": "shards", "path": "data/pairs", "field": "x_1", "cond": CAPTION}})  # fmt: skip
    assert distill.load(run / "export").kind == "grid"


def test_conditioning_that_is_not_the_teachers_is_refused_with_the_key(cwd: Path, latents: Path, sd3: Path) -> None:
    sections = text_job(sd3, latents)
    del sections["data"]["cond"]
    Path("sd3.yaml").write_text(yaml.safe_dump({**SHORT, **sections}))
    (found,) = problems("sd3.yaml")
    assert "data.cond: [pooled, text]" in found
    del sections["data"]
    Path("sd3.yaml").write_text(yaml.safe_dump({**SHORT, **sections, "objective": {"name": "data_free"}}))
    (found,) = problems("sd3.yaml")
    assert "data: is missing" in found and "embeddings" in found


# --- networks that turn fast


def test_the_tangent_of_a_fast_network_is_tamed_unless_the_recipe_says_otherwise(
    cwd: Path, latents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {**sit(cwd, latents), "objective": {"name": "mean_flow", "source": "teacher"}}
    slow, fast = {**SHORT, **sections}, {**SHORT, **sections}
    fast["teacher"] = {k: v for k, v in sections["teacher"].items() if k not in ("path_type", "prediction")}
    fast["teacher"]["name"] = "dit"
    Path("slow.yaml").write_text(yaml.safe_dump(slow))
    Path("fast.yaml").write_text(yaml.safe_dump(fast))

    def tangent(file: str, *overrides: str) -> Tangent:
        objective = recipe.load(file, overrides).objective
        assert isinstance(objective, MeanFlow)
        return objective.tangent

    assert tangent("slow.yaml") == Tangent()
    assert tangent("fast.yaml") == Tangent(normalise=True, warmup=1000)
    assert tangent("fast.yaml", "objective.tangent={normalise: false}") == Tangent()
    assert cli.main(["validate", "fast.yaml"]) == 0
    assert "1000 radians a unit time, so the tangent of this objective is normalised" in capsys.readouterr().err
