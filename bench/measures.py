"""How far a student is from its teacher's flow: as a map, as a law, and by the equations that a flow map obeys."""

from __future__ import annotations

import torch
from problems import SEED, Problem, Reference
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distill.derivative import derivative
from distill.flow_map import steps_refused
from distill.rows import fresh_noise, noise
from distill.student import Student


def rms(residual: Tensor) -> float:
    """Over rows and features."""
    return residual.double().square().mean().sqrt().item()


def w2(x: Tensor, y: Tensor) -> float:
    """The 2-Wasserstein distance of two samples of equal size, a feature: divided by the root of the dimension."""
    costs = torch.cdist(x.double().flatten(1), y.double().flatten(1)).square()
    row, column = linear_sum_assignment(costs.numpy())
    return (costs[row, column].mean() / x[0].numel()).sqrt().item()


def generated(student: Student, ref: Reference, steps: int) -> Tensor | None:
    """The student's samples from the reference's noise; None if it is not made for this number of steps."""
    if steps_refused(student.kind, student.finest, steps):
        return None
    shape = tuple(ref.noise.shape[1:])
    return student.generate(ref.noise, steps, ref.cond, fresh=fresh_noise(SEED, 0, len(ref.noise), shape))


@torch.no_grad()
def measured(student: Student, problem: Problem, ref: Reference) -> dict[str, float | None]:
    """Map errors, W2 and residuals, each a feature; None where the student is not made for it."""
    found: dict[str, float | None] = {}
    for steps in (1, 4):
        x = generated(student, ref, steps)
        follows = x is not None and not (steps > 1 and student.kind == "consistency")
        found[f"map_{steps}"] = rms(x - ref.end) if x is not None and follows else None
        found[f"w2_{steps}"] = None if x is None else w2(x, ref.other)
    return found | _equations(student, problem, ref)


def _equations(student: Student, problem: Problem, ref: Reference) -> dict[str, float | None]:
    probe, cond = ref.probes.get(student.kind), ref.cond
    if probe is None:
        return {"map_any": None, "semigroup": None, "transport": None}
    x_s, s, m, t = probe.x_s, probe.s, probe.m, probe.t
    there = student(x_s, s, t, cond)
    found: dict[str, float | None] = {"map_any": rms(there - probe.x_t), "semigroup": None, "transport": None}
    if student.kind != "consistency":  # which knows no jump that ends before 1
        found["semigroup"] = rms(student(student(x_s, s, m, cond), m, t, cond) - there)
    if student.kind != "shortcut":  # which knows no neighbouring start
        v = problem.teacher.velocity(x_s, s, cond)
        along = derivative(lambda x, s: student(x, s, t, cond), (x_s, s), (v, torch.ones_like(s)))[1]
        found["transport"] = rms(along)
    return found


@torch.no_grad()
def of_teacher(problem: Problem, ref: Reference) -> dict[str, dict[str, float]]:
    """The same numbers of the teacher: its law against itself (the floor, and how it varies with the noise, which is
    drawn anew five times), its Euler steps, and its samples with an error of 0.1 of two kinds: noise, or blur, which
    moves them towards their mean."""
    steps = {f"euler {n}": {"map_1": rms(x - ref.end), "w2_1": w2(x, ref.other)} for n, x in ref.euler.items()}
    zero, shape = torch.zeros(len(ref.end), dtype=torch.float64), tuple(ref.noise.shape[1:])
    drawn = [noise(SEED + seed, 0, len(ref.end), shape) for seed in range(2, 7)]
    floors = [w2(problem.flow_map(x_0, zero, zero + 1, ref.cond), ref.other) for x_0 in drawn]
    floor = {"map_1": 0.0, "w2_1": w2(ref.end, ref.other), "spread": torch.tensor(floors).std().item()}
    towards = ref.end.mean(0) - ref.end
    errors = {"noise": noise(SEED + 7, 0, len(ref.end), shape), "blur": towards / rms(towards)}
    wrong = {f"{name} of 0.1": {"map_1": 0.1, "w2_1": w2(ref.end + 0.1 * e, ref.other)} for name, e in errors.items()}
    return {"floor": floor} | steps | wrong
