"""Latents, embeddings and pairs: against the networks themselves, on many processes, after kills, as training data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import environment, files, problems, written

from distill.cli import main
from distill.data.encode import build_embeddings, build_latents
from distill.data.manifest import DataError, read_manifest
from distill.data.pairs import PairsPlan, build_pairs
from distill.data.reader import ShardReader
from distill.data.samples import verify
from distill.data.shards import Shards
from distill.data.store import LocalFolder
from distill.rows import Rows
from teachers.adapters import TEACHERS
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.solvers import euler, midpoint, uniform_grid


def samples(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from distill.data.samples import open_shard

    manifest = read_manifest(folder)
    for shard in manifest.shards:
        opened = open_shard(LocalFolder(folder), shard)
        for index in range(shard.samples):
            yield opened.key(index), opened.read(index, manifest.fields)


# --- latents


def test_latents_are_those_of_the_autoencoder(photos: Path, autoencoder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    manifest = build_latents(LocalFolder(photos), tmp_path / "l", autoencoder, flips=True, batch=7)
    network = AutoencoderKL.from_pretrained(autoencoder)
    assert manifest.autoencoder["id"] == "tiny-vae"
    assert (manifest.autoencoder["scale"], manifest.autoencoder["shift"]) == (0.5, 0.25)
    assert manifest.fields["latent"].shape == (4, 8, 8)
    assert set(manifest.fields) == {"class", "caption", "latent", "latent_std", "latent_flip", "latent_flip_std"}
    for (key, image), (same, latent) in zip(samples(photos), samples(tmp_path / "l"), strict=True):
        x = image["image"].float()[None] / 127.5 - 1
        with torch.no_grad():
            straight, mirrored = network.encode(x).latent_dist, network.encode(x.flip(-1)).latent_dist
        assert key == same and image["class"] == latent["class"] and image["caption"] == latent["caption"]
        torch.testing.assert_close(latent["latent"], straight.mean[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(latent["latent_std"], straight.std[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(latent["latent_flip"], mirrored.mean[0], atol=1e-4, rtol=1e-4)
    assert verify(LocalFolder(tmp_path / "l"), manifest) == []
    before = files(tmp_path / "l")
    build_latents(LocalFolder(photos), tmp_path / "l", autoencoder, flips=True, batch=7)
    assert files(tmp_path / "l") == before
    with pytest.raises(DataError, match=r"already holds the shards of .* \(flips true instead of false\)"):
        build_latents(LocalFolder(photos), tmp_path / "l", autoencoder, batch=7)


def test_training_sees_what_the_network_would(photos: Path, autoencoder: Path, tmp_path: Path) -> None:
    """(z - shift) scale, z = mean + std noise with the noise of (seed, step, row), mirrored by a coin."""
    build_latents(LocalFolder(photos), tmp_path / "l", autoencoder, flips=True)
    config = Shards(path=str(tmp_path / "l"), field="latent", autoencoder="tiny-vae", shape=(4, 8, 8), flip=True)
    reader, held = ShardReader(config), dict(samples(tmp_path / "l"))
    mirrored = 0
    for step, batch in enumerate(islice(reader.batches(5, 16, 0), 4)):
        rows = Rows(5, "read", step, 0, 16)
        coin, noise = rows.uniform() < 0.5, rows.normal(4, 8, 8)
        for row, key in enumerate(batch.keys):
            end = "_flip" if coin[row] else ""
            z = held[key][f"latent{end}"] + held[key][f"latent{end}_std"] * noise[row]
            torch.testing.assert_close(batch.x_1[row], (z - 0.25) * 0.5)
        mirrored += int(coin.sum())
    assert 10 < mirrored < 54
    assert reader.space.value_range is None and reader.space.classes == 2
    x, labels = reader.everything()
    torch.testing.assert_close(x[3], (held[f"{3:09d}"]["latent"] - 0.25) * 0.5)
    assert labels.tolist() == [held[f"{n:09d}"]["class"] for n in range(40)]


def test_an_old_autoencoder_has_the_scale_of_its_class(photos: Path, autoencoder: Path, tmp_path: Path) -> None:
    """As sd-vae-ft-mse, whose config.json is older than the key."""
    old = Path(shutil.copytree(autoencoder, tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("scaling_factor", "shift_factor")})
    )
    said = build_latents(LocalFolder(photos), tmp_path / "l", old).autoencoder
    assert said is not None and (said["scale"], said["shift"]) == (0.18215, 0.0)
    (old / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(DataError, match="AutoencoderKLWan shifts and scales each channel on its own"):
        build_latents(LocalFolder(photos), tmp_path / "w", old)


def test_one_sample_instead_of_mean_and_std(photos: Path, autoencoder: Path, tmp_path: Path) -> None:
    build_latents(LocalFolder(photos), tmp_path / "m", autoencoder)
    build_latents(LocalFolder(photos), tmp_path / "s", autoencoder, sample=True, seed=3)
    noise = Rows(3, "latent", 0, 0, 40).normal(4, 8, 8)
    for number, ((_, means), (_, drawn)) in enumerate(
        zip(samples(tmp_path / "m"), samples(tmp_path / "s"), strict=True)
    ):
        torch.testing.assert_close(drawn["latent"], means["latent"] + means["latent_std"] * noise[number])
    assert set(read_manifest(tmp_path / "s").fields) == {"class", "caption", "latent"}


EXPECTATIONS = {
    "no autoencoder": ({"field": "latent"}, "set data.autoencoder to tiny-vae"),
    "another autoencoder": (
        {"field": "latent", "autoencoder": "sd-vae", "shape": (4, 8, 8)},
        "latents of the autoencoder tiny-vae .*data.autoencoder says sd-vae",
    ),
    "no shape": ({"field": "latent", "autoencoder": "tiny-vae"}, r"set data.shape to \[4, 8, 8\]"),
    "another shape": (
        {"field": "latent", "autoencoder": "tiny-vae", "shape": (4, 16, 16)},
        r"latent has the shape \[4, 8, 8\], data.shape says \[4, 16, 16\]",
    ),
    "pixels": ({}, "no field 'image' .*fields: .*latent.*set data.field"),
    "no mirrors": (
        {"field": "latent", "autoencoder": "tiny-vae", "shape": (4, 8, 8), "flip": True},
        "data.flip, but only images, and latents that were made with --flips",
    ),
    "captions": ({"field": "caption"}, "the field 'caption' is no array"),
    "no such condition": ({"field": "latent_std", "cond": ("text",)}, "no field 'text'"),
}


def test_what_the_recipe_expects_is_a_validation_error(photos: Path, autoencoder: Path, tmp_path: Path) -> None:
    build_latents(LocalFolder(photos), tmp_path / "l", autoencoder)
    for keys, reason in EXPECTATIONS.values():
        with pytest.raises(DataError, match=reason):
            Shards(path=str(tmp_path / "l"), **keys).check()
    data = {"name": "shards", "path": str(tmp_path / "l"), "field": "latent"}
    recipe = {"name": "a", "objective": {"name": "flow_matching"}, "data": data, "trainer": {"steps": 1, "batch": 4},
              "student": {"init": "random", "network": {"name": "mlp"}}}  # fmt: skip
    (found,) = problems(written(tmp_path, recipe))
    assert ": data.autoencoder: " in found and "set data.autoencoder to tiny-vae" in found
    (found,) = problems(written(tmp_path, recipe), "data.autoencoder=tiny-vae", "data.shape=[4, 9, 9]")
    assert "data.shape=[4, 9, 9]': data.shape: " in found  # where the key that does not agree was written
    data |= {"autoencoder": "tiny-vae", "shape": [4, 8, 8]}
    assert problems(written(tmp_path, recipe)) == []
    with pytest.raises(DataError, match=r"data\.autoencoder is for latents and must name theirs: remove it"):
        Shards(path=str(photos), autoencoder="x").check()


def test_folders_that_are_no_autoencoder(photos: Path, encoder: Path, built: Path, tmp_path: Path) -> None:
    for folder, reason in ((tmp_path, "not the local folder of a diffusers auto"), (encoder, "no autoencoder that")):
        with pytest.raises(DataError, match=reason):
            build_latents(LocalFolder(photos), tmp_path / "l", folder)
    assert not (tmp_path / "l").exists()


KILLED = """
import sys, pathlib, time
from distill.data import encode
from distill.data.store import LocalFolder
opened = encode.open_shard
def slowly(*args):
    time.sleep(0.2)
    return opened(*args)
encode.open_shard = slowly
source, target, autoencoder = map(pathlib.Path, sys.argv[1:])
encode.build_latents(LocalFolder(source), target, autoencoder, batch=1)
"""


@pytest.mark.slow
def test_latents_killed_anywhere_go_on(photos: Path, autoencoder: Path, tmp_path: Path) -> None:
    build_latents(LocalFolder(photos), tmp_path / "whole", autoencoder, batch=1)
    target, kills = tmp_path / "l", 0
    for delay in (0.0, 0.03, 0.06, None):
        command = [sys.executable, "-c", KILLED, str(photos), str(target), str(autoencoder)]
        process = subprocess.Popen(command, env=environment())
        if delay is not None:
            while not (target / ".plan.json").exists() and process.poll() is None:
                time.sleep(0.001)
            done = len(list(target.glob("*.tar")))
            while len(list(target.glob("*.tar"))) == done and process.poll() is None and delay:
                time.sleep(0.001)
            time.sleep(delay)
            process.kill()
            kills += process.wait() == -9
        assert process.wait() in (0, -9)
    assert kills >= 2
    assert files(target) == files(tmp_path / "whole")


# --- embeddings


def test_embeddings_are_those_of_the_encoder(photos: Path, encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    manifest = build_embeddings(LocalFolder(photos), tmp_path / "e", encoder, length=6, batch=7)
    network, tokenizer = CLIPTextModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    assert {name: manifest.fields[name].shape for name in ("text", "text_mask", "pooled")} == {
        "text": (6, 8), "text_mask": (6,), "pooled": (8,)}  # fmt: skip
    for (key, source), (same, found) in zip(samples(photos), samples(tmp_path / "e"), strict=True):
        assert key == same and torch.equal(source["image"], found["image"])
        tokens = tokenizer([source["caption"]], padding="max_length", max_length=6, return_tensors="pt")
        with torch.no_grad():
            made = network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        torch.testing.assert_close(found["text"], made.last_hidden_state[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["pooled"], made.pooler_output[0], atol=1e-5, rtol=1e-5)
        assert found["text_mask"].tolist() == [True] * 4 + [False] * 2
    reader = ShardReader(Shards(path=str(tmp_path / "e"), cond=("class", "text", "text_mask", "pooled")))
    batch = next(reader.batches(0, 8, 0))
    assert batch.cond["text"].shape == (8, 6, 8) and batch.cond["text_mask"].dtype == torch.bool


def test_captions_are_needed(built: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no field 'caption' to encode"):
        build_embeddings(LocalFolder(built), tmp_path / "e", encoder)


# --- pairs

TEACHER = TEACHERS["native"](path="digits").load()


def test_pairs_are_the_solver_s(tmp_path: Path) -> None:
    plan = PairsPlan(samples=50, steps=8, points=3, seed=4, batch=20)
    manifest = build_pairs(tmp_path / "p", TEACHER, plan, shard_size=30)
    assert (manifest.source["solver"], manifest.source["nfe"], manifest.source["seed"]) == ("midpoint", 16, 4)
    x_0, cond = Rows(4, "pairs", 0, 0, 50).normal(1, 8, 8), TEACHER.space.cond_for(0, 50)
    grid = uniform_grid(8)
    with torch.no_grad():
        x_1 = midpoint(TEACHER, x_0, grid, cond)
        middle = midpoint(TEACHER, x_0, grid[:5], cond)
    for number, (_, values) in enumerate(samples(tmp_path / "p")):
        assert torch.equal(values["x_0"], x_0[number]) and values["class"] == number % 10
        torch.testing.assert_close(values["x_1"], x_1[number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values["points"][1], middle[number], atol=1e-5, rtol=1e-5)
    reader = ShardReader(Shards(path=str(tmp_path / "p"), field="x_1"))
    assert reader.space == TEACHER.space
    batch = next(reader.batches(0, 16, 0))
    held = dict(samples(tmp_path / "p"))
    assert all(torch.equal(batch.x_0[row], held[key]["x_0"]) for row, key in enumerate(batch.keys))
    assert all(torch.equal(batch.x_1[row], held[key]["x_1"]) for row, key in enumerate(batch.keys))


def test_plans_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FieldError) as error:
        PairsPlan(samples=0, solver="magic", steps=10, points=2, batch=0)
    assert set(error.value.problems) == {"samples", "solver", "points", "batch"}
    with pytest.raises(DataError, match="own needs a teacher with a generator"):
        build_pairs(tmp_path / "p", TEACHER, PairsPlan(samples=1, solver="own"))


def test_pairs_of_another_guidance_are_other_pairs(tmp_path: Path) -> None:
    plan = PairsPlan(samples=4, steps=2)
    pairs, weak = tmp_path / "p", TEACHERS["native"](path="digits").load()
    build_pairs(pairs, guided(TEACHER, 2.0, (0.0, 1.0), weak), plan)
    for scale, interval in ((3.0, (0.0, 1.0)), (2.0, (0.0, 0.5))):
        with pytest.raises(DataError, match=r"already holds the shards of 'pairs' \(teacher "):
            build_pairs(pairs, guided(TEACHER, scale, interval, weak), plan)
    build_pairs(pairs, guided(TEACHER, 2.0, (0.0, 1.0), weak), plan)
    build_pairs(tmp_path / "q", TEACHER, plan, conditioned_on="captions")
    with pytest.raises(DataError, match=r"already holds .*conditioned on \"captions\" instead of \"others\""):
        build_pairs(tmp_path / "q", TEACHER, plan, conditioned_on="others")


def test_pairs_of_many_processes_are_the_same(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["shards", "pairs", "quickstart", "data/one", "--samples", "300", "--steps", "4", "--shard-size", "70"]
    assert main(command) == 0
    assert capsys.readouterr().out == "data/one: 300 samples in 5 shards, 10 classes\n"
    command[3] = "data/two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, "-m", "distill", *command], check=True, env=environment(), capture_output=True)
    assert files(Path("data/one")) == files(Path("data/two"))


def test_a_job_learns_from_pairs(cwd: Path) -> None:
    from distill.job import run

    build_pairs(cwd / "pairs", TEACHER, PairsPlan(samples=200, steps=4, solver="euler"))
    folder = run("quickstart", ["objective={name: endpoint}", "data={name: shards, path: pairs, field: x_1}",
                                "trainer.steps=4", "trainer.batch=16", "evaluation.samples=100", "evaluation.steps=[1]",
                                "evaluation.reference_steps=4", "tracking.wandb=disabled"])  # fmt: skip
    assert (folder / "export" / "config.json").is_file()
    reader = ShardReader(Shards(path="pairs", field="x_1"))
    batch = next(reader.batches(0, 8, 0))
    with torch.no_grad():
        x_1 = euler(TEACHER, batch.x_0, uniform_grid(4), batch.cond)
    torch.testing.assert_close(batch.x_1, x_1, atol=1e-5, rtol=1e-5)
