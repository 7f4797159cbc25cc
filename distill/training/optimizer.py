"""AdamW, or Muon for the matrices inside of blocks and AdamW for all other weights, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from distill.training.config import TrainerConfig
from teachers.errors import InputError
from teachers.networks.base import matrices

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c: five times x -> a x + b x^3 + c x^5 bring singular values of 0.002 to 1 between 0.68 and 1.21."""


def make_optimizer(trained: Sequence[nn.Module], config: TrainerConfig) -> Optimizer:
    """Of all parameters with a gradient, in the order of `grouped`. Raises InputError if Muon has no matrix."""
    own, rest = grouped(trained, config)
    if config.optimizer == "adamw":
        return _adamw(rest, config)
    if not own:
        raise InputError(
            "trainer.optimizer: muon is for the matrices inside of a network's blocks (its nn.ModuleList), and here "
            "none of them is trained: set it to adamw"
        )
    return Muon(own, rest, config)


def grouped(trained: Sequence[nn.Module], config: TrainerConfig) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters with a gradient: Muon's, and AdamW's."""
    own = [p for part in trained for p in matrices(part)] if config.optimizer == "muon" else []
    taken = set(map(id, own))
    return own, [p for part in trained for p in part.parameters() if p.requires_grad and id(p) not in taken]


def _adamw(parameters: Sequence[nn.Parameter], config: TrainerConfig) -> AdamW:
    return AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


class Muon(Optimizer):
    """Steps of a matrix go along its momentum with all singular values about one, of the size that AdamW's steps have,
    so that one learning rate serves both. Unlike torch.optim.Muon it takes maps that lie on top of each other in one
    matrix one by one, and multiplies in the precision of the run.

    Jordan et al., https://kellerjordan.github.io/posts/muon (2024); size: Liu et al., arXiv 2502.16982, equation 4; one
    by one: Chen et al., arXiv 2608.02502.
    """

    def __init__(self, own: Sequence[nn.Parameter], rest: Sequence[nn.Parameter], config: TrainerConfig) -> None:
        super().__init__([{"params": list(own)}, {"params": list(rest)}], {"lr": config.lr})
        self._adamw = _adamw(rest, config) if rest else None
        self._decay = config.weight_decay
        self._dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that are there, or that `closure` makes, whose result it returns."""
        result = None if closure is None else closure()
        own, rest = self.param_groups
        for parameter in own["params"]:
            if parameter.grad is not None:
                self._step(parameter, parameter.grad, own["lr"])
        if self._adamw is not None:
            self._adamw.state = self.state  # another after a checkpoint was read
            self._adamw.param_groups[0]["lr"] = rest["lr"]
            self._adamw.step()
        return result

    @torch.no_grad()
    def _step(self, parameter: nn.Parameter, gradient: Tensor, lr: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(state["momentum"], MOMENTUM)  # Nesterov's
        parameter.mul_(1 - lr * self._decay).sub_(self._direction(ahead), alpha=lr)

    def _direction(self, matrix: Tensor) -> Tensor:
        if isinstance(matrix, DTensor):  # each process makes the whole and keeps its rows
            whole = self._direction(matrix.full_tensor())
            return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)
        return direction(matrix, self._dtype)


def direction(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[rows, columns]`` -> the same directions with singular values of about one, times 0.2 sqrt(max(rows, columns)):
    a root mean square of 0.2, as AdamW's steps have. Zero stays zero.

    Up to 12 squares on top of each other, as queries, keys and values or shifts and scales of one input, are taken one
    by one. A taller matrix is one map, as an adapter's.
    """
    rows, columns = matrix.shape
    stack = rows % columns == 0 and rows <= 12 * columns
    parts = matrix.unflatten(0, (-1, columns)) if stack else matrix[None]
    return (0.2 * math.sqrt(max(parts.shape[1:])) * _orthogonal(parts.to(dtype))).flatten(0, 1).to(matrix.dtype)


def _orthogonal(x: Tensor) -> Tensor:
    """Matrices ``[n, rows, columns]``, whose singular values go to about one. Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return _orthogonal(x.mT).mT
    a, b, c = QUINTIC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
