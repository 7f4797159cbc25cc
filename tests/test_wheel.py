"""The wheel: what a user gets, without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_it_holds_what_is_needed_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name: info.file_size for name, info in zip(archive.namelist(), archive.infolist(), strict=True)}
        (metadata,) = [n for n in found if n.endswith("METADATA")]
        about = archive.read(metadata).decode()
        entry = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    for package in ("distill", "teachers"):
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*")
                if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
        assert {f"{package}/__init__.py", f"{package}/py.typed"} < ours
        assert ours <= found.keys()
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        assert f"distill/{recipe.relative_to(ROOT).as_posix()}" in found
    for name in ("digits", "fashion"):
        for file in ("config.json", "model.safetensors", "LICENSE.md", "features/config.json",
                     "features/model.safetensors"):  # fmt: skip
            shipped = f"teachers/weights/{name}/{file}"
            assert found[shipped] == (ROOT / shipped).stat().st_size
    tops = {name.split("/")[0] for name in found}
    assert tops == {"distill", "teachers", metadata.split("/")[0]}
    assert not [n for n in found if "test" in n or "__pycache__" in n or "/runs/" in n or "/data/digits" in n]
    assert sum(found.values()) < 20_000_000
    assert "distill = distill.__main__:run" in entry
    assert "Name: flow-distill" in about and "License-Expression: Apache-2.0" in about
    assert any(n.endswith("licenses/LICENSE") for n in found)
    required = [line for line in about.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split()[1].partition(">")[0] for line in required] == ["numpy", "safetensors", "torch"]


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command with the installed files alone: not the checkout, nor an editable install of it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_installed_it_works_from_anywhere(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import distill, teachers; print(distill.__file__, teachers.__file__)")
    assert all(Path(word).is_relative_to(installed) for word in where.stdout.split()) and where.stdout.split()
    listed = run(installed, tmp_path, "-m", "distill", "ls")
    assert listed.returncode == 0, listed.stderr
    assert {p.relative_to(ROOT / "recipes").with_suffix("").as_posix() for p in (ROOT / "recipes").rglob("*.yaml")} <= {
        line.split()[0] for line in listed.stdout.splitlines() if line.strip()
    }
    teachers = run(installed, tmp_path, "-m", "distill", "ls", "--teachers")
    assert "path: digits" in teachers.stdout
    valid = run(installed, tmp_path, "-m", "distill", "validate", "quickstart")
    assert valid.returncode == 0 and "valid" in valid.stdout, valid.stderr
    assert list(tmp_path.iterdir()) == []


def test_installed_it_runs_a_job(installed: Path, tmp_path: Path) -> None:
    quick = ("trainer.steps=3", "evaluation.samples=50", "evaluation.reference_steps=3", "tracking.wandb=disabled")
    done = run(installed, tmp_path, "-m", "distill", "run", "quickstart", *quick)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    assert (tmp_path / "data" / "digits" / "manifest.json").is_file()
