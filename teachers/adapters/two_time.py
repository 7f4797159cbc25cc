"""Files of models that are already distilled: a network of two times, seen as its diagonal and what leaves it.

    u(x, s, t) = network(x, s, shift = gap(t - s)),  gap(0) = 0

As a teacher such a model is its diagonal u(x, t, t); as a student it is whole. Networks that embed t - s besides s have
the embedding's value at 0 folded into the diagonal, so that one network serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from teachers.checkpoints import Checkpoint
from teachers.velocity import Teacher


@dataclass(frozen=True, kw_only=True)
class TwoTime:
    """diagonal: the teacher that the file makes; gap: the weights of its ``network.second_time()`` with which that
    gives what the file's own second time adds; kind, finest: the (s, t) it was trained for, as students name them;
    steps: the numbers of network calls it is published for."""

    diagonal: Teacher
    gap: Mapping[str, Tensor]
    kind: Literal["flow_map", "shortcut"] = "flow_map"
    finest: int = 1
    steps: tuple[int, ...] = (1, 2, 4)


class Finished(Protocol):
    """What the adapter of such files offers besides ``load()``."""

    def two_time(self) -> TwoTime:
        """The model in its file. Raises CheckpointError, and FieldError for keys that the file does not answer."""
        ...


def part(checkpoint: Checkpoint, prefix: str) -> tuple[Checkpoint, Checkpoint]:
    """(what is under `prefix`, by names without it; the rest)."""
    under = {name.removeprefix(prefix): v for name, v in checkpoint.tensors.items() if name.startswith(prefix)}
    rest = {name: v for name, v in checkpoint.tensors.items() if not name.startswith(prefix)}
    named = replace(checkpoint, source=f"{checkpoint.source} ({prefix}*)", tensors=under)
    return named, replace(checkpoint, tensors=rest)


@torch.no_grad()
def centred(embedding: nn.Module, at: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(what `embedding` makes of the number `at`, ``[width]``; its weights with that taken from the last bias)."""
    value: Tensor = embedding(torch.tensor([at], dtype=torch.float64))[0]
    state = {name: v.clone() for name, v in embedding.state_dict().items()}
    state["mlp.2.bias"] = state["mlp.2.bias"] - value
    return value, state
