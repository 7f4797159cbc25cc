"""The Fashion-MNIST teacher over its steps and guidance scales: docs/results/teacher.json, for bench/results.py.

    python bench/teacher.py              what is not there yet, or is of other samples, teacher or features

Guided, a step is two network calls; a sample of each setting starts from the same noise as in the other ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from objectives_report import rounded
from rich.console import Console

from distill.evaluation.config import EvaluationConfig
from distill.evaluation.evaluate import Judge, like
from distill.evaluation.features import load_features
from distill.evaluation.metrics import interval
from distill.guidance import Guidance
from distill.parallel import device
from distill.parts import Job
from distill.recipe import load
from distill.sampling import generate, teacher_generator
from teachers.adapters.native import Native
from teachers.velocity import Teacher

FILE = Path(__file__).resolve().parents[1] / "docs" / "results" / "teacher.json"
SCALES, STEPS = (1.0, 1.5, 2.0, 3.0), (1, 2, 4, 8, 16, 32, 100)
BATCH, SEED, AGAIN = 500, 0, 200


def measured(teacher: Teacher, steps: int, samples: int, judge: Judge) -> dict[str, Any]:
    """The metrics of evaluation.json for one setting."""
    make = teacher_generator(teacher, steps)
    judged = judge(generate(make, teacher.space, samples, BATCH, SEED, judge.conditions))
    errors = judge.errors([judged.features], AGAIN)[0]
    return {"nfe": steps * teacher.calls, **judged.metrics, "interval": interval(judged.metrics["fd"] + errors)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The Fashion-MNIST teacher over steps and guidance scales.")
    parser.add_argument("--teacher", default="fashion", help="an export, or the shipped one")
    parser.add_argument("--features", default="fashion", help="its classifier")
    parser.add_argument("--samples", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args()

    teacher, features = Native(path=asked.teacher).load(), load_features(asked.features)
    teacher.freeze()
    teacher.to(device())
    job = Job(Path(), load("teachers/fashion"), None, Console())
    assert job.held_out is not None
    real = job.real_samples(job.held_out)
    judge = Judge(real, features, like(real, teacher.space))
    head = {"samples": asked.samples, "teacher": teacher.info["digest"], "features": features.digest,
            "floor": rounded(judge.floor(EvaluationConfig(samples=asked.samples), None)["fd"])}  # fmt: skip
    found = json.loads(asked.out.read_text()) if asked.out.exists() else {"runs": {}}
    if {k: v for k, v in found.items() if k != "runs"} != head:
        found = {**head, "runs": {}}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for scale in SCALES:
        guided = teacher if scale == 1 else Guidance(scale=scale).guide(teacher)
        for steps in STEPS:
            name = f"{scale:g} {steps}"
            if name not in found["runs"]:
                found["runs"][name] = rounded(measured(guided, steps, asked.samples, judge))
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
                print(name, found["runs"][name], flush=True)


if __name__ == "__main__":
    main()
