"""Networks of diffusers as students and as exports, and what the adapter says of a folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
import torch
from diffusers_models import TINY, module, said, save, scheduler
from proof import batch, what_starts_from
from small_networks import spread

from distill.student import StudentConfig
from teachers.networks.diffusers import DiffusersNetwork
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


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "DiTTransformer2DModel"])
def test_calls_in_several_threads_do_not_meet(name: str, tmp_path: Path) -> None:
    teacher = loaded(name, tmp_path / "folder")
    x, s, t, cond = batch(teacher)
    student = StudentConfig().build(teacher, teacher.space, 0)
    spread(student)
    (network,) = (part for part in student.modules() if isinstance(part, DiffusersNetwork))
    network.module.register_forward_pre_hook(lambda *_: sleep(0.02))  # so that they would
    ends = [s, t, torch.ones_like(t)]
    with torch.no_grad():
        one_by_one = [student.mean_velocity(x, s, end, cond) for end in ends]
    with ThreadPoolExecutor(len(ends)) as pool:
        at_once = list(pool.map(lambda end: student.mean_velocity(x, s, end, cond).detach(), ends))
    assert all(map(torch.equal, one_by_one, at_once))
    assert not torch.equal(*one_by_one[:2])
