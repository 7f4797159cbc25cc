"""Improved MeanFlow (MIT), files of its torch branch: already distilled, told of guidance instead of guided.

    u(x, s, t) = -F(x, h = t - s, omega, interval)

Geng et al., arXiv 2512.02012. Native time, that of the interval, is 1 at the noise. F is never told s. Its scale and
interval of guidance are frozen to those that the recipe names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from teachers.adapters.base import Foreign, assemble, opened
from teachers.adapters.two_time import TwoTime, centred
from teachers.checkpoints import Checkpoint
from teachers.fields import FieldError
from teachers.fill import fill
from teachers.networks.conventions import Flow
from teachers.networks.converted import Converted
from teachers.networks.imeanflow import IMeanFlow as Network
from teachers.networks.imeanflow import IMeanFlowConfig
from teachers.space import DataSpace, Latent
from teachers.velocity import Teacher

LATENT = Latent(
    autoencoder="stabilityai/sd-vae-ft-mse",
    mean=(0.86488, -0.27787343, 0.21616915, 0.3738409),
    std=(4.85503674, 5.31922414, 3.93725398, 3.9870003),
)
"""Of all that are published."""


@dataclass(frozen=True, kw_only=True)
class IMeanFlow(Foreign):
    """An improved MeanFlow, as a teacher its diagonal. omega, interval: the guidance scale, and the ends of its
    interval in native time (1 at the noise), that it is told at every call; size: side of its latents (32 in what is
    published); latent: null for that of the published weights."""

    omega: float | None = None
    interval: tuple[float, float] | None = None
    size: int | None = None
    latent: Latent | None = None

    def two_time(self) -> TwoTime:
        """See `teachers.adapters.two_time.Finished`."""
        diagonal = self._teacher(weights=True)
        assert isinstance(diagonal.network, Converted) and isinstance(diagonal.network.network, Network)
        gap = centred(diagonal.network.network.h_embedder, 0.0)[1]
        return TwoTime(diagonal=diagonal, gap=gap, steps=(1, 2))

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "imeanflow", ("model",))
        checkpoint = _renamed(checkpoint)
        network, space = self._sizes(checkpoint)
        backbone = fill(lambda: network.build(space), checkpoint, self.placement,
                        ignore=(r"v_heads\..*", r"v_final_layer\..*"), weights=weights)  # fmt: skip
        teacher = assemble(
            self, checkpoint, "imeanflow", backbone, network, Flow(noise_time=1), space,
            latent=self.latent or LATENT, sampler={"solver": "jumps", "steps": 1},
        )  # fmt: skip
        told = {"omega": network.omega, "interval": list(network.interval)}
        return replace(teacher, info={**teacher.info, "told": told})

    def _sizes(self, checkpoint: Checkpoint) -> tuple[IMeanFlowConfig, DataSpace]:
        omega, interval, size = self.omega, self.interval, self.size
        if omega is None or interval is None or size is None:
            guidance = ("its guidance is told to it at every call (published: omega 8.0 and interval [0.4, 0.65] of B, "
                        "10.5 and [0.4, 0.6] of M and L, 8.0 and [0.42, 0.62] of XL)")  # fmt: skip
            side = f"{checkpoint.source} does not say the side of its latents (published: 32)"
            needed = {"omega": (omega, guidance), "interval": (interval, guidance), "size": (size, side)}
            raise FieldError(
                "IMeanFlow", {key: f"is needed: {why}" for key, (value, why) in needed.items() if value is None}
            )
        width, channels, patch, _ = checkpoint.shape("x_embedder.proj.weight", 4)
        classes = checkpoint.shape("y_embedder.embedding_table.weight", 2)[0] - 1
        head = checkpoint.shape("blocks.0.attn.q_norm.weight", 1)[0]
        config = IMeanFlowConfig(
            patch=patch,
            width=width,
            depth=checkpoint.count("blocks."),
            heads=width // head,
            hidden=checkpoint.shape("blocks.0.mlp.w2.weight", 2)[1],
            tokens=(
                checkpoint.shape("class_tokens")[0],
                checkpoint.shape("omega_tokens")[0],
                checkpoint.shape("t_min_tokens")[0],
                checkpoint.shape("time_tokens")[0],
            ),
            omega=omega,
            interval=interval,
        )
        return config, DataSpace((channels, size, size), classes)


def _renamed(checkpoint: Checkpoint) -> Checkpoint:
    """In the network's names: one row of blocks, and plain layers."""
    shared = 1 + max(
        (int(m[1]) for m in (re.match(r"net\.shared_blocks\.(\d+)\.", k) for k in checkpoint.tensors) if m), default=-1
    )

    def change(name: str) -> str:
        name = re.sub(r"^net\.", "", name).replace("._flax_linear", "").replace("._flax_embedding", "")
        name = re.sub(r"^shared_blocks\.", "blocks.", name).replace("u_final_layer.", "final_layer.")
        return re.sub(r"^u_heads\.(\d+)", lambda m: f"blocks.{int(m[1]) + shared}", name)

    return checkpoint.renamed(change)
