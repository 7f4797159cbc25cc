"""What tests run in: warnings are errors, the global generator is seeded; and the folders they share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


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
