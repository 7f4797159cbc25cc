"""Muon: against torch's own, against singular value decompositions, and which weights are whose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.training.config import TrainerConfig
from distill.training.optimizer import direction, grouped, make_optimizer
from teachers.errors import InputError
from teachers.networks import NETWORKS
from teachers.space import DataSpace


def config(**changes: Any) -> TrainerConfig:
    return TrainerConfig(steps=10, warmup=0, optimizer="muon", **changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Tower(nn.Module):
    """One matrix in a block, one that is not."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(columns, rows)])
        self.leave = nn.Linear(rows, 3)
        for index, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_steps_are_those_of_torch(shape: tuple[int, int], precision: str) -> None:
    """torch.optim.Muon multiplies in bfloat16; matrices that are no stack of squares."""
    ours, theirs = Tower(*shape), Tower(*shape)
    settings = config(lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), precision=precision)
    optimizer = make_optimizer([ours], settings)
    (matrix,), rest = grouped([theirs], settings)
    muon = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(4):
        for index, (mine, other) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            mine.grad = other.grad = normal(*mine.shape, seed=10 * step + index)
        for each in (optimizer, muon, adamw):
            for group in each.param_groups:
                group["lr"] = 0.02 / (1 + step)
            each.step()
    for name, mine in ours.named_parameters():
        other = theirs.get_parameter(name)
        if other is matrix:
            moved = (mine - start[0]).norm()
            assert moved > 0.1 and (mine - other).norm() < (2e-3 if precision == "bfloat16" else 2e-2) * moved
        else:
            torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 8), (160, 4)])
def test_a_direction_keeps_singular_vectors_and_levels_values(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(normal(*shape).double(), full_matrices=False)
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    found = left.T @ direction((left * values) @ right, torch.float64) @ right.T / (0.2 * math.sqrt(max(shape)))
    levelled = found.diagonal()
    assert float(levelled.min()) > 0.68 and float(levelled.max()) < 1.21
    torch.testing.assert_close(found, torch.diag(levelled), atol=1e-12, rtol=0)
    assert float(direction(normal(*shape)).square().mean().sqrt()) == pytest.approx(0.2, rel=0.32)


def test_squares_on_top_of_each_other_are_taken_one_by_one() -> None:
    parts = [normal(16, 16, seed=seed) * 10**seed for seed in range(3)]
    whole = direction(torch.cat(parts))
    for part, found in zip(parts, whole.chunk(3), strict=True):
        torch.testing.assert_close(found, direction(part), atol=1e-6, rtol=1e-5)


def test_no_gradient_is_no_step() -> None:
    assert not direction(torch.zeros(6, 4)).any()
    tower = Tower(6, 4)
    before = [p.detach().clone() for p in tower.parameters()]
    make_optimizer([tower], config(weight_decay=0.5)).step()
    assert all(torch.equal(a, b) for a, b in zip(before, tower.parameters(), strict=True))


def test_matrices_of_blocks_are_muons_and_all_else_adamws() -> None:
    network = NETWORKS["dit"](patch=2, width=16, depth=2, heads=2).build(DataSpace((1, 8, 8), classes=3))
    network.blocks[1].attention.out.weight.requires_grad_(False)
    network.blocks[0].table = nn.Embedding(5, 16)
    network.blocks[1].up = network.blocks[0].up
    names = {id(p): name for name, p in network.named_parameters()}
    own, rest = ([names[id(p)] for p in part] for part in grouped([network], config()))
    parts = ("modulation", "attention.project", "attention.out", "up", "down")
    without = {(1, "attention.out"), (1, "up")}
    assert own == [f"blocks.{k}.{part}.weight" for k in range(2) for part in parts if (k, part) not in without]
    assert sorted([*own, *rest]) == sorted(n for n, p in network.named_parameters() if p.requires_grad)
    assert {"blocks.0.table.weight", "enter.weight", "leave.weight", "blocks.0.up.bias"} <= set(rest)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match=r"trainer\.optimizer: muon is for the matrices.*set it to adamw"):
        make_optimizer([nn.Linear(3, 4)], config())


def test_adapters_alone_have_no_other_weights() -> None:
    tower = Tower(8, 4)
    for parameter in tower.parameters():
        parameter.requires_grad_(parameter is tower.blocks[0].weight)
    tower.blocks[0].weight.grad = normal(8, 4)
    optimizer = make_optimizer([tower], config())
    before = tower.blocks[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, tower.blocks[0].weight)
