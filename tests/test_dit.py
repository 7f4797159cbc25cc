"""The transformer: patches, positions, attention and its tangent, blocks, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal, uniform
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers.fields import FieldError
from teachers.networks.base import modulated_norm, rms_norm
from teachers.networks.dit import DiT, DiTConfig, patchify, unpatchify
from teachers.networks.embeddings import position_embedding
from teachers.space import DataSpace

close = torch.testing.assert_close


def built(shape: tuple[int, ...] = (3, 4, 6), **config: Any) -> DiT:
    """A small network whose every weight is random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTConfig(width=16, depth=2, heads=2, **config).build(DataSpace(shape))
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.4)
    return network.double()


# --- patches


def test_tokens_are_the_patches_row_by_row() -> None:
    x = normal(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    patches = [x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1) for r in range(2) for c in range(3)]
    assert all(torch.equal(tokens[:, i], patch) for i, patch in enumerate(patches))


@pytest.mark.parametrize(("shape", "patch"), [((3, 4, 6), 2), ((1, 8, 8), 4), ((4, 6, 3), 3), ((2, 3, 5), 1)])
def test_unpatchify_inverts_patchify(shape: tuple[int, int, int], patch: int) -> None:
    x = normal(2, *shape)
    assert torch.equal(unpatchify(patchify(x, patch), shape, patch), x)
    tokens = normal(2, shape[1] * shape[2] // patch**2, shape[0] * patch**2)
    assert torch.equal(patchify(unpatchify(tokens, shape, patch), patch), tokens)


def test_unpatchify_to_another_height_and_width_is_no_inverse() -> None:
    x = normal(2, 3, 4, 6)
    turned = unpatchify(patchify(x, 2), (3, 6, 4), 2)
    assert turned.shape == (2, 3, 6, 4)
    assert not torch.equal(turned.reshape(x.shape), x)


# --- positions


def test_positions_break_the_symmetry_of_permuted_patches() -> None:
    """Attention and MLP do not know the order of tokens: without positions the network commutes with permutations."""
    network = built()
    x, t, order = normal(2, 3, 4, 6), uniform(2), torch.tensor([3, 0, 5, 1, 2, 4])

    def permuted(x: Tensor) -> Tensor:
        return unpatchify(patchify(x, 2)[:, order], (3, 4, 6), 2)

    assert (network(permuted(x), t, None) - permuted(network(x, t, None))).abs().max() > 1e-2
    network.position.zero_()
    close(network(permuted(x), t, None), permuted(network(x, t, None)), atol=1e-12, rtol=0)


def test_positions_know_displacements() -> None:
    """Inner products depend on the displacement alone, and the greatest is that of a position with itself."""
    rows, columns = 3, 4
    position = position_embedding(rows, columns, 16).double().reshape(rows, columns, 16)
    gram = torch.einsum("rcw,pqw->rcpq", position, position)
    seen: dict[tuple[int, int], Tensor] = {}
    for r, c, p, q in torch.cartesian_prod(*map(torch.arange, gram.shape)).tolist():
        close(gram[r, c, p, q], seen.setdefault((p - r, q - c), gram[r, c, p, q]), atol=1e-6, rtol=0)
    assert len(seen) == (2 * rows - 1) * (2 * columns - 1)
    assert max(seen, key=lambda key: seen[key]) == (0, 0)
    assert abs(seen[0, 1] - seen[1, 1]) > 1e-2
    angle = torch.tensor([2.0, 2.0 * 1e-2])
    expected = torch.cat([angle.sin(), angle.cos(), torch.zeros(2), torch.ones(2)])
    close(position_embedding(3, 1, 8)[2], expected)


def test_positions_are_not_weights() -> None:
    network = built()
    assert "position" not in network.state_dict()
    assert "position" not in dict(network.named_parameters())
    assert network.position.shape == (6, 16)


def test_positions_are_those_of_the_patches() -> None:
    """Of an image two patches high and three wide: half of the features know the row, half the column."""
    row, column = built().position.reshape(2, 3, 16).chunk(2, dim=-1)
    assert torch.equal(row, row[:, :1].expand_as(row))
    assert torch.equal(column, column[:1].expand_as(column))
    assert (row[0] - row[1]).abs().max() > 0.1
    assert (column[:, 1:] - column[:, :-1]).abs().amax(-1).min() > 0.1


# --- attention


def test_attention_does_not_see_the_size_of_queries_and_keys() -> None:
    """They are normalised: scaling their projection changes nothing (up to the norm's 1e-6); scaling values does."""
    attention = built().blocks[0].attention
    h = normal(2, 6, 16)
    before = attention(h)
    with torch.no_grad():
        attention.project.weight[:32] *= 7
        attention.project.bias[:32] *= 7
    close(attention(h), before, atol=1e-4, rtol=0)
    with torch.no_grad():
        attention.project.weight[32:] *= 7
    assert (attention(h) - before).abs().max() > 0.1


def test_attention_is_that_of_torch_over_each_head() -> None:
    """softmax(q k / sqrt(d)) v with q and k over their root mean square, times their scales; head by head."""
    attention = built().blocks[0].attention
    h = normal(2, 6, 16)
    query, key, value = attention.project(h).chunk(3, dim=-1)

    def head(i: int) -> Tensor:
        q, k, v = (part[..., 8 * i : 8 * i + 8] for part in (query, key, value))
        q = nn.functional.rms_norm(q, (8,), attention.query_scale, 1e-6)
        k = nn.functional.rms_norm(k, (8,), attention.key_scale, 1e-6)
        return (q @ k.mT / 8**0.5).softmax(-1) @ v

    close(attention(h), attention.out(torch.cat([head(0), head(1)], -1)), atol=1e-12, rtol=0)
    assert (attention(h) - attention.out(torch.cat([head(1), head(0)], -1))).abs().max() > 1e-2


def test_tangent_of_attention_is_the_formula_for_a_fused_kernel() -> None:
    """tS = (tQ K' + Q tK') scale, P = softmax(S), H = P tS (by entries): tO = P tV + H V - rowsum(H) O."""
    shape = (2, 3, 5, 4)
    q, k, v = (normal(*shape, seed=i) for i in range(3))
    dq, dk, dv = (normal(*shape, seed=i) for i in range(3, 6))
    with sdpa_kernel(SDPBackend.MATH):
        out, tangent = jvp(nn.functional.scaled_dot_product_attention, (q, k, v), (dq, dk, dv))
    scale = shape[-1] ** -0.5
    p = (q @ k.mT * scale).softmax(-1)
    h = p * (dq @ k.mT + q @ dk.mT) * scale
    without_rowsum = p @ dv + h @ v
    close(out, p @ v, atol=1e-12, rtol=0)
    close(tangent, without_rowsum - h.sum(-1, keepdim=True) * out, atol=1e-12, rtol=0)
    assert (tangent - without_rowsum).abs().max() > 1e-2


# --- blocks


def test_modulated_norm_is_layer_norm_with_its_parameters_given() -> None:
    x, shift, scale = 1 + normal(5, 7), normal(5, 7, seed=1), normal(5, 7, seed=2)
    expected = nn.functional.layer_norm(x, (7,), eps=1e-6) * (1 + scale) + shift
    close(modulated_norm(x, shift, scale), expected, atol=1e-12, rtol=0)
    assert (rms_norm(x) * (1 + scale) + shift - expected).abs().max() > 0.1


def test_block_is_adaptive_layer_norm_around_attention_and_mlp() -> None:
    """Six parts of the modulation: shift, scale and gate of attention, then those of the MLP."""
    block = built().blocks[0]
    h, embedding = normal(2, 6, 16), normal(2, 16, seed=1)

    def expected(order: list[int]) -> Tensor:
        parts = block.modulation(embedding)[:, None].chunk(6, dim=-1)
        a, b, c, d, e, f = (parts[i] for i in order)
        middle = h + c * block.attention(nn.functional.layer_norm(h, (16,), eps=1e-6) * (1 + b) + a)
        hidden = block.up(nn.functional.layer_norm(middle, (16,), eps=1e-6) * (1 + e) + d)
        return middle + f * block.down(nn.GELU(approximate="tanh")(hidden))

    close(block(h, embedding), expected([0, 1, 2, 3, 4, 5]), atol=1e-12, rtol=0)
    assert (block(h, embedding) - expected([0, 1, 2, 0, 1, 2])).abs().max() > 0.1


# --- building


@pytest.mark.parametrize("shape", [(2,), (1, 8, 9), (1, 9, 8), (8, 8), (1, 8, 8, 8)])
def test_samples_that_cannot_be_cut_into_patches_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FieldError, match="must divide height and width of samples") as error:
        DiTConfig(patch=2).build(DataSpace(shape))
    assert set(error.value.problems) == {"patch"}
    DiTConfig(patch=2).build(DataSpace((1, 8, 10)))


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"patch": 0}, {"patch"}),
        ({"heads": 0}, {"heads"}),
        ({"heads": -1}, {"heads"}),
        ({"heads": 3}, {"width"}),
        ({"width": 6, "heads": 2}, {"width"}),
        ({"width": 0}, {"width"}),
        ({"patch": 0, "width": 6, "heads": 0}, {"patch", "width", "heads"}),
    ],
)
def test_out_of_range_arguments_are_named(config: dict[str, int], wrong: set[str]) -> None:
    with pytest.raises(FieldError) as error:
        DiTConfig(**config)
    assert set(error.value.problems) == wrong


def test_width_is_a_multiple_of_four_and_of_heads() -> None:
    assert built(patch=1).depth == 2
    DiTConfig(width=12, heads=3)
    DiTConfig(width=12, heads=6)
