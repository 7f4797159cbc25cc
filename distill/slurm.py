"""What is SLURM's own: the place of a process that srun started, the batch script of a job, and its requeueing."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from teachers.errors import InputError


def from_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a process that srun started, none for any other. Raises InputError for nodes with
    different numbers of processes."""
    # a batch script's own shell has SLURM_NTASKS and SLURM_PROCID too; those of the step only srun sets
    tasks, nodes = int(env.get("SLURM_STEP_NUM_TASKS", "1")), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    by_hand = env.get("SLURM_JOB_NAME") in ("bash", "interactive") and os.isatty(0)  # in a shell that srun started
    if tasks == 1 or by_hand:
        return {}
    if tasks % nodes:
        raise InputError(f"srun started {tasks} processes on {nodes} nodes: give each node as many, --ntasks-per-node")
    port = 15000 + int(env["SLURM_JOB_ID"]) % 15000  # the same on every node, below those that systems give out
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "GROUP_RANK": env["SLURM_NODEID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }


def _first_host(nodes: str) -> str:
    """Of SLURM's list: node[001-004,7]-ib,gpu3 begins with node001-ib."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    if first is None:
        raise InputError(f"SLURM_STEP_NODELIST: {nodes!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def slurm_script(
    recipe: str,
    overrides: Sequence[str],
    *,
    nodes: int,
    gpus: int,
    time: str,
    partition: str | None = None,
    account: str | None = None,
) -> str:
    """A batch script that runs a recipe with a process for each of `gpus` GPUs on each of `nodes` nodes.

    time: 30m, 4h, 2d, 1d12h, or SLURM's [D-]HH:MM:SS. Raises InputError.
    """
    for name, count in (("--nodes", nodes), ("--gpus", gpus)):
        if count < 1:
            raise InputError(f"{name} {count}: must be 1 or more")
    options = {
        "job-name": "distill-" + re.sub(r"[^\w.-]+", "-", recipe.removesuffix(".yaml")).strip("-"),
        "nodes": nodes,
        "ntasks-per-node": gpus,
        "gpus-per-node": gpus,
        "time": _time_limit(time),
        "partition": partition,
        "account": account,
        "output": "slurm-%j.out",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    command = shlex.join(["distill", "run", recipe, *overrides])
    return "\n".join([
        "#!/bin/bash",
        *lines,
        "# two minutes before the time is up: a checkpoint is written, the job goes back into the queue and continues",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@120",
        "",
        f"srun --kill-on-bad-exit=1 {command}",
        "",
    ])  # fmt: skip


def _time_limit(text: str) -> str:
    """In SLURM's form."""
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif text and (match := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text)):
        days, hours, minutes, seconds = (*(int(part or 0) for part in match.groups()), 0)
    else:
        raise InputError(f"--time {text!r}: give 30m, 4h, 2d, 1d12h or [D-]HH:MM:SS")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 600:  # the signal comes two minutes before the end, or three: nothing would be trained, again and again
        raise InputError(f"--time {text}: must be 10m or more, so that each start gets somewhere")
    minutes, seconds = divmod(total, 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:{seconds:02}"


def requeue() -> None:
    """Put this SLURM job back into its queue, or say why that failed; nothing where SLURM has not started it.

    To be called on one process, after the checkpoint and before any process ends: srun then ends the others.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None
    except OSError as error:
        problem = str(error)
    if problem:
        print(f"distill: job {job} did not go back into SLURM's queue (scontrol requeue: {problem}); continue it by "
              "hand with distill resume RUN", file=sys.stderr)  # fmt: skip
