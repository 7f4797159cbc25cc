"""How to train and what to track, apart from the code that does it so that a recipe is checked without Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from teachers.fields import require


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Training is counted in optimizer steps of `batch` samples each (the global batch).

    lr: the peak of a linear `warmup` (steps) followed by `schedule`; betas, weight_decay: AdamW's; clip: the largest
    gradient norm; ema: the decay of the averaged weights, reached gradually; checkpoint_every: steps between
    checkpoints, of which the newest `keep` stay; threads: of torch on the CPU, null for one a core (a small network is
    slowed by more than one as soon as the cores are shared).
    """

    steps: int
    batch: int = 256
    lr: float = 1e-3
    warmup: int = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    checkpoint_every: int = 500
    keep: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        require(
            self,
            steps=(1 <= self.steps < 10**8, "must be in [1, 10^8)"),
            batch=(self.batch >= 1, "must be at least 1"),
            lr=(0 < self.lr < math.inf, "must be above 0"),
            warmup=(self.warmup >= 0, "must be at least 0"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "must both be in [0, 1)"),
            weight_decay=(0 <= self.weight_decay < math.inf, "must be at least 0"),
            clip=(self.clip > 0, "must be above 0"),
            ema=(0 <= self.ema < 1, "must be in [0, 1)"),
            checkpoint_every=(self.checkpoint_every >= 1, "must be at least 1"),
            keep=(self.keep >= 1, "must be at least 1"),
            threads=(self.threads is None or self.threads >= 1, "must be at least 1"),
        )

    def lr_factor(self, step: int) -> float:
        """The share of `lr` in force at a step (from 0): linear warm-up, then `schedule`."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "constant":
            return warm
        return warm * (1 + math.cos(math.pi * min(step / self.steps, 1))) / 2


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """metrics.jsonl gets a line every `log_every` steps; samples/ a picture of fixed noise, teacher beside student,
    every `samples_every` steps (0: never). wandb: auto is online with an API key and offline without."""

    log_every: int = 10
    samples_every: int = 500
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "distill"

    def __post_init__(self) -> None:
        require(
            self,
            log_every=(self.log_every >= 1, "must be at least 1"),
            samples_every=(self.samples_every >= 0, "must be at least 0"),
            project=(bool(self.project), "must not be empty"),
        )
