"""Student <-> a folder that other people's tools can load: config.json, model.safetensors and a model card.

Loading needs torch, safetensors and numpy alone, and no recipe. The format is that of `teachers.adapters.native`, so an
export of kind velocity is a teacher for the next job.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.flow_map import Kind
from distill.guidance import GuidanceInput
from distill.parameterisation import PARAMETERISATIONS, Parameterisation
from distill.student import Student
from teachers.adapters.native import (
    FORMAT,
    as_exported,
    load_strict,
    network_from,
    read_config,
    read_weights,
    space_from,
    space_to_plain,
)
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError
from teachers.path import from_plain, to_plain

WEIGHTS = "model.safetensors"


def load(path: str | Path, device: torch.device | str = "cpu", network: nn.Module | None = None) -> Student:
    """The exported student in `path`, in eval mode: ``load("runs/x/export").sample(16, steps=1, seed=0)``.

    Its ``config`` is config.json. network: of a student of somebody's own module (`teachers.from_module`), a module of
    the same class, whose copy takes the weights. It can be put in another precision, ``.bfloat16()``, and samples in
    float32 still. Raises CheckpointError for a folder that is not an export, unknown keys, missing or extra weights,
    and files that are not what config.json states.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that `distill export` wrote (RUN/export)")
    config = read_config(folder)
    source = str(folder / "config.json")
    space = space_from(config)
    with as_exported():
        built = network_from(config, space, source, network)
        try:
            student = Student(built, space, from_plain(config["path"]), cast(Kind, config["kind"]), **_form(config))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: {error}; export again with this version") from None
    if config["supports"] != student.support:
        raise CheckpointError(f"{source}: supports is {config['supports']!r}, this {config['kind']} supports "
                              f"{student.support!r}; export again")  # fmt: skip
    load_strict(student, read_weights(folder, config), str(folder / config["weights"]["file"]))
    student.config = config
    return student.eval().requires_grad_(False).to(device)


def _form(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `Student`. Raises ValueError: a key left out is not the default."""
    form = dict(config["student"])
    given = form["parameterisation"]
    cls = PARAMETERISATIONS.get(str(given.get("name"))) if isinstance(given, dict) else None
    if cls is None:
        raise ValueError(f"student.parameterisation is {given!r}, must be one of {', '.join(PARAMETERISATIONS)}")
    own = _exactly("student.parameterisation", given, ("name", *(spec.name for spec in fields(cast(Any, cls)))))
    form["parameterisation"] = cls(**{k: v for k, v in own.items() if k != "name"})
    guidance = config["guidance"]
    if guidance is not None:
        names = tuple(spec.name for spec in fields(GuidanceInput))
        guidance = GuidanceInput.of(_exactly("guidance", guidance, names))
    return form | {"guidance": guidance}


def _exactly(where: str, given: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(given, dict) or set(given) != set(names):
        raise ValueError(f"{where} is {given!r}, must have the keys {', '.join(names)}")
    return dict(given)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an export says beside the weights. network: its entry (see teachers.networks); steps: recommended numbers
    of network calls, the default first; teacher: id, digest, licence, None for one trained from data; recipe: the
    resolved YAML.
    """

    name: str
    network: Mapping[str, Any]
    steps: tuple[int, ...]
    teacher: Mapping[str, Any] | None
    licence: str
    trained_on: Mapping[str, Any]
    metrics: Mapping[str, Any]
    recipe: str


def write(folder: Path, student: Student, weights: Mapping[str, Tensor], facts: Facts) -> None:
    """Fill the empty `folder` with config.json, model.safetensors and README.md. weights: the student's state dict."""
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, folder / WEIGHTS)
    file, space = folder / WEIGHTS, student.space
    config = {
        "format": FORMAT,
        "kind": student.kind,
        "network": dict(facts.network),
        "path": to_plain(student.path),
        "space": space_to_plain(space),
        "supports": student.support,
        "student": {
            "finest": student.finest,
            "parameterisation": _named(student.parameterisation),
            "own_output": student.own_output,
            "split": student.split,
        },
        "steps": list(facts.steps),
        "guidance": None if student.guidance is None else asdict(student.guidance),
        "teacher": facts.teacher,
        "licence": facts.licence,
        "trained_on": facts.trained_on,
        "metrics": facts.metrics,
        "recipe": facts.recipe,
        "weights": {"file": WEIGHTS, "bytes": file.stat().st_size, "sha256": sha256(file)},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(student, facts), encoding="utf-8")


_WHAT = {
    "flow_map": "flow-map student: noise to sample in one network call, better in more",
    "shortcut": "shortcut student: noise to sample in one network call, better in 2, 4, ..., {finest}",
    "consistency": "consistency student: noise to sample in one network call; in more it is noised again between them",
    "grid": "student: noise to sample in exactly {finest} network call(s)",
    "velocity": "flow-matching velocity (a teacher)",
}


def _named(parameterisation: Parameterisation) -> dict[str, Any]:
    name = next(name for name, cls in PARAMETERISATIONS.items() if cls is type(parameterisation))
    return {"name": name, **asdict(cast(Any, parameterisation))}


def _own(network: Mapping[str, Any]) -> str:
    """What loading asks for, of a network of its author's own class."""
    inner = network.get("network", network)
    return f", network={inner['of'].rpartition('.')[2]}(...)" if inner["name"] == "own" else ""


def _card(student: Student, facts: Facts) -> str:
    space = student.space
    what = _WHAT[student.kind].format(finest=student.finest)
    teacher = "none" if facts.teacher is None else f"{facts.teacher.get('id')} (sha256 {facts.teacher.get('digest')})"
    lines = [
        "---",
        f"license: {facts.licence.lower()}",
        "library_name: flow-distill",
        "---",
        f"# {facts.name}",
        "",
        f"A {what}. Time runs from 0 (noise) to 1 (data), on the {student.path.name} path.",
        "",
        "```python",
        "import distill",
        "",
        f'model = distill.load("this/folder"{_own(facts.network)})',
        f"x = model.sample(16, steps={facts.steps[0]}, seed=0)  # float32 [16, {', '.join(map(str, space.shape))}]",
        "```",
        "",
        f"- samples: shape {list(space.shape)}, range {space.value_range}, classes {space.classes}",
        f"- supported times: {student.support}; recommended steps: {', '.join(map(str, facts.steps))}",
        f"- teacher: {teacher}",
        f"- trained on: {json.dumps(dict(facts.trained_on))}",
        f"- licence: {facts.licence}",
        "",
    ]
    if facts.metrics:
        names = sorted({name for entry in facts.metrics.values() for name in entry})
        lines += ["| steps | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for steps, entry in facts.metrics.items():
            cells = ["" if entry.get(name) is None else f"{entry[name]:.4g}" for name in names]
            lines.append(f"| {steps} | " + " | ".join(cells) + " |")
        lines += ["", "Metrics as in the project's evaluation protocol; config.json holds the recipe."]
    return "\n".join(lines) + "\n"
