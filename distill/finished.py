"""Models that others have distilled, as students of this project: sampled here, and exported natively.

    student(MeanFlow(path="0400000.pt", ...)).sample(16, steps=1)
    export(MeanFlow(path="0400000.pt", ...), Path("meanflow"))     then     distill.load("meanflow").sample(16, steps=1)

A family joins with an adapter that has ``two_time()`` (see `teachers.adapters.two_time`) and a line in FINISHED.
"""

from __future__ import annotations

from pathlib import Path

import torch

from distill.atomic import atomic_directory
from distill.export import Facts, write
from distill.student import Student
from teachers.adapters.imeanflow import IMeanFlow
from teachers.adapters.meanflow import MeanFlow
from teachers.adapters.py_meanflow import PyMeanFlow
from teachers.adapters.shortcut_models import ShortcutModels
from teachers.adapters.two_time import Finished, TwoTime
from teachers.errors import CheckpointError, InputError
from teachers.fill import compare

FINISHED: dict[str, type[Finished]] = {
    "meanflow": MeanFlow,
    "imeanflow": IMeanFlow,
    "py_meanflow": PyMeanFlow,
    "shortcut_models": ShortcutModels,
}
"""By the names that TEACHERS gives them."""


def student(config: Finished) -> Student:
    """The model of a file as a student, frozen, in eval mode. Raises CheckpointError and FieldError as loading does."""
    return _student(config.two_time())


def export(config: Finished, folder: Path) -> None:
    """Write the model of a file as a native export, the new `folder`. Raises InputError if there is one, and as
    `student` does."""
    if folder.exists():
        raise InputError(f"{folder}: exists; name another folder, or move it away")
    found = config.two_time()
    made, info = _student(found), found.diagonal.info
    assert found.diagonal.network_config is not None
    facts = Facts(
        name=Path(str(info["id"])).stem,
        network=found.diagonal.network_config,
        steps=found.steps,
        teacher={key: info[key] for key in ("id", "digest", "licence")},
        licence=str(info["licence"]),
        trained_on={"steps": 0, "family": info["family"], "weights": info["weights"]},
        metrics={},
        recipe="",
    )
    with atomic_directory(folder) as empty:
        write(empty, made, made.state_dict(), facts)


def _student(found: TwoTime) -> Student:
    diagonal, source = found.diagonal, str(found.diagonal.info["id"])
    assert diagonal.network is not None
    if any(parameter.dtype != torch.float32 for parameter in diagonal.network.parameters()):
        raise CheckpointError(f"{source}: a student computes in float32; set teacher.placement.dtype: float32")
    made = Student(diagonal.network, diagonal.space, diagonal.path, found.kind, finest=found.finest)
    assert made.gap is not None
    compare(made.gap, found.gap, source)
    made.gap.load_state_dict(dict(found.gap))
    return made.eval().requires_grad_(False)
