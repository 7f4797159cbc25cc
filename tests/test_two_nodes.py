"""A whole job on two nodes of two processes each, by torchrun over gloo; and what a death on one does to the other."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FAST, ROOT, TINY, checkpoints
from test_many import differences
from two_nodes import Hosts, end, hosts, workers

from distill.job import run

WAIT = 240.0  # seconds; generous, since nothing is measured


@pytest.fixture
def nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Hosts]:
    with hosts(tmp_path) as found:
        if found.why:
            with capsys.disabled():
                print(f"\ntwo nodes on loopback instead of network namespaces: {found.why}")
        yield found


def ended(launched: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit code and output of each, within the time."""
    last = time.monotonic() + seconds
    said = [process.communicate(timeout=max(last - time.monotonic(), 0.1))[0] for process in launched]
    return [(process.returncode, text) for process, text in zip(launched, said, strict=True)]


def test_a_job_on_two_nodes_is_the_job_on_one_process(nodes: Hosts, cwd: Path) -> None:
    small = [*TINY, "evaluation.samples=40", "evaluation.batch=10"]
    alone = run("toy/lagrangian", [*small, "name=alone"])
    launched = nodes.launch("-m", "distill", "run", "toy/lagrangian", *small)
    try:
        results = ended(launched, WAIT)
    finally:
        end(launched)
    assert [code for code, _ in results] == [0, 0], results
    assert {path.name for path in Path("runs").iterdir()} == {"alone", "toy-lagrangian"}
    together = Path("runs/toy-lagrangian")
    assert list(differences(alone, together)) == []
    assert {p.name for p in together.iterdir()} == {p.name for p in alone.iterdir()}
    measured = [json.loads((folder / "evaluation.json").read_text()) for folder in (alone, together)]
    assert measured[0]["gap"]["1"]["fd"] == pytest.approx(measured[1]["gap"]["1"]["fd"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["README.md", "docs/many.md"])
def test_the_command_that_is_told(file: str, nodes: Hosts, cwd: Path) -> None:
    """As it stands there, on fewer steps."""
    told = re.findall(r"^torchrun ((?:.*\\\n)*.*distill run quickstart)$", (ROOT / file).read_text(), re.MULTILINE)
    commands = [shlex.split(told[n].replace("\\\n", " ")) for n in (0, -1)]
    commands[1][commands[1].index("--node-rank") + 1] = "1"
    first = nodes.endpoint.partition(":")[0]  # host0, but on loopback
    launched = nodes.torchrun([[*(first if word == "host0" else word for word in words), *FAST] for words in commands])
    try:
        results = ended(launched, WAIT)
    finally:
        end(launched)
    assert [code for code, _ in results] == [0, 0], results
    assert {path.name for path in Path("runs").iterdir()} == {"quickstart"}
    assert json.loads(Path("runs/quickstart/evaluation.json").read_text())["step"] == 12


@pytest.mark.slow
def test_a_death_on_one_node_ends_the_other(nodes: Hosts, cwd: Path) -> None:
    endless = ("trainer.steps=1000000", "trainer.checkpoint_every=5", "trainer.strategy=fsdp2")
    launched = nodes.launch("-m", "distill", "run", "toy/lagrangian", *TINY, *endless)
    last, folder = time.monotonic() + WAIT, Path("runs/toy-lagrangian/checkpoints")
    try:
        while not (folder.exists() and any(p.name.startswith("step-") for p in folder.iterdir())):
            assert time.monotonic() < last and all(process.poll() is None for process in launched)
            time.sleep(0.1)
        os.kill(workers(launched[1])[0], signal.SIGKILL)
        results = ended(launched, WAIT)
    finally:
        end(launched)
    assert all(code > 0 for code, _ in results), results
    assert "another one is gone" in results[0][1]
    assert checkpoints(folder.parent)
