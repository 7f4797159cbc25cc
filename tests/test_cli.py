"""The command line: every verb, what bad input is told, and what is not imported for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, data_in, environment, files, timeless, trained
from PIL import Image

import distill
from distill import recipe_files
from distill.cli import main

Said = pytest.CaptureFixture[str]


@pytest.fixture
def digits(digits_run: Path, cwd: Path) -> Path:
    """A copy of the finished digits run, as runs/quickstart."""
    return Path(shutil.copytree(digits_run, Path("runs") / digits_run.name))


# --- every verb


def test_ls(cwd: Path, capsys: Said) -> None:
    assert main(["ls"]) == 0
    said = capsys.readouterr().out
    names = recipe_files.names()
    assert len(names) >= 4
    for name in names:
        (line,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
        summary = recipe_files.read(name).values["about"]["summary"]
        assert line == f"{name:{max(map(len, names))}} {summary}"
    assert "objective lagrangian; teacher native; data shards" in said
    assert main(["ls", "--teachers"]) == 0
    said = capsys.readouterr().out
    from teachers.adapters import TEACHERS

    for name in TEACHERS:
        assert any(line.startswith(f"{name} ") for line in said.splitlines())
    assert "{name: native, path: digits}" in said and "Apache-2.0" in said


@pytest.mark.parametrize("name", recipe_files.names())
def test_validate(name: str, cwd: Path, tmp_path: Path, capsys: Said) -> None:
    assert main(["validate", name, "trainer.steps=1234", *data_in(tmp_path, name)]) == 0
    assert "valid" in (said := capsys.readouterr().out) and "1,234 steps" in said
    assert list(cwd.iterdir()) == []


def test_run_resume_evaluate_export_report(toy_run: Path, cwd: Path, capsys: Said) -> None:
    assert main(["run", "toy/lagrangian", *TINY]) == 0
    folder = Path("runs/toy-lagrangian")
    said = capsys.readouterr().out.replace("\n", " ")
    for name in ("export", "report.html", "samples", "metrics.jsonl"):
        assert str(folder / name) in said
    assert "Frechet distance" in said
    assert trained(folder) == trained(toy_run)

    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    assert main(["resume", str(folder)]) == 0
    assert trained(folder) == trained(toy_run)
    capsys.readouterr()

    before = files(folder)
    assert main(["evaluate", str(folder), "evaluation.samples=60", "evaluation.steps=[3]", "--out", "other.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "other.json"
    found = json.loads(Path("other.json").read_text())
    assert found["protocol"]["samples"] == 60 and list(found["student"]) == ["3"]
    assert files(folder) == before  # for this once

    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()

    assert main(["export", str(folder), "--out", "far/given"]) == 0
    assert capsys.readouterr().out.strip() == "far/given"
    given = distill.load("far/given")
    assert torch.equal(given.sample(3, seed=1), distill.load(toy_run / "export").sample(3, seed=1))
    assert given.config["metrics"].keys() == {"1", "2"}
    shutil.rmtree(folder / "export")
    assert main(["export", str(folder)]) == 0
    assert distill.load(folder / "export").config == given.config


def test_evaluate_again_says_the_same(toy: Path, toy_run: Path) -> None:
    (toy / "evaluation.json").unlink()
    assert main(["evaluate", str(toy)]) == 0
    assert timeless(toy / "evaluation.json") == timeless(toy_run / "evaluation.json")


def test_evaluate_an_export(digits: Path, digits_run: Path, capsys: Said) -> None:
    given = shutil.copytree(digits / "export", "given")
    shutil.rmtree("runs")
    assert main(["evaluate", str(given)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "evaluation.json"
    assert timeless(Path("evaluation.json")) == timeless(digits_run / "evaluation.json")
    before = files(Path())
    assert main(["evaluate", str(given)]) == 2
    assert "evaluation.json: exists" in capsys.readouterr().err
    assert files(Path()) == before


def test_an_export_that_was_converted_has_no_protocol(digits: Path, capsys: Said) -> None:
    file = digits / "export" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"recipe": ""}))
    assert main(["evaluate", str(digits / "export")]) == 2
    assert "carries no recipe to be measured by: it was converted" in capsys.readouterr().err


def test_sample(digits: Path, capsys: Said) -> None:
    student = distill.load(digits / "export")
    assert (
        main(["sample", str(digits), "-n", "5", "--steps", "2", "--seed", "3", "--class", "7", "--out", "a.npy"]) == 0
    )
    assert capsys.readouterr().out.strip() == "5 samples: a.npy"
    x = np.load("a.npy")
    assert x.dtype == np.float32
    assert np.array_equal(x, student.sample(5, 2, 3, {"class": 7}).numpy())
    assert main(["sample", str(digits / "export"), "-n", "5", "--out", "b.npy"]) == 0
    assert np.array_equal(np.load("b.npy"), student.sample(5).numpy())
    assert main(["sample", str(digits), "-n", "16", "--class", "0", "--out", "c.png"]) == 0
    with Image.open("c.png") as image:
        assert image.size == (512, 128)  # 2 rows of 8, each 64 pixels
        shown = np.asarray(image)[::8, ::8]
    first = student.images(student.sample(16, cond={"class": 0}))
    assert np.array_equal(shown[:8, :8], first[0, 0].numpy())
    assert np.array_equal(shown[8:, 56:], first[15, 0].numpy())


def test_sample_defaults(toy: Path) -> None:
    assert main(["sample", str(toy)]) == 0
    with Image.open("samples.png") as image:
        image.verify()


def test_report_of_several(toy: Path, digits: Path, capsys: Said) -> None:
    assert main(["report", str(toy), str(digits), "--out", "both.html"]) == 0
    assert capsys.readouterr().out.strip() == "both.html"
    text = Path("both.html").read_text()
    assert "toy-lagrangian" in text and "quickstart" in text


def test_shards(cwd: Path, capsys: Said) -> None:
    assert main(["shards", "build", "digits", "data/d", "--shard-size", "500"]) == 0
    assert capsys.readouterr().out.strip() == "data/d: 1,797 samples in 4 shards, 10 classes"
    assert main(["shards", "info", "data/d"]) == 0
    said = capsys.readouterr().out
    assert "1,797 samples in 4 shards" in said and "4 streams by default" in said and "CC-BY-4.0" in said
    assert "class: member .cls, int64 [], 10 classes" in said
    assert main(["shards", "verify", "data/d"]) == 0
    assert "all as the manifest says" in capsys.readouterr().out
    tar = Path("data/d/digits-000002.tar")
    tar.write_bytes(tar.read_bytes()[:-100])
    Path("data/d/more.tar").touch()
    assert main(["shards", "verify", "data/d"]) == 2
    said = capsys.readouterr().err
    assert f"{tar}: " in said and "more.tar: not in the manifest" in said


# --- bad input


BAD: dict[str, tuple[list[str], str]] = {
    "unknown recipe": (["run", "quickstrat"], "did you mean 'quickstart'"),
    "unknown recipe to validate": (["validate", "toy/lagrangien"], "did you mean 'toy/lagrangian'"),
    "bad override": (["run", "quickstart", "trainer.stepz=3"], "did you mean 'steps'"),
    "no override": (["run", "quickstart", "trainer"], "key.path=value"),
    "two problems": (["validate", "quickstart", "seed=x", "trainer.lr=0"], "2 problems; nothing was started"),
    "resume nowhere": (["resume", "runs/nowhere"], "not a run folder"),
    "resume an export": (["resume", "runs/quickstart/export"], "not a run folder"),
    "sample nowhere": (["sample", "nowhere"], "no such folder"),
    "sample no picture": (["sample", "runs/quickstart", "--out", "a.jpg"], "must end in .png"),
    "sample over a file": (["sample", "runs/quickstart", "--out", "there.png"], "there.png: exists"),
    "sample into a folder that is not there": (["sample", "runs/quickstart", "--out", "nowhere/a.png"], "nowhere"),
    "sample of captions that are not there": (
        ["sample", "runs/quickstart", "--cond", "no.safetensors"],
        "no.safetensors: no such file",
    ),
    "evaluate into a folder that is not there": (
        ["evaluate", "runs/quickstart", "--out", "nowhere/a.json"],
        "there is no folder nowhere",
    ),
    "no such class": (["sample", "runs/quickstart", "--class", "10"], r"must be in [0, 9], got 10"),
    "a class of points": (["sample", "runs/toy-lagrangian", "--class", "1"], "unconditional"),
    "no samples": (["sample", "runs/quickstart", "-n", "0"], "at least 1"),
    "no steps": (["sample", "runs/quickstart", "--steps", "0"], "at least 1"),
    "evaluate nowhere": (["evaluate", "runs/nowhere"], "no such folder"),
    "evaluate with a bad override": (
        ["evaluate", "runs/quickstart", "evaluation.samples=1", "--out", "a.json"],
        "must be at least 2",
    ),
    "evaluate with another protocol": (["evaluate", "runs/quickstart", "evaluation.samples=9"], "give --out FILE"),
    "evaluate another job": (["evaluate", "runs/quickstart", "seed=3"], "only keys of the section evaluation"),
    "evaluate over a file": (["evaluate", "runs/quickstart", "--out", "there.png"], "there.png: exists"),
    "export nowhere": (["export", "nowhere"], "not a run folder"),
    "export over a folder": (["export", "runs/quickstart", "--out", "runs"], "runs: exists"),
    "report nowhere": (["report", "nowhere"], "not a run"),
    "report of an export": (["report", "runs/quickstart/export"], "not a run"),
    "report of several": (["report", "runs/quickstart", "runs/toy-lagrangian"], "needs --out"),
    "report over a file": (["report", "runs/quickstart", "--out", "there.png"], "there.png: exists"),
    "report into a folder that is not there": (["report", "runs/quickstart", "--out", "nowhere/a.html"], "nowhere"),
    "build what is unknown": (["shards", "build", "mnist", "data/mnist"], "known: digits"),
    "build over a folder": (["shards", "build", "digits", "runs"], "nothing was written"),
    "build shards of nothing": (["shards", "build", "digits", "new", "--shard-size", "0"], "at least 1"),
    "build images of no size": (["shards", "build", "digits", "new", "--size", "0"], "at least 1, got 0"),
    "info on no batch": (["shards", "info", "nowhere", "--batch", "0"], "--batch must be at least 1, got 0"),
    "info on nothing": (["shards", "info", "nowhere"], "no manifest.json"),
    "verify nothing": (["shards", "verify", "nowhere"], "no manifest.json"),
}


@pytest.fixture(scope="module")
def two_runs(toy_run: Path, digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs and a file; nothing in it may change."""
    folder = tmp_path_factory.mktemp("two")
    for run in (toy_run, digits_run):
        shutil.copytree(run, folder / "runs" / run.name)
    (folder / "there.png").write_text("mine")
    return folder


def test_a_teachers_folder_is_told_to_be_a_key(cwd: Path, capsys: Said) -> None:
    Path("mine").mkdir()
    for name in ("digits", "mine"):
        assert main(["teachers", "info", name]) == 2
        assert f"distill teachers info native path={name}" in capsys.readouterr().err
    Path("quickstart").mkdir()  # hides no recipe
    assert main(["teachers", "info", "quickstart"]) == 0
    assert main(["teachers", "info", "nowhere"]) == 2
    assert "nor a shipped recipe" in capsys.readouterr().err
    assert main(["teachers", "info", "sitt", "path=nowhere.pt"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "sitt: is no family of teachers, did you mean 'sit'? (see distill ls --teachers)" in said


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_and_changes_nothing(
    what: str, two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(two_runs)
    before = {p: p.stat().st_mtime_ns for p in two_runs.rglob("*")}
    arguments, words = BAD[what]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert {p: p.stat().st_mtime_ns for p in two_runs.rglob("*")} == before


@pytest.mark.parametrize("arguments", [[], ["dance"], ["run"], ["sample", "x", "-n", "many"], ["shards"], ["ls", "x"]])
def test_what_does_not_parse_is_bad_input(arguments: list[str], untouched: Path, capsys: Said) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: distill" in capsys.readouterr().err


def test_what_is_missing_from_an_installation_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Said, cwd: Path) -> None:
    def missing(*args: Any) -> Any:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr("distill.cli._resume", missing)
    assert main(["resume", "x"]) == 1
    assert "[train]" in capsys.readouterr().err


# --- what is imported


def imported(*arguments: str) -> tuple[set[str], str, float]:
    """The modules that `distill ARGUMENTS` imports, what it prints, and its seconds."""
    code = (
        "import sys\nfrom distill.cli import main\ntry:\n    code = main(sys.argv[1:])\nexcept SystemExit as e:\n"
        "    code = e.code\nprint('MODULES', *sys.modules)\nsys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    said, _, modules = done.stdout.partition("MODULES ")
    return set(modules.split()), said, time.perf_counter() - start


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--teachers"], ["--help"], ["run", "--help"], ["--version"]])
def test_listing_and_help_do_not_import_torch(arguments: list[str], cwd: Path) -> None:
    modules, said, _ = imported(*arguments)
    assert said and "distill.cli" in modules
    assert not modules & {"torch", "numpy", "pytorch_lightning", "omegaconf", "wandb", "webdataset", "matplotlib"}


def test_validate_imports_no_trainer(cwd: Path) -> None:
    modules, said, _ = imported("validate", "quickstart")
    assert "valid" in said and "torch" in modules
    assert not modules & {
        "pytorch_lightning",
        "wandb",
        "diffusers",
        "webdataset",
        "matplotlib",
        "accelerate",
        "sklearn",
    }


@pytest.mark.parametrize("verb", ["evaluate", "export", "report"])
def test_what_comes_after_training_imports_no_trainer(verb: str, toy: Path) -> None:
    assert not imported(verb, str(toy))[0] & {"pytorch_lightning", "torchmetrics", "wandb"}


def test_importing_distill_imports_nothing(cwd: Path) -> None:
    code = "import sys, distill, teachers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "pytorch_lightning", "yaml"}


def test_it_ends_without_a_traceback_when_nobody_reads_on(cwd: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "distill", "ls"], stdout=writing, stderr=subprocess.PIPE, text=True,
                          env=environment(), check=False)  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "distill: [Errno 32] Broken pipe\n")


def test_it_runs_as_a_module(cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "distill", "--version"], capture_output=True, text=True,
                          env=environment())  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"distill {distill.__version__}\n")
    done = subprocess.run([sys.executable, "-m", "distill", "validate", "nothing"], capture_output=True, text=True,
                          env=environment())  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""


def test_the_shipped_recipes_are_those_of_the_checkout() -> None:
    assert recipe_files.RECIPES == ROOT / "recipes"
    assert files(ROOT / "recipes").keys() == {f"{name}.yaml" for name in recipe_files.names()}


def test_overrides_may_follow_an_option(cwd: Path, capsys: Said) -> None:
    assert main(["evaluate", "nothing", "--out", "e.json", "evaluation.seed=1"]) == 2
    assert "nothing: no such folder" in capsys.readouterr().err
    for stray in (["evaluate", "nothing", "--ouput=e.json"], ["resume", "nothing", "seed=1"]):
        with pytest.raises(SystemExit) as stopped:
            main(stray)
        assert stopped.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err
