"""bfloat16 where it is enough, float32 where it is not; over networks and objectives, against float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import TINY as MODELS
from helpers import TINY
from small_networks import CONFIGS, drawn, student, teacher
from torch import Tensor, nn

from distill.cli import main
from distill.derivative import DerivativeError, check, derivative, stopped
from distill.objectives import OBJECTIVES
from distill.objectives.lagrangian import Lagrangian
from distill.student import Student, StudentConfig
from distill.training.precision import caution, mixed
from teachers.adapters.module import from_module
from teachers.adapters.native import Native
from teachers.guidance import guided
from teachers.networks.diffusers import DiffusersNetwork
from teachers.space import DataSpace
from teachers.velocity import Teacher

# of diffusers itself, at Chroma's and Mochi's networks
pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

CPU = torch.device("cpu")
FEW = ("mlp", "dit", "sit", "adm_unet", "SD3Transformer2DModel", "UNet2DConditionModel")
"""One of each kind."""
T = torch.tensor([0.5, 0.5001], dtype=torch.float64)  # one number to bfloat16

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Teacher]:
    """By name, each made once."""
    made: dict[str, Teacher] = {}
    folder = tmp_path_factory.mktemp("teachers")

    def get(name: str) -> Teacher:
        if name not in made:
            made[name] = teacher(name, folder / name)
        return made[name]

    return get


EMBEDDERS = ("TimeEmbedding", "TimestepEmbedder", "TimestepEmbedding", "SecondTime", "_SecondTime")


def of_times(net: Student) -> list[nn.Module]:
    """The embeddings of times, steps and scales."""
    found = {part for part in net.modules() if type(part).__name__ in EMBEDDERS}
    for part in net.modules():
        if isinstance(part, DiffusersNetwork):
            found |= set(part._embedders())
    return list(found)


# --- what is bfloat16 and what is not


@pytest.mark.parametrize("name", [*CONFIGS, *MODELS])
def test_times_are_embedded_as_in_float32(name: str, teachers: Callable[[str], Teacher]) -> None:
    """What autocast makes of the rest of the network does not reach them: second times and scales too, bit for bit."""
    of = teachers(name)
    net = student(of)
    draw = drawn(OBJECTIVES["flow_matching"](), of, 2)

    def embedded() -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [part.register_forward_hook(lambda part, given, said: seen.append(said)) for part in of_times(net)]
        if hasattr(net.network, "_embedding"):
            seen.append(net.network._embedding(T, draw.cond, None))
        net.mean_velocity(draw.x_s, T, T + T - 0.4, draw.cond)
        for hook in hooks:
            hook.remove()
        return seen

    exact = embedded()
    with mixed("bfloat16", CPU):
        found = embedded()
    assert len(exact) > 1 and len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    assert torch.equal(*T.bfloat16()) and any(not torch.equal(*one[:2]) for one in exact)


@pytest.mark.parametrize("name", [*CONFIGS, *MODELS])
def test_products_are_bfloat16_and_what_comes_out_float32(name: str, teachers: Callable[[str], Teacher]) -> None:
    of = teachers(name)
    net = student(of)
    draw = drawn(OBJECTIVES["flow_matching"](), of, 2)
    exact = net.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond)
    seen: list[torch.dtype] = []
    lists = [part for part in net.network.modules() if isinstance(part, (nn.ModuleList, nn.ModuleDict))]
    layers = {m for part in lists for m in part.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for layer in layers:
        layer.register_forward_hook(lambda layer, given, said: seen.append(said.dtype))
    with mixed("bfloat16", CPU):
        u = net.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond)
        v = of(draw.x_s, draw.s, draw.cond)
        more = guided(of, 2.0, (0.0, 1.0), of)(draw.x_s, draw.s, draw.cond)
    assert seen.count(torch.bfloat16) >= 0.7 * len(seen) > 0 or not layers  # but embeddings inside of blocks
    assert u.dtype == v.dtype == more.dtype == torch.float32
    error = (u - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


def test_the_mode_is_that_of_the_recipe() -> None:
    with mixed("float32", CPU):
        assert not torch.is_autocast_enabled("cpu")
    with mixed("bfloat16", CPU):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert not torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")


class Net(nn.Module):
    """Of an author who knows nothing of this; with norms whose weights are float32."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32))
        self.enter, self.norm, self.leave = nn.Linear(6, 32), nn.GroupNorm(4, 32), nn.Conv1d(32, 6, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(torch.stack([t, 10 * t], 1))
        h = self.enter(x) + time
        return self.leave(self.norm(h.to(self.enter(x).dtype)[:, :, None]))[:, :, 0]


def test_a_module_of_ones_own() -> None:
    net = Net()
    of = from_module(net, DataSpace((6,)), second_time="time")
    learner = StudentConfig().build(of, of.space, 0)
    x, s, w = torch.randn(4, 6), torch.tensor([0.5, 0.5001, 0.2, 0.7], dtype=torch.float64), torch.randn(4, 6)
    seen: list[Tensor] = []
    net.time.register_forward_hook(lambda part, given, said: seen.append(said))
    exact = of(x, s, None)
    with mixed("bfloat16", CPU):
        v = of(x, s, None)
        check(learner, x, s, s + 0.2, None, w)
    assert torch.equal(seen[0], seen[1])
    assert v.dtype == torch.float32 and 0 < (v - exact).norm() < 0.02 * exact.norm()


def test_a_velocity_that_is_no_module() -> None:
    weight = torch.randn(6, 6)
    of = Teacher(velocity=lambda x, t, cond: x @ weight, space=DataSpace((6,)))
    x, t = torch.randn(4, 6), torch.rand(4)
    with mixed("bfloat16", CPU):
        assert (x @ weight).dtype == torch.bfloat16
        assert of(x, t, None).dtype == torch.float32


# --- training


def graded(objective: Any, net: Student, target: Student, of: Teacher, precision: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of all weights."""
    net.zero_grad()
    draw = drawn(objective, of)
    with mixed(precision, CPU):
        loss = objective.loss(net, target, of, draw)
        assert all(v.dtype == torch.float32 for v in loss.summands.values())
        value = torch.stack([*loss.summands.values()]).sum(0).mean()
    value.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    assert all(g.dtype == torch.float32 for g in found)
    return value.detach(), torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize(
    "name", ["flow_matching", "lagrangian", "eulerian", "mean_flow", "shortcut", "semigroup", "consistency"]
)
@pytest.mark.parametrize("network", FEW)
def test_trains_as_float32_does(network: str, name: str, teachers: Callable[[str], Teacher]) -> None:
    of, objective = teachers(network), OBJECTIVES[name]()
    net = student(of, objective.kind, objective.finest)
    target = student(of, objective.kind, objective.finest, seed=5)
    value, gradient = graded(objective, net, target, of, "float32")
    found, other = graded(objective, net, target, of, "bfloat16")
    assert found != value and abs(found / value - 1) < 0.03
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.99
    reached = gradient != 0
    assert (other[reached] != 0).float().mean() > 0.99


@pytest.mark.parametrize("network", FEW)
def test_a_pass_without_gradients_leaves_nothing_behind(network: str, teachers: Callable[[str], Teacher]) -> None:
    of = teachers(network)
    net = student(of)
    draw = drawn(OBJECTIVES["flow_matching"](), of)
    with mixed("bfloat16", CPU):
        with torch.no_grad():
            net.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond)
        net.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_without_bfloat16_is_told_of(
    able: bool, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    assert caution("float32", CPU) is None and caution("bfloat16", torch.device("cuda")) is None
    assert main(["run", "toy/lagrangian", *TINY, "trainer.steps=1", "trainer.precision=bfloat16"]) == 0
    assert ("set trainer.precision=float32" in " ".join(capsys.readouterr().out.split())) == (not able)


# --- derivatives


@pytest.mark.parametrize("network", FEW)
def test_differences_are_those_of_float32(network: str, teachers: Callable[[str], Teacher]) -> None:
    of = teachers(network)
    net = student(of)
    draw = drawn(Lagrangian(), of)

    def f(t: Tensor) -> Tensor:
        return net(draw.x_s, draw.s, t, draw.cond)

    for form in (derivative, stopped):
        exact = form(f, (draw.t,), (torch.ones_like(draw.t),), "finite_difference")
        with mixed("bfloat16", CPU):
            found = form(f, (draw.t,), (torch.ones_like(draw.t),), "finite_difference")
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1])


@pytest.mark.parametrize("network", FEW)
def test_forward_mode_gives_float32_near_the_exact_one(network: str, teachers: Callable[[str], Teacher]) -> None:
    of = teachers(network)
    net = student(of)
    draw = drawn(Lagrangian(), of)
    along = (draw.t,), (torch.ones_like(draw.t),)
    exact = derivative(lambda t: net(draw.x_s, draw.s, t, draw.cond), *along)[1]
    with mixed("bfloat16", CPU):
        found = derivative(lambda t: net(draw.x_s, draw.s, t, draw.cond), *along)[1]
    assert found.dtype == torch.float32
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize("network", ["digits", "mlp", "dit", "sit"])
def test_the_check_at_the_start_passes(network: str, method: Any, teachers: Callable[[str], Teacher]) -> None:
    of = Native(path="digits").load() if network == "digits" else teachers(network)
    net = StudentConfig().build(of, of.space, 0) if network == "digits" else student(of)
    draw = drawn(Lagrangian(), of)
    w = torch.randn(draw.x_s.shape, generator=torch.Generator().manual_seed(7))
    with mixed("bfloat16", CPU):
        check(net, draw.x_s, draw.s, draw.t, draw.cond, w, method)


def test_the_check_still_refuses() -> None:
    """What computes in half precision by itself is not helped by float32 around it."""
    of = Native(path="digits").load()
    net, draw = StudentConfig().build(of, of.space, 0).bfloat16(), drawn(Lagrangian(), of)

    class Half(nn.Module):
        def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Any) -> Tensor:
            return net.mean_velocity(x.bfloat16(), s, t, cond).to(x.dtype)

    with mixed("bfloat16", CPU), pytest.raises(DerivativeError, match="below float32"):
        check(Half(), draw.x_s, draw.s, draw.t, draw.cond, torch.randn_like(draw.x_s), "finite_difference")
