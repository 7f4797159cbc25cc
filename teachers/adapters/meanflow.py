"""MeanFlow files of zhuyu-cs/MeanFlow (MIT): a SiT with a second embedding, of the length of a jump.

Native time is 1 at the noise, and u predicts the average of noise - data over [t - h, t]:

    u(x, s, t) = -F(x, 1 - s, h = t - s)

Geng et al., arXiv 2505.13447. Guidance, if it was trained with it, is in the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from teachers.adapters.base import known, opened, require_said
from teachers.adapters.sit import EMA, ImageTransformer, image_transformer
from teachers.adapters.two_time import TwoTime, centred, part
from teachers.checkpoints import Checkpoint
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.fill import fill
from teachers.networks.conventions import Flow
from teachers.networks.sit import TimestepEmbedder
from teachers.path import PATHS
from teachers.velocity import Rule, Teacher

_OWN = {"guidance_scale": "cfg_omega", "guidance_mix": "cfg_kappa", "from": "cfg_min_t", "to": "cfg_max_t"}


@dataclass(frozen=True, kw_only=True)
class MeanFlow(ImageTransformer):
    """A SiT trained as a MeanFlow, as a teacher its diagonal. latent: needed, for its file does not say which of two
    scales it was trained with; path_type: null to take it from the file's own arguments."""

    path_type: Literal["linear", "cosine"] | None = None

    def _teacher(self, weights: bool) -> Teacher:
        return self._parts(weights)[0]

    def two_time(self) -> TwoTime:
        """See `teachers.adapters.two_time.Finished`."""
        diagonal, embedder = self._parts(weights=True, native=True)
        return TwoTime(diagonal=diagonal, gap=centred(embedder, 0.0)[1])

    def _parts(self, weights: bool, native: bool = False) -> tuple[Teacher, nn.Module]:
        """The diagonal, on its native path if asked, and the embedder of the second time."""
        checkpoint = opened(self, "meanflow", EMA)
        said = checkpoint.arguments
        path = known(self, checkpoint, "path_type", ("linear", "cosine"))
        if self.latent is None:
            raise FieldError("MeanFlow", {"latent": (
                f"is needed: {checkpoint.source} does not say its scale, which is 0.18125 (a typo) in the first "
                "version of its training code and 0.18215 since (e.g. {autoencoder: stabilityai/sd-vae-ft-ema, "
                "scale: 0.18125})"
            )})  # fmt: skip
        require_said(self, checkpoint, path_type=path)
        embedder, checkpoint = _folded(checkpoint, weights)
        # jumps are straight in the native points: a student lives on the native path
        flow = Flow(noise_time=1) if native else Flow(native=path, noise_time=1)
        sampler = {"solver": "jumps", "steps": 1, "guidance": 1.0}
        teacher = image_transformer(self, checkpoint, "meanflow", flow, Rule(), sampler, weights, None)
        trained = {key: said[name] for key, name in _OWN.items() if name in said}
        teacher = replace(teacher, info={**teacher.info, **({"trained_with": trained} if trained else {})})
        return (replace(teacher, path=PATHS[path]()) if native else teacher), embedder


def _folded(checkpoint: Checkpoint, weights: bool) -> tuple[nn.Module, Checkpoint]:
    """The embedder of the second time, and the rest with its value at 0 added to the first's."""
    width = checkpoint.shape("x_embedder.proj.weight", 4)[0]
    second, rest = part(checkpoint, "r_embedder.")
    if not second.tensors:
        raise CheckpointError(
            f"{checkpoint.source}: has no r_embedder, so it is no MeanFlow but a model of one time: name it repa "
            "(time 1 is noise) or sit (time 0 is)"
        )
    embedder = fill(lambda: TimestepEmbedder(width), second, weights=weights)
    if weights and "t_embedder.mlp.2.bias" in rest.tensors:
        value, _ = centred(embedder, 0.0)
        bias = rest.tensors["t_embedder.mlp.2.bias"] + value
        rest = replace(rest, tensors={**rest.tensors, "t_embedder.mlp.2.bias": bias})
    return embedder, rest
