"""Batches for Lightning, from the step that training is at."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl

from distill.data.base import Reader
from distill.data.loader import Loader


class DistillData(pl.LightningDataModule):
    """The batches of `reader`. The position is the trainer's step, so there is no loader state to save (what Lightning
    would save of one is a batch ahead of what was trained on). `say` tells of samples that were skipped."""

    def __init__(self, reader: Reader, seed: int, batch: int, workers: int, say: Callable[[str], None]) -> None:
        super().__init__()
        self._reader, self._seed, self._batch, self._workers, self._say = reader, seed, batch, workers, say
        self.loader: Loader | None = None

    def train_dataloader(self) -> Loader:
        """Starts at the trainer's step, after a checkpoint was restored too."""
        assert self.trainer is not None
        step = self.trainer.global_step
        self.loader = Loader(self._reader, self._seed, self._batch, step, workers=self._workers, say=self._say)
        return self.loader
