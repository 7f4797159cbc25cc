"""What shows early that training goes wrong: residuals and derivatives by time, which the mean loss hides."""

from __future__ import annotations

import torch
from torch import Tensor

from distill import parallel
from distill.objectives.base import Loss

BINS = 4


class Seen:
    """Of the rows of a step: time ``[b]``, t - s of a flow map and t of a velocity, and squares ``[b]`` by name."""

    def __init__(self, time: Tensor, loss: Loss) -> None:
        self.time = time.detach()
        self.squares = {"residual": loss.per_sample.detach()}
        if loss.tangent is not None:
            self.squares["tangent"] = loss.tangent


def by_time(seen: Seen | None) -> dict[str, float]:
    """Root mean squares of residual and tangent in quarters of the time, ``residual/0.25-0.50``, over the rows of all
    processes; without quarters that have none."""
    if seen is None:
        return {}
    place = (seen.time * BINS).long().clamp(0, BINS - 1)
    count = torch.bincount(place, minlength=BINS).double()
    sums = [
        torch.zeros(BINS, dtype=torch.float64, device=place.device).index_add(0, place, v.double())
        for v in seen.squares.values()
    ]
    means = iter(parallel.mean(torch.cat([count, *sums]).tolist()))
    counts = [next(means) for _ in range(BINS)]
    found = {}
    for name in seen.squares:
        for n, share in enumerate(counts):
            total = next(means)
            if share:
                found[f"{name}/{n / BINS:.2f}-{(n + 1) / BINS:.2f}"] = (total / share) ** 0.5
    return found
