"""Batches for Lightning, from the step that training is at."""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from distill.data.base import Reader
from distill.objectives.base import Batch


class _Batches(IterableDataset[Batch]):
    def __init__(self, reader: Reader, seed: int, batch: int, step: int) -> None:
        self._from = (reader, seed, batch, step)

    def __iter__(self) -> Iterator[Batch]:
        reader, seed, batch, step = self._from
        return reader.batches(seed, batch, step)


class DistillData(pl.LightningDataModule):
    """The global batches of `reader`. The position is the trainer's step, so there is no loader state to save (what
    Lightning would save of one is a batch ahead of what was trained on)."""

    def __init__(self, reader: Reader, seed: int, batch: int) -> None:
        super().__init__()
        self._reader, self._seed, self._batch = reader, seed, batch

    def train_dataloader(self) -> DataLoader[Batch]:
        """Starts at the trainer's step, after a checkpoint was restored too."""
        assert self.trainer is not None
        return DataLoader(_Batches(self._reader, self._seed, self._batch, self.trainer.global_step), batch_size=None)
