"""What tests run in: warnings are errors, the global generator is seeded; and the folders they share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from helpers import FAST, TINY


def pytest_configure(config: pytest.Config) -> None:
    # torch 2.13 scripts its own decompositions on the first forward-mode derivative
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards; to be read only."""
    from distill.data.build import build

    folder = tmp_path_factory.mktemp("data") / "digits"
    build("digits", folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "digits"))


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test runs in an empty folder, where recipes would put data and runs, and nothing may be written to it.

    Yields the folder beside it, which is free to use.
    """
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield tmp_path
    assert list(empty.iterdir()) == []


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in this empty folder, where recipes put data and runs."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _job(folder: Path, recipe: str, *overrides: str) -> Path:
    from distill.job import run

    with chdir(folder):
        return folder / run(recipe, overrides)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of toy/lagrangian with `TINY`; to be read only."""
    return _job(tmp_path_factory.mktemp("toy"), "toy/lagrangian", *TINY)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:
    """A finished run of the quickstart with `FAST` and pictures; to be read only."""
    overrides = (*FAST, "tracking.samples_every=8", f"data.path={built}")
    return _job(tmp_path_factory.mktemp("digits-run"), "quickstart", *overrides)


@pytest.fixture(scope="session")
def velocity_run(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:
    """A finished run of teachers/digits, a small network trained from data alone; to be read only."""
    network = "student.network={name: mlp, width: 16, depth: 1}"
    overrides = (*FAST, network, f"data.path={built}", "evaluation.features=digits")
    return _job(tmp_path_factory.mktemp("velocity"), "teachers/digits", *overrides)


@pytest.fixture
def toy(toy_run: Path, cwd: Path) -> Path:
    """A copy of the finished toy run, as runs/toy-lagrangian in the test's own folder, that may be changed."""
    return Path(shutil.copytree(toy_run, Path("runs") / toy_run.name))
