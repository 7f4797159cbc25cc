"""``distill``, ``python -m distill`` and ``torchrun -m distill``."""

from typing import NoReturn

from distill.cli import main
from distill.launch import whole


def run() -> NoReturn:
    """Run the command of this process's arguments, and end the process with its exit code."""
    whole(main)


if __name__ == "__main__":
    run()
