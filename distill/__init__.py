"""Distil a multi-step flow-matching teacher into a one-step student.

    distill.run("quickstart")                        # the whole job; see `distill --help` for the command line
    student = distill.load("runs/quickstart/export") # needs torch, safetensors and numpy alone
    x = student.sample(16, steps=1, seed=0)

Importing this package does not import torch or Lightning: names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.export import load as load
    from distill.job import resume as resume
    from distill.job import run as run
    from distill.objectives.base import Draw as Draw
    from distill.objectives.base import Loss as Loss
    from distill.objectives.base import Objective as Objective
    from distill.student import Student as Student

__version__ = "0.1.0"
__all__ = ["Draw", "Loss", "Objective", "Student", "load", "resume", "run"]
_HOMES = {
    "load": "export",
    "run": "job",
    "resume": "job",
    "Draw": "objectives.base",
    "Loss": "objectives.base",
    "Objective": "objectives.base",
    "Student": "student",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"distill.{_HOMES[name]}"), name)
