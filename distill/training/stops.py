"""Why training stops early: it diverged, or was asked to by a signal. The second signal stops at once: the process
ends, or is interrupted where somebody types into it.

Outside training the first signal raises `Stopped` where it arrives. While `deferred`, it only leaves a note: the
training loop reads `pending` at a step boundary and stops there after a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from distill.launch import SIGNALS


class Diverged(RuntimeError):
    """Losses, gradients or weights were not finite, more often than is allowed."""


class Stopped(BaseException):
    """A signal asked the job to stop. Not an Exception, so that no guard takes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Signals:
    """Owns `SIGNALS` inside its ``with`` block; in a thread other than the main one it changes nothing."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
            for number in SIGNALS:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            sys.unraisablehook = self._hook

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal is noted in `pending` instead of raised."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_pending(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.pending is not None:
            raise Stopped(self.pending)

    def _swallowed(self, what: Any) -> None:
        """Python drops what is raised while it collects an object: the signal comes once more, a little later."""
        if not isinstance(what.exc_value, Stopped):
            self._hook(what)
            return
        self.pending = None
        threading.Timer(0.01, os.kill, (os.getpid(), what.exc_value.exit_code - 128)).start()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            if hasattr(sys, "ps1"):  # an interpreter or notebook, with more in it than this job
                raise KeyboardInterrupt
            os._exit(128 + signum)
        self.pending = signum
        if not self._deferred:
            raise Stopped(signum)
