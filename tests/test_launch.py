"""How processes are started: real processes, real signals; SLURM's programs are stand-ins on PATH."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TINY, checkpoints, environment, logged, verified

from distill import launch
from distill.parallel import noticing
from distill.slurm import _first_host, from_slurm, requeue, slurm_script
from distill.training.stops import Signals, Stopped
from teachers.errors import InputError

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from distill.launch import leave, take_place
from distill.slurm import requeue
take_place()
from distill.training.stops import Signals

what, rank = sys.argv[1], int(os.environ["RANK"])
if what == "end":  # as a job that is done, or fails on all processes alike
    sys.exit(int(sys.argv[2]))
if what == "deaf":  # as one that hangs in a library
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Path(f"ready-{rank}").write_text(str(os.getpid()))
    if rank == 1 and len(sys.argv) > 2:
        sys.exit(int(sys.argv[2]))
    time.sleep(600)

import torch
import torch.distributed as dist

with Signals() as signals, signals.deferred():  # as training does: reduce, step, look whether to stop
    dist.init_process_group("gloo")
    while True:
        asked = torch.tensor([signals.pending or 0, rank])
        try:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        except RuntimeError:
            os._exit(1)
        place = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "LOCAL_RANK", "WORLD_SIZE")}
        ready = Path(f"ready-{rank}")
        if not ready.exists():
            ready.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "highest": asked[1].item(), **place}))
            ready.with_suffix(".new").rename(ready)
            if what == "once":
                dist.destroy_process_group()
                sys.exit(0)
        if asked[0]:
            break
        time.sleep(0.02)
    if rank == 0:  # the others have written less
        time.sleep(float(sys.argv[2]))
        if asked[0] == signal.SIGUSR1:
            requeue()
    Path(f"saved-{rank}").touch()
    if what == "together":  # srun ends the others with the first
        dist.barrier()
    leave(128 + int(asked[0]))
"""
START = "import sys; from distill.launch import start; sys.exit(start(int(sys.argv[1]), sys.argv[2:]))"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def started(cwd: Path) -> Iterator[Start]:
    """Starts processes in the test's folder that are gone after the test."""
    (cwd / "worker.py").write_text(WORKER)
    processes: list[subprocess.Popen[str]] = []

    def begin(*command: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True} | options
        processes.append(subprocess.Popen(command, text=True, env=env or environment(), **options))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
    for file in cwd.glob("ready-*"):  # what is left of these holds the pipes
        with suppress(ProcessLookupError):
            os.kill(pid_in(file), signal.SIGKILL)
    for process in processes:
        process.communicate()


def job(started: Start, *arguments: str, n: int = 2, **options: Any) -> subprocess.Popen[str]:
    return started(sys.executable, "-c", START, str(n), sys.executable, "worker.py", *arguments, **options)


def pid_in(file: Path) -> int:
    said = json.loads(file.read_text())
    return int(said if isinstance(said, int) else said["pid"])


def ready(n: int = 2) -> list[int]:
    """The processes, by rank, when all of them are at work."""
    files = [Path(f"ready-{rank}") for rank in range(n)]
    within(120, lambda: all(file.exists() and file.read_text() for file in files))
    return [pid_in(file) for file in files]


def within(seconds: float, true: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what stands on stderr."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def saved() -> set[str]:
    return {file.name for file in Path().glob("saved-*")}


# --- on this host


@pytest.mark.parametrize("threads", [None, "3"])
def test_processes_find_each_other_and_keep_torchruns_threads(started: Start, threads: str | None) -> None:
    env = environment(OMP_NUM_THREADS=threads or "")
    if threads is None:
        del env["OMP_NUM_THREADS"]
    assert ends(job(started, "once", n=3, env=env)) == (0, "")
    for rank in range(3):
        place = json.loads(Path(f"ready-{rank}").read_text())
        del place["pid"]
        expected = {"highest": 2, "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": threads or "1"}
        assert place == expected


@pytest.mark.parametrize("number", launch.SIGNALS, ids=lambda number: number.name)
def test_a_signal_reaches_each_process_once_and_the_slowest_is_waited_for(
    started: Start, number: signal.Signals
) -> None:
    process = job(started, "train", "4")  # the first is gone for seconds when the other has written
    ready()
    process.send_signal(number)
    assert ends(process) == (128 + number, "")
    assert saved() == {"saved-0", "saved-1"}  # the second signal would have ended a process before


def test_a_signal_to_one_process_stops_all(started: Start) -> None:
    process = job(started, "train", "2")
    os.kill(ready()[1], signal.SIGTERM)
    assert ends(process) == (143, "")
    assert saved() == {"saved-0", "saved-1"}


def test_control_c_in_a_terminal_is_one_signal(started: Start) -> None:
    ours, theirs = pty.openpty()
    take = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"  # fmt: skip  # noqa: E501
    command = [sys.executable, "-c", START, "2", sys.executable, "worker.py", "train", "2"]
    process = started(sys.executable, "-c", take, *command, stdin=theirs, start_new_session=False)
    ready()
    os.write(ours, b"\x03")
    assert ends(process) == (130, "")
    assert saved() == {"saved-0", "saved-1"}
    os.close(ours)
    os.close(theirs)


def test_the_second_signal_stops_at_once_whatever_the_processes_do(started: Start) -> None:
    process = job(started, "deaf")
    pids = ready()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ends(process) == (130, "")
    assert all(map(gone, pids))


def test_processes_do_not_outlive_the_one_that_started_them(started: Start) -> None:
    process = job(started, "deaf")
    pids = ready()
    process.kill()
    within(60, lambda: all(map(gone, pids)))


def test_a_process_started_by_one_that_is_gone_ends(started: Start) -> None:
    env = environment(RANK="0", DISTILL_LAUNCHER="1")
    assert ends(started(sys.executable, "worker.py", "end", "0", env=env)) == (-signal.SIGKILL, "")


def test_what_a_process_starts_is_its_own(started: Start, cwd: Path) -> None:
    (cwd / "parent.py").write_text(
        "import subprocess, sys\nfrom distill.launch import take_place\ntake_place()\n"
        "sys.exit(subprocess.run([sys.executable, 'worker.py', 'end', '0']).returncode)"
    )
    assert ends(started(sys.executable, "-c", START, "1", sys.executable, "parent.py")) == (0, "")


def test_a_process_that_dies_ends_the_others(started: Start) -> None:
    process = job(started, "train", "0")
    pids = ready()
    os.kill(pids[1], signal.SIGKILL)
    code, said = ends(process)
    assert code == 1
    assert said == "distill: process 1 of 2 was killed by SIGKILL (out of memory?); the others were stopped\n"
    assert all(map(gone, pids))


def test_those_that_do_not_notice_are_ended_too(started: Start) -> None:
    process = job(started, "deaf", "2")
    assert ends(process) == (2, "distill: process 1 of 2 ended with exit code 2; the others were stopped\n")
    assert all(map(gone, ready()))


@pytest.mark.parametrize("code", [0, 1, 2, 78])
def test_the_exit_code_is_the_jobs(started: Start, code: int) -> None:
    assert ends(job(started, "end", str(code))) == (code, "")


def test_a_signal_before_a_process_listens_is_a_stop(started: Start, cwd: Path) -> None:
    (cwd / "worker.py").write_text(
        "import os, time; open(f'ready-{os.environ[\"RANK\"]}', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    process = job(started)
    ready()
    process.send_signal(signal.SIGTERM)
    assert ends(process) == (143, "")


def test_the_first_failure_counts_and_not_what_followed() -> None:
    assert launch._exit_code({1: 78, 0: 143}, [], 2, cut=False) == 78
    assert launch._exit_code({1: 143, 0: 1}, [15], 2, cut=False) == 1
    assert launch._exit_code({2: 0, 1: 2, 0: 1}, [], 3, cut=False) == 2


def test_a_killed_process_comes_before_those_that_noticed_it(capfd: pytest.CaptureFixture[str]) -> None:
    workers = [subprocess.Popen(["sh", "-c", what], start_new_session=True) for what in ("exit 1", "kill -9 $$")]
    for worker in workers:
        worker.wait()
    assert launch._watch(workers, []) == 1
    assert capfd.readouterr().err.startswith("distill: process 1 of 2 was killed by SIGKILL")


def test_the_command_line_runs_in_every_process(capfd: pytest.CaptureFixture[str], cwd: Path) -> None:
    assert launch.spread_here(2, ["ls", "--teachers"]) == 0
    assert capfd.readouterr().out.count("shipped: {name: native, path: digits}") == 2
    assert launch.spread_here(2, ["validate", "no-such-recipe"]) == 2
    assert "no-such-recipe" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="this host has 2"):
        launch.spread_here(3, ["ls"])
    with pytest.raises(InputError, match="1 or more"):
        launch.spread_here(0, ["ls"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="started 4 processes already"):
        launch.spread_here(2, ["ls"])


# --- SLURM's variables

STEP = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "8",
}  # fmt: skip


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables of a process that srun started, and none of torchrun's, which the test may leave behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_srun_is_torchrun_by_another_name(slurm: pytest.MonkeyPatch) -> None:
    launch.take_place()
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
                "MASTER_ADDR": "gpu07", "MASTER_PORT": "19567"}  # fmt: skip
    assert {name: os.environ[name] for name in expected} == expected


@pytest.mark.parametrize(
    "variables",
    [{"SLURM_STEP_NUM_TASKS": None}, {"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0"}],
    ids=["batch script", "one task", "torchrun"],
)
def test_other_processes_under_slurm_are_left_alone(
    slurm: pytest.MonkeyPatch, variables: Mapping[str, str | None]
) -> None:
    for name, value in variables.items():
        slurm.delenv(name) if value is None else slurm.setenv(name, value)
    launch.take_place()
    assert "WORLD_SIZE" not in os.environ and os.environ.get("RANK") == variables.get("RANK")


@pytest.mark.parametrize(("terminal", "name", "world"), [(True, "bash", "1"), (False, "bash", "8"), (True, "x", "8")])
def test_a_shell_that_srun_started_is_no_launch(
    started: Start, slurm: pytest.MonkeyPatch, terminal: bool, name: str, world: str
) -> None:
    ours, theirs = pty.openpty()
    code = "import os; from distill.launch import take_place; take_place(); print(os.environ.get('WORLD_SIZE', 1))"
    process = started(sys.executable, "-c", code, env=environment(SLURM_JOB_NAME=name),
                      stdin=theirs if terminal else subprocess.DEVNULL)  # fmt: skip
    said, _ = process.communicate(timeout=120)
    assert said == f"{world}\n"
    os.close(ours)
    os.close(theirs)


def test_uneven_nodes_are_refused(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("SLURM_STEP_NUM_NODES", "3")
    with pytest.raises(InputError, match="8 processes on 3 nodes"):
        launch.take_place()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("node[001-004,7]", "node001"), ("node[7,001-004],x[1-2]", "node7"),
        ("gpu[3-9]-ib", "gpu3-ib"), ("rack[0-1]n[02-03]", "rack0n02"), ("10.0.0.[8-9]", "10.0.0.8"), ("a-b,c", "a-b"),
    ],
)  # fmt: skip
def test_the_first_of_slurms_hosts(nodes: str, first: str) -> None:
    assert _first_host(nodes) == first


def test_slurms_ports_are_free_for_all_to_choose() -> None:
    ports = {int(from_slurm(STEP | {"SLURM_JOB_ID": str(job)})["MASTER_PORT"]) for job in range(1, 40000, 7)}
    assert min(ports) >= 15000 and max(ports) < 30000 and len(ports) > 5000


@pytest.mark.parametrize(
    ("variables", "name", "again"),
    [
        ({}, None, False),
        ({"SLURM_JOB_ID": "77"}, "slurm-77", False),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "x"}, "slurm-77", True),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}, "torchrun-x", False),
        ({"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "h", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "1"},
         "torchrun-h:29500", True),
    ],
)  # fmt: skip
def test_a_launch_has_one_name_through_its_restarts(
    slurm: pytest.MonkeyPatch, variables: Mapping[str, str], name: str | None, again: bool
) -> None:
    slurm.delenv("SLURM_JOB_ID")
    for key, value in variables.items():
        slurm.setenv(key, value)
    assert (launch.launch_id(), launch.restarted()) == (name, again)


def test_torchruns_restart_is_told_by_torchrun_itself(started: Start, cwd: Path) -> None:
    (cwd / "worker.py").write_text(
        "import sys; from distill.launch import launch_id, restarted\n"
        "open('said', 'a').write(f'{launch_id()} {restarted()}\\n'); sys.exit(0 if restarted() else 1)"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-id", "mine", "--rdzv-backend", "c10d"]
    process = started(*torchrun, "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", "1", "worker.py")
    assert ends(process)[0] == 0
    assert (cwd / "said").read_text() == "torchrun-mine False\ntorchrun-mine True\n"


# --- SLURM's script


def script(recipe: str = "toy/lagrangian", *overrides: str, **options: Any) -> str:
    return slurm_script(recipe, overrides, **{"nodes": 2, "gpus": 1, "time": "4h", **options})


def test_the_script_whole() -> None:
    given = slurm_script(
        "imagenet/mean_flow", ["trainer.batch=1024", "name=a b"], nodes=4, gpus=8, time="1d12h", account="me"
    )
    assert given == (
        "#!/bin/bash\n#SBATCH --job-name=distill-imagenet-mean_flow\n#SBATCH --nodes=4\n"
        "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n#SBATCH --time=1-12:00:00\n#SBATCH --account=me\n"
        "#SBATCH --output=slurm-%j.out\n#SBATCH --open-mode=append\n"
        "# two minutes before the time is up: a checkpoint is written, the job goes back into the queue and continues\n"
        "#SBATCH --requeue\n#SBATCH --signal=USR1@120\n\n"
        "srun --kill-on-bad-exit=1 distill run imagenet/mean_flow trainer.batch=1024 'name=a b'\n"
    )
    assert "#SBATCH --partition='my part'\n" in script(partition="my part")
    assert "#SBATCH --job-name=distill-my-recipes-a-b\n" in script("/my recipes/a b.yaml")


def test_the_script_is_the_one_in_the_docs() -> None:
    docs = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
    assert f"```bash\n{script('quickstart', 'trainer.steps=2000', nodes=4, gpus=8)}```" in docs
    assert "distill slurm quickstart trainer.steps=2000 --nodes 4 --gpus 8 --time 4h" in docs


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("30m", "0-00:30:00"), ("4h", "0-04:00:00"), ("2d", "2-00:00:00"), ("1d12h", "1-12:00:00"),
        ("1h30m", "0-01:30:00"), ("90m", "0-01:30:00"), ("00:10:00", "0-00:10:00"), ("100:00:30", "4-04:00:30"),
        ("3-01:02:03", "3-01:02:03"),
    ],
)  # fmt: skip
def test_times_in_slurms_form(given: str, expected: str) -> None:
    assert f"#SBATCH --time={expected}\n" in script(time=given)


@pytest.mark.parametrize("time", ["", "4", "4 h", "h", "12h1d", "1:2", "00:61:00", "4hours", "-4h"])
def test_other_times_are_refused(time: str) -> None:
    with pytest.raises(InputError, match="give 30m, 4h"):
        script(time=time)


def test_what_makes_no_script() -> None:
    with pytest.raises(InputError, match=r"--time 9m: must be 10m or more"):
        script(time="9m")
    with pytest.raises(InputError, match="--nodes 0"):
        script(nodes=0)
    with pytest.raises(InputError, match="--gpus 0"):
        script(gpus=0)


SRUN = """
# n processes with SLURM's variables; USR1 goes to their whole process groups, as with SLURM's proctrack/pgid; the
# first that ends with another code than 0 ends all
import os, signal, subprocess, sys, time

assert sys.argv[1] == "--kill-on-bad-exit=1", sys.argv
nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
step = {"SLURM_STEP_NUM_TASKS": str(nodes * each), "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NODELIST": "127.0.0.[1-9]"}
tasks = []
for i in range(nodes * each):
    place = {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % each), "SLURM_NODEID": str(i // each)}
    tasks.append(subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True,
                                  env=os.environ | step | place))
def to_all(number, frame=None):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, number)
signal.signal(signal.SIGUSR1, to_all)
open("srun.pid", "w").write(str(os.getpid()))
while any(task.poll() is None for task in tasks):
    if any(task.returncode for task in tasks):
        to_all(signal.SIGTERM)
        time.sleep(1)
        to_all(signal.SIGKILL)
    time.sleep(0.05)
sys.exit(max(abs(task.returncode) for task in tasks))
"""
SCONTROL = "import sys; open('scontrol.log', 'a').write(' '.join(sys.argv[1:]) + '\\n')"


@pytest.fixture
def cluster(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with srun and scontrol."""
    folder = cwd / "bin"
    folder.mkdir()
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
        program(folder / name, code)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(file: Path, code: str) -> None:
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(0o755)


def submit(started: Start, text: str, restarts: int = 0) -> subprocess.Popen[str]:
    """As sbatch: the script by bash, with the variables that a batch script has."""
    Path("job.sh").write_text(text)
    Path("srun.pid").unlink(missing_ok=True)
    asked = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in text.splitlines() if "SBATCH --" in line
                 and "=" in line)  # fmt: skip
    variables = {"SLURM_JOB_ID": "77", "SLURM_NNODES": asked["nodes"], "SLURM_PROCID": "0",
                 "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"], "SLURM_NTASKS": "2"}  # fmt: skip
    again = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    return started("bash", "job.sh", env=environment(**variables, **again))


def warn() -> None:
    """What SLURM does two minutes before a job's time is up."""
    os.kill(int(Path("srun.pid").read_text()), signal.SIGUSR1)


def test_a_job_is_queued_again_once_when_its_time_is_up(started: Start, cluster: Path, cwd: Path) -> None:
    arguments = "import sys; from pathlib import Path; Path('arguments').write_text(repr(sys.argv[1:]))\n"
    program(cluster / "distill", f"{arguments}sys.argv[1:] = ['together', '1']\n{WORKER}")
    overrides = ["name=it's $HOME", "student.network={name: mlp, width: 16}"]
    process = submit(started, script("my recipe.yaml", *overrides))
    ready()
    warn()
    code, said = ends(process)
    assert said == "" and code in (138, 143)  # srun ends with SIGTERM what waits for the first
    assert (cwd / "scontrol.log").read_text() == "requeue 77\n"
    assert (cwd / "arguments").read_text() == repr(["run", "my recipe.yaml", *overrides])
    assert saved() == {"saved-0", "saved-1"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [("import sys; sys.exit('Requeue is disabled for job 77')", "Requeue is disabled for job 77"),
     ("import sys; sys.exit(3)", "exit code 3"), (None, "No such file")],
)  # fmt: skip
def test_a_queue_that_does_not_take_it_back_is_told(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str | None, reason: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    if code is None:
        (cluster / "scontrol").unlink()
    else:
        program(cluster / "scontrol", code)
    requeue()
    said = capsys.readouterr().err
    assert "job 77 did not go back into SLURM's queue" in said and reason in said and "distill resume RUN" in said


def test_nothing_is_queued_without_slurm(cluster: Path, monkeypatch: pytest.MonkeyPatch, cwd: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue()
    assert not (cwd / "scontrol.log").exists()


# --- the jobs themselves

LONG = (*TINY, "trainer.steps=400", "trainer.checkpoint_every=20")


def distill(started: Start, *arguments: str) -> subprocess.Popen[str]:
    return started(sys.executable, "-m", "distill", *arguments)


def trains(process: subprocess.Popen[str]) -> None:
    """Waits for the first checkpoint."""

    def done() -> bool:
        assert process.poll() is None, process.communicate()
        return any(Path("runs").glob("toy-lagrangian/checkpoints/step-*"))

    within(200, done)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_job_in_two_processes_stops_after_a_checkpoint(started: Start, number: signal.Signals) -> None:
    process = distill(started, "run", "toy/lagrangian", *LONG, "--gpus", "2")
    trains(process)
    process.send_signal(number)
    said = f"distill: stopped by {number.name}; continue with: distill resume runs/toy-lagrangian\n"
    assert ends(process) == (128 + number, said)
    stopped = verified(checkpoints(Path("runs/toy-lagrangian"))[-1])
    assert [row["step"] for row in logged(Path("runs/toy-lagrangian"))][-1] in (stopped, stopped - 1)  # each second one


ABORTS = """
import atexit, ctypes
c = ctypes.CDLL(None)
c.__cxa_atexit(c.abort, None, None)  # as threads of torch do now and then
atexit.register(print, "exit functions", end="")
from distill.launch import leave
print("said", end=" ")
leave(3)
"""


@pytest.mark.parametrize(("processes", "code"), [("2", 3), ("1", -signal.SIGABRT)])
def test_the_end_of_the_interpreter_does_not_change_the_exit_code_of_one_of_several(
    started: Start, processes: str, code: int
) -> None:
    process = started(sys.executable, "-c", ABORTS, env=environment() | {"WORLD_SIZE": processes})
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, said) == (code, "said exit functions")


def test_a_job_in_two_processes_says_once_what_is_wrong(started: Start) -> None:
    process = distill(started, "run", "toy/lagrangian", "trainer.stepz=3", "--gpus", "2")
    code, said = ends(process)
    assert code == 2 and said.count("distill: ") == 1 and "stepz" in said and "Traceback" not in said
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_under_slurm_is_stopped_queued_again_and_continued(started: Start, cluster: Path, cwd: Path) -> None:
    program(cluster / "distill", "from distill.__main__ import run; run()")
    written = distill(started, "slurm", "toy/lagrangian", *LONG, "--nodes", "2", "--gpus", "1", "--time", "4h",
                      "--out", "job.slurm")  # fmt: skip
    assert ends(written) == (0, "")
    text = Path("job.slurm").read_text()

    process = submit(started, text)
    trains(process)
    warn()
    said = "distill: stopped by SIGUSR1; continue with: distill resume runs/toy-lagrangian\n"
    code, told = ends(process)
    assert told == said and code in (138, 143)  # srun ends with SIGTERM what waits for the first to queue the job
    assert (cwd / "scontrol.log").read_text() == "requeue 77\n"
    stopped = verified(checkpoints(Path("runs/toy-lagrangian"))[-1])
    assert 20 <= stopped < 400

    process = submit(started, text, restarts=1)
    out, said = process.communicate(timeout=180)
    assert (process.returncode, said) == (0, "")
    assert f"continuing from runs/toy-lagrangian/checkpoints/step-{stopped:08d}" in out
    assert [folder.name for folder in Path("runs").iterdir()] == ["toy-lagrangian"]
    assert verified(checkpoints(Path("runs/toy-lagrangian"))[-1]) == 400
    assert [row["step"] for row in logged(Path("runs/toy-lagrangian"))] == list(range(2, 401, 2))
    assert Path("runs/toy-lagrangian/report.html").exists()
    assert (cwd / "scontrol.log").read_text() == "requeue 77\n"  # no more


def test_a_signal_that_comes_while_an_object_is_collected_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    """Python drops what is raised there, and prints a traceback."""

    class Collected:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    def collect() -> None:
        with Signals():
            Collected()
            time.sleep(10)

    before = sys.unraisablehook
    with pytest.raises(Stopped, match="SIGTERM"):
        collect()
    assert sys.unraisablehook is before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[unbound_buffer.cc:81] gloo: Timed out waiting 20000ms for recv operation", "did not answer in time"),
        ("Application timeout caused pair closure", "did not answer in time"),
        ("Connection closed by peer [127.0.0.1]:2345", "is gone"),
        ("expected a shape of 3", None),
    ],
)
def test_what_torch_says_of_another_process(said: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = f"process 0 of 2 stopped: another one {reason}" if reason else said
    with pytest.raises(RuntimeError, match=re.escape(expected)), noticing():
        raise RuntimeError(said)
