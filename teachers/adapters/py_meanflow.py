"""MeanFlow files of Gsunshine/py-meanflow (code and weights CC-BY-NC-SA 4.0): an unconditional U-Net of pixels.

Native time is 1 at the noise, and u predicts the average of noise - data over [t - h, t]:

    u(x, s, t) = -F(x, 1 - s, h = t - s)

Geng et al., arXiv 2505.13447. F is EDM's U-Net of DDPM++; its first layer sees the sinusoids of both times, side by
side, so that what h adds enters before its activation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teachers.adapters.base import Foreign, assemble
from teachers.adapters.edm import edm_network
from teachers.adapters.two_time import TwoTime, part
from teachers.checkpoints import Checkpoint, read
from teachers.errors import CheckpointError
from teachers.fill import fill
from teachers.networks.conventions import Flow
from teachers.networks.song_unet import Sinusoid, SongUNetConfig
from teachers.velocity import Teacher

_OWN = ("net_ema", "net_ema1", "net_ema2", "net")


@dataclass(frozen=True, kw_only=True)
class PyMeanFlow(Foreign):
    """A MeanFlow of pixels, as a teacher its diagonal. weights: `net_ema`, another average (`net_ema1`, `net_ema2`) or
    `net`."""

    licence: str = "CC-BY-NC-SA-4.0"

    def _teacher(self, weights: bool) -> Teacher:
        return self._parts(weights)[0]

    def two_time(self) -> TwoTime:
        """See `teachers.adapters.two_time.Finished`."""
        diagonal, gap = self._parts(weights=True)
        return TwoTime(diagonal=diagonal, gap=gap, steps=(1,))

    def _parts(self, weights: bool) -> tuple[Teacher, Mapping[str, Tensor]]:
        checkpoint, gap = _halved(_net(read(self.path, ("model",)), self.weights))
        network, space = edm_network(checkpoint, None, null=False)
        if not isinstance(network, SongUNetConfig) or space.classes is not None:
            raise CheckpointError(f"{checkpoint.source}: is another network of EDM's code; name it edm")
        network = replace(network, joins="early")
        backbone = fill(
            lambda: network.build(space), checkpoint, self.placement, ignore=(r"map_augment\.weight",), weights=weights
        )
        sampler = {"solver": "jumps", "steps": 1}
        return assemble(self, checkpoint, "py_meanflow", backbone, network, Flow(noise_time=1), space,
                        sampler=sampler), gap  # fmt: skip


def _net(checkpoint: Checkpoint, wanted: str | None) -> Checkpoint:
    """One of the networks in a training checkpoint, or the one that the file is."""
    if "map_layer0.weight" in checkpoint.tensors:
        return checkpoint
    name = wanted or _OWN[0]
    found, rest = part(checkpoint, f"{name}.")
    strange = [key for key in rest.tensors if key != "num_updates" and key.partition(".")[0] not in _OWN]
    if not found.tensors or strange:
        held = ", ".join(sorted({key.partition(".")[0] for key in checkpoint.tensors})[:8])
        raise CheckpointError(
            f"{checkpoint.source}: holds {held}, where {', '.join(_OWN)} and num_updates are known"
            + ("" if found.tensors else f" and {name} is needed (choose another with teacher.weights)")
        )
    return replace(found, weights=name)


def _halved(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The network of the first time, with what the second adds at 0, and the weights of the rest of what it adds."""
    columns = checkpoint.shape("map_layer0.weight", 2)[1]
    widths = [v.shape[0] for name, v in checkpoint.tensors.items() if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name)]
    if columns % 2 or columns in widths or "map_noise.freqs" in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.source}: its first layer sees {columns} features of time, not the sinusoids of two: it is a "
            "network of one time; name it edm"
        )
    first, second = checkpoint.tensors["map_layer0.weight"].chunk(2, dim=1)
    at_0 = second @ Sinusoid(columns // 2)(torch.zeros(1))[0].to(second.dtype)
    tensors = {name: _interleaved(v) if ".qkv." in name else v for name, v in checkpoint.tensors.items()}
    tensors["map_layer0.weight"] = first.clone()
    if "map_layer0.bias" in tensors:
        tensors["map_layer0.bias"] = tensors["map_layer0.bias"] + at_0
    return replace(checkpoint, tensors=tensors), {"layers.0.weight": second.clone(), "layers.0.bias": -at_0}


def _interleaved(qkv: Tensor) -> Tensor:
    """All queries, all keys, all values (of one head) -> each channel's three side by side."""
    return qkv.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1) if len(qkv) % 3 == 0 else qkv
