"""How the processes of a job are started: by `--gpus N` on this host, by torchrun, or by SLURM.

torchrun's environment variables are the one language: `take_place` gives them to a process that srun started, and
`spread_here` to those that it starts itself. It does so without torch's elastic agent. That one sends SIGTERM to all
others as soon as one process has ended with a code other than 0, which cuts off what they still write after a stop;
kills 30 seconds after a signal, which is less than a large checkpoint takes; and ends with exit code 1 and a traceback
whatever the job's own code was.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from distill.slurm import from_slurm
from teachers.errors import InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What the processes of a job answer: stop at the same step, after a checkpoint. SLURM is asked to send SIGUSR1 before
the time is up."""

BAD_INPUT, DIVERGED = 2, 78
"""Exit codes: nothing was started; training diverged."""

AGREED = (DIVERGED, *(128 + number for number in SIGNALS))
"""Exit codes that all processes come to together, each when it has written its part."""

_LAUNCHER = "DISTILL_LAUNCHER"  # the process that a process started by `start` must not outlive
_PR_SET_PDEATHSIG = 1


class FailedElsewhere(RuntimeError):
    """Another process of the launch has failed, and tells why. code: that process's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("another process of this launch failed: see its message")
        self.code = code


class Lost(RuntimeError):
    """Another process of the launch is gone, or does not answer."""


def take_place() -> None:
    """To be called first in a process: it takes the place in its launch that whoever started it has planned.

    Under srun it sets the variables that torchrun would have set, unless they are set already; started by `start`, it
    will not outlive that process. Raises InputError where srun has not started equally many processes on every node.
    """
    if (launcher := os.environ.pop(_LAUNCHER, None)) is not None:
        die_with(int(launcher))
    if "RANK" not in os.environ:
        os.environ.update(from_slurm(os.environ))


def whole(main: Callable[[], int | None]) -> NoReturn:
    """All that a process does: it ends with the exit code that `main` returns, or with 1 and the traceback of what it
    raises. See `leave`."""
    try:
        code = main() or 0
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """To be called last in a process: it ends with this exit code.

    One of several does so without taking apart what torch holds: gloo's threads now and then abort the process there,
    whose exit code, 134, then says that it failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def die_with(parent: int) -> None:
    """End this process, at once, as soon as its `parent` is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def launch_id() -> str | None:
    """What names a launch through all its restarts: SLURM's job, else torchrun's; None of a process on its own."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm-{job}"
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run == "none":  # torchrun's default
        run = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"torchrun-{run}" if run else None


def restarted() -> bool:
    """Whether torchrun or SLURM has started this launch before."""
    return any(int(os.environ.get(name, "0")) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


# --- on this host


def spread_here(n: int, arguments: Sequence[str]) -> int:
    """``distill <arguments>`` in n processes on this host, a GPU each where there are any; returns the exit code.

    Raises InputError for more processes than GPUs, or when this process is itself one of several.
    """
    if n < 1:
        raise InputError(f"--gpus {n}: must be 1 or more")
    if "RANK" in os.environ:
        raise InputError(f"--gpus {n}: torchrun or srun has started {os.environ.get('WORLD_SIZE')} processes already; "
                         "leave --gpus out")  # fmt: skip
    import torch

    if 0 < (visible := torch.cuda.device_count()) < n:
        raise InputError(f"--gpus {n}: this host has {visible}; for more hosts see docs/many.md")
    return start(n, [sys.executable, "-m", "distill", *arguments])


def start(n: int, command: Sequence[str]) -> int:
    """Run a command that calls `take_place` in n processes with torchrun's variables; returns the exit code of the job.

    SIGINT, SIGTERM and SIGUSR1 to this process go to all of them, and it waits as long as they take; the second of
    these signals kills them. When one dies or fails the others have 10 seconds to end by themselves.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, as under torchrun
        _LAUNCHER: str(os.getpid()),
    }
    if n > 1:
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # as torchrun does
    received: list[int] = []
    before = {number: signal.signal(number, lambda got, _: received.append(got)) for number in SIGNALS}
    try:
        workers = []
        for rank in range(n):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # in a session of its own, so that Ctrl-C in a terminal arrives once, from here
            workers.append(subprocess.Popen(command, env=os.environ | variables | place, start_new_session=True))
        return _watch(workers, received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Pass on the first signal `received`, wait, and say which exit code the job has."""
    running, ended = dict(enumerate(workers)), dict[int, int]()
    deadline, told = float("inf"), False
    while running and len(received) < 2 and time.monotonic() < deadline:
        if received and not told:
            told = True
            for worker in running.values():
                worker.send_signal(received[0])
        codes = {rank: code for rank, worker in running.items() if (code := worker.poll()) is not None}
        for rank, code in sorted(codes.items(), key=lambda item: item[1]):  # the killed before those who noticed it
            ended[rank] = code
            del running[rank]
            deadline = min(deadline, time.monotonic() + _patience(code))
        time.sleep(0.05)
    for worker in running.values():
        os.killpg(worker.pid, signal.SIGKILL)
    for worker in running.values():
        with suppress(subprocess.TimeoutExpired):  # one that hangs in a driver cannot even be killed
            worker.wait(timeout=10)
    return _exit_code(ended, received, len(workers), cut=bool(running))


def _patience(code: int) -> float:
    """Seconds that the others are waited for when a process has ended."""
    if code == 0:
        return float("inf")
    return 600.0 if code in AGREED else 10.0


def _exit_code(ended: Mapping[int, int], received: Sequence[int], n: int, cut: bool) -> int:
    """ended: codes by rank, first ends first. cut: whether others had to be killed."""
    if len(received) > 1:
        return 128 + received[1]
    codes = {rank: 128 - code if -code in received else code for rank, code in ended.items() if code}
    for rank, code in sorted(codes.items(), key=lambda item: item[1] in AGREED):  # a failure before what followed
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return _lost(f"process {rank} of {n} was killed by {signal.Signals(-code).name}{hint}", 1)
        return _lost(f"process {rank} of {n} ended with exit code {code}", code) if cut else code
    return 0


def _lost(text: str, code: int) -> int:
    print(f"distill: {text}; the others were stopped", file=sys.stderr)
    return code
