"""Two hosts on this machine: network namespaces with names of their own, or, where those are not allowed, loopback.

Each host is a process that ends with this one, whatever happens to it: its standard input is closed then. With it end
all processes in its namespaces, and these themselves, which are never in a list of the system's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from helpers import environment

NAMES = ("host0", "host1")
PORT = 29400
_SPACES = ("--net", "--uts", "--mount", "--pid")
_HOLD = 'mount --bind "$0" /etc/hosts && hostname "$1" && ip link set lo up && echo ready && read end'


@dataclass(frozen=True)
class Hosts:
    """enter: what a command on each host begins with; endpoint: where they meet; why: they are not apart."""

    enter: tuple[list[str], list[str]]
    endpoint: str
    why: str | None = None

    def launch(self, *command: str, processes: int = 2) -> list[subprocess.Popen[str]]:
        """torchrun on both hosts, of a command for python."""
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint, "--rdzv-id", "two-nodes"]
        return self.torchrun([["--nnodes", "2", "--nproc-per-node", str(processes), *meet, *command]] * 2)

    def torchrun(self, arguments: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
        """torchrun with its own arguments on each host."""
        return [
            subprocess.Popen(
                [*_here(enter), sys.executable, "-m", "torch.distributed.run", *words], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, env=environment(PYTHONWARNINGS="ignore"), start_new_session=True,
            )
            for enter, words in zip(self.enter, arguments, strict=True)
        ]  # fmt: skip


@contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts; `folder` is for their /etc/hosts."""
    with ExitStack() as stack:
        try:
            found = _apart(folder, stack)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            found = Hosts(([], []), f"127.0.0.1:{port}", getattr(error, "stderr", None) or str(error))
        yield found


def _apart(folder: Path, stack: ExitStack) -> Hosts:
    """Raises where namespaces are not allowed, or programs are missing."""
    file = folder / "hosts"
    file.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{n} {name}\n" for n, name in enumerate(NAMES, 1)))
    pids = []
    for name in NAMES:
        hold = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _HOLD, str(file), name]
        pipe = subprocess.PIPE
        holder = stack.enter_context(subprocess.Popen(hold, text=True, stdin=pipe, stdout=pipe, stderr=pipe))
        stack.callback(holder.kill)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            raise RuntimeError(holder.stderr.read().strip())
        pids.append(str(children(holder.pid)[0]))
    _do("ip", "link", "add", "veth0", "netns", pids[0], "type", "veth", "peer", "name", "veth0", "netns", pids[1])
    enter = [["nsenter", "--target", pid, *_SPACES] for pid in pids]
    for n in range(2):
        _do(*enter[n], "ip", "addr", "add", f"10.77.0.{n + 1}/24", "dev", "veth0")
        _do(*enter[n], "ip", "link", "set", "veth0", "up")
    return Hosts((enter[0], enter[1]), f"{NAMES[0]}:{PORT}")


def _here(enter: list[str]) -> list[str]:
    """In this folder: a command in another mount namespace begins at its root."""
    return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(Path.cwd())] if enter else []


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(launched: subprocess.Popen[str]) -> list[int]:
    """The processes that a torchrun has started."""
    found = children(launched.pid)
    return found if len(found) > 1 else children(found[0])  # behind nsenter, which waits for it


def end(launched: Sequence[subprocess.Popen[str]]) -> None:
    """Kill torchruns that still run, with all that they have started."""
    for process in launched:
        below = [process.pid]
        for pid in below:
            with suppress(OSError):
                below += children(pid)
        for pid in below if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
