"""Jobs in real processes that can be killed, and what must be equal at the end.

A process is forked from one that has loaded everything, so that a job starts in a moment; it then runs the command
line as if it had been typed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from helpers import checkpoints, files
from safetensors.torch import load_file

SEED = int(os.environ.get("FAULTS_SEED", "0"))
"""Of all moments and places."""
COUNT = int(os.environ.get("FAULTS_COUNT", "50"))
"""Runs that are stopped at random moments."""
WAIT = 240.0  # seconds; generous, since nothing is measured
END = 240.0  # seconds in which a launch must end after its trainer.timeout; on idle cores it takes few
RUN = Path("runs/faults")

JOB = (
    "name=faults", "student.network={name: mlp, width: 16, depth: 1}", "trainer.steps=30", "trainer.batch=24",
    "trainer.accumulate=3", "trainer.checkpoint_every=6", "trainer.warmup=4", "trainer.ema=0.99",
    "evaluation.samples=100", "evaluation.steps=[1]", "evaluation.reference_steps=4", "tracking.log_every=1",
    "tracking.samples_every=20", "tracking.wandb=disabled",
)  # fmt: skip
"""A toy job on the 90 points of `few`: an epoch is 3.75 steps, a step three parts."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["distill.cli", "distill.job", "distill.training.fit", "wandb", "helpers"])


def points(count: int) -> np.ndarray[Any, Any]:
    """``[count, 2]`` of the law of toy/lagrangian's teacher."""
    random = np.random.default_rng(SEED)
    return (random.choice([-1.5, 0.0, 1.5], (count, 2)) + 0.25 * random.normal(size=(count, 2))).astype(np.float32)


def shards(x: np.ndarray[Any, Any], folder: Path) -> None:
    """Shards of ten samples each in folder/shards."""
    from distill.data.build import build

    np.save(folder / "points.npy", x)
    build(str(folder / "points.npy"), folder / "shards", 10)


def on(path: Path) -> str:
    """The override for a job on shards."""
    return f"data={{name: shards, path: {path}, field: x}}"


_started: list[Child] = []


def end_all() -> None:
    """End what tests have left running."""
    for child in _started:
        if child.running():
            child.kill()
    _started.clear()


class Child:
    """``distill ARGUMENTS`` in `folder`, in a process of its own; what it says goes to the file `said`.

    plant: called there first, to break something from within. What still runs when a test is over is killed.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        plant: Callable[[], None] | None = None,
        said: str = "said",
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the one that is forked from
        self._said = folder / said
        self._said.write_text("")
        typed = _context.Event()
        self.process: ForkServerProcess = _context.Process(
            target=_work, args=(typed, arguments, folder, dict(env or {}), plant, said)
        )
        self.process.start()
        _started.append(self)
        assert typed.wait(WAIT)

    def said(self) -> str:
        """All output so far, its lines joined."""
        return " ".join(self._said.read_text(encoding="utf-8").split())

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.exitcode is None

    def send(self, number: int) -> bool:
        """Send a signal; False if it had ended before."""
        if not self.running():
            return False
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return True

    def code(self, wait: float = WAIT) -> int:
        """Its exit code, minus the signal that killed it. Fails if it does not end."""
        self.process.join(wait)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"did not end in {wait:.0f} s:\n{self._said.read_text()[-3000:]}")
        return code

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.send(signal.SIGCONT)
        self.process.kill()
        self.process.join(WAIT)


def _work(
    typed: Any, arguments: tuple[str, ...], folder: Path, env: Mapping[str, str], plant: Callable[[], None] | None,
    said: str,
) -> None:  # fmt: skip
    multiprocessing.set_start_method(None, force=True)  # of processes that read data: not what started this one
    os.chdir(folder)
    os.environ.update(env)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["distill", *arguments]
    if plant is not None:
        plant()
    from distill.cli import main

    typed.set()
    sys.exit(main(arguments))


def launch(
    folder: Path, n: int, *arguments: str, plant: Callable[[], None] | None = None, env: Mapping[str, str] | None = None
) -> list[Child]:
    """A job in n processes with torchrun's variables, as srun would start them: nobody watches over them. Each says
    its own in ``said-<rank>``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, **(env or {})}  # fmt: skip
    return [
        Child(folder, *arguments, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, plant=plant,
              said=f"said-{rank}")
        for rank in range(n)
    ]  # fmt: skip


def unhurried() -> None:
    """Plant: a step takes a while, so that what is done to it in training does not come after."""
    from distill.training.callbacks import StopWhenAsked

    after_step = StopWhenAsked.after_step

    def later(*args: Any) -> None:
        time.sleep(0.05)
        after_step(*args)
        time.sleep(0.05)

    StopWhenAsked.after_step = later  # type: ignore[method-assign]


def finish(folder: Path, *arguments: str, processes: int = 0, plant: Callable[[], None] | None = None) -> str:
    """Run a command to its end, which must be good; returns what it said. processes: 0 for one on its own."""
    started = (
        launch(folder, processes, *arguments, plant=plant) if processes else [Child(folder, *arguments, plant=plant)]
    )
    codes = ended(started)
    said = " ".join(child.said() for child in started)
    assert codes == [0] * len(started), f"{codes}: {said[-3000:]}"
    return said


def ended(started: list[Child], wait: float = WAIT) -> list[int]:
    """The exit codes of all of them."""
    try:
        return [child.code(wait) for child in started]
    finally:
        for child in started:
            if child.running():
                child.kill()


def at_once(one: Callable[[int], None], numbers: Iterable[int]) -> list[BaseException | None]:
    """What ``one(number)`` raises, two of them side by side."""

    def caught(number: int) -> BaseException | None:
        try:
            one(number)
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(caught, numbers))


def until(reached: Callable[[], bool], *started: Child) -> None:
    """Wait for something; fails if the processes end first, or if it takes too long."""
    end = time.monotonic() + WAIT
    while not reached():
        if not any(child.running() for child in started):
            assert reached(), "\n".join(child.said()[-2000:] for child in started)
            return
        assert time.monotonic() < end, "\n".join(child.said()[-2000:] for child in started)
        time.sleep(0.002)


def step_of(run: Path) -> int:
    """The last step of which metrics.jsonl has a whole line."""
    log = run / "metrics.jsonl"
    whole = log.read_bytes().rpartition(b"\n")[0] if log.exists() else b""
    return int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else 0


# --- what must be equal


def end_of(run: Path) -> dict[str, Any]:
    """All that a finished run has that does not depend on the clock: weights, metrics, numbers, pictures, files."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in log:
        for timing in ("images_per_second", "waiting_for_data"):
            row.pop(timing, None)
    content = files(run)
    return {
        # a stop adds a checkpoint of its own, so that others than the last may lie at other steps
        "files": sorted(name for name in content if not name.startswith(("wandb/", "checkpoints/"))),
        "checkpoints": [len(checkpoints(run)), checkpoints(run)[-1].name],
        "weights": _tensors(checkpoints(run)[-1]),
        "metrics": log,
        "numbers": _timeless(content["evaluation.json"]),
        **{name: content[name] for name in content if name.endswith(".png") or name == "export/model.safetensors"},
    }


def _tensors(checkpoint: Path) -> dict[str, bytes]:
    return {f"{file.name}/{name}": tensor.numpy().tobytes() for file in sorted(checkpoint.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


def _timeless(evaluation: bytes) -> str:
    return re.sub(rb'"(seconds_per_sample|speedup)": (\{[^}]*\}|[\d.e+-]+)', b"", evaluation).decode()


def same(run: Path, whole: Path) -> None:
    """`run` has ended as `whole` did, bit for bit, and nothing half-written is left in it."""
    mine, theirs = end_of(run), end_of(whole)
    for word, value in theirs.items():
        if mine[word] != value:
            raise AssertionError(f"{run}: {word} differs: {_first_difference(mine[word], value)}")
    assert mine.keys() == theirs.keys()
    assert not hidden(run)


def _first_difference(mine: Any, theirs: Any) -> str:
    if isinstance(theirs, list):
        found = next((pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), None)
        return f"{found}, {len(mine)} and {len(theirs)}: {set(map(str, mine)) ^ set(map(str, theirs))}"[:2000]
    if isinstance(theirs, dict):
        return str([name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)][:5])
    return f"{mine!r:.300} {theirs!r:.300}"


def hidden(run: Path) -> list[str]:
    """What unfinished writes have left."""
    return [str(path.relative_to(run)) for path in run.rglob(".*") if "wandb" not in path.parts]
