"""A run that was stopped at any point continues to the weights and metrics of the unbroken one, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers import FAST, TINY, checkpoints, environment, files, logged, trained, verified

from distill.cli import main
from distill.job import resume, run
from distill.objectives.lagrangian import Lagrangian
from distill.parts import RunError
from distill.training.module import DistillModule
from distill.training.stops import Signals

WAIT = 240.0  # seconds; generous, since nothing is measured


# --- crashes within one process


class Crash(Exception):
    """The power is cut."""


@dataclass(frozen=True, kw_only=True)
class Fragile(Lagrangian):
    """The toy objective; while `crash_at` is a step, drawing it fails."""

    crash_at: ClassVar[list[int]] = []

    def draw(self, batch: Any, path: Any, generator: Any, step: int) -> Any:
        if step in self.crash_at and len(batch.x_1) == 16:  # not when the job is tried, on fewer rows
            raise Crash
        return super().draw(batch, path, generator, step)


OWN: dict[str, Any] = {"objectives": {"fragile": Fragile}}
SHORT = (*TINY, "objective={name: fragile}", "trainer.steps=8", "trainer.checkpoint_every=3")


def test_a_crash_at_any_step_changes_nothing(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("toy/lagrangian", [*SHORT, "name=whole"], **OWN)
    for step in range(7):
        monkeypatch.setattr(Fragile, "crash_at", [step])
        with pytest.raises(Crash):
            run("toy/lagrangian", [*SHORT, f"name=crash-{step}"], **OWN)
        folder = Path(f"runs/crash-{step}")
        assert [verified(path) for path in sorted(folder.glob("checkpoints/*"))] == [3, 6][: step // 3]
        monkeypatch.setattr(Fragile, "crash_at", [])
        resume(folder, **OWN)
        assert trained(folder) == trained(whole)
        assert logged(folder) == logged(whole)
        assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


WEAK = "{name: gaussian, mean: [0, 0], covariance: [[2, 0], [0, 2]]}"
ALONG = {
    "a slow target": ("toy/ctm", ()),
    "a target by stages": ("toy/pfmm", ("objective.stage_steps=2", "objective.stages=3")),
    "a further network": ("toy/freeflow", ()),
    "a learned log-variance": ("toy/lsd", ()),
    "the momentum of matrices": ("toy/freeflow", ("trainer.optimizer=muon", "trainer.weight_decay=0.1")),
    "embeddings of guidance": ("toy/lagrangian", (f"guidance={{scale: 1.5, scales: [1, 2], weak: {WEAK}}}",)),
}


@pytest.mark.parametrize("what", ALONG)
def test_what_is_trained_along_goes_on_too(what: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, overrides = ALONG[what]
    short = (*TINY, *overrides, "trainer.steps=8", "trainer.checkpoint_every=3")
    whole, step = run(recipe, [*short, "name=whole"]), DistillModule.training_step

    def fails(self: DistillModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            raise Crash
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", fails)
    with pytest.raises(Crash):
        run(recipe, [*short, "name=broken"])
    monkeypatch.setattr(DistillModule, "training_step", step)
    resume("runs/broken")
    assert trained(Path("runs/broken")) == trained(whole)
    assert logged(Path("runs/broken")) == logged(whole)


def test_crashes_may_follow_each_other(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("toy/lagrangian", [*SHORT, "name=whole"], **OWN)
    monkeypatch.setattr(Fragile, "crash_at", [4, 7])
    with pytest.raises(Crash):
        run("toy/lagrangian", [*SHORT, "name=broken"], **OWN)
    monkeypatch.setattr(Fragile, "crash_at", [7])
    for _ in range(2):
        with pytest.raises(Crash):
            resume("runs/broken", **OWN)
    monkeypatch.setattr(Fragile, "crash_at", [])
    resume("runs/broken", **OWN)
    assert trained(Path("runs/broken")) == trained(whole)
    assert logged(Path("runs/broken")) == logged(whole)


def test_resuming_a_finished_run_changes_no_result(toy: Path) -> None:
    before = files(toy)
    resume(toy)
    assert files(toy) == before


@pytest.mark.parametrize("gone", ["evaluation.json", "export", "report.html", "samples"])
def test_a_stage_that_is_missing_is_made_again(gone: str, toy: Path) -> None:
    path = toy / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if gone == "samples":  # made beside the evaluation
        (toy / "evaluation.json").unlink()
    before = files(toy / "checkpoints")
    resume(toy)
    assert path.exists()
    assert (toy / "samples" / "teacher-student.png").is_file()
    assert files(toy / "checkpoints") == before


@pytest.mark.parametrize("text", ['{"command": "x"', "[]", "{}"])
def test_a_damaged_provenance_is_to_be_restored(text: str, toy: Path) -> None:
    """Without one there is no run, so that to remove it is no remedy."""
    (toy / "provenance.json").write_text(text)
    with pytest.raises(RunError, match=r"provenance\.json: .*restore it, or start a new run"):
        resume(toy)


def test_a_program_of_several_runs_goes_on_with_its_own(
    built: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again, also where the name of one begins as another's, or several have one name."""
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    monkeypatch.setenv("SLURM_JOB_ID", "4242")

    def runs() -> list[Path]:
        return [
            run("toy/lagrangian", [*TINY, "name=sweep"]),
            run("toy/lagrangian", [*TINY, "name=sweep-long"]),
            run("toy/lagrangian", [*TINY, "name=sweep", "trainer.lr=1e-4"]),
            run("quickstart", [*FAST, f"data.path={built}", "name=digits"]),  # its streams are counted when it runs
        ]

    first = runs()
    assert [folder.name for folder in first] == ["sweep", "sweep-long", "sweep-2", "digits"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert runs() == first
    assert run("toy/lagrangian", [*TINY, "name=swe"]) == Path("runs/swe")
    assert run("toy/lagrangian", [*TINY, "name=sweep", "trainer.lr=1e-5"]) == Path("runs/sweep-3")


def test_a_command_goes_on_whatever_its_recipe_says_by_now(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be edited for the next run while this one waits to be started again."""
    monkeypatch.setattr(sys, "argv", ["/bin/distill", "run", "mine.yaml"])
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    folder = run("toy/lagrangian", TINY)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run("toy/lagrangian", [*TINY, "trainer.lr=1e-5"]) == folder


def test_leftovers_of_a_killed_writer_are_cleared(toy: Path) -> None:
    shutil.rmtree(checkpoints(toy)[-1])
    before = {p.relative_to(toy) for p in toy.rglob("*")}
    for folder in (toy, toy / "checkpoints"):
        (folder / ".export.new-123").mkdir()
        (folder / ".export.new-123" / "config.json").write_text("half")
        (folder / ".evaluation.json.new-7").write_text("half")
    resume(toy)
    assert [p.name for p in toy.rglob(".*")] == []
    assert before <= {p.relative_to(toy) for p in toy.rglob("*")}


def test_leftovers_among_the_pictures_are_cleared(toy: Path) -> None:
    (toy / "samples" / ".step-00000012.png.new-7").write_text("half")
    resume(toy)
    assert [p.name for p in toy.rglob(".*")] == []


def test_a_line_cut_short_is_written_again(toy: Path, toy_run: Path) -> None:
    shutil.rmtree(checkpoints(toy)[-1])  # of 8 and 12
    log = toy / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    resume(toy)
    assert logged(toy) == logged(toy_run)
    assert trained(toy) == trained(toy_run)


def test_the_run_may_have_moved(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkpoints(toy)[-1])
    moved = tmp_path / "elsewhere"
    shutil.move(toy, moved)
    resume(moved)
    assert trained(moved) == trained(toy_run)


# --- signals, to a real process

LONG = ("trainer.steps=200", "trainer.checkpoint_every=40", "trainer.keep=100", "tracking.log_every=1")
RUN = Path("runs/toy-lagrangian")


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """``python ARGUMENTS`` in the current folder; its output goes to the file `said`. Killed if it is left early."""
    with Path("said").open("wb") as said:
        started = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=said, env=environment())
        try:
            yield started
        finally:
            started.kill()
            started.wait()


def until(reached: Callable[[], bool], started: subprocess.Popen[bytes]) -> None:
    """Wait for what the process is to do; fails if it ends first."""
    end = time.monotonic() + WAIT
    while not reached():
        assert started.poll() is None, Path("said").read_text()
        assert time.monotonic() < end, Path("said").read_text()
        time.sleep(0.002)


def steps_logged() -> int:
    """How many lines metrics.jsonl has: with log_every=1, the step."""
    log = RUN / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `LONG` that nothing disturbs."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("unbroken"))
    try:
        return run("toy/lagrangian", [*TINY, *LONG]).resolve()
    finally:
        os.chdir(before)


def agrees(unbroken: Path) -> None:
    assert trained(RUN) == trained(unbroken)
    assert logged(RUN) == logged(unbroken)
    assert {p.name for p in RUN.iterdir()} == {p.name for p in unbroken.iterdir()}
    for name in ("ema", "student", "optimizer"):  # and every checkpoint on the way that both have
        for path in checkpoints(unbroken):
            mine = RUN / "checkpoints" / path.name / f"{name}.safetensors"
            assert mine.read_bytes() == (path / f"{name}.safetensors").read_bytes()


PACED = """
import time
from distill.__main__ import run
from distill.objectives.lagrangian import Lagrangian
from distill.parts import RunError

draw = Lagrangian.draw
def slowly(self, batch, path, generator, step):
    time.sleep(0.05 if step > 45 else 0)
    return draw(self, batch, path, generator, step)
Lagrangian.draw = slowly
run()
"""


def paced() -> Any:
    """The run of `LONG`, its later steps slow enough to be stopped among them."""
    Path("paced.py").write_text(PACED)
    return process("paced.py", "run", "toy/lagrangian", *TINY, *LONG)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_stops_after_a_checkpoint(number: signal.Signals, code: int, unbroken: Path, cwd: Path) -> None:
    with paced() as started:
        until(lambda: steps_logged() >= 50, started)
        started.send_signal(number)
        assert started.wait(WAIT) == code
    said = Path("said").read_text()
    assert f"stopped by {number.name}" in said and f"distill resume {RUN}" in said
    assert "Traceback" not in said
    last = checkpoints(RUN)[-1]
    assert verified(last) == steps_logged() < 200
    assert verified(last) >= 50
    assert not (RUN / "evaluation.json").exists()
    if number == signal.SIGTERM:
        with process("-m", "distill", "resume", str(RUN)) as started:
            assert started.wait(WAIT) == 0, Path("said").read_text()
        assert f"continuing from {last}" in Path("said").read_text()
    else:
        assert main(["resume", str(RUN)]) == 0
    agrees(unbroken)


def test_killed_while_training(unbroken: Path, cwd: Path) -> None:
    with paced() as started:
        until(lambda: steps_logged() >= 95, started)
        started.kill()
        assert started.wait(WAIT) == -signal.SIGKILL
    assert steps_logged() < 200
    assert main(["resume", str(RUN)]) == 0
    agrees(unbroken)


@pytest.mark.slow
def test_killed_while_evaluating(unbroken: Path, cwd: Path) -> None:
    slow = ("evaluation.samples=2000", "evaluation.reference_steps=200")
    with process("-m", "distill", "run", "toy/lagrangian", *TINY, *LONG, *slow) as started:
        until((RUN / "checkpoints" / "step-00000200" / "manifest.json").exists, started)
        started.kill()
        assert started.wait(WAIT) == -signal.SIGKILL
    assert not (RUN / "evaluation.json").exists()
    before = files(RUN / "checkpoints")
    assert main(["resume", str(RUN)]) == 0
    assert files(RUN / "checkpoints") == before
    agrees(unbroken)


@pytest.mark.slow
def test_killed_again_and_again(unbroken: Path, cwd: Path) -> None:
    begin = ["run", "toy/lagrangian", *TINY, *LONG]
    for step in (7, 41, 118, 119, 199):
        with process("-m", "distill", *begin) as started:
            until(lambda step=step: steps_logged() >= step or started.poll() is not None, started)
            started.kill()
            started.wait()
        begin = ["resume", str(RUN)]
    assert main(["resume", str(RUN)]) == 0
    agrees(unbroken)


GATED = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from distill.cli import main
from distill.evaluation import evaluate
from distill.objectives import OBJECTIVES
from distill.objectives.lagrangian import Lagrangian
from distill.parts import RunError

def wait(at):
    Path(f"at-{at}").touch()
    while not Path("go").exists():
        time.sleep(0.002)

@dataclass(frozen=True, kw_only=True)
class Gated(Lagrangian):
    def draw(self, batch, path, generator, step):
        if step == 5:
            wait("step")
        return super().draw(batch, path, generator, step)

OBJECTIVES["gated"] = Gated
if "evaluation" in sys.argv:
    Path("go").touch()
    import distill.stages
    measure = distill.stages.measure
    def gated(*args, **kwargs):
        Path("go").unlink()
        wait("evaluation")
        return measure(*args, **kwargs)
    distill.stages.measure = gated
sys.exit(main(sys.argv[sys.argv.index("run"):]))
"""


def gated(*arguments: str) -> Any:
    Path("gated.py").write_text(GATED)
    return process("gated.py", *arguments, "run", "toy/lagrangian", *TINY, "objective={name: gated}")


def test_the_second_signal_stops_at_once(cwd: Path) -> None:
    with gated() as started:
        until(Path("at-step").exists, started)
        started.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits for the step to end, which it never does
            started.wait(0.5)
        started.send_signal(signal.SIGINT)
        assert started.wait(WAIT) == 130
    assert [verified(path) for path in checkpoints(RUN)] == [4]


def test_the_second_signal_leaves_an_interpreter_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that somebody types into, or a notebook, has more in it than this job."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with Signals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.pending == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_within_a_step_lets_it_end(cwd: Path) -> None:
    with gated() as started:
        until(Path("at-step").exists, started)
        started.send_signal(signal.SIGTERM)
        Path("go").touch()
        assert started.wait(WAIT) == 143
    assert [verified(path) for path in checkpoints(RUN)] == [4, 6]


def test_a_signal_while_evaluating_stops_at_once(toy_run: Path, cwd: Path) -> None:
    with gated("evaluation") as started:
        until(Path("at-evaluation").exists, started)
        started.send_signal(signal.SIGTERM)
        assert started.wait(WAIT) == 143
    said = Path("said").read_text()
    assert f"distill resume {RUN}" in said and "Traceback" not in said
    assert [verified(path) for path in checkpoints(RUN)] == [8, 12]
    assert not (RUN / "evaluation.json").exists()


KILLED = """
import os, sys
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
import torch
import distill.job
from distill.training import fit

def child(work):  # what is loaded is shared, so that a job is a second
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed(n, overrides):
    calls = [0]
    replace, fsync = os.replace, os.fsync
    def counted(function):
        def call(*args):
            calls[0] += 1
            if calls[0] == n:
                os._exit(9)  # like SIGKILL: nothing is cleaned up
            return function(*args)
        return call
    os.replace, os.fsync = counted(replace), counted(fsync)
    distill.job.run("toy/lagrangian", overrides)

n, started = 1, 0
while True:
    name = f"killed-{n}"
    code = child(lambda: killed(n, [*sys.argv[1:], f"name={name}"]))
    if code == 0:
        break
    assert code == 9, code
    folder = Path("runs") / name
    if (folder / "recipe.resolved.yaml").exists():
        assert child(lambda: distill.job.resume(folder)) == 0, name
        started += 1
    n += 1
print("killed", n - 1, "resumed", started)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_write(cwd: Path) -> None:
    overrides = (*TINY, "trainer.steps=4", "trainer.checkpoint_every=2", "trainer.keep=1", "evaluation.samples=20")
    whole = run("toy/lagrangian", [*overrides, "name=whole"])
    Path("killed.py").write_text(KILLED)
    with process("killed.py", *overrides) as started:
        assert started.wait(6 * WAIT) == 0, Path("said").read_text()[-3000:]
    words = Path("said").read_text().splitlines()[-1].split()
    assert words[0] == "killed" and int(words[1]) >= 40 and int(words[3]) >= 30
    for folder in Path("runs").glob("killed-*"):
        if (folder / "recipe.resolved.yaml").exists():
            assert trained(folder) == trained(whole)
            assert logged(folder) == logged(whole)
            assert files(folder).keys() == files(whole).keys()
