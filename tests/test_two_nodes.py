"""A whole job on two nodes of two processes each, by torchrun over gloo; and what a death on one does to the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import TINY, checkpoints
from test_many import differences
from two_nodes import Hosts, children, hosts

from distill.job import run

WAIT = 240.0  # seconds; generous, since nothing is measured


@pytest.fixture
def nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Hosts]:
    with hosts(tmp_path) as found:
        if found.why:
            with capsys.disabled():
                print(f"\ntwo nodes on loopback instead of network namespaces: {found.why}")
        yield found


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit code and output of each, which are gone afterwards with all that they have started."""
    end = time.monotonic() + seconds
    found = []
    try:
        for process in processes:
            said, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            found.append((process.returncode, said))
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return found


def test_a_job_on_two_nodes_is_the_job_on_one_process(nodes: Hosts, cwd: Path) -> None:
    small = [*TINY, "evaluation.samples=40", "evaluation.batch=10"]
    launched = nodes.launch("-m", "distill", "run", "toy/lagrangian", *small)
    alone = run("toy/lagrangian", [*small, "name=alone"])
    results = ended(launched, WAIT)
    assert [code for code, _ in results] == [0, 0], results
    assert {path.name for path in Path("runs").iterdir()} == {"alone", "toy-lagrangian"}
    together = Path("runs/toy-lagrangian")
    assert list(differences(alone, together)) == []
    assert {p.name for p in together.iterdir()} == {p.name for p in alone.iterdir()}
    measured = [json.loads((folder / "evaluation.json").read_text()) for folder in (alone, together)]
    assert measured[0]["gap"]["1"] == pytest.approx(measured[1]["gap"]["1"], rel=1e-3)


def test_a_death_on_one_node_ends_the_other(nodes: Hosts, cwd: Path) -> None:
    endless = ("trainer.steps=1000000", "trainer.checkpoint_every=5", "trainer.strategy=fsdp2")
    launched = nodes.launch("-m", "distill", "run", "toy/lagrangian", *TINY, *endless)
    try:
        end, folder = time.monotonic() + WAIT, Path("runs/toy-lagrangian/checkpoints")
        while not (folder.exists() and any(p.name.startswith("step-") for p in folder.iterdir())):
            assert time.monotonic() < end and all(process.poll() is None for process in launched)
            time.sleep(0.1)
        os.kill(children(launched[1].pid)[0], signal.SIGKILL)
    except BaseException:
        with suppress(subprocess.TimeoutExpired):
            ended(launched, 0)
        raise
    results = ended(launched, 60)
    assert all(code > 0 for code, _ in results), results
    assert "another one is gone" in results[0][1]
    assert checkpoints(folder.parent)
