"""A small network of every kind with random weights, as after training: nothing hides behind a layer that is zero."""

from __future__ import annotations

from pathlib import Path

import torch
from proof import conditioning
from torch import nn

from distill.objectives.base import Batch, Draw, Objective
from distill.rows import Rows
from distill.student import Student, StudentConfig
from teachers.networks import AnyConfig, to_entry
from teachers.networks.adm_unet import ADMUNetConfig
from teachers.networks.dhariwal_unet import DhariwalUNetConfig
from teachers.networks.dit import DiTConfig
from teachers.networks.edm2_unet import EDM2UNetConfig
from teachers.networks.imeanflow import IMeanFlowConfig
from teachers.networks.jit import JiTConfig
from teachers.networks.lightning_dit import LightningDiTConfig
from teachers.networks.mlp import MLPConfig
from teachers.networks.sit import SiTConfig
from teachers.networks.song_unet import SongUNetConfig
from teachers.space import DataSpace
from teachers.velocity import Teacher

IMAGE = DataSpace((3, 8, 8), 10)
CONFIGS: dict[str, AnyConfig] = {
    "mlp": MLPConfig(width=32),
    "dit": DiTConfig(width=32, depth=3, heads=2),
    "sit": SiTConfig(width=32, depth=3, heads=2),
    "lightning_dit": LightningDiTConfig(patch=2, width=32, depth=3, heads=2, hidden=48, qk_norm=True),
    "jit": JiTConfig(patch=2, bottleneck=16, width=32, depth=3, heads=2, hidden=48, tokens=4, start=1),
    "imeanflow": IMeanFlowConfig(width=32, depth=3, heads=2, hidden=48, tokens=(2, 2, 2, 2)),
    "adm_unet": ADMUNetConfig(width=32, widths=(32, 32), blocks=1),
    "song_unet": SongUNetConfig(width=16, widths=(16, 16), blocks=1, attention=(1,), features=16, embedding=32),
    "dhariwal_unet": DhariwalUNetConfig(width=32, widths=(64, 64), blocks=1, attention=(1,), embedding=64),
    "edm2_unet": EDM2UNetConfig(widths=(64, 64), blocks=1, attention=(1,), features=16, embedding=64),
}


def spread(network: nn.Module, seed: int = 0) -> None:
    """Moves every weight, about as much as its layer's usual size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator) / max(p[0].numel() if p.dim() else 1, 4) ** 0.5)


def teacher(name: str, folder: Path, seed: int = 1) -> Teacher:
    """Frozen, in eval mode. A name of `CONFIGS`, or a class of `diffusers_models.TINY`, which is saved in `folder`."""
    if name in CONFIGS:
        torch.manual_seed(seed)
        network = CONFIGS[name].build(IMAGE)
        made = Teacher(velocity=network, space=IMAGE, network=network, network_config=to_entry(CONFIGS[name]))
    else:
        from diffusers_models import module, said, save, scheduler  # seconds, which others need not wait for

        folder.mkdir(exist_ok=True)
        made = said(name, save(name, folder, module(name), scheduler(name))).load()
    assert made.network is not None
    spread(made.network, seed)
    made.freeze()
    return made


def student(of: Teacher, kind: str = "flow_map", finest: int = 1, seed: int = 2) -> Student:
    """Of the teacher's network, moved away from it."""
    made = StudentConfig().build(of, of.space, 0, kind, finest)  # type: ignore[arg-type]
    spread(made, seed)
    return made


def drawn(objective: Objective, of: Teacher, rows: int = 8, step: int = 0, dtype: torch.dtype = torch.float32) -> Draw:
    """The draw of a step, of random data."""
    x_1 = torch.randn(rows, *of.space.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    batch = Batch(x_1, conditioning(of.space, rows), tuple(map(str, range(rows))))
    return objective.draw(batch, of.path, Rows(0, "test", step, 0, rows), step)
