"""How to train and what to track, apart from the code that does it so that a recipe is checked without Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from teachers.fields import require

Precision = Literal["float32", "bfloat16"]
StrategyName = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Training is counted in optimizer steps of `batch` samples each (the global batch).

    optimizer: adamw, or muon for the matrices inside of blocks and adamw for all else; lr: the peak of a linear
    `warmup` (steps) followed by `schedule`; betas: AdamW's; clip: the largest gradient norm; ema: the decay of the
    averaged weights, reached gradually; checkpoint_every: steps between checkpoints, of which the newest `keep` stay;
    threads: of torch on the CPU, null for one a core (a small network is slowed by more than one as soon as the cores
    are shared).
    strategy: of several processes, ddp (each holds all) or fsdp2 (weights, optimizer, averages and the teacher in
    shards), auto for fsdp2 where the whole takes more than 60 % of a GPU; accumulate: parts in which each process goes
    through its share of a batch; precision: of matrix products, while times, losses and what is reckoned with
    derivatives stay float32; recompute: the activations of blocks in the backward pass instead of keeping them; skip:
    steps with a loss or gradient that is not finite, which may be left out from one checkpoint to the next before
    training goes back to it;
    timeout: seconds after which a process that the others wait for counts as lost.
    """

    steps: int
    batch: int = 256
    optimizer: Literal["adamw", "muon"] = "adamw"
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
    strategy: Literal["auto", "single", "ddp", "fsdp2"] = "auto"
    accumulate: int = 1
    precision: Precision = "float32"
    recompute: bool = False
    skip: int = 10
    timeout: float = 600.0

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
            accumulate=(
                self.accumulate >= 1 and self.batch % max(self.accumulate, 1) == 0,
                f"must be at least 1 and divide the batch, {self.batch}",
            ),
            skip=(self.skip >= 0, "must be at least 0"),
            timeout=(1 <= self.timeout < 10**6, "must be in [1, 10^6) seconds"),
        )

    @property
    def training(self) -> TrainerConfig:
        """With what changes nothing but rounding, and how a run is kept, set to its default."""
        return replace(
            self, checkpoint_every=1, keep=1, device="auto", threads=None, strategy="auto", accumulate=1,
            recompute=False, skip=10, timeout=600.0,
        )  # fmt: skip

    def lr_factor(self, step: int) -> float:
        """The share of `lr` in force at a step (from 0): linear warm-up, then `schedule`."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "constant":
            return warm
        return warm * (1 + math.cos(math.pi * min(step / self.steps, 1))) / 2


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """metrics.jsonl gets a line every `log_every` steps; samples/ a picture of fixed noise, teacher beside student,
    every `samples_every` steps (0: never). wandb: auto is online with an API key and offline without, unless WANDB_MODE
    is offline or disabled."""

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
