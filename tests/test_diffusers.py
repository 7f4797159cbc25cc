"""Networks of diffusers as students and as exports, and what the adapter says of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers_models import TINY, module, said, save, scheduler
from proof import what_starts_from

from teachers.velocity import Teacher

# of diffusers itself, at Chroma's and Mochi's networks
pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]


def loaded(name: str, folder: Path) -> Teacher:
    """The teacher in a folder of diffusers."""
    return said(name, save(name, folder, module(name), scheduler(name))).load()


@pytest.mark.parametrize("name", TINY)
def test_a_student_starts_at_its_teacher_and_can_be_differentiated_and_exported(name: str, tmp_path: Path) -> None:
    teacher = loaded(name, tmp_path / "folder")
    what_starts_from(teacher, tmp_path)
