"""Backbones: shapes, dtypes, where a second time enters, classes and no class, derivatives; over all of NETWORKS."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import normal, uniform
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.fields import FieldError
from teachers.networks import NETWORKS
from teachers.networks.base import Network
from teachers.networks.embeddings import TimeEmbedding
from teachers.space import DataSpace

IMAGE, VECTOR = DataSpace((1, 8, 8), 10, (-1.0, 1.0)), DataSpace((2,))
networks = pytest.mark.parametrize("name", NETWORKS)
cases = pytest.mark.parametrize(
    ("name", "space"),
    [pytest.param(name, space, id=f"{name}-{space.shape}") for name in NETWORKS for space in (IMAGE, VECTOR)
     if space is IMAGE or name != "dit"],
)  # fmt: skip
close = torch.testing.assert_close


def built(name: str, space: DataSpace, seed: int = 0, **config: Any) -> Network:
    """A small network whose every weight is random, as after training: nothing hides behind a zero layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name](**{"width": 16, "depth": 3, **config}).build(space)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.4)
    return network.double()


def arguments(space: DataSpace, b: int = 5) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
    return normal(b, *space.shape), uniform(b, seed=1), space.cond_for(3, b)


def second(network: Network, b: int = 5) -> tuple[Tensor, Tensor]:
    """A shift and an end time."""
    return normal(b, network.time_embedding.out.out_features, seed=5), uniform(b, seed=6)


def distance(a: Tensor, b: Tensor) -> float:
    """The smallest over the rows of the largest difference: above zero if every row differs."""
    return (a - b).flatten(1).abs().amax(1).min().item()


def after_blocks(network: Network, *args: Any) -> list[Tensor]:
    """What went into the first block and what came out of each, then the network's output."""
    seen: list[Tensor] = []
    hooks = [network.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda module, inputs, output: seen.append(output))
              for block in network.blocks]  # fmt: skip
    seen.append(network(*args))
    for hook in hooks:
        hook.remove()
    assert len(seen) == network.depth + 2
    return seen


# --- the call


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("times", [torch.float32, torch.float64])
def test_output_has_the_shape_and_dtype_of_the_point(
    name: str, space: DataSpace, dtype: torch.dtype, times: torch.dtype
) -> None:
    x, t, cond = arguments(space)
    network = built(name, space).to(dtype)
    end = second(network)[1].to(times)
    for out in (network(x.to(dtype), t.to(times), cond), network(x.to(dtype), t.to(times), cond, None, end, 1)):
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert out.isfinite().all()


@cases
def test_rows_do_not_mix(name: str, space: DataSpace) -> None:
    x, t, cond = arguments(space)
    network = built(name, space)
    shift, end = second(network)
    args = [x, t, shift, end]
    others = [torch.cat([a[2:3], a[:2] + 1]) for a in args]
    label, other = (None, None) if cond is None else ({"class": cond["class"]}, {"class": cond["class"][[2, 0, 1]]})

    def at(rows: list[Tensor], label: dict[str, Tensor] | None) -> Tensor:
        return network(rows[0], rows[1], label, rows[2], rows[3], 1)

    whole, mixed = at(args, label), at(others, other)
    close(mixed[0], whole[2], atol=1e-12, rtol=0)
    assert distance(mixed[1:], whole[:2]) > 1e-3


@cases
def test_point_time_class_and_shift_all_enter(name: str, space: DataSpace) -> None:
    x, t, cond = arguments(space)
    network = built(name, space)
    shift, _ = second(network)
    plain = network(x, t, cond)
    assert distance(network(x + 0.1, t, cond), plain) > 1e-4
    assert distance(network(x, t + 0.1, cond), plain) > 1e-4
    assert distance(network(x, t, cond, shift), plain) > 1e-4
    assert torch.equal(network(x, t, cond, torch.zeros_like(shift)), plain)
    if cond:
        assert distance(network(x, t, {"class": cond["class"] * 0 + 1}), plain) > 1e-4


@networks
def test_shift_is_added_to_the_time_embedding(name: str) -> None:
    """Shifting by the difference of two embeddings is the same as calling at the other time."""
    x, t, cond = arguments(IMAGE)
    network = built(name, IMAGE)
    other = uniform(5, seed=9)
    shift = network.time_embedding(other) - network.time_embedding(t)
    close(network(x, t, cond, shift), network(x, other, cond), atol=1e-12, rtol=0)
    assert distance(network(x, t, cond, -shift), network(x, other, cond)) > 1e-3


# --- the end time


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_equal_times_the_end_changes_no_bit(name: str, space: DataSpace, dtype: torch.dtype) -> None:
    x, t, cond = arguments(space)
    network = built(name, space).to(dtype)
    shift, end = (value.to(dtype) for value in second(network))
    for given in (None, shift):
        plain = network(x.to(dtype), t, cond, given)
        for split in range(network.depth + 1):
            assert torch.equal(network(x.to(dtype), t, cond, given, t.clone(), split), plain)
            assert distance(network(x.to(dtype), t, cond, given, end, split), plain) > 1e-3


@cases
def test_blocks_before_the_split_see_t_and_all_after_it_the_end(name: str, space: DataSpace) -> None:
    """Bit for bit what the network at t gives before the split; from there on a function of the end time alone."""
    x, t, cond = arguments(space)
    network = built(name, space)
    shift, end = second(network)
    at_t, at_end = (after_blocks(network, x, time, cond, shift) for time in (t, end))
    for split in range(network.depth + 1):
        both = after_blocks(network, x, t, cond, shift, end, split)
        same = [torch.equal(a, b) for a, b in zip(both, at_t, strict=True)]
        assert same == [True] * (split + 1) + [False] * (network.depth + 1 - split)
        assert all(distance(a, b) > 1e-4 for a, b, held in zip(both, at_t, same, strict=True) if not held)
        assert torch.equal(both[-1], at_end[-1]) == (split == 0)


@networks
def test_what_leaves_sees_the_end_with_class_and_shift(name: str) -> None:
    """With split = depth the network is that at the end time, made to leave with what the blocks at t gave."""
    x, t, cond = arguments(IMAGE)
    network = built(name, IMAGE)
    shift, end = second(network)
    of_blocks = after_blocks(network, x, t, cond, shift)[-2]
    expected = network(x, t, cond, shift, end, network.depth)
    hook = network.blocks[-1].register_forward_hook(lambda module, inputs, output: of_blocks)
    assert torch.equal(network(x, end, cond, shift), expected)
    assert distance(network(x, end, cond), expected) > 1e-4
    assert distance(network(x, end, {"class": cond["class"] * 0 + 1}, shift), expected) > 1e-4
    hook.remove()
    assert distance(network(x, end, cond, shift), expected) > 1e-4


@networks
def test_split_is_a_number_of_blocks(name: str) -> None:
    x, t, cond = arguments(IMAGE)
    network = built(name, IMAGE, depth=2)
    assert network.depth == len(network.blocks) == 2
    for split in (-1, 3):
        with pytest.raises(ValueError, match=rf"split must be in \[0, 2\].*got {split}"):
            network(x, t, cond, None, t, split)


# --- classes


@networks
def test_missing_classes_are_asked_for(name: str) -> None:
    x, t, _ = arguments(IMAGE)
    network = built(name, IMAGE)
    for cond in (None, {}, {"text": t}):
        with pytest.raises(ValueError, match="10 classes"):
            network(x, t, cond)


@networks
def test_a_network_without_classes_has_no_table_of_them(name: str) -> None:
    space = DataSpace((1, 8, 8))
    x, t, _ = arguments(space)
    network = built(name, space)
    assert torch.equal(network(x, t, {"class": torch.zeros(5, dtype=torch.int64)}), network(x, t, None))
    plain, conditional = network.state_dict().keys(), built(name, IMAGE).state_dict().keys()
    assert conditional - plain == {"class_embedding.weight"}
    assert not plain - conditional


@networks
def test_null_class_is_a_row_of_its_own_after_the_classes(name: str) -> None:
    """No class makes a difference to each class, until its row of the table is made that of class 3."""
    x, t, cond = arguments(IMAGE)
    network = built(name, IMAGE, null_class=True)
    none = {"class": torch.full((5,), 10)}
    for label in range(10):
        assert distance(network(x, t, none), network(x, t, {"class": torch.full((5,), label)})) > 1e-4
    before = network(x, t, cond)
    with torch.no_grad():
        network.class_embedding.weight[10] = network.class_embedding.weight[3]
    assert torch.equal(network(x, t, none), network(x, t, {"class": torch.full((5,), 3)}))
    assert torch.equal(network(x, t, cond), before)


@networks
@pytest.mark.parametrize(("null_class", "highest"), [(False, 9), (True, 10)])
def test_an_unknown_class_is_refused(name: str, null_class: bool, highest: int) -> None:
    x, t, _ = arguments(IMAGE)
    network = built(name, IMAGE, null_class=null_class)
    network(x, t, {"class": torch.full((5,), highest)})
    for label in (-1, highest + 1):
        with pytest.raises(ValueError, match=rf"classes must be in \[0, {highest}\]"):
            network(x, t, {"class": torch.full((5,), label)})


@networks
def test_null_class_needs_classes_and_changes_the_class_table_alone(name: str) -> None:
    with pytest.raises(FieldError, match="must be false without classes") as error:
        NETWORKS[name](null_class=True).build(DataSpace((1, 8, 8)))
    assert set(error.value.problems) == {"null_class"}
    shapes = [{k: tuple(v.shape) for k, v in built(name, IMAGE, null_class=null).state_dict().items()}
              for null in (False, True)]  # fmt: skip
    assert {k for k in shapes[0] if shapes[0][k] != shapes[1][k]} == {"class_embedding.weight"}
    assert [s["class_embedding.weight"][0] for s in shapes] == [10, 11]
    assert list(shapes[0]) == list(shapes[1])


# --- the start


@networks
def test_a_fresh_network_is_zero_and_its_blocks_are_the_identity(name: str) -> None:
    """adaLN-Zero: every gate is closed, and so is the last layer."""
    x, t, cond = arguments(IMAGE)
    entered, *left, out = after_blocks(NETWORKS[name]().build(IMAGE), x.float(), t, cond)
    assert not out.any()
    assert entered.any()
    assert all(torch.equal(h, entered) for h in left)
    entered, *left, out = after_blocks(built(name, IMAGE), x, t, cond)
    assert min(distance(h, entered) for h in left) > 1e-3
    assert distance(out, torch.zeros_like(out)) > 1e-3


@networks
def test_gradient_reaches_every_parameter(name: str) -> None:
    """Of a fresh network the last layer alone, which opens what is behind it."""
    x, t, cond = arguments(IMAGE)

    def reached(network: Network, *second_time: Any) -> set[str]:
        (network(x, t, cond, *second_time) * normal(*x.shape, seed=4)).sum().backward()
        return {key for key, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}

    network = built(name, IMAGE)
    assert reached(network) == set(dict(network.named_parameters()))
    network = built(name, IMAGE)
    assert reached(network, *second(network), 1) == set(dict(network.named_parameters()))
    assert reached(NETWORKS[name]().build(IMAGE).double()) == {"leave.weight", "leave.bias"}


# --- derivatives


@cases
@sdpa_kernel(SDPBackend.MATH)
def test_forward_derivatives_agree_with_central_differences(name: str, space: DataSpace) -> None:
    """In the point, the time, the shift and the end time; and each is a derivative of its own."""
    x, t, cond = arguments(space)
    network, h = built(name, space).requires_grad_(False), 1e-6
    shift, end = second(network)
    at = (x, t, shift, end)
    directions = [
        tuple(normal(*value.shape, seed=7) if i == j else torch.zeros_like(value) for j, value in enumerate(at))
        for i in range(4)
    ]

    def call(x: Tensor, t: Tensor, shift: Tensor, end: Tensor) -> Tensor:
        return network(x, t, cond, shift, end, 1)

    def moved(direction: tuple[Tensor, ...], h: float) -> Tensor:
        return call(*(value + h * d for value, d in zip(at, direction, strict=True)))

    tangents = [jvp(call, at, direction)[1] for direction in directions]
    differences = [(moved(direction, h) - moved(direction, -h)) / (2 * h) for direction in directions]
    for i, tangent in enumerate(tangents):
        for j, difference in enumerate(differences):
            error = (tangent - difference).abs().max() / tangent.abs().max()
            assert error < 1e-6 if i == j else error > 0.1


def along(network: Network, parameters: dict[str, Tensor], of: int) -> Tensor:
    """A weighted sum of the output (of = 0) or of its derivative in x, t and end (of = 1), in the weights' dtype."""
    dtype = next(iter(parameters.values())).dtype
    x, t, cond = arguments(IMAGE)
    x, end = x.to(dtype), second(network)[1]

    def call(x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        return functional_call(network, parameters, (x, t, cond, None, end, 1))

    tangents = (normal(*x.shape, seed=3).to(dtype), torch.ones_like(t), -torch.ones_like(end))
    return (jvp(call, (x, t, end), tangents)[of] * normal(*x.shape, seed=4).to(dtype)).sum()


@networks
@sdpa_kernel(SDPBackend.MATH)
def test_backward_through_the_tangent_agrees_with_central_differences(name: str) -> None:
    network, h = built(name, IMAGE), 1e-6
    parameters = dict(network.named_parameters())
    direction = {key: normal(*p.shape, seed=i) for i, (key, p) in enumerate(parameters.items())}

    def slope(of: int) -> Tensor:
        gradients = torch.autograd.grad(along(network, parameters, of), list(parameters.values()), allow_unused=True)
        return sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True) if g is not None)

    with torch.no_grad():
        ends = [along(network, {k: p + sign * h * direction[k] for k, p in parameters.items()}, 1) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * h)
    close(slope(1), expected, atol=0, rtol=1e-6)
    assert abs(slope(0) / expected - 1) > 1e-2


@networks
@sdpa_kernel(SDPBackend.MATH)
def test_derivatives_in_float32_are_those_in_float64(name: str) -> None:
    def gradient(dtype: torch.dtype) -> dict[str, Tensor]:
        network = built(name, IMAGE).to(dtype)
        along(network, dict(network.named_parameters()), 1).backward()
        return {key: p.grad for key, p in network.named_parameters() if p.grad is not None}

    single, double = gradient(torch.float32), gradient(torch.float64)
    assert single.keys() == double.keys()
    assert len(single) > 10
    for key, g in double.items():
        assert single[key].dtype == torch.float32
        close(single[key].double(), g, atol=1e-4 * g.abs().max().item(), rtol=0)


# --- the embedding of time


def features(embedding: TimeEmbedding, t: Tensor) -> Tensor:
    """What the first layer of an embedding is given."""
    seen: list[Tensor] = []
    hook = embedding.hidden.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    embedding(t)
    hook.remove()
    return seen[0]


def test_time_embedding_is_of_cosines_and_sines_up_to_the_highest_frequency() -> None:
    embedding = TimeEmbedding(8, frequencies=4, highest=3 * math.pi)
    assert embedding.omega[0] == pytest.approx(math.pi / 4)
    assert embedding.omega[-1] == pytest.approx(3 * math.pi)
    ratios = embedding.omega[1:] / embedding.omega[:-1]
    close(ratios, ratios[:1].expand(3))
    t = uniform(6)
    angle = t[:, None] * embedding.omega.double()
    close(features(embedding, t), torch.cat([angle.cos(), angle.sin()], -1).float())


def test_angles_are_as_precise_as_the_time() -> None:
    embedding = TimeEmbedding(8, frequencies=4, highest=1e6)
    t = uniform(6)
    angle = t[:, None] * embedding.omega.double()
    expected = torch.cat([angle.cos(), angle.sin()], -1).float()
    close(features(embedding, t), expected, atol=1e-6, rtol=0)
    assert (features(embedding, t.float()) - expected).abs().max() > 1e-3


@networks
def test_out_of_range_arguments_are_named_at_once(name: str) -> None:
    with pytest.raises(FieldError) as error:
        NETWORKS[name](width=0, depth=0, frequencies=1, highest=0.5)
    assert set(error.value.problems) == {"width", "depth", "frequencies", "highest"}
