"""How a job's processes share the work: each holds all (DDP), or all hold shards (FSDP2: torch's fully_shard).

Lightning's strategies, saving by our checkpoints: every process comes to a save, and what fails on one fails on all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from distill.memory import here
from distill.parallel import world
from teachers.errors import InputError
from teachers.networks.base import LISTS, blocks

Name = Literal["single", "ddp", "fsdp2"]


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


def make_strategy(name: Name) -> Strategy | Literal["auto"]:
    """Lightning's strategy over the processes of this launch."""
    if name == "single":
        return "auto"
    return Whole() if name == "ddp" else Sharded()


def environment(name: Name) -> ClusterEnvironment:
    """Who tells Lightning of the processes: torchrun's variables. Not its plugin for SLURM, which answers signals by
    itself."""
    return LightningEnvironment() if name == "single" else TorchElasticEnvironment()


def shard(module: nn.Module, mesh: Any) -> None:
    """Shard a module's parameters over the processes, in place: what it says is called `apart` from the block that it
    is in, the elements of its outermost lists of blocks one by one, what is left of it as one.

    Raises InputError for a parameter without dimensions.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise InputError(
                f"trainer.strategy: fsdp2 cannot shard {name}, which has no dimension: set it to ddp, or give the "
                "parameter the shape [1]"
            )
    roots = list(blocks(module)) if isinstance(module, LISTS) else [module]
    apart = [part for m in module.modules() for part in getattr(m, "apart", ())]
    for part in (*apart, *(block for root in roots for block in blocks(root)), *roots):
        if any(not isinstance(p, DTensor) for p in part.parameters()):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)  # the root too: it may be read after any forward


def idle(loss: Tensor, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that a loss does not depend on."""
    found, coming = set(), [loss.grad_fn]
    while coming:
        node = coming.pop()
        if node is not None and node not in found:
            found.add(node)
            coming += [before for before, _ in node.next_functions]
    reached = {id(node.variable) for node in found if hasattr(node, "variable")}
    return [p for p in parameters if id(p) not in reached]


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of tensors that may be sharded: the same memory."""
    return list(map(here, tensors))


def first_row(tensor: DTensor) -> int:
    """Where this process's shard begins in the first dimension."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0]) if tensor.dim() else 0


def number(value: Tensor) -> Tensor:
    """A scalar that may be the sum of what processes hold."""
    return value.full_tensor() if isinstance(value, DTensor) else value
