"""What a derivative costs: steps of each form beside a plain flow-matching step, and the error of finite differences.

    python bench/derivative.py

One thread (or the CUDA device, where there is one). The forms take turns, and each is compared with the plain step of
its own turn; the tables have the medians. Memory is the largest sum of what a step has allocated at any one time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from distill.derivative import derivative, stopped
from distill.student import Student
from teachers.networks import NETWORKS
from teachers.path import Linear
from teachers.space import DataSpace

ROUNDS = 41
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {
    "mlp 128 x 3, batch 128": ("mlp", (1, 8, 8), 128, {"width": 128, "depth": 3}),
    "mlp 256 x 4, batch 512": ("mlp", (1, 8, 8), 512, {"width": 256, "depth": 4}),
    "dit 64 x 4, 49 tokens, batch 32": ("dit", (1, 28, 28), 32, {"patch": 4, "width": 64, "depth": 4}),
}


@dataclass
class Case:
    """A student of random weights, and points ``[b, *shape]`` and times ``[b]``, a quarter of them with s = t."""

    student: Student
    x: Tensor
    s: Tensor
    t: Tensor
    w: Tensor

    @staticmethod
    def of(network: str, shape: tuple[int, ...], batch: int, arguments: dict[str, float]) -> Case:
        torch.manual_seed(0)
        space = DataSpace(shape)
        student = Student(NETWORKS[network](**arguments).build(space), space, Linear())
        for parameter in student.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        a, b = torch.rand(2, batch, dtype=torch.float64).sort(0).values
        b = torch.where(torch.rand(batch) < 0.25, a, b)
        x, w = torch.randn(2, batch, *shape)
        return Case(student.to(DEVICE), x.to(DEVICE), a.to(DEVICE), b.to(DEVICE), w.to(DEVICE))

    def u(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.student.mean_velocity(x, s, t, None)

    @property
    def along(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Primals and the Eulerian tangents."""
        return (self.x, self.s, self.t), (self.w, torch.ones_like(self.s), torch.zeros_like(self.t))


def plain(case: Case) -> Tensor:
    return case.u(case.x, case.s, case.s) - case.w


def through(case: Case) -> Tensor:
    u, du = derivative(case.u, *case.along)
    return u - case.w - du


def one_pass(case: Case) -> Tensor:
    u, du = stopped(case.u, *case.along, passes=1)
    return u - case.w - du


def two_passes(case: Case) -> Tensor:
    u, du = stopped(case.u, *case.along, passes=2)
    return u - case.w - du


def differences(case: Case) -> Tensor:
    u, du = stopped(case.u, *case.along, method="finite_difference")
    return u - case.w - du


def differences_through(case: Case) -> Tensor:
    u, du = derivative(case.u, *case.along, method="finite_difference")
    return u - case.w - du


FORMS: dict[str, Callable[[Case], Tensor]] = {
    "plain step": plain,
    "jvp, gradient through the derivative": through,
    "jvp, derivative stopped, one pass": one_pass,
    "jvp, derivative stopped, two passes": two_passes,
    "finite differences, derivative stopped": differences,
    "finite differences, gradient through the derivative": differences_through,
}


def step(case: Case, form: Callable[[Case], Tensor]) -> None:
    """Forward, loss, backward; no optimizer."""
    case.student.zero_grad()
    form(case).square().mean().backward()


def seconds(case: Case, form: Callable[[Case], Tensor]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(case, form)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(case: Case, form: Callable[[Case], Tensor]) -> int:
    """The largest number of bytes that one step has allocated at the same time."""
    case.student.zero_grad()
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(case, form)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(case, form)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def costs(case: Case) -> dict[str, tuple[float, float]]:
    """Time and memory of each form, of the plain step's."""
    ratios: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(-3, ROUNDS):
        took = {name: seconds(case, form) for name, form in FORMS.items()}
        if number >= 0:  # what comes before is warming up
            for name, value in took.items():
                ratios[name].append(value / took["plain step"])
    held = {name: memory(case, form) for name, form in FORMS.items()}
    return {name: (statistics.median(ratios[name]), held[name] / held["plain step"]) for name in FORMS}


def error(case: Case, h: float) -> float:
    """Of finite differences in float32, relative to forward mode in float64."""
    exact = Case(deepcopy(case.student).double(), case.x.double(), case.s, case.t, case.w.double())
    with torch.no_grad():
        slope = derivative(exact.u, *exact.along)[1]
        off = derivative(case.u, *case.along, method="finite_difference", h=h)[1] - slope
    return (off.square().mean() / slope.square().mean()).sqrt().item()


def table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def main() -> None:
    torch.set_num_threads(1)
    found = [costs(Case.of(*case)) for case in CASES.values()]
    print(f"Time / memory of a step, on {DEVICE.type}; the plain step is 1.\n")
    table(["form", *CASES], [[name, *(f"{c[name][0]:.2f} / {c[name][1]:.2f}" for c in found)] for name in FORMS])
    print("Relative error of finite differences in float32, by their step and the highest frequency of time.\n")
    high = {"4 pi": 4 * math.pi, "16 pi": 16 * math.pi, "1000": 1000.0}
    cases = {
        f"{network}, {name}": Case.of(network, shape, 128, {**arguments, "highest": value})
        for network, shape, _, arguments in list(CASES.values())[1:]
        for name, value in high.items()
    }
    steps = (1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4, 1e-4)
    table(["h", *cases], [[f"{h:g}", *(f"{error(case, h):.1e}" for case in cases.values())] for h in steps])


if __name__ == "__main__":
    main()
