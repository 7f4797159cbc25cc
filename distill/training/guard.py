"""The numerical guard: a step whose loss or gradient is not finite on any process is left out on all of them.

Weights, optimizer and average stay as they were, bit for bit; a target moves as after any step. It is counted, named
with its samples, and bounded: beyond `allowed` such steps since the last checkpoint training has diverged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distill import parallel
from distill.training.stops import Diverged

_NAMED = 5  # samples that a message names


class Guard:
    """`skipped` counts the steps that were left out over the whole run, `recent` those since the last checkpoint that a
    step was made before."""

    def __init__(self, allowed: int, say: Callable[[str], None]) -> None:
        self.skipped = 0
        self.recent = 0
        self._made = False  # a step, since the last checkpoint
        self._allowed, self._say = allowed, say
        self._losses: list[tuple[Tensor, tuple[str, ...]]] = []

    def saw(self, per_row: Tensor, keys: tuple[str, ...]) -> None:
        """The loss of each row ``[b]`` of a part of the step, and the samples' keys."""
        self._losses.append((per_row.detach(), keys))

    def passes(self, step: int, norms: Sequence[Tensor]) -> bool:
        """Whether the step may be made: the same answer on every process. norms: of the gradients.

        Raises Diverged when more steps than are allowed were left out.
        """
        losses, self._losses = self._losses, []
        finite = torch.stack([torch.isfinite(v).all() for v in (*(loss for loss, _ in losses), *norms)]).all()
        if not parallel.most(int(not finite)):
            self._made = True
            return True
        told = [text for text in parallel.everywhere(lambda: _bad_losses(losses)) if text]
        seen = "; ".join(told) or _bad_gradient(losses, norms)
        self.skipped += 1
        self.recent += 1
        if self.recent > self._allowed:
            raise Diverged(
                f"step {step}: {seen}; {self.recent} steps since the last checkpoint were not finite, trainer.skip "
                f"allows {self._allowed}"
            )
        self._say(f"step {step} was left out: {seen}")
        return False

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "recent": self.recent, "made": int(self._made)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from what a checkpoint kept."""
        self.skipped, self.recent, self._made = state["skipped"], state["recent"], bool(state["made"])

    def saves(self) -> None:
        """A checkpoint is due: from here on steps are counted anew, unless all since the last one were left out."""
        if self._made:
            self.recent, self._made = 0, False


def _bad_losses(losses: Sequence[tuple[Tensor, tuple[str, ...]]]) -> str:
    """Which losses of this process are not finite."""
    bad = [(keys[i], float(loss[i])) for loss, keys in losses for i in torch.nonzero(~torch.isfinite(loss)).flatten()]
    if not bad:
        return ""
    where = f" on process {parallel.rank()}" if parallel.world() > 1 else ""
    return f"the loss is {bad[0][1]} for {_samples([key for key, _ in bad])}{where}"


def _bad_gradient(losses: Sequence[tuple[Tensor, tuple[str, ...]]], norms: Sequence[Tensor]) -> str:
    bad = [float(norm) for norm in norms if not torch.isfinite(norm)]
    found = parallel.everywhere(lambda: (bad, [key for _, part in losses for key in part]))
    keys = [key for _, part in found for key in part]
    norm = next(norm for its, _ in found for norm in its)
    return f"the gradient's norm is {norm} though every loss is finite, in the batch of {_samples(keys)}"


def _samples(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"sample{'s' if len(keys) > 1 else ''} {', '.join(keys[:_NAMED])}{more}"
