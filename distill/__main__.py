"""``distill``, ``python -m distill`` and ``torchrun -m distill``."""

import sys
from typing import NoReturn

from distill.cli import main
from distill.launch import leave


def run() -> NoReturn:
    """Run the command of this process's arguments, and end the process with its exit code."""
    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


if __name__ == "__main__":
    run()
