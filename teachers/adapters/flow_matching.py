"""The image examples of flow_matching: a U-Net on pixels, linear path, t = 0 noise, velocity; Lipman et al., arXiv
2412.06264 (CC-BY-NC 4.0). With averaged weights a file numbers them in the order of the parameters, without names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from teachers.adapters.adm_unet import Published, UNet, network_of
from teachers.adapters.base import assemble
from teachers.checkpoints import Checkpoint, read
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.fill import fill
from teachers.networks.conventions import Flow
from teachers.velocity import Teacher

_PUBLISHED = (
    Published(128, (256, 256, 256), 4, (1,), size=32, heads=1),  # cifar10
    Published(192, (192, 384, 576, 768), 3, (1, 2, 3), size=None, head_width=64),  # imagenet, of 32 or 64 pixels
)
_RAW, _AVERAGED = "model", "shadow_params"


@dataclass(frozen=True, kw_only=True)
class FlowMatching(UNet):
    """A U-Net of flow_matching's image examples. weights: `shadow_params`, the averaged ones, or `model`; null for the
    averaged ones if there are any."""

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = read(self.path, ("model",))
        said = checkpoint.arguments
        _refuse_discrete(checkpoint, said)
        named, averaged = _parts(checkpoint)
        network, space = network_of(self, named, "new", True, _PUBLISHED)
        # every name and size of the raw weights is compared, whichever are taken
        backbone = fill(
            lambda: network.build(space), named, self.placement, weights=weights and not self._wants(averaged)
        )
        if self._wants(averaged):
            names = [name for name, _ in backbone.named_parameters()]
            named = _by_name(checkpoint, averaged, names)
            backbone = fill(lambda: network.build(space), named, self.placement, weights=weights)
        dropped = said.get("class_drop_prob", 0.2) > 0
        return assemble(
            self,
            replace(checkpoint, weights=named.weights),
            "flow_matching",
            backbone,
            network,
            Flow(),
            space,
            null=space.null if network.null_class and dropped else None,
            sampler={"solver": "midpoint", "steps": 100, "guidance": 1 + said.get("cfg_scale", 0.2)},
        )

    def _wants(self, averaged: Mapping[str, Tensor]) -> bool:
        if self.weights not in (None, _RAW, _AVERAGED):
            raise FieldError("FlowMatching", {"weights": f"must be {_AVERAGED}, {_RAW} or null, got {self.weights!r}"})
        if self.weights == _AVERAGED and not averaged:
            raise CheckpointError(f"{self.path}: has no {_AVERAGED}: it was trained without use_ema; set "
                                  "teacher.weights to null")  # fmt: skip
        return bool(averaged) and self.weights != _RAW


def _refuse_discrete(checkpoint: Checkpoint, said: Mapping[str, Any]) -> None:
    if said.get("discrete_flow_matching") or any("pixel_embedding." in name for name in checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.source}: a discrete flow, which jumps between the values of pixels and has no velocity; name "
            "a checkpoint that was trained without discrete_flow_matching"
        )


def _parts(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The raw weights by name, and the averaged ones by number, none if there are none."""
    averaged = {k: v for k, v in checkpoint.tensors.items() if k.startswith(f"{_AVERAGED}.")}
    if not averaged:
        return replace(checkpoint, weights=_RAW), {}
    others = {k: v for k, v in checkpoint.tensors.items() if k not in averaged and k != "num_updates"}
    return replace(checkpoint, tensors=others, weights=_RAW).renamed(lambda name: name.removeprefix("model.")), averaged


def _by_name(checkpoint: Checkpoint, averaged: Mapping[str, Tensor], names: list[str]) -> Checkpoint:
    numbers = [f"{_AVERAGED}.{i}" for i in range(len(names))]
    if averaged.keys() != set(numbers):
        off = sorted(averaged.keys() ^ set(numbers))
        raise CheckpointError(
            f"{checkpoint.source}: the network has {len(names)} parameters, the averaged ones are {len(averaged)} and "
            f"do not agree on {', '.join(off[:8])}; take the others with teacher.weights: {_RAW}"
        )
    tensors = {name: averaged[number] for name, number in zip(names, numbers, strict=True)}
    return replace(checkpoint, tensors=tensors, weights=f"{_AVERAGED} (averaged)")
