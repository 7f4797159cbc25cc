"""Backbones: one a file, no loss, no path.

A network is called as ``network(x, t, cond, shift=None)`` and has a `time_embedding` (with a last linear layer `out`);
`shift` is added to that embedding before anything that follows, which is where a student's second time enters.
"""

from teachers.networks.mlp import MLPConfig

NetworkConfig = MLPConfig
NETWORKS: dict[str, type[NetworkConfig]] = {"mlp": MLPConfig}
