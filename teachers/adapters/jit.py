"""JiT (MIT): a transformer on pixels in [-1, 1] that predicts the data, t = 0 noise, on the linear path.

    v = (y - x) / max(1 - t, 0.05),    noise of standard deviation `noise_scale`

Li and He, arXiv 2511.13720. The size of its noise is not in its weights, and neither is the block at which tokens of
the class come in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teachers.adapters.base import Foreign, assemble, opened
from teachers.checkpoints import Checkpoint
from teachers.fields import FieldError, require
from teachers.fill import fill
from teachers.networks.conventions import Flow
from teachers.networks.jit import JiTConfig
from teachers.space import DataSpace
from teachers.velocity import Rule, Teacher

_AVERAGED = ("model_ema1", "model_ema2", "model")
_STARTS = {12: 4, 24: 8, 32: 10}
"""Depth of a published size (B, L, H) -> the block before which tokens come in."""
_SCALES = {12: 3.0, 24: 2.4, 32: 2.2}
"""Depth of a published size -> its guidance."""
_FLOOR = 0.05


@dataclass(frozen=True, kw_only=True)
class JiT(Foreign):
    """A JiT. noise_scale: of its noise, null to take it from the arguments in a training checkpoint; in_context_start:
    the block before which tokens of the class come in, null for that of the published sizes."""

    noise_scale: float | None = None
    in_context_start: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.noise_scale
        require(self, noise_scale=(scale is None or scale > 0, "must be null or above 0"))

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "jit", _AVERAGED)
        checkpoint = checkpoint.renamed(lambda name: name.removeprefix("net."))
        said = checkpoint.arguments
        network, space = self._sizes(checkpoint, said)
        scale = self.noise_scale or said.get("noise_scale")
        if scale is None:
            raise FieldError("JiT", {"noise_scale": (
                f"is needed: {checkpoint.source} does not say the standard deviation of its noise (1.0 of those "
                "published at 256 pixels, 2.0 at 512)"
            )})  # fmt: skip
        backbone = fill(lambda: network.build(space), checkpoint, self.placement, weights=weights)
        flow = Flow(prediction="data", floor=said.get("t_eps", _FLOOR), noise_std=float(scale))
        start = 0.1 / (0.1 + flow.noise_std * (1 - 0.1))  # 0.1 of its own time
        sampler: dict[str, Any] = {"solver": "heun", "last": "euler", "steps": 50, "interval": [start, 1.0]}
        if network.depth in _SCALES:
            sampler["guidance"] = _SCALES[network.depth]
        return assemble(
            self, checkpoint, "jit", backbone, network, flow, space,
            null=space.null if network.null_class else None, rule=Rule(open=True), sampler=sampler,
        )  # fmt: skip

    def _sizes(self, checkpoint: Checkpoint, said: Mapping[str, Any]) -> tuple[JiTConfig, DataSpace]:
        bottleneck, channels, patch, _ = checkpoint.shape("x_embedder.proj1.weight", 4)
        width = checkpoint.shape("x_embedder.proj2.weight", 4)[0]
        side = patch * round(checkpoint.shape("pos_embed", 3)[1] ** 0.5)
        rows = checkpoint.shape("y_embedder.embedding_table.weight", 2)[0]
        depth, classes = checkpoint.count("blocks."), said.get("class_num", rows - 1)
        posemb = "in_context_posemb"
        tokens = checkpoint.shape(posemb, 3)[1] if posemb in checkpoint.tensors else 0
        start = self.in_context_start if self.in_context_start is not None else _STARTS.get(depth)
        if tokens and start is None:
            raise FieldError("JiT", {"in_context_start": (
                f"is needed: {checkpoint.source} does not say before which of its {depth} blocks the tokens of the "
                "class come in, and this is none of the published sizes (12 blocks: 4, 24: 8, 32: 10)"
            )})  # fmt: skip
        config = JiTConfig(
            patch=patch,
            bottleneck=bottleneck,
            width=width,
            depth=depth,
            heads=width // checkpoint.shape("blocks.0.attn.q_norm.weight", 1)[0],
            hidden=checkpoint.shape("blocks.0.mlp.w3.weight", 2)[1],
            tokens=tokens,
            start=start or 0,
            null_class=rows > classes,
        )
        return config, DataSpace((channels, side, side), classes, (-1.0, 1.0))
