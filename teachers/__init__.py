"""What is given: paths, velocities, networks and pretrained teachers. Nothing here knows of students.

Importing this package does not import torch, so that listing what there is stays instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachers.adapters.module import from_module as from_module
    from teachers.networks.conventions import Discrete as Discrete
    from teachers.networks.conventions import Flow as Flow
    from teachers.path import Path as Path
    from teachers.space import DataSpace as DataSpace
    from teachers.velocity import Teacher as Teacher
    from teachers.velocity import Velocity as Velocity

_HOMES = {
    "Path": "path",
    "DataSpace": "space",
    "Discrete": "networks.conventions",
    "Flow": "networks.conventions",
    "Teacher": "velocity",
    "Velocity": "velocity",
    "from_module": "adapters.module",
}
__all__ = ["DataSpace", "Discrete", "Flow", "Path", "Teacher", "Velocity", "from_module"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'teachers' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"teachers.{_HOMES[name]}"), name)
