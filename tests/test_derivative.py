"""Derivatives are the hand-made ones, gradients flow where they should, and the self-check tells right from wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import Changed, Exact, Wave, gaussian, normal, uniform
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.checkpoint import checkpoint

import distill.derivative
from distill.derivative import DerivativeError, Method, check, derivative, stopped
from distill.student import Student
from teachers.networks import NETWORKS
from teachers.path import Linear, expand_like
from teachers.space import Cond, DataSpace

close = torch.testing.assert_close
METHODS: tuple[Method, ...] = ("jvp", "finite_difference")
methods = pytest.mark.parametrize("method", METHODS)
B = 64
WAVE = Wave(3)

Point = tuple[Tensor, Tensor, Tensor]


def point(seed: int = 0) -> Point:
    """x [b, 3] and s < t, at least 0.05 away from each other and from the ends."""
    s = uniform(B, low=0.05, high=0.45, seed=seed)
    return normal(B, 3, seed=seed + 1), s, s + uniform(B, low=0.05, high=0.5, seed=seed + 2)


def eulerian(x: Tensor, s: Tensor, t: Tensor) -> Point:
    return normal(*x.shape, seed=5).to(x), torch.ones_like(s), torch.zeros_like(t)


def lagrangian(x: Tensor, s: Tensor, t: Tensor) -> Point:
    return torch.zeros_like(x), torch.zeros_like(s), torch.ones_like(t)


def by_hand(primals: Point, tangents: Point) -> Tensor:
    """Of `WAVE`, along one of the two directions."""
    w, along_s, along_t = tangents
    return expand_like(along_s, w) * WAVE.along(*primals, w) + expand_like(along_t, w) * WAVE.d_t(*primals)


directions = pytest.mark.parametrize("direction", [eulerian, lagrangian])


# --- against derivatives by hand


@methods
@directions
def test_is_the_derivative_by_hand(method: Method, direction: Callable[..., Point]) -> None:
    at = point()
    value, along = derivative(WAVE, at, direction(*at), method)
    close(value, WAVE(*at), atol=0, rtol=0)
    bound = 1e-13 if method == "jvp" else 1e-8
    exact = by_hand(at, direction(*at))
    assert (along - exact).abs().max() < bound
    other = by_hand(at, (lagrangian if direction is eulerian else eulerian)(*at))
    assert (along - other).abs().max() > 0.1


@methods
@directions
def test_stopped_is_the_same_without_a_gradient(method: Method, direction: Callable[..., Point]) -> None:
    at = point()
    value, along = stopped(WAVE, at, direction(*at), method)
    close(value, WAVE(*at), atol=0, rtol=0)
    assert (along - by_hand(at, direction(*at))).abs().max() < (1e-13 if method == "jvp" else 1e-8)


@methods
def test_single_precision_keeps_its_dtype(method: Method) -> None:
    """x float32 and times float64, as objectives have them; the default step suits float32."""
    x, s, t = point()
    at = x.float(), s, t
    value, along = derivative(WAVE, at, eulerian(*at), method)
    assert value.dtype == along.dtype == torch.float32
    exact = by_hand((x, s, t), eulerian(x, s, t))
    off = ((along - exact).square().mean() / exact.square().mean()).sqrt()
    assert off < (1e-6 if method == "jvp" else 2e-4)
    smaller = derivative(WAVE, at, eulerian(*at), "finite_difference", h=1e-5)[1]
    assert ((smaller - exact).square().mean() / exact.square().mean()).sqrt() > 2e-4


# --- finite differences: their order, and where they ask


def at_the_ends() -> Point:
    """Times inside, and on and near the ends and the diagonal: (s, t) each beside each."""
    times = torch.tensor([0, 0.003, 0.3, 0.303, 0.7, 0.999, 1], dtype=torch.float64)
    pairs = torch.cartesian_prod(times, times)
    s, t = pairs[pairs[:, 0] <= pairs[:, 1]].unbind(1)
    return normal(len(s), 3), s, t


@directions
def test_the_error_is_of_second_order_everywhere(direction: Callable[..., Point]) -> None:
    at = at_the_ends()
    exact = by_hand(at, direction(*at))

    def error(h: float) -> Tensor:
        return (derivative(WAVE, at, direction(*at), "finite_difference", h)[1] - exact).norm(dim=1)

    # below h = 0.0005 every row has room for its whole stencil, so that halving h divides its error by 4, or more
    assert (error(4e-4) / error(2e-4)).min() > 3.9
    shifted = derivative(WAVE, at, direction(*at), "finite_difference", 4e-4)[1]
    centred = (WAVE(*ahead(at, direction, 4e-4)) - WAVE(*ahead(at, direction, -4e-4))) / 8e-4
    one_sided = (WAVE(*ahead(at, direction, 4e-4)) - WAVE(*at)) / 4e-4
    inside = (torch.stack([at[1], 1 - at[2], at[2] - at[1]]) > 4e-4).all(0)
    close(shifted[inside], centred[inside], atol=1e-12, rtol=0)
    assert (shifted - centred).abs().max() > 1e-8  # the others are not centred,
    assert ((one_sided - exact).norm(dim=1) / error(4e-4)).min() > 10  # and of first order these would be off by more


def ahead(at: Point, direction: Callable[..., Point], h: float) -> Point:
    x, s, t = (p + h * d for p, d in zip(at, direction(*at), strict=True))
    return x, s, t


def test_a_stencil_without_room_is_a_shorter_one() -> None:
    """Error at most that of h everywhere, also where times leave less than h."""
    at = at_the_ends()
    for direction in (eulerian, lagrangian):
        exact = by_hand(at, direction(*at))
        off = derivative(WAVE, at, direction(*at), "finite_difference", 5e-3)[1] - exact
        assert off.abs().max() < 100 * 5e-3**2


@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_stay_in_the_unit_interval_and_in_order(direction: Callable[..., Point], dtype: torch.dtype) -> None:
    x, s, t = at_the_ends()
    rows = uniform(2, 500, seed=3).sort(0).values
    x, s, t = normal(len(s) + 500, 3), torch.cat([s, rows[0]]), torch.cat([t, rows[1]])
    s, t, h = s.to(dtype), t.to(dtype), 5e-3
    asked: list[Point] = []

    def spy(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        asked.append((x, s, t))
        return WAVE(x, s, t)

    derivative(spy, (x, s, t), direction(x, s, t), "finite_difference", h)
    assert len(asked) == 3
    corner = t < h / 5 if direction is eulerian else s > 1 - h / 5
    assert 0 < corner.sum() < 20
    for _, s_asked, t_asked in asked:
        assert s_asked.min() >= 0 and t_asked.max() <= 1 and s_asked.max() <= 1 and t_asked.min() >= 0
        assert (s_asked <= t_asked)[~corner].all()
    moved = 1 if direction is eulerian else 2
    assert all((this[moved] != (s, t)[moved - 1]).all() for this in asked[1:])


def test_other_directions_and_speeds() -> None:
    """Both times together; a time alone; a point alone; a tangent that differs by row."""
    x, s, t = at_the_ends()
    speed = uniform(len(s), low=-2, high=2)
    both = derivative(WAVE, (x, s, t), (0 * x, speed, speed), "finite_difference")[1]
    exact = derivative(WAVE, (x, s, t), (0 * x, speed, speed))[1]
    assert (both - exact).abs().max() < 1e-8
    asked: list[Tensor] = []

    def at_t(t: Tensor) -> Tensor:
        asked.append(t)
        return WAVE(x, s, t)

    alone = derivative(at_t, (t,), (speed,), "finite_difference")[1]
    near = torch.linspace(0.98, 1, len(t)).double()
    derivative(at_t, (near,), (speed,), "finite_difference", h=5e-3)
    assert len(asked) == 6 and torch.stack(asked).min() >= 0 and torch.stack(asked).max() <= 1
    assert (alone - expand_like(speed, x) * WAVE.d_t(x, s, t)).abs().max() < 1e-8
    for method in METHODS:  # None is no tangent, but keeps the order
        asked.clear()

        def at(s: Tensor, t: Tensor) -> Tensor:
            asked.append(t - s)
            return WAVE(x, s, t)

        found = derivative(at, (s, t), (None, torch.ones_like(t)), method)[1]
        assert torch.stack(asked).min() >= (0 if method == "jvp" else -2.1e-5)
        assert torch.stack(asked)[:, s < 0.9].min() >= 0
        assert (found - WAVE.d_t(x, s, t)).abs().max() < 1e-8
    w = normal(*x.shape)
    still = derivative(lambda x: WAVE(x, s, t), (x,), (w,), "finite_difference")[1]
    assert (still - (WAVE.along(x, s, t, w) - WAVE.along(x, s, t, 0 * w))).abs().max() < 1e-8


# --- gradients


def scaled(theta: Tensor) -> Callable[..., Tensor]:
    return lambda x, s, t: theta * WAVE(x, s, t)


@methods
@directions
def test_gradients_flow_through_value_and_derivative(method: Method, direction: Callable[..., Point]) -> None:
    at, theta = point(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    value, along = derivative(scaled(theta), at, direction(*at), method)
    (2 * value + 3 * along).sum().backward()
    exact = (2 * WAVE(*at) + 3 * by_hand(at, direction(*at))).sum(0)
    close(theta.grad, exact, atol=1e-7, rtol=0)


@methods
@pytest.mark.parametrize("passes", [1, 2])
def test_no_gradient_flows_through_a_stopped_derivative(method: Method, passes: int) -> None:
    at, theta = point(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    value, along = stopped(scaled(theta), at, eulerian(*at), method, passes=passes)
    assert value.requires_grad and not along.requires_grad
    (2 * value + 3 * along).sum().backward()
    close(theta.grad, 2 * WAVE(*at).sum(0))


@methods
def test_gradients_reach_the_point_and_the_tangent(method: Method) -> None:
    x, s, t = point()
    w = normal(B, 3, seed=8).requires_grad_(True)
    x.requires_grad_(True)
    _, along = derivative(WAVE, (x, s, t), (w, torch.ones_like(s), torch.zeros_like(t)), method)
    to_x, to_w = torch.autograd.grad(along.sum(), (x, w))
    exact = torch.autograd.grad(WAVE.along(x, s, t, w).sum(), (x, w))
    close(to_x, exact[0], atol=1e-5, rtol=0)
    close(to_w, exact[1], atol=1e-5, rtol=0)


# --- networks


SPACE = DataSpace((1, 8, 8), 10, (-1.0, 1.0))


def student(network: str = "mlp", fresh: bool = False, highest: float = 4 * math.pi, init: float = 0.1) -> Student:
    """Of random weights; fresh: a network that has been trained, with a gap embedding that has not."""
    made = NETWORKS[network](width=32, depth=2, highest=highest).build(SPACE)

    def fill(module: nn.Module) -> None:
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=init)

    if not fresh:
        fill(made)
    result = Student(made, SPACE, Linear())
    if not fresh:
        fill(result)
    return result


def untrained_gap(network: str = "mlp") -> Student:
    made = student(network)
    return Student(made.network, SPACE, Linear())


def batch(rows: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Cond, Tensor]:
    """x_s, s, t, cond, w with x_s and w float32; rows 0 to 2 at s = 0, t = 1 and s = t."""
    times = uniform(2, rows, seed=seed).sort(0).values
    s, t = times[0].clone(), times[1].clone()
    s[0], t[1] = 0, 1
    t[2] = s[2]
    shape = rows, *SPACE.shape
    return normal(*shape, seed=seed).float(), s, t, SPACE.cond_for(seed, rows), normal(*shape, seed=seed + 1).float()


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    module.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("network", NETWORKS)
def test_one_pass_and_two_agree(network: str) -> None:
    net = student(network).double()
    x, s, t, cond, w = batch()
    at, tangents = (x.double(), s, t), (w.double(), torch.ones_like(s), torch.zeros_like(t))

    def u(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return net.mean_velocity(x, s, t, cond)

    found = [stopped(u, at, tangents, passes=passes) for passes in (1, 2)]
    exact = attention_agrees_to = 0 if network == "mlp" else 1e-14  # fused in the second pass
    close(found[0][0], found[1][0], atol=attention_agrees_to, rtol=exact)
    close(found[0][1], found[1][1], atol=1e-12, rtol=0)
    target = found[0][1]
    gradients = [gradient(net, (value - target).square().mean()) for value, _ in found]
    close(gradients[0], gradients[1], atol=attention_agrees_to, rtol=exact)
    through = gradient(net, (lambda value, along: (value - along).square().mean())(*derivative(u, at, tangents)))
    assert (through - gradients[0]).norm() > 0.1 * gradients[0].norm()


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "derivative": derivative,
    "differences": lambda *a: derivative(*a, method="finite_difference"),
    "one pass": lambda *a: stopped(*a, passes=1),
    "two passes": lambda *a: stopped(*a, passes=2),
    "stopped differences": lambda *a: stopped(*a, method="finite_difference"),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_evaluations_have_the_same_dropout(form: str) -> None:
    """What is linear in x has its value as the derivative along x, if the same entries are dropped."""
    x = normal(B, 100)

    def dropped(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)

    torch.manual_seed(3)
    value, along = FORMS[form](dropped, (x,), (x,))
    after = torch.rand(5)
    close(along, value, atol=1e-9, rtol=0)
    torch.manual_seed(3)
    assert torch.equal(dropped(x), value)  # and one call's draws are taken from the generator
    assert torch.equal(torch.rand(5), after)
    assert (dropped(x) - value).abs().max() > 1


class Attention(nn.Module):
    """Of x with itself, fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.query = fused, nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2), x.unflatten(-1, (4, 4)).transpose(1, 2)
        if self.fused:
            return attention(q, k, k)
        return (q @ k.transpose(-1, -2) / 2).softmax(-1) @ k


@pytest.mark.parametrize("grad", [True, False])
def test_fused_attention_has_a_derivative(grad: bool) -> None:
    x, w = normal(4, 9, 16), normal(4, 9, 16, seed=1)
    fused, plain = Attention(True), Attention(False)
    plain.load_state_dict(fused.state_dict())
    with torch.set_grad_enabled(grad):
        for found, exact in zip(derivative(fused, (x,), (w,)), torch.func.jvp(plain, (x,), (w,)), strict=True):
            close(found, exact, atol=1e-13, rtol=0)
        with pytest.raises(NotImplementedError):  # without the engine
            torch.func.jvp(fused, (x,), (w,))


def test_the_derivative_of_attention_is_its_formula() -> None:
    """P = softmax(q k' / sqrt(d)), H = P * dS: d(P v) = P dv + H v - rowsum(H) P v."""
    (q, k, v), (dq, dk, dv) = ([normal(2, 3, 7, 4, seed=i + j) for i in range(3)] for j in (0, 3))
    p, ds = (q @ k.mT / 2).softmax(-1), (dq @ k.mT + q @ dk.mT) / 2
    h = p * ds
    expected = p @ dv + h @ v - h.sum(-1, keepdim=True) * (p @ v)
    close(derivative(attention, (q, k, v), (dq, dk, dv))[1], expected, atol=1e-13, rtol=0)
    assert (p @ dv + h @ v - expected).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["train", "eval, no gradient"])
@pytest.mark.parametrize("layer", ["attention", "encoder"])
def test_attention_layers_of_torch_have_a_derivative(layer: str, mode: str) -> None:
    made = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True, dtype=torch.float64)
    f = encoder if layer == "encoder" else lambda x: made(x, x, x, need_weights=False)[0]
    for module in (made, encoder):
        module.train(mode == "train")
    x, w = normal(4, 9, 16), normal(4, 9, 16, seed=1)
    with nullcontext() if mode == "train" else torch.no_grad():
        _, along = derivative(f, (x,), (w,))
        close(along, derivative(f, (x,), (w,), "finite_difference")[1], atol=1e-7, rtol=0)


def test_two_passes_allow_activation_checkpoints() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)).double()
    x, w = normal(5, 4), normal(5, 4, seed=1)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(plain, x, use_reentrant=False)

    def loss(f: Callable[[Tensor], Tensor], passes: int) -> Tensor:
        value, along = stopped(f, (x,), (w,), passes=passes)
        return (value - along).square().mean()

    close(gradient(plain, loss(checkpointed, 2)), gradient(plain, loss(plain, 2)), atol=1e-15, rtol=0)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        gradient(plain, loss(checkpointed, 1))


@pytest.mark.parametrize("form", FORMS)
def test_mixed_precision_trains_every_weight(form: str) -> None:
    """A weight cast where no gradient was wanted must not be used where one is."""
    net = student()
    x, s, t, cond, w = batch()
    with torch.autocast("cpu", torch.bfloat16):
        u, du = FORMS[form](
            lambda x, s, t: net.mean_velocity(x, s, t, cond), (x, s, t), (w, torch.ones_like(s), torch.zeros_like(t))
        )
        found = gradient(net, (u - w + 0 * du).float().square().mean())
    exact = gradient(net, (net.mean_velocity(x, s, t, cond) - w).square().mean())
    assert (found - exact).norm() < 0.03 * exact.norm()


# --- operations without forward mode


class NoJvp(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Inside(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


def resampled(x: Tensor) -> Tensor:
    return nn.functional.grid_sample(x, torch.zeros(len(x), 3, 3, 2).to(x), align_corners=False)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


UNSUPPORTED: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], list[str]]] = {
    "operation": (lambda: Inside(resampled), ["grid_sampler_2d (in Inside)", "replace it"]),
    "function without jvp": (lambda: Inside(NoJvp.apply), ["autograd.Function NoJvp (in Inside)", "jvp"]),
    "old function": (lambda: OldStyle.apply, ["autograd.Function OldStyle has", "setup_context"]),
    "old checkpoint": (lambda: lambda x: checkpoint(torch.sin, x, use_reentrant=True), ["use_reentrant=False"]),
    "batch norm": (lambda: nn.BatchNorm2d(8, dtype=torch.float64), ["add_", "(in BatchNorm2d)", "another norm"]),
    "group norm": (
        lambda: nn.Sequential(Inside(channels_last), nn.GroupNorm(2, 8, dtype=torch.float64)),
        ["group norm", "(in GroupNorm)", "contiguous()"],
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the old checkpoint's
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_operation_without_forward_mode_is_named(name: str) -> None:
    make, said = UNSUPPORTED[name]
    f, x = make(), normal(32, 8, 4, 4)
    for form in (derivative, stopped):
        with pytest.raises(DerivativeError) as refused:
            form(f, (x,), (x,))
        for part in [*said, "objective.derivative: finite_difference"]:
            assert part in str(refused.value)
        form(f, (x,), (x,), "finite_difference")  # as the message promises


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.t().view(-1),
        lambda x: x @ x,
        lambda x: torch.linalg.cholesky(-x @ x.T),
        lambda x: {}["missing"],
        lambda x: torch.sin(x, missing=1),
    ],
)
@methods
def test_other_errors_pass_through(wrong: Callable[[Tensor], Tensor], method: Method) -> None:
    x = normal(32, 8)
    with pytest.raises(Exception) as plain:
        wrong(x)
    with pytest.raises(type(plain.value)) as found:
        derivative(wrong, (x,), (x,), method)
    assert str(found.value) == str(plain.value)


# --- the self-check


class Float32Inside(nn.Module):
    """A foreign network: its time embedding and its norm are in float32 whatever the weights are."""

    def __init__(self, highest: float) -> None:
        super().__init__()
        self.omega = torch.linspace(0, math.log(highest), 16).exp()
        self.time, self.enter, self.leave = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        angle = s.float()[:, None] * self.omega + t.float()[:, None]
        h = self.enter(x.flatten(1)) + self.time(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        h = nn.functional.layer_norm(h.float(), (64,)).to(x.dtype)
        return self.leave(nn.functional.gelu(h)).reshape(x.shape)


CORRECT: dict[str, Callable[[], nn.Module]] = {
    **{f"{name}, random": lambda name=name: student(name) for name in NETWORKS},
    **{f"{name}, gap untrained": lambda name=name: untrained_gap(name) for name in NETWORKS},
    **{f"{name}, untrained": lambda name=name: student(name, fresh=True) for name in NETWORKS},
    "wide weights": lambda: student(init=1.0),
    "higher frequencies": lambda: student(highest=16 * math.pi),
    "float32 inside": lambda: Float32Inside(10.0),
}


@methods
@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("large", [False, True])
def test_correct_networks_pass(name: str, method: Method, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(distill.derivative, "_DOUBLE_UP_TO", 0)
    network = CORRECT[name]()
    for seed in range(5):
        check(network, *batch(seed=seed), method)


class Broken(nn.Module):
    """A student in whose network one layer's output is changed."""

    def __init__(self, made: Student, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made
        layer.register_forward_hook(lambda module, inputs, output: change(output))

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.made.mean_velocity(x, s, t, cond)


class WrongJvp(torch.autograd.Function):
    """Sine, with the derivative of minus sine."""

    sign = -1

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @classmethod
    def jvp(cls, ctx: torch.autograd.function.FunctionCtx, tangent: Tensor) -> Tensor:
        return cls.sign * ctx.saved_tensors[0].cos() * tangent


class RightJvp(WrongJvp):
    sign = 1


def hidden(made: Student, where: str, change: Callable[[Tensor], Tensor]) -> Broken:
    layer = made.network.time_embedding if where == "time" else made.gap if where == "gap" else made.network.enter
    assert isinstance(layer, nn.Module)
    return Broken(made, layer, change)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("make", [student, untrained_gap, lambda: student(fresh=True)])
@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("time", torch.Tensor.detach),
        ("gap", torch.Tensor.detach),
        ("time", WrongJvp.apply),
        ("enter", WrongJvp.apply),
        ("gap", WrongJvp.apply),
    ],
)
def test_wrong_derivatives_are_refused(
    make: Callable[[], Student],
    where: str,
    change: Callable[[Tensor], Tensor],
    large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if large:
        monkeypatch.setattr(distill.derivative, "_DOUBLE_UP_TO", 0)
    with pytest.raises(DerivativeError, match=r"hides its input .* finite_difference; .*teacher\.placement\.dtype"):
        check(hidden(make(), where, change), *batch())
    for other in (torch.Tensor.clone, RightJvp.apply):
        check(hidden(make(), where, other), *batch())
    check(hidden(make(), where, change), *batch(), "finite_difference")  # does not ask for it


class OnlyTheEnd(nn.Module):
    """Its end time alone is detached; its start time is not."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        t = t.detach() if self.detach else t
        return x * expand_like(torch.sin(s + 2 * t), x)


def test_both_directions_are_checked() -> None:
    check(OnlyTheEnd(False), *batch())
    with pytest.raises(DerivativeError, match=r"along \(0, 0, 1\)"):
        check(OnlyTheEnd(True), *batch())


def test_the_message_has_both_numbers() -> None:
    class Half(nn.Module):
        def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return -torch.arange(1, 65).to(x).reshape(1, 8, 8) * expand_like(s + s.detach(), x)

    with pytest.raises(DerivativeError, match=r"jvp .* is -64 where central differences give -128: an error of 0.5 wh"):
        check(Half(), *batch())


def test_times_in_single_precision_are_as_good() -> None:
    x, s, t, cond, w = batch()
    for method in METHODS:
        check(student(), x, s.float(), t.float(), cond, w, method)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_finite_differences_refuse_a_thousand_t(network: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(distill.derivative, "_DOUBLE_UP_TO", 0)
    for fast in (student(network, highest=1000.0), student(network, highest=1000.0, fresh=True)):
        check(fast, *batch())
        with pytest.raises(DerivativeError, match=r"1000 t.*objective\.derivative: jvp"):
            check(fast, *batch(), "finite_difference")


@pytest.mark.parametrize("large", [False, True])
def test_finite_differences_refuse_half_precision(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(distill.derivative, "_DOUBLE_UP_TO", 0)
    net = student().bfloat16()

    class Half(nn.Module):
        """Computes in bfloat16 whatever it is made of."""

        def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return net.mean_velocity(x.bfloat16(), s, t, cond).to(x.dtype)

    with pytest.raises(DerivativeError, match="below float32"):
        check(Half(), *batch(), "finite_difference")


@methods
def test_nothing_to_compare_is_no_disagreement(method: Method) -> None:
    """No derivative, no value: 0 is not divided by 0. Not a number is no agreement."""

    def constant(c: float) -> nn.Module:
        module = nn.Module()
        module.mean_velocity = lambda x, s, t, cond: torch.full_like(x, c)
        return module

    for c in (0.0, 1.0, 1e6):
        check(constant(c), *batch(), method)
    with pytest.raises(DerivativeError):
        check(constant(math.nan), *batch(), method)


@methods
def test_rounding_beside_a_slope_of_next_to_nothing_is_no_disagreement(method: Method) -> None:
    class Slow(nn.Module):
        def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return x * expand_like(1 + 1e-4 * t, x)

    check(Slow(), *batch(), method)


@methods
def test_plain_objects_are_checked_as_they_are(method: Method) -> None:
    law = gaussian()
    x, s, t = point()
    w = law.velocity(x, s)
    check(Exact(law), x, s, t, None, w, method)
    wrong = Changed(Exact(law), lambda u, x, s, t: u + WAVE(x, s.detach(), t))
    if method == "jvp":
        with pytest.raises(DerivativeError):
            check(wrong, x, s, t, None, w)
    else:
        check(wrong, x, s, t, None, w, method)


class Rate(nn.Module):
    """Its only weight says how fast it turns; it notes what it is asked with."""

    asked: set[torch.dtype]

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.asked = nn.Parameter(torch.tensor([rate])), set()

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.asked.add(x.dtype)
        return x * expand_like(torch.sin(self.rate * s), x)

    def __deepcopy__(self, memo: object) -> Rate:
        copy = Rate(self.rate.item())
        copy.asked = self.asked
        return copy


def test_the_weights_are_the_networks_own() -> None:
    check(Rate(5.0), *batch(), "finite_difference")
    with pytest.raises(DerivativeError):
        check(Rate(1000.0), *batch(), "finite_difference")


def test_a_large_network_is_compared_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, plain = Rate(5.0), Rate(5.0), Rate(5.0)
    check(small, *batch())
    assert small.asked == {torch.float32, torch.float64}
    check(type("Plain", (), {"mean_velocity": plain.mean_velocity})(), *batch())
    assert plain.asked == {torch.float32, torch.float64}
    monkeypatch.setattr(distill.derivative, "_DOUBLE_UP_TO", 0)
    check(large, *batch())
    assert large.asked == {torch.float32}


class WrongInRows(nn.Module):
    """Its start time is detached in the first rows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x * expand_like(torch.sin(3 * torch.cat([s[: self.count].detach(), s[self.count :]])), x)


def test_one_row_of_four_may_be_singular() -> None:
    for count in (0, 1):
        check(WrongInRows(count), *batch())
    for count, rows in ((2, 4), (3, 4), (1, 2), (1, 1)):
        x, s, t, cond, w = batch(rows=4)
        with pytest.raises(DerivativeError):
            check(WrongInRows(count), x[:rows], s[:rows], t[:rows], cond, w[:rows])


def test_at_most_four_samples_are_asked_for() -> None:
    class Spy(nn.Module):
        rows: list[int] = []  # noqa: RUF012

        def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
            assert cond is not None
            self.rows += [len(v) for v in (x, s, t, *cond.values())]
            assert cond["text"].dtype == x.dtype and cond["class"].dtype == torch.int64
            return x * cond["text"].mean((1, 2))[:, None, None, None] * expand_like(s * t, x)

    spy = Spy()
    x, s, t, cond, w = batch(rows=9)
    assert cond is not None
    check(spy, x, s, t, {**cond, "text": torch.ones(9, 3, 5)}, w)
    assert set(spy.rows) == {4}
    x, s, t, cond, w = batch(rows=3)
    assert cond is not None
    spy.rows.clear()
    check(spy, x, s, t, {**cond, "text": torch.ones(3, 3, 5)}, w)
    assert set(spy.rows) == {3}


# --- nothing else is changed


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    def state() -> list[object]:
        backends = torch.backends
        return [
            {k: v.tolist() for k, v in module.state_dict().items()},
            [m.training for m in module.modules()],
            [p.grad is None and p.requires_grad for p in module.parameters()],
            torch.random.get_rng_state().tolist(),
            backends.mha.get_fastpath_enabled(),
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            torch.is_grad_enabled(),
        ]

    before = state()
    yield
    assert state() == before


class Drawing(nn.Module):
    """Takes from the global generator whenever it is called."""

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x + 0 * torch.rand(1).to(x)


@methods
@pytest.mark.parametrize("training", [True, False])
def test_nothing_global_is_changed(method: Method, training: bool) -> None:
    net = student("dit").train(training)
    net.network.blocks[0].train(not training)
    torch.backends.mha.set_fastpath_enabled(True)  # as it is by default
    at, wrong = batch(), hidden(student(fresh=True), "time", torch.Tensor.detach)
    with unchanged(net):
        check(net, *at, method)
    with unchanged(wrong), pytest.raises(DerivativeError):
        check(wrong, *at)
    with unchanged(net), pytest.raises(DerivativeError):
        stopped(NoJvp.apply, (at[0],), (at[0],))
    with unchanged(net):
        check(Drawing(), *at, method)
    with pytest.raises(AssertionError), unchanged(net):
        Drawing().mean_velocity(*at[:4])


def test_dropout_is_off_in_the_check() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.drop = student(), nn.Dropout(0.5)

        def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return self.drop(self.made.mean_velocity(x, s, t, cond))

    net = Dropped()
    with unchanged(net):
        check(net, *batch())
