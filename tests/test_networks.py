"""Backbones: shapes, dtypes, where a second time enters, and forward-mode derivatives; over all of NETWORKS."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import normal, uniform
from torch import Tensor, nn

from teachers.fields import FieldError
from teachers.networks import NETWORKS
from teachers.networks.embeddings import TimeEmbedding
from teachers.space import DataSpace

networks = pytest.mark.parametrize("name", NETWORKS)
SPACES = {"image": DataSpace((1, 8, 8), 10, (-1.0, 1.0)), "vector": DataSpace((2,))}
spaces = pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))
close = torch.testing.assert_close


def built(name: str, space: DataSpace, seed: int = 0) -> nn.Module:
    """A network whose every weight is random, as after training: nothing hides behind a zero layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]().build(space)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    return network.double()


def arguments(space: DataSpace, b: int = 5) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
    return normal(b, *space.shape), uniform(b, seed=1), space.cond_for(3, b)


@networks
@spaces
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_has_the_shape_and_dtype_of_the_point(name: str, space: DataSpace, dtype: torch.dtype) -> None:
    x, t, cond = arguments(space)
    out = built(name, space).to(dtype)(x.to(dtype), t, cond)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.isfinite().all()


@networks
@spaces
def test_rows_do_not_mix(name: str, space: DataSpace) -> None:
    x, t, cond = arguments(space)
    network = built(name, space)
    alone = {k: v[2:3] for k, v in cond.items()} if cond else None
    close(network(x[2:3], t[2:3], alone), network(x, t, cond)[2:3], atol=1e-13, rtol=0)


@networks
@spaces
def test_point_time_class_and_shift_all_enter(name: str, space: DataSpace) -> None:
    x, t, cond = arguments(space)
    network = built(name, space)
    width = network.time_embedding.out.out_features
    plain = network(x, t, cond)
    assert (network(x + 0.1, t, cond) - plain).abs().max() > 1e-4
    assert (network(x, t + 0.1, cond) - plain).abs().max() > 1e-4
    assert (network(x, t, cond, normal(5, width)) - plain).abs().max() > 1e-4
    assert torch.equal(network(x, t, cond, torch.zeros(5, width).double()), plain)
    if cond:
        assert (network(x, t, {"class": cond["class"] * 0 + 1}) - plain).abs().amax((1, 2, 3)).min() > 1e-4


@networks
def test_shift_is_added_to_the_time_embedding(name: str) -> None:
    """Shifting by the difference of two embeddings is the same as calling at the other time."""
    x, t, cond = arguments(SPACES["image"])
    network = built(name, SPACES["image"])
    other = uniform(5, seed=9)
    shift = network.time_embedding(other) - network.time_embedding(t)
    close(network(x, t, cond, shift), network(x, other, cond), atol=1e-12, rtol=0)


@networks
@spaces
def test_forward_derivatives_agree_with_central_differences(name: str, space: DataSpace) -> None:
    x, t, cond = arguments(space)
    network, direction, h = built(name, space), normal(*x.shape, seed=3), 1e-4

    def at(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, cond)

    for dx, dt in ((direction, torch.zeros_like(t)), (torch.zeros_like(x), torch.ones_like(t))):
        tangent = torch.func.jvp(at, (x, t), (dx, dt))[1]
        difference = (at(x + h * dx, t + h * dt) - at(x - h * dx, t - h * dt)) / (2 * h)
        close(tangent, difference, atol=1e-5 * tangent.detach().abs().max().item(), rtol=0)
        assert tangent.abs().max() > 1e-3


@networks
def test_missing_classes_are_asked_for(name: str) -> None:
    x, t, _ = arguments(SPACES["image"])
    network = built(name, SPACES["image"])
    for cond in (None, {}, {"text": t}):
        with pytest.raises(ValueError, match="10 classes"):
            network(x, t, cond)


@networks
def test_a_fresh_network_has_no_class_table_without_classes(name: str) -> None:
    x, t, _ = arguments(SPACES["vector"])
    network = built(name, SPACES["vector"])
    close(network(x, t, {"class": torch.zeros(5, dtype=torch.int64)}), network(x, t, None))


@networks
def test_a_fresh_network_is_zero(name: str) -> None:
    x, t, cond = arguments(SPACES["image"])
    assert not NETWORKS[name]().build(SPACES["image"])(x.float(), t, cond).any()


def test_time_embedding_is_of_cosines_and_sines_up_to_the_highest_frequency() -> None:
    embedding = TimeEmbedding(8, frequencies=4, highest=3 * math.pi)
    assert embedding.omega[0] == pytest.approx(math.pi / 4)
    assert embedding.omega[-1] == pytest.approx(3 * math.pi)
    ratios = embedding.omega[1:] / embedding.omega[:-1]
    close(ratios, ratios[:1].expand(3))
    seen: list[Tensor] = []
    embedding.hidden.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    t = uniform(6)
    embedding(t)
    angle = t[:, None] * embedding.omega.double()
    close(seen[0], torch.cat([angle.cos(), angle.sin()], -1).float())


def test_out_of_range_arguments_are_named_at_once() -> None:
    with pytest.raises(FieldError) as error:
        NETWORKS["mlp"](width=0, depth=0, frequencies=1, highest=0.5)
    assert set(error.value.problems) == {"width", "depth", "frequencies", "highest"}


def test_mlp_blocks_start_as_the_identity() -> None:
    """adaLN-Zero: the gate of a fresh block is closed."""
    network = NETWORKS["mlp"](width=8, depth=2).build(SPACES["vector"])
    h = normal(5, 8).float()
    for block in network.blocks:
        assert torch.equal(block(h, normal(5, 8, seed=1).float()), h)
