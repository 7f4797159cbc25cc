"""Batches for Lightning, from the step that training is at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytorch_lightning as pl

from distill.data.base import Reader, cut
from distill.data.loader import Loader
from distill.objectives.base import Batch
from distill.parallel import rank, world


class DistillData(pl.LightningDataModule):
    """The batches of `reader`. The position is the trainer's step, so there is no loader state to save (what Lightning
    would save of one is a batch ahead of what was trained on). `say` tells of samples that were skipped; parts: in
    which this process's rows of a batch come one after the other."""

    def __init__(
        self, reader: Reader, seed: int, batch: int, workers: int, say: Callable[[str], None], parts: int = 1
    ) -> None:
        super().__init__()
        self._reader, self._seed, self._batch, self._workers, self._say = reader, seed, batch, workers, say
        self._parts = parts
        self.loader: Loader | None = None

    def train_dataloader(self) -> Parts:
        """Starts at the trainer's step, after a checkpoint was restored too."""
        assert self.trainer is not None
        step = self.trainer.global_step
        self.loader = Loader(
            self._reader, self._seed, self._batch, step, rank=rank(), world=world(), workers=self._workers,
            say=self._say,
        )  # fmt: skip
        return Parts(self.loader, self._parts)


class Parts:
    """The parts of a loader's batches."""

    def __init__(self, loader: Loader, parts: int) -> None:
        self._loader, self._parts = loader, parts

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            yield from cut(batch, self._parts)
