"""Mixed precision: matrix products in bfloat16, and float32 where three digits are not enough.

Weights, gradients, optimizer and averages stay float32, and so do points, coefficients and losses, which are no matrix
products. Embeddings of times (`teachers.networks.exact`) and finite differences (`distill.derivative`) are computed in
float32; what a network says comes back in its point's dtype (`Student.mean_velocity`, `Teacher`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from distill.training.config import Precision


def mixed(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What a training step's forward and the check of its derivatives run in; the backward runs outside of it."""
    if precision == "float32":
        return nullcontext()
    # without its cache, which would keep a bfloat16 copy of every weight to the end of the step, of sharded ones too
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def caution(precision: Precision, device: torch.device) -> str | None:
    """What to say before training in bfloat16 on a CPU without instructions for it, where a step takes about six
    times as long as in float32."""
    able = not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "float32" or device.type != "cpu" or able:
        return None
    return "this CPU has no bfloat16 instructions, a step takes several times as long: set trainer.precision=float32"
