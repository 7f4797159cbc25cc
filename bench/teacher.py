"""The Fashion-MNIST teacher over its steps and guidance scales: docs/results/teacher.json, for bench/results.py.

    python bench/teacher.py              everything that is not there yet: about 3 hours of a CPU core

Guided, a step is two network calls; a sample of each setting starts from the same noise as in the other ones.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distill.evaluation.features import Features, load_features
from distill.evaluation.metrics import (
    agreement,
    frechet_distance,
    frechet_errors,
    frechet_floor,
    interval,
    kernel_distance,
    precision_recall,
)
from distill.guidance import Guidance
from distill.parts import Job
from distill.recipe import load
from distill.sampling import generate, teacher_generator
from teachers.adapters.native import Native
from teachers.velocity import Teacher

FILE = Path(__file__).resolve().parents[1] / "docs" / "results" / "teacher.json"
SCALES, STEPS = (1.0, 1.5, 2.0, 3.0), (1, 2, 4, 8, 16, 32, 100)
BATCH, SEED, AGAIN = 500, 0, 200


def measured(teacher: Teacher, steps: int, samples: int, real: torch.Tensor, features: Features) -> dict[str, Any]:
    """The metrics of evaluation.json for one setting. real: features of the held-out images."""
    start = time.perf_counter()
    x = generate(teacher_generator(teacher, steps), teacher.space, samples, BATCH, SEED).x
    own, classes = features(x)
    cond = teacher.space.cond_for(0, samples)
    assert cond is not None and classes is not None
    fd = frechet_distance(own, real)
    precision, recall = precision_recall(own, real)
    return {
        "nfe": steps * teacher.calls,
        "fd": fd,
        "interval": interval(fd + frechet_errors([own], real, AGAIN)[0]),
        "kid": kernel_distance(own, real),
        "precision": precision,
        "recall": recall,
        "label_accuracy": agreement(classes, cond["class"]),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The Fashion-MNIST teacher over steps and guidance scales.")
    parser.add_argument("--teacher", default="fashion", help="an export, or the shipped one")
    parser.add_argument("--features", default="fashion", help="its classifier")
    parser.add_argument("--samples", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args()

    teacher, features = Native(path=asked.teacher).load(), load_features(asked.features)
    teacher.freeze()
    job = Job(Path(), load("teachers/fashion"), None, Console())
    assert job.held_out is not None
    x, _ = job.real_samples(job.held_out)
    real = features(x)[0]
    found = json.loads(asked.out.read_text()) if asked.out.exists() else {"runs": {}}
    found |= {"samples": asked.samples, "teacher": teacher.info["digest"], "features": features.digest,
              "floor": frechet_floor(real, asked.samples)[1]}  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for scale in SCALES:
        guided = teacher if scale == 1 else Guidance(scale=scale).guide(teacher)
        for steps in STEPS:
            name = f"{scale:g} {steps}"
            if name not in found["runs"]:
                found["runs"][name] = measured(guided, steps, asked.samples, real, features)
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
                print(name, found["runs"][name], flush=True)


if __name__ == "__main__":
    main()
