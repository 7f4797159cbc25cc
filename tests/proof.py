"""What is true of every network that a teacher brings, whatever its family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import distill
from distill import derivative
from distill.export import Facts, write
from distill.student import Student, StudentConfig
from teachers.adapters.base import Foreign
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher


def batch(teacher: Teacher, rows: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Cond]:
    """Points, s <= t in float64 away from the ends, conditioning."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *teacher.space.shape, generator=generator)
    s = 0.05 + 0.6 * torch.rand(rows, generator=generator, dtype=torch.float64)
    t = s + 0.3 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return x, s, t, conditioning(teacher.space, rows)


def conditioning(space: DataSpace, rows: int, seed: int = 3) -> dict[str, Tensor] | None:
    """Random embeddings, and classes in turn; masks leave off ends of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    cond = {}
    for e in space.embeddings:
        if e.dtype == "bool":
            kept = e.shape[0] - torch.arange(rows) % 3
            cond[e.name] = torch.arange(e.shape[0]) < kept[:, None]
        else:
            cond[e.name] = torch.randn(rows, *e.shape, generator=generator)
    return {**(replace(space, embeddings=()).cond_for(0, rows) or {}), **cond} or None


def student_starts_at(teacher: Teacher) -> Student:
    """Its student is the teacher, bit for bit and for any t; the last layer of what is new learns at once."""
    student, learning = learner(teacher)
    assert student.gap is not None
    names = [name for name, _ in student.gap.named_parameters()]
    last = names[-1].rpartition(".")[0]
    assert learning == {name for name in names if name.startswith(f"{last}.")}
    return student


def learner(teacher: Teacher) -> tuple[Student, set[str]]:
    """Its student, which is the teacher, after a gradient; and the names of what learns of the second time."""
    x, s, t, cond = batch(teacher)
    student = StudentConfig().build(teacher, teacher.space, 0)
    for end in (s, t, torch.ones_like(t)):
        assert torch.equal(student.mean_velocity(x, s, end, cond), teacher(x, s, cond))
    assert student.gap is not None
    student.mean_velocity(x, s, t, cond).square().mean().backward()
    return student, {name for name, p in student.gap.named_parameters() if p.grad is not None and p.grad.any()}


def what_starts_from(teacher: Teacher, folder: Path) -> None:
    """Its student starts there, is differentiated exactly and comes back from an export."""
    student = student_starts_at(teacher)
    derivatives_are_exact(student, teacher)
    export_keeps(student, teacher, folder / "export")


def outline_reads_no_weights(config: Foreign) -> Teacher:
    """And says all else as the whole teacher does."""
    outline, whole = config.outline(), config.load()
    assert outline.network is not None and all(p.is_meta for p in outline.network.parameters())
    assert (outline.space, outline.network_config, outline.path) == (whole.space, whole.network_config, whole.path)
    return outline


def derivatives_are_exact(student: Student, teacher: Teacher) -> None:
    """Forward mode agrees with central differences in float64."""
    x, s, t, cond = batch(teacher)
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    derivative.check(student, x, s, t, cond, w)


def export_keeps(student: Student, teacher: Teacher, folder: Path) -> None:
    """A student whose every weight is moved comes back as it was, bit for bit."""
    with torch.no_grad():
        for i, parameter in enumerate(student.parameters()):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    student.eval()
    assert teacher.network_config is not None
    folder.mkdir()
    write(folder, student, student.state_dict(), Facts(
        name="x", network=teacher.network_config, steps=(1,), teacher=None, licence="MIT", trained_on={"steps": 1},
        metrics={}, recipe="",
    ))  # fmt: skip
    x, s, t, cond = batch(teacher)
    loaded = distill.load(folder)
    assert torch.equal(loaded.mean_velocity(x, s, t, cond), student.mean_velocity(x, s, t, cond))
    assert not torch.equal(student.mean_velocity(x, s, t, cond), teacher(x, s, cond))
