"""Blocks that recompute give the gradients of blocks that do not, and keep less; over networks and objectives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import TINY
from helpers import environment
from safetensors.torch import load_file
from small_networks import CONFIGS, drawn, student, teacher
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from distill.derivative import derivative, stopped
from distill.lora import LoRA
from distill.objectives import OBJECTIVES
from distill.objectives.base import Objective
from distill.objectives.eulerian import Eulerian
from distill.objectives.lagrangian import Lagrangian
from distill.student import Student, StudentConfig
from distill.training.ema import averaged
from distill.training.precision import mixed
from distill.training.recompute import recompute
from teachers.networks.base import blocks
from teachers.velocity import Teacher

# of diffusers itself, at Chroma's and Mochi's networks
pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

close = torch.testing.assert_close

TRAINED: dict[str, Objective] = {
    "plain": OBJECTIVES["flow_matching"](),
    "two passes": OBJECTIVES["mean_flow"](),
    "through the derivative": Lagrangian(),
    "through both": Eulerian(gradient="full"),
    "through the input": OBJECTIVES["consistency_trajectory"](),
}
INSIDE = ("DiTTransformer2DModel",)
"""Whose blocks embed the time themselves: a second time comes in by a hook, past the border of the block."""


def kept(compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What it gives, and the bytes of all that is kept for the backward pass."""
    storages: dict[int, int] = {}
    alive = []

    def pack(v: Tensor) -> Tensor:
        alive.append(v)
        while is_functorch_wrapped_tensor(v):
            v = get_unwrapped(v)
        if not v._is_zerotensor():
            storages[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return alive[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        found = compute()
    return found, sum(storages.values())


def graded(objective: Any, net: Student, of: Teacher, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients by name, bytes kept."""
    net.zero_grad()
    draw = drawn(objective, of, dtype=dtype)
    value, size = kept(lambda: torch.stack([*objective.loss(net, net, of, draw).summands.values()]).sum(0).mean())
    value.backward()
    return value.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, size


def same(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    """Beside the largest of all: biases before a norm have a gradient that is rounding alone."""
    assert found.keys() == exact.keys()
    largest = max(float(g.abs().max()) for g in exact.values())
    assert 0 < largest < float("inf")
    assert max(float((found[name] - exact[name]).abs().max()) for name in exact) <= tolerance * largest


def pair(of: Teacher) -> tuple[Student, Student]:
    """A student, and one that recomputes."""
    net = student(of)
    other = deepcopy(net)
    recompute(other.network)
    return net, other


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_without_and_less_is_kept(name: str, trained: str, tmp_path: Path) -> None:
    of = teacher(name, tmp_path)
    net, other = pair(of)
    for part in (of.network, net, other):
        assert part is not None
        part.double()
    value, exact, size = graded(TRAINED[trained], net, of, torch.float64)
    again, found, less = graded(TRAINED[trained], other, of, torch.float64)
    assert torch.equal(again, value)
    same(found, exact, 1e-10)
    assert less < 0.5 * size


@pytest.mark.parametrize("name", TINY)
def test_so_it_is_with_networks_of_diffusers(name: str, tmp_path: Path) -> None:
    of = teacher(name, tmp_path / "folder")
    net, other = pair(of)
    # Chroma's own gradient through the derivative is not a number
    for trained in ("two passes", *(["through the derivative"] if not name.startswith("Chroma") else [])):
        value, exact, size = graded(TRAINED[trained], net, of, torch.float32)
        again, found, less = graded(TRAINED[trained], other, of, torch.float32)
        assert torch.equal(again, value)
        same(found, exact, 2e-6)
        assert less < 0.65 * size or (name in INSIDE and trained != "two passes")


def test_in_mixed_precision(tmp_path: Path) -> None:
    of = teacher("dit", tmp_path)
    net, other = pair(of)
    with mixed("bfloat16", torch.device("cpu")):
        for trained in TRAINED.values():
            value, exact, size = graded(trained, net, of, torch.float32)
            again, found, less = graded(trained, other, of, torch.float32)
            assert torch.equal(again, value)
            same(found, exact, 1e-6)
            assert less < 0.5 * size


def test_of_an_adapted_student(tmp_path: Path) -> None:
    of = teacher("sit", tmp_path)
    net, other = (StudentConfig(lora=LoRA(rank=2)).build(of, of.space, 0) for _ in range(2))
    for p in (*net.parameters(), *other.parameters()):
        if p.requires_grad:  # at first nothing is added
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    recompute(other.network)
    for trained in ("plain", "through the derivative"):
        value, exact, size = graded(TRAINED[trained], net, of, torch.float32)
        again, found, less = graded(TRAINED[trained], other, of, torch.float32)
        assert torch.equal(again, value)
        same(found, exact, 1e-6)
        assert less < 0.6 * size


# --- every way of asking for a derivative


@pytest.mark.parametrize("form", ["one pass", "two passes", "differences", "gradients", "gradients of differences"])
def test_every_form_of_a_derivative(form: str, tmp_path: Path) -> None:
    of = teacher("dit", tmp_path)
    net, other = pair(of)
    draw = drawn(Lagrangian(), of)

    def loss(net: Student) -> Tensor:
        at = (lambda t: net(draw.x_s, draw.s, t, draw.cond)), (draw.t,), (torch.ones_like(draw.t),)
        if form.startswith("gradients"):
            u, du = derivative(*at, "finite_difference" if "differences" in form else "jvp")
        else:
            method = "finite_difference" if form == "differences" else "jvp"
            u, du = stopped(*at, method, 1 if form == "one pass" else 2)  # type: ignore[arg-type]
        return (u + du).square().mean()

    (value, size), (again, less) = kept(lambda: loss(net)), kept(lambda: loss(other))
    assert torch.equal(value, again)
    exact, found = (torch.autograd.grad(v, list(n.parameters()), allow_unused=True)
                    for v, n in ((value, net), (again, other)))  # fmt: skip
    for one, two in zip(found, exact, strict=True):
        close(one, two, atol=1e-5, rtol=1e-5)
    assert less < 0.3 * size


# --- blocks of every form


class Odd(nn.Module):
    """Tensors, None, keywords and numbers in; tensors, None and texts out; noise and a hook inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 6)
        self.drop = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, h: Tensor, none: None, told: dict[str, Any], *, power: int, scale: Tensor) -> Any:
        self.calls += 1
        assert none is None and told["name"] == "x" and told["class"].dtype == torch.int64
        h = h + self.second(self.drop(torch.tanh(self.first(h)) ** power)) * scale * told["class"][:, None]
        return h, (told["side"] * scale, None, "text")


class Odds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lists = nn.ModuleList([nn.ModuleList([Odd()]), nn.ModuleDict({"a": Odd(), "b": Odd()})])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        side, label = t[:, None], torch.arange(len(x))
        for block in blocks(self):
            x, (side, none, text) = block(
                x, None, {"name": "x", "class": label, "side": side}, power=2, scale=1 + t[:, None].sin()
            )
            assert none is None and text == "text"
        return x * side


def of_odds(net: nn.Module, form: str) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    x, t, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 6), (5,), (5, 6)))
    if form == "value":
        found = net(x, t).square().mean()
    else:
        u, du = derivative(net, (x, t), (w, torch.ones_like(t)))
        found = (u.square() + (du - 1).square()).mean()
    return found, list(torch.autograd.grad(found, list(net.parameters())))


@pytest.mark.parametrize("form", ["value", "derivative"])
def test_a_block_of_any_form_with_dropout(form: str) -> None:
    torch.manual_seed(1)
    net = Odds().double()
    other = deepcopy(net)
    recompute(other)
    assert len(list(blocks(other))) == 3
    value, exact = of_odds(net, form)
    again, found = of_odds(other, form)
    assert torch.equal(value, again)
    for one, two in zip(found, exact, strict=True):
        close(one, two, atol=1e-12, rtol=1e-12)
    assert [block.calls for block in blocks(net)] == [1] * 3
    assert [block.calls for block in blocks(other)] == [2] * 3  # all were recomputed


@pytest.mark.parametrize("form", ["value", "derivative"])
def test_a_hook_for_one_call_is_there_again(form: str) -> None:
    """As networks of other packages are told of a second time; with forward mode in it too."""

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odds = Odds()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            shift = torch.cos(3 * t)[:, None]
            hook = list(blocks(self))[1].first.register_forward_hook(lambda part, given, said: said + shift)
            try:
                return self.odds(x, t)
            finally:
                hook.remove()

    torch.manual_seed(1)
    net = Told().double()
    other = deepcopy(net)
    recompute(other)
    value, exact = of_odds(net, form)
    again, found = of_odds(other, form)
    assert torch.equal(value, again)
    for one, two in zip(found, exact, strict=True):
        close(one, two, atol=1e-12, rtol=1e-12)
    assert not any(part._forward_hooks for part in other.modules())


# --- what stays as it is


def test_nothing_is_recomputed_without_gradients() -> None:
    net = Odds().double()
    recompute(net)
    x, t = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    with torch.no_grad():
        net(x, t)
        derivative(net, (x, t), (x, t))
    assert [block.calls for block in blocks(net)] == [2] * 3


def test_names_weights_and_copies(tmp_path: Path) -> None:
    of = teacher("adm_unet", tmp_path)
    net, other = pair(of)
    recompute(other.network)  # once more is as once
    assert list(net.state_dict()) == list(other.state_dict())
    assert [type(part).__name__ for part in net.modules()] == [type(part).__name__ for part in other.modules()]
    assert all(isinstance(two, type(one)) for one, two in zip(net.modules(), other.modules(), strict=True))
    assert len(list(blocks(other.network))) > 10
    for copy in (deepcopy(other), averaged(other, 0.9).module):
        with torch.no_grad():
            for p in copy.parameters():
                p.zero_()
        draw = drawn(Lagrangian(), of)
        assert not copy.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond).any()
        assert other.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond).any()


# --- several processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return worked(tmp_path_factory.mktemp("alone") / "weights", "single", [])


def worked(out: Path, mode: str, launcher: list[str]) -> dict[str, Tensor]:
    worker = Path(__file__).parent / "recompute_worker.py"
    done = subprocess.run([sys.executable, *launcher, str(worker), str(out), mode],
                          env=environment(PYTHONFAULTHANDLER="1"), capture_output=True, text=True,
                          timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr[-9000:]
    return load_file(out)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_several_processes_take_the_steps_of_one(mode: str, alone: dict[str, Tensor], tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = worked(tmp_path / "weights", mode, torchrun)
    assert found.keys() == alone.keys()
    for name, exact in alone.items():
        close(found[name], exact, atol=1e-12, rtol=0)
