"""Teachers of other families: weights that anyone can make again, and what the families' own code made of them.

tests/golden/<family>.safetensors holds numbers alone: inputs, and outputs of the original code on `weights` of the
shapes that its metadata lists. Nothing of the original code is needed to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.rows import derived_seed

GOLDEN = Path(__file__).parent / "golden"


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Random float32 weights by name: matrices keep the size of what they are applied to, norms are near 1."""
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(
            tuple(shape), generator=torch.Generator().manual_seed(derived_seed("weights", name) % 2**63)
        )
        if len(shape) >= 2:
            made[name] = noise / noise[0].numel() ** 0.5
        else:
            made[name] = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return made


def save_golden(name: str, shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], source: str) -> None:
    """Keep what the original code `source` (repository and commit) made."""
    GOLDEN.mkdir(exist_ok=True)
    metadata = {"source": source, "shapes": json.dumps({k: list(v) for k, v in shapes.items()})}
    save_file(
        {k: v.detach().clone().contiguous() for k, v in tensors.items()}, GOLDEN / f"{name}.safetensors", metadata
    )


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, inputs and outputs by name)."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as opened:
        shapes = json.loads(opened.metadata()["shapes"])
        return weights(shapes), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
