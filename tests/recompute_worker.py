"""SGD steps of students whose blocks recompute, by one process or several: ``recompute_worker.py OUT MODE``, which is
single, ddp or fsdp2.

The first process writes the weights of every objective's student to the file OUT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_networks import drawn, student, teacher
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distill.launch import whole
from distill.objectives.base import Objective
from distill.objectives.eulerian import Eulerian
from distill.objectives.flow_matching import FlowMatching
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.pieces import rows_of
from distill.training.recompute import recompute
from distill.training.sharding import shard
from teachers.velocity import Teacher

OBJECTIVES: dict[str, Objective] = {
    "flow_matching": FlowMatching(),
    "mean_flow": MeanFlow(),  # two passes
    "lagrangian": Lagrangian(),  # gradients through the derivative
    "lagrangian full": Lagrangian(gradient="full"),
    "eulerian full": Eulerian(gradient="full"),
}
CASES = [*(("dit", name) for name in OBJECTIVES), ("adm_unet", "lagrangian")]


class Step(nn.Module):
    """The loss, which is all that DDP sees."""

    def __init__(self, net: nn.Module, objective: Objective, of: Teacher) -> None:
        super().__init__()
        self.net = net
        self._fixed = (objective, of)

    def forward(self, draw: Any) -> Tensor:
        objective, of = self._fixed
        return objective.loss(self.net, self.net, of, draw).per_sample.mean()  # type: ignore[arg-type]


def trained(network: str, objective: Objective, mode: str, rank: int, world: int) -> dict[str, Tensor]:
    of = teacher(network, Path())
    net = student(of).double()
    recompute(net.network)
    step: nn.Module = Step(net, objective, of)
    if mode == "fsdp2":
        for part in net.children():
            shard(part, init_device_mesh("cpu", (world,)))
    elif mode == "ddp":
        step = DistributedDataParallel(step)
    assert of.network is not None
    of.network.double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for number in range(3):
        draw = rows_of(drawn(objective, of, 8, number, torch.float64), torch.arange(8)[rank::world])
        optimizer.zero_grad()
        step(draw).backward()
        optimizer.step()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in net.state_dict().items()}


def main() -> None:
    out, mode = sys.argv[1:]
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if mode != "single":
        dist.init_process_group("gloo")
    found = {
        f"{network}/{name}/{key}": value.detach().clone()
        for network, name in CASES
        for key, value in trained(network, OBJECTIVES[name], mode, rank, world).items()
    }
    if rank == 0:
        save_file(found, out)
    if mode != "single":
        dist.barrier()


if __name__ == "__main__":
    whole(main)
