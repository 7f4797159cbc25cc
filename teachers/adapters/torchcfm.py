"""torchcfm: a U-Net on pixels, t = 0 noise, velocity; Tong et al., arXiv 2302.00482 (MIT).

otcfm, icfm   x_t = t x_1 + (1 - t) x_0, x_0 and x_1 paired by optimal transport in a batch, or independent
fm            x_t = t x_1 + (1 - (1 - sigma) t) x_0
si            x_t = sin(pi t / 2) x_1 + cos(pi t / 2) x_0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teachers.adapters.adm_unet import Published, UNet, network_of
from teachers.adapters.base import assemble, opened
from teachers.fields import FieldError, require
from teachers.fill import fill
from teachers.networks.conventions import ConventionConfig, Flow, FlowToSigmaMin
from teachers.velocity import Teacher

_PUBLISHED = (Published(128, (128, 256, 256, 256), 2, (1,), size=32, head_width=64),)


@dataclass(frozen=True, kw_only=True)
class TorchCFM(UNet):
    """A U-Net of torchcfm. variant: the matcher it was trained with, which its file does not say (`icfm` is `cfm` in
    old names of files); sigma: of the matcher, 0 in all that is published."""

    variant: Literal["otcfm", "icfm", "fm", "si"] | None = None
    sigma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, sigma=(0 <= self.sigma < 1, "must be in [0, 1)"))

    def _teacher(self, weights: bool) -> Teacher:
        checkpoint = opened(self, "torchcfm", ("ema_model", "net_model"))
        convention = self._convention(checkpoint.source)
        network, space = network_of(self, checkpoint, "legacy", False, _PUBLISHED)
        backbone = fill(lambda: network.build(space), checkpoint, self.placement, weights=weights)
        coupling = "optimal transport within a batch" if self.variant == "otcfm" else "independent"
        return assemble(self, checkpoint, "torchcfm", backbone, network, convention, space,
                        sampler={"solver": "euler", "steps": 100}, said={"variant": self.variant,
                                                                         "coupling": coupling})  # fmt: skip

    def _convention(self, source: str) -> ConventionConfig:
        if self.variant is None:
            raise FieldError("TorchCFM", {"variant": f"is needed: {source} does not say it (otcfm, icfm, fm or si)"})
        if self.sigma and self.variant != "fm":
            raise FieldError("TorchCFM", {"sigma": (
                f"must be 0 for {self.variant}, got {self.sigma}: noise is then added to the whole path, which neither "
                "starts at the noise its sampler starts from nor ends at data, so its velocity is of no path known here"
            )})  # fmt: skip
        if self.variant == "fm" and self.sigma:
            return FlowToSigmaMin(sigma_min=self.sigma)
        return Flow(native="cosine") if self.variant == "si" else Flow()
