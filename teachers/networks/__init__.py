"""Backbones: one a file, no loss, no path.

A network is called as ``network(x, t, cond, shift=None, end=None, split=0)``, and has a `time_embedding` (with a last
linear layer `out`) and a `depth`, its number of blocks. There are two places where a student's second time enters:
`shift` is added to the time embedding before anything that follows; with `end` the blocks from number `split` on, and
the last layer's modulation, see the embedding of that time instead of t's. See `teachers.networks.base`.
"""

from teachers.networks.dit import DiTConfig
from teachers.networks.mlp import MLPConfig

NetworkConfig = MLPConfig | DiTConfig
NETWORKS: dict[str, type[NetworkConfig]] = {"mlp": MLPConfig, "dit": DiTConfig}
