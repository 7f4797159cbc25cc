"""The averaged weights: what is evaluated and exported, and the slow `target` of objectives that want one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distill.lora import copied
from distill.training.sharding import local


def averaged(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `student`, frozen. Call ``update_parameters(student)`` after each step.

    The decay in force after n updates is min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.
    """
    model = AveragedModel(nn.Identity(), multi_avg_fn=_average(decay))
    model.module = copied(student)
    return model.requires_grad_(False)


_Tensors = tuple[Tensor, ...] | list[Tensor]


def _average(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(averages: _Tensors, values: _Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        # what the average shares with the student stays as it is
        both = zip(local(averages), local(values), strict=True)
        pairs = [(a, v) for a, v in both if a.data_ptr() != v.data_ptr()]
        if pairs:
            mine, theirs = zip(*pairs, strict=True)
            torch._foreach_lerp_(mine, theirs, 1 - min(decay, (1 + n) / (10 + n)))

    return update
