"""TarFlow: a normalizing flow, a teacher of samples that has no velocity.

Its state dict (``afhq_model_8_768_8_8_0.07.pth``) holds no arguments; sizes are read from the shapes. A sample is the
inverse of the flow, guided on the way, and one denoising step x + noise_std^2 grad log p(x), both as its authors draw
samples. Zhai et al., arXiv 2412.06329. (Code: Apple's own licence.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from teachers.adapters.base import Foreign, opened, require_said
from teachers.checkpoints import Checkpoint
from teachers.errors import CheckpointError
from teachers.fields import FieldError, require
from teachers.fill import fill
from teachers.networks.tarflow import TarFlow as Network
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

CLASSES = "blocks.0.class_embed"


@dataclass(frozen=True, kw_only=True)
class TarFlow(Foreign):
    """A TarFlow. noise_std: of the noise on its training data, which is taken off its samples (0: none is); guidance:
    its weight w, what is conditioned + w (that - what is not), 0 for none; guide: which of scale and shift of a patch
    it moves; annealed: whether it grows to w over the patches; temperature: of the attention of what is not
    conditioned. heads: of attention, null for a width of 64 each; channels: of the images, null for 1 or 3."""

    noise_std: float | None = None
    guidance: float = 0.0
    guide: Literal["both", "scale", "shift"] = "both"
    annealed: bool = True
    temperature: float = 1.0
    heads: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            noise_std=(self.noise_std is None or 0 <= self.noise_std < 1, "must be in [0, 1)"),
            guidance=(0 <= self.guidance < math.inf, "must be at least 0"),
            temperature=(0 < self.temperature < math.inf, "must be above 0"),
        )

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "tarflow", ())
        require_said(self, checkpoint, noise_std=self.noise_std)
        space, build = self._sizes(checkpoint)
        network = fill(build, checkpoint, self.placement, ignore=(r"blocks\.\d+\.attn_mask",), weights=weights)
        assert isinstance(network, Network)
        said = {"noise_std": self.noise_std, "guidance": self.guidance, "guide": self.guide, "annealed": self.annealed,
                "temperature": self.temperature}  # fmt: skip
        return Teacher(
            generator=_Generator(self, network),
            space=space,
            parts=(network,),
            info={
                "id": self.path,
                "family": "tarflow",
                "digest": checkpoint.digest if weights else "not read",
                "weights": checkpoint.weights,
                "licence": self.licence,
                "sampler": {"solver": "own", **said},
            },
        )

    def _sizes(self, checkpoint: Checkpoint) -> tuple[DataSpace, Callable[[], Network]]:
        width, features = checkpoint.shape("blocks.0.proj_in.weight", 2)
        tokens = checkpoint.shape("blocks.0.pos_embed")[0]
        said = checkpoint.shape("blocks.0.proj_out.bias")[0]
        classes = checkpoint.shape(CLASSES)[0] if CLASSES in checkpoint.tensors else 0
        grid = math.isqrt(tokens)
        counts = (self.channels,) if self.channels else (1, 3)
        fits = [(c, math.isqrt(features // c)) for c in counts if c * math.isqrt(features // c) ** 2 == features]
        if not fits or grid**2 != tokens:
            raise CheckpointError(
                f"{checkpoint.source}: {tokens} patches of {features} numbers are no square image of "
                f"{' or '.join(map(str, counts))} channels in square patches; set teacher.channels"
            )
        channels, patch = fits[0]
        shape = (channels, grid * patch, grid * patch)
        depth, layers = checkpoint.count("blocks."), checkpoint.count("blocks.0.attn_blocks.")
        heads = self.heads or max(1, width // 64)
        if width % heads:
            raise FieldError("TarFlow", {"heads": f"must divide the width, {width}, got {heads}"})
        return DataSpace(shape, classes or None, (-1.0, 1.0)), lambda: Network(
            shape, patch, width, depth, layers, heads, classes, scales=said == 2 * features
        )


@dataclass(frozen=True)
class _Generator:
    """Noise ``[b, *shape]`` and classes -> samples: a function of the noise alone."""

    config: TarFlow
    network: Network

    def __call__(self, x_0: Tensor, cond: Cond) -> Tensor:
        network, config = self.network, self.config
        label = None if cond is None else cond.get("class")
        push = self._push if config.guidance else None
        x = network.back(x_0.to(network.var.dtype), label, push, config.temperature)
        if config.noise_std:
            x = x + config.noise_std**2 * network.score(x, label)
        return x.to(x_0.dtype)

    def _push(self, i: int, a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> tuple[Tensor, Tensor]:
        config, last = self.config, self.network.var.shape[0] - 1
        w = config.guidance * ((i + 1) / last if config.annealed else 1)
        a = a if config.guide == "shift" else a + w * (a - other_a)
        return a, b if config.guide == "scale" else b + w * (b - other_b)
