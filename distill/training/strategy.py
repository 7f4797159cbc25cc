"""How a job's processes share the work: each holds all (DDP), or all hold shards (FSDP2: torch's fully_shard).

Lightning's strategies, saving by our checkpoints: every process comes to a save, and what fails on one fails on all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer

from distill.atomic import remove
from distill.parallel import world
from distill.training.checkpoint import load, save
from distill.training.config import StrategyName
from teachers.errors import InputError


class DirectoryCheckpoint(CheckpointIO):
    """Lightning's way to disk and back; every process comes to both."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `save`."""
        save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `load`."""
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one checkpoint."""
        remove(Path(path))


class Whole(DDPStrategy):
    """DDP."""

    def __init__(self) -> None:
        # every process starts with the same buffers and changes them alike
        super().__init__(broadcast_buffers=False, gradient_as_bucket_view=True)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """On every process."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


class Sharded(ModelParallelStrategy):
    """FSDP2. What is saved are the shards of each process."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=world(), tensor_parallel_size=1)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As every strategy that saves through a CheckpointIO."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """With the shards as they are."""
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """From shards that `DistillModule.on_load_checkpoint` has cut."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """With the shards as they are."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """From shards that `DistillModule.on_load_checkpoint` has cut."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Raises InputError for a network that cannot be sharded by its blocks."""
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise InputError(
                "trainer.strategy: this network uses weights of one of its blocks outside of that block's own forward, "
                "which fsdp2 gathers them for: set it to ddp"
            ) from error

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """On every process."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """On every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)


def make_strategy(name: StrategyName) -> Strategy | Literal["auto"]:
    """Lightning's strategy over the processes of this launch."""
    if name == "single":
        return "auto"
    return Whole() if name == "ddp" else Sharded()


def environment(name: StrategyName) -> ClusterEnvironment:
    """Who tells Lightning of the processes: torchrun's variables. Not its plugin for SLURM, which answers signals by
    itself."""
    return LightningEnvironment() if name == "single" else TorchElasticEnvironment()
