"""The data and the unbroken runs that the faults are measured by, and the count of what was broken and what held."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from breaking import COUNT, JOB, SEED, end_all, finish, on, points, shards

_broken: Counter[str] = Counter()
_held: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def tally() -> Callable[..., None]:
    """``tally(what)`` when a fault was made, ``tally(what, held=True)`` when what must hold after it was seen to."""

    def enter(what: str, *, held: bool = False) -> None:
        (_held if held else _broken)[what] += 1

    return enter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of docs/reliability.md; FAULTS_FILE names a file for it."""
    if not _broken:
        return
    rows = ["| what was broken | times | held |", "|---|---|---|"]
    rows += [f"| {what} | {_broken[what]} | {_held[what]} |" for what in _broken]
    terminalreporter.section(f"faults, FAULTS_SEED={SEED} FAULTS_COUNT={COUNT}")
    terminalreporter.write_line("\n".join(rows))
    if "FAULTS_FILE" in os.environ:
        Path(os.environ["FAULTS_FILE"]).write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 points of the toy teacher's law in nine shards; to be read only."""
    folder = tmp_path_factory.mktemp("few")
    shards(points(90), folder)
    return folder / "shards"


@pytest.fixture(scope="session")
def job(few: Path) -> tuple[str, ...]:
    """The arguments of the job that most tests break."""
    return ("run", "toy/lagrangian", on(few), *JOB)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, job: tuple[str, ...]) -> Path:
    """That job in one process, undisturbed; to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, *job)
    return folder / "runs" / "faults"


@pytest.fixture(scope="session")
def whole_of(tmp_path_factory: pytest.TempPathFactory, job: tuple[str, ...]) -> Callable[[str], Path]:
    """That job in two processes by a strategy, undisturbed; to be read only."""

    @cache
    def run(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp(strategy)
        finish(folder, *job, f"trainer.strategy={strategy}", processes=2)
        return folder / "runs" / "faults"

    return run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to run jobs in."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder
