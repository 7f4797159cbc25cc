"""metrics.jsonl, always; wandb beside it, never able to stop a run."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from rich.console import Console

from distill.atomic import write_atomic
from distill.training.config import TrackingConfig


class JsonlLogger(Logger):
    """One JSON object a line. Lines of steps after `step` are dropped first: they will be written again."""

    name = "metrics.jsonl"
    version = 1

    def __init__(self, file: Path, step: int) -> None:
        super().__init__()
        if file.exists():
            kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_atomic(file, "".join(f"{line}\n" for line in kept))
        self._stream = file.open("a", encoding="utf-8", buffering=1)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line, null for what is not finite. Raises OSError that names the file."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._stream.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._stream.name) from error

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The recipe lies beside the file."""

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


class GuardedWandb(Logger):
    """wandb's logger behind a guard: the first failure is reported once and switches it off."""

    name = "wandb"
    version = 1

    def __init__(self, make: Callable[[], WandbLogger], console: Console) -> None:
        super().__init__()
        self._console = console
        self._logger: WandbLogger | None = None
        self._logger = self._guard(make)

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            text = f"wandb is off for the rest of this run: {error}; metrics.jsonl has everything"
            self._console.print(text, markup=False, highlight=False)
            self._logger = None
            return None

    def _tell(self, call: Callable[[WandbLogger], object]) -> None:
        logger = self._logger
        if logger is not None:
            self._guard(lambda: call(logger))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Forward to wandb, with the step as the curves' x."""
        self._tell(lambda logger: logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Forward to wandb."""
        self._tell(lambda logger: logger.log_hyperparams(params))

    def log_image(self, file: Path, step: int) -> None:
        """Forward a picture to wandb."""
        self._tell(lambda logger: logger.log_image("samples", [str(file)], step))

    def finalize(self, status: str) -> None:
        """Close the wandb run."""
        self._tell(lambda logger: logger.experiment.finish())
        self._logger = None


def make_loggers(
    folder: Path, config: TrackingConfig, step: int, params: dict[str, Any], console: Console, run_id: str | None = None
) -> list[Logger]:
    """metrics.jsonl and, unless it is disabled, here or in auto by WANDB_MODE, wandb, where a run that is continued has
    the same id: one curve."""
    loggers: list[Logger] = [JsonlLogger(folder / "metrics.jsonl", step)]
    if (os.environ.get("WANDB_MODE") if config.wandb == "auto" else config.wandb) != "disabled":
        os.environ.setdefault("WANDB_SILENT", "true")
        loggers.append(GuardedWandb(lambda: _wandb(folder, config, run_id), console))
        loggers[-1].log_hyperparams(params)
    return loggers


_STEP = "trainer/global_step"


def _wandb(folder: Path, config: TrackingConfig, run_id: str | None) -> WandbLogger:
    import wandb

    asked_off = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
    has_key = config.wandb == "auto" and not asked_off and wandb.login(prompt=False, verify=False)
    online = config.wandb == "online" or has_key

    def start(mode: Literal["online", "offline"]) -> WandbLogger:
        patience = 20 if mode == "online" else 90  # offline nothing is waited for but a slow machine
        settings = wandb.Settings(silent=True, console="off", init_timeout=patience)
        # beside one that the caller may have begun, which Lightning's logger would write to, and we then finish
        run = wandb.init(name=folder.name, id=run_id, project=config.project, dir=folder, mode=mode, settings=settings,
                         resume="allow", reinit="create_new" if wandb.run else None)  # fmt: skip
        run.define_metric(_STEP)  # as Lightning's logger does of a run that it begins
        run.define_metric("*", step_metric=_STEP, step_sync=True)
        return WandbLogger(experiment=run)

    if online:
        try:
            return start("online")
        except Exception:
            if config.wandb == "online":
                raise
    return start("offline")
