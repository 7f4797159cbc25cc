"""A whole job: what lies in its run folder, that it repeats bit for bit, and what stops it or cannot."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from helpers import FAST, ROOT, TINY, checkpoints, files, logged, trained, verified, written
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import distill
from distill.cli import main
from distill.data.manifest import read_manifest
from distill.job import check_teacher, evaluate, export, plan, report, resume, run, sample
from distill.objectives import OBJECTIVES
from distill.objectives.eulerian import Eulerian
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.times import TimeLaw, Times, UniformTriangle
from distill.parameterisation import OneTime
from distill.parts import RunError
from distill.recipe import load
from distill.stages import _drawn
from distill.student import StudentConfig
from distill.training.callbacks import Pictures
from distill.training.checkpoint import load_weights
from distill.training.config import TrackingConfig
from distill.training.guard import Guard
from distill.training.logger import GuardedWandb, make_loggers
from distill.training.stops import Diverged
from teachers import DataSpace, Teacher
from teachers.adapters.native import Native
from teachers.errors import InputError
from teachers.path import VP

# --- the run folder


def test_the_run_folder_holds_what_it_should_and_nothing_else(toy_run: Path, digits_run: Path) -> None:
    whole = {"recipe.yaml", "recipe.resolved.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "samples",
             "evaluation.json", "export", "report.html"}  # fmt: skip
    for folder in (toy_run, digits_run):
        assert {p.name for p in folder.iterdir()} == whole
        assert [p.name for p in checkpoints(folder)] == ["step-00000008", "step-00000012"]
        assert {p.name for p in (folder / "export").iterdir()} == {
            "config.json",
            "model.safetensors",
            "README.md",
            "samples.png",
        }
    assert {p.name for p in (toy_run / "samples").iterdir()} == {"teacher-student.png"}
    drawn = [f"step-{step:08d}.png" for step in (0, 8, 12)]
    assert sorted(p.name for p in (digits_run / "samples").iterdir()) == [*drawn, "teacher-student.png"]
    for picture in (*digits_run.rglob("*.png"), *toy_run.rglob("*.png")):
        with Image.open(picture) as image:
            image.verify()
    assert {p.name for p in toy_run.parent.parent.iterdir()} == {"runs"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_recipe_is_kept_as_given(end: str, cwd: Path) -> None:
    text = "# Größe: klein\nextends: toy/lagrangian   # whole\nname:   'mine'\n\n"
    given = text.replace("\n", end).encode()
    (cwd / "mine.yaml").write_bytes(given)
    assert run("mine.yaml", TINY) == Path("runs/mine")
    assert Path("runs/mine/recipe.yaml").read_bytes() == given


def test_the_resolved_recipe_runs_the_job_again(toy_run: Path, digits_run: Path, cwd: Path) -> None:
    for before in (toy_run, digits_run):
        text = (before / "recipe.resolved.yaml").read_text()
        assert "${" not in text and "extends" not in text
        again = run(before / "recipe.resolved.yaml")
        assert trained(again) == trained(before)
        assert logged(again) == logged(before)
        assert (again / "recipe.resolved.yaml").read_text() == text
        assert files(again / "export").keys() == files(before / "export").keys()
        for name in ("export/model.safetensors", "export/config.json"):
            changing = r'"speedup": [^,}\n]*'
            assert re.sub(changing, "", (again / name).read_bytes().decode("latin1")) == re.sub(
                changing, "", (before / name).read_bytes().decode("latin1")
            )


def test_streams_are_fixed_in_the_resolved_recipe(digits_run: Path) -> None:
    assert yaml.safe_load((digits_run / "recipe.resolved.yaml").read_text())["data"]["streams"] == 16


def test_a_seed_is_one_result_and_another_seed_another(toy_run: Path, cwd: Path) -> None:
    same = run("toy/lagrangian", TINY)
    assert trained(same) == trained(toy_run)
    assert logged(same) == logged(toy_run)
    other = run("toy/lagrangian", [*TINY, "seed=1"])
    assert logged(other)[0]["loss"] != logged(toy_run)[0]["loss"]
    ours, theirs = trained(other), trained(toy_run)
    assert ours.keys() == theirs.keys()
    name = "student/state_dict.student.network.enter.weight"
    assert ours[name] != theirs[name]


def test_lines_of_metrics_are_those_asked_for(toy_run: Path, digits_run: Path) -> None:
    for folder in (toy_run, digits_run):
        rows = logged(folder)
        assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
        for row in rows:
            known = {name for name in row if not name.startswith(("residual/", "tangent/", "rmse_to_teacher"))}
            assert known == {"step", "loss", "grad_norm", "lr"}
        assert all(math.isfinite(value) for row in rows for value in row.values())


def test_the_last_step_is_logged_saved_and_drawn_whatever_the_rhythm(cwd: Path) -> None:
    odd = ("trainer.steps=5", "trainer.checkpoint_every=3", "tracking.log_every=4", "tracking.samples_every=4")
    folder = run("toy/lagrangian", [*TINY, *odd])
    assert [row["step"] for row in logged(folder)] == [4, 5]
    assert [p.name for p in checkpoints(folder)] == ["step-00000003", "step-00000005"]
    assert sorted(p.name for p in (folder / "samples").glob("step-*")) == [f"step-{step:08d}.png" for step in (0, 4, 5)]


def test_an_existing_run_stays_as_it_is(toy: Path) -> None:
    before = files(toy)
    assert [run("toy/lagrangian", TINY).name for _ in range(2)] == ["toy-lagrangian-2", "toy-lagrangian-3"]
    assert files(toy) == before


def test_the_shipped_teacher_names_the_data_it_was_trained_on(built: Path) -> None:
    shipped = json.loads((ROOT / "teachers/weights/digits/config.json").read_text())
    assert shipped["trained_on"]["data"] == read_manifest(built).digest


def test_provenance_names_what_was_used(digits_run: Path, toy_run: Path, built: Path) -> None:
    said = json.loads((digits_run / "provenance.json").read_text())
    assert said["versions"]["torch"] == torch.__version__
    assert said["versions"]["distill"] == distill.__version__
    shipped = json.loads((ROOT / "teachers/weights/digits/config.json").read_text())
    assert said["digests"]["teacher"] == shipped["weights"]["sha256"]
    assert said["digests"]["data"] == read_manifest(built).digest
    assert said["from_python"] == []
    assert said["digests"]["recipe"] != json.loads((toy_run / "provenance.json").read_text())["digests"]["recipe"]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_export_holds_the_weights_asked_for(weights: str, cwd: Path) -> None:
    folder = run("toy/lagrangian", [*TINY, f"export.weights={weights}"])
    newest = checkpoints(folder)[-1]
    name, prefix = {"ema": ("ema", "ema.module."), "raw": ("student", "student.")}[weights]
    kept = load_file(newest / f"{name}.safetensors")
    exported = load_file(folder / "export" / "model.safetensors")
    assert len(exported) >= 10
    for key, value in exported.items():
        assert torch.equal(value, kept[f"state_dict.{prefix}{key}"])
    assert json.loads((folder / "evaluation.json").read_text())["protocol"]["weights"] == weights


def test_pictures_take_as_many_samples_as_they_show() -> None:
    assert [_drawn(DataSpace(shape)) for shape in ((2,), (1,), (3,), (4, 32, 32), (1, 8, 8))] == [
        2000,
        2000,
        32,
        32,
        32,
    ]


def test_a_job_closes_its_files(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original = Path.open

    def watched(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(original(self, *args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(Path, "open", watched)
    run("toy/lagrangian", TINY)
    gc.collect()
    assert any(Path(f.name).name == "metrics.jsonl" for f in opened)
    assert [f.name for f in opened if not f.closed] == []


def test_signals_are_given_back(cwd: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run("toy/lagrangian", TINY)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- evaluation.json


def strict(file: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{file}: {constant} is not JSON")

    found = json.loads(file.read_text(), parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def test_evaluation_has_the_documented_keys(toy_run: Path, digits_run: Path) -> None:
    for folder in (toy_run, digits_run):
        found = strict(folder / "evaluation.json")
        assert found.keys() >= {"format", "protocol", "teacher", "floor", "student", "gap", "speedup"}
        assert found["format"] == 1 and found["step"] == 12
        assert found["protocol"].items() >= {"samples": 100, "seed": 0, "weights": "ema", "batch": 500}.items()
        assert found["protocol"].keys() >= {"features", "reference"}
        teacher = found["teacher"]
        assert (teacher["solver"], teacher["steps"], teacher["nfe"]) == ("euler", 4, 4)
        assert list(found["student"]) == list(found["gap"]) == list(found["speedup"]) == ["1", "2"]
        assert list(found["teacher_steps"]) == ["1", "2"]
        for steps, entry in found["student"].items():
            assert entry["nfe"] == int(steps)
            assert entry["paired"]["endpoint_rmse"] > 0
            assert found["gap"][steps]["fd"] == entry["metrics"]["fd"] / teacher["metrics"]["fd"]
            assert found["speedup"][steps] == teacher["seconds_per_sample"] / entry["seconds_per_sample"]
        assert found["floor"]["fd"] > 0
    words = found["student"]["1"]
    assert words["metrics"].keys() == {"fd", "kid", "precision", "recall", "sw2", "label_accuracy"}
    assert words["paired"].keys() == {"endpoint_rmse", "class_agreement"}
    assert found["protocol"]["features"].startswith("classifier ")
    assert found["protocol"]["reference"] == json.loads((digits_run / "provenance.json").read_text())["digests"]["data"]
    toy = strict(toy_run / "evaluation.json")
    assert toy["student"]["1"]["paired"].keys() == {"endpoint_rmse", "exact_rmse"}
    assert toy["protocol"]["features"] == "raw"


def test_a_teacher_in_training_is_judged_at_the_reference_steps_too(velocity_run: Path) -> None:
    found = strict(velocity_run / "evaluation.json")
    assert found["teacher"] is None and found["teacher_steps"] == {}
    assert list(found["student"]) == ["1", "2", "4"]
    assert found["gap"] == found["speedup"] == {}


# --- from Python


def turning(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """Half a circle: X_{0,1}(x) = -x."""
    return torch.pi * torch.stack([-x_t[:, 1], x_t[:, 0]], dim=1)


PLANE = Teacher(velocity=turning, space=DataSpace(shape=(2,)), info={"id": "half-circle", "licence": "CC0-1.0"})


@dataclass(frozen=True, kw_only=True)
class OneStep(distill.Objective):
    """The student's jump is one Euler step: wrong, but an objective."""

    needs_data = False
    scale: float = 1.0
    times: TimeLaw = field(default_factory=UniformTriangle)

    def loss(self, student: Any, target: Any, velocity: Any, draw: Any) -> distill.Loss:
        with torch.no_grad():
            v = velocity(draw.x_s, draw.s, draw.cond)
        return distill.Loss.squared(self.scale * (student.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond) - v))


OWN = {
    "name": "own",
    "student": {"init": "random", "network": {"name": "mlp", "width": 16, "depth": 1}},
    "objective": {"name": "mine", "scale": 0.5},
    "trainer": {"steps": 6},
}


def test_own_teacher_and_objective_without_data(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(cwd, OWN)
    quick = [o for o in FAST if "steps=12" not in o]
    folder = run(file, quick, teacher=PLANE, objectives={"mine": OneStep})
    said = json.loads((folder / "provenance.json").read_text())
    assert said["from_python"] == ["teacher", "objectives"]
    resolved = yaml.safe_load((folder / "recipe.resolved.yaml").read_text())
    assert resolved["objective"].items() >= {"name": "mine", "scale": 0.5}.items()
    assert resolved["objective"]["times"].items() >= {"name": "uniform_triangle", "diagonal": 0.25}.items()
    assert resolved["data"] is None and resolved["teacher"] is None
    found = strict(folder / "evaluation.json")
    assert found["protocol"]["reference"].startswith("samples of ")
    student = distill.load(folder / "export")
    assert student.config["licence"] == "CC0-1.0"
    assert student.config["teacher"] == dict(PLANE.info)
    assert student.sample(3).shape == (3, 2)
    again = run(folder / "recipe.resolved.yaml", teacher=PLANE, objectives={"mine": OneStep})
    assert trained(again) == trained(folder)
    for verb in ("resume", "evaluate", "export"):
        assert main([verb, str(folder)]) == 2  # the command line has neither teacher nor objective
    assert main(["report", str(folder)]) == 0
    own: dict[str, Any] = {"teacher": PLANE, "objectives": {"mine": OneStep}}
    before = found["student"]["1"]["metrics"]
    assert strict(evaluate(folder, **own))["student"]["1"]["metrics"] == before
    assert export(folder, "again", **own) == Path("again")
    assert torch.equal(distill.load("again").sample(3), student.sample(3))


def test_resume_says_what_a_run_from_python_needs(cwd: Path) -> None:
    file = written(cwd, OWN)
    quick = [o for o in FAST if "steps=12" not in o]
    folder = run(file, quick, teacher=PLANE, objectives={"mine": OneStep})
    before = trained(folder)
    shutil.rmtree(checkpoints(folder)[-1])
    own: dict[str, Any] = {"teacher": PLANE, "objectives": {"mine": OneStep}}
    with pytest.raises(InputError, match=r"distill\.resume\('runs/own', teacher=\.\.\., objectives=\.\.\.\)"):
        resume(folder)
    with pytest.raises(InputError, match=r"its own teacher: "):
        resume(folder, objectives=own["objectives"])
    with pytest.raises(InputError, match=r"its own objectives: "):
        resume(folder, teacher=PLANE)
    assert resume(folder, **own) == folder
    assert trained(folder) == before


def test_another_own_teacher_is_refused(cwd: Path) -> None:
    """Of a function there is no digest unless it is given; what else is known of it must be the same."""
    quick = [o for o in FAST if "steps=12" not in o]
    mine = replace(PLANE, info={"id": "mine", "digest": "abc"})
    for number, (first, others) in enumerate([
        (PLANE, [replace(PLANE, info={"id": "another"}), replace(PLANE, path=VP()), mine]),
        (mine, [replace(PLANE, info={"id": "mine", "digest": "abd"}), PLANE]),
    ]):  # fmt: skip
        own: dict[str, Any] = {"objectives": {"mine": OneStep}}
        folder = run(written(cwd, {**OWN, "name": f"own{number}"}), quick, teacher=first, **own)
        before = files(folder)
        for other in others:
            with pytest.raises(InputError, match="its teacher had the digest"):
                resume(folder, teacher=other, **own)
        assert files(folder) == before
        shutil.rmtree(checkpoints(folder)[-1])
        assert resume(folder, teacher=replace(first, velocity=lambda *of: turning(*of)), **own) == folder


# --- what is kept of what was made in Python


@dataclass(frozen=True, kw_only=True)
class Powers(TimeLaw):
    """An own law of (s, t)."""

    power: float = 2.0

    def __call__(self, rows: Any, step: int = 0) -> Times:
        a, b = rows.uniform() ** self.power, rows.uniform() ** self.power
        return Times(torch.minimum(a, b), torch.maximum(a, b))


@dataclass(frozen=True, kw_only=True)
class OwnTimes(OneStep):
    times: TimeLaw = field(default_factory=Powers)
    halved: float = field(default=0.0, init=False)  # made of the others

    def __post_init__(self) -> None:
        object.__setattr__(self, "halved", self.scale / 2)


def test_own_times_of_an_own_objective_are_read_back(cwd: Path) -> None:
    quick = [o for o in FAST if "steps=12" not in o]
    own: dict[str, Any] = {"teacher": PLANE, "objectives": {"mine": OwnTimes}}
    folder = run(written(cwd, OWN), [*quick, "objective.times={power: 3}"], **own)
    again = load(folder / "recipe.resolved.yaml", **own).objective
    assert again == OwnTimes(scale=0.5, times=Powers(power=3.0)) and again.halved == 0.25
    before = trained(folder)
    shutil.rmtree(checkpoints(folder)[-1])
    assert resume(folder, **own) == folder and trained(folder) == before
    evaluate(folder, **own)
    with pytest.raises(InputError, match=r"objective.times.pover: unknown key, did you mean 'power'"):
        run(written(cwd, OWN), [*quick, "objective.times={pover: 3}"], **own)


def test_an_own_objective_in_a_recipe_object_is_known_to_be_needed(cwd: Path) -> None:
    recipe = replace(load("toy/lagrangian", TINY), objective=OneStep(scale=2))
    folder = run(recipe)
    assert json.loads((folder / "provenance.json").read_text())["from_python"] == ["objectives"]
    with pytest.raises(InputError, match=r"its own objectives: .*, objectives=\.\.\.\)"):
        resume(folder)
    before = trained(folder)
    shutil.rmtree(checkpoints(folder)[-1])
    assert resume(folder, objectives={"OneStep": OneStep}) == folder and trained(folder) == before


class Kind(Enum):
    A = "a"


def objective_with(hint: Any, default: Any) -> Any:
    return make_dataclass("Mine", [("k", hint, field(default=default))], bases=(OneStep,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Shadow(UniformTriangle):
    """Other times under the same keys."""


LOST: dict[str, tuple[Any, str]] = {
    "no type": (objective_with(object, None), r"objective\.k: must be a section, got null"),
    "a path": (objective_with(Path, Path("x")), r"objective\.k: a PosixPath cannot be written"),
    "a choice": (objective_with(Kind, Kind.A), r"objective\.k: a Kind cannot be written"),
    "a tensor": (objective_with(float, torch.tensor(1.0)), r"objective\.k: a Tensor cannot be written"),
    "a number of numpy": (OneStep(scale=np.float64(2)), r"objective\.scale: a float64 cannot be written"),
    "another type": (OneStep(scale="much"), r"objective\.scale: must be a number, got 'much'"),
    "own times": (OneStep(times=Powers()), r"objective\.times\.power: unknown key"),
    "own times of known keys": (OneStep(times=Shadow()), r"objective\.times: Shadow.* is read back .* as Uniform"),
}


@pytest.mark.parametrize("what", LOST)
def test_what_cannot_be_read_back_creates_nothing(what: str, untouched: Path) -> None:
    mine, reason = LOST[what]
    recipe: Any = (replace(load("toy/lagrangian", TINY), objective=mine),)
    given: dict[str, Any] = {}
    if isinstance(mine, type):  # named in a recipe file
        recipe, given = ("toy/lagrangian", [*TINY, "objective={name: mine}"]), {"objectives": {"mine": mine}}
    with pytest.raises(RunError, match=rf"{reason}.*; so a run could not be resumed.*: use numbers"):
        run(*recipe, **given)


@dataclass(frozen=True, kw_only=True)
class Amiss(OneStep):
    """A loss that something is wrong with."""

    what: str = "a summand"

    def loss(self, student: Any, target: Any, velocity: Any, draw: Any) -> distill.Loss:
        residual = student.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond) - draw.x_s
        if self.what == "a summand":
            return distill.Loss.squared(residual, other=0.1 * residual)
        return distill.Loss.squared(residual / torch.where(draw.s < draw.t, 0.0, 1.0)[:, None])


@pytest.mark.parametrize(("what", "said"), [
    ("a summand", r"objective Amiss: its loss has the summands loss, other, its terms are loss: return"),
    ("a number", r"objective Amiss: before the first step loss is (inf|nan) for a sample from s = 0\.\d+ to"),
])  # fmt: skip
def test_a_loss_that_cannot_be_trained_creates_nothing(what: str, said: str, cwd: Path) -> None:
    """With a learned weight too, which has a number for each of the terms."""
    recipe = {**OWN, "objective": {"name": "mine", "what": what, "weight": {"learned": "gaussian"}}}
    with pytest.raises(InputError, match=said):
        run(written(cwd, recipe), teacher=PLANE, objectives={"mine": Amiss})
    assert not Path("runs").exists()


def test_a_teacher_that_is_infinite_at_the_noise_creates_nothing(cwd: Path) -> None:
    """The objective does not ask for it there, what the student is compared with does."""
    infinite = Teacher(velocity=lambda x, t, cond: -x / t[:, None].to(x), space=PLANE.space, info={"id": "mine"})
    with pytest.raises(InputError, match=r"teacher mine: its velocity is not finite at t = 0, where sampling begins"):
        run(written(cwd, OWN), teacher=infinite, objectives={"mine": OneStep})
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "recipes" / "toy").glob("*.yaml")))
def test_every_toy_recipe_makes_a_student_that_samples(name: str, cwd: Path) -> None:
    network = "student.network={name: mlp, width: 16, depth: 3}"
    folder = run(f"toy/{name}", [*TINY, network, "trainer.steps=4", "evaluation.steps=[1]"])
    assert [line["step"] for line in logged(folder)] == [2, 4]
    assert all(math.isfinite(value) for line in logged(folder) for value in line.values())
    student = distill.load(folder / "export")
    assert student.kind == load(f"toy/{name}").objective.kind
    assert student.sample(5).shape == (5, 2) and student.sample(5).isfinite().all()


def test_a_guided_job_counts_both_networks_and_its_student_takes_a_scale(cwd: Path) -> None:
    weak = "{name: gaussian, mean: [0, 0], covariance: [[2, 0], [0, 2]]}"
    guidance = f"guidance={{scale: 1.5, interval: [0.2, 0.9], scales: [1, 2], weak: {weak}}}"
    folder = run("toy/lagrangian", [*TINY, "trainer.steps=4", guidance])
    result = json.loads((folder / "evaluation.json").read_text())
    assert (result["teacher"]["steps"], result["teacher"]["nfe"]) == (4, 8)
    assert result["student"]["2"]["nfe"] == 2
    student = distill.load(folder / "export")
    assert student.config["guidance"] == {
        "low": 1.0, "high": 2.0, "scale": 1.5, "interval": [0.2, 0.9], "intervals": False,
    }  # fmt: skip
    assert torch.equal(student.sample(3), student.sample(3, guidance=1.5))
    with pytest.raises(ValueError, match=r"guidance must be in \[1.0, 2.0\], got 3"):
        student.sample(3, guidance=3)


def test_a_recipe_object_is_as_good_as_its_file(toy_run: Path, cwd: Path) -> None:
    folder = run(load("toy/lagrangian", TINY))
    assert trained(folder) == trained(toy_run)
    assert load(folder / "recipe.yaml") == load("toy/lagrangian", TINY)


@dataclass(frozen=True, kw_only=True)
class Probe(Eulerian):
    """Records how far the student is from its teacher at each step."""

    seen: ClassVar[list[float]] = []

    def loss(self, student: Any, target: Any, velocity: Any, draw: Any) -> distill.Loss:
        with torch.no_grad():
            u = student.mean_velocity(draw.x_s, draw.s, draw.t, draw.cond)
            self.seen.append(float((u - velocity(draw.x_s, draw.s, draw.cond)).abs().max()))
        return super().loss(student, target, velocity, draw)


def test_the_student_starts_at_its_teacher_and_leaves_it_unchanged(built: Path, cwd: Path) -> None:
    teacher = Native(path="digits").load()
    assert teacher.network is not None
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    Probe.seen.clear()
    overrides = [*FAST, f"data.path={built}", "objective={name: probe}", "trainer.lr=0.1", "trainer.warmup=0"]
    folder = run("quickstart", overrides, teacher=teacher, objectives={"probe": Probe})
    first, *later = Probe.seen[-12:]  # before the first step a job tries its loss once
    assert first == 0.0 and len(later) == 11 and min(later) > 1e-3
    after = teacher.network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.network.parameters())
    student = load_file(checkpoints(folder)[-1] / "student.safetensors")
    assert any(not torch.equal(student[f"state_dict.student.network.{k}"], v) for k, v in before.items())


@dataclass(frozen=True, kw_only=True)
class Reading(Lagrangian):
    """Records step, first and last key of each batch."""

    seen: ClassVar[list[tuple[int, str, str]]] = []

    def draw(self, batch: Any, path: Any, generator: Any, step: int) -> Any:
        self.seen.append((step, batch.keys[0], batch.keys[-1]))
        return super().draw(batch, path, generator, step)


def test_each_step_is_trained_on_its_own_batch(cwd: Path) -> None:
    Reading.seen.clear()
    run("toy/lagrangian", [*TINY, "objective={name: reading}"], objectives={"reading": Reading})
    assert Reading.seen[-12:] == [(step, f"{step}/0", f"{step}/15") for step in range(12)]


def test_a_teacher_trained_here_is_the_next_jobs_teacher(velocity_run: Path, built: Path, cwd: Path) -> None:
    Probe.seen.clear()
    teacher = f"teacher={{name: native, path: {velocity_run / 'export'}}}"
    overrides = [*FAST, f"data.path={built}", teacher, "objective={name: probe}", "trainer.lr=0.01"]
    folder = run("quickstart", overrides, objectives={"probe": Probe})
    first, *later = Probe.seen[-12:]
    assert first == 0.0 and min(later) > 0
    config = distill.load(folder / "export").config
    theirs = json.loads((velocity_run / "export" / "config.json").read_text())
    assert config["teacher"]["digest"] == theirs["weights"]["sha256"]
    assert config["network"] == theirs["network"]
    assert config["licence"] == theirs["licence"] == "Apache-2.0"


def test_a_teacher_with_no_spread_at_all_can_be_measured(cwd: Path) -> None:
    # every sample is the origin: the distance to the data is zero, and no ratio to it exists
    def velocity(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return -x_t / (1 - t).to(x_t)[:, None]

    teacher = Teacher(velocity=velocity, space=DataSpace(shape=(2,)))
    quick = [o for o in FAST if "steps=12" not in o]
    folder = run(written(cwd, OWN), quick, teacher=teacher, objectives={"mine": OneStep})
    found = strict(folder / "evaluation.json")
    assert found["teacher"]["metrics"]["fd"] == 0
    assert found["gap"]["1"]["fd"] is None
    assert (folder / "report.html").is_file()


# --- what is refused before anything is created

BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown recipe": (lambda free: run("quickstrat"), "did you mean 'quickstart'"),
    "unknown key": (lambda free: run("quickstart", ["trainer.stpes=3"]), "did you mean 'steps'"),
    "bad value": (lambda free: run("quickstart", ["trainer.lr=-1"]), "must be above 0"),
    "missing shards": (lambda free: run("quickstart", ["data.path=nowhere", "data.source=null"]), "no manifest.json"),
    "a function as teacher": (lambda free: run("quickstart", teacher=turning), r"Teacher\(velocity=v"),
    "an objective that is none": (lambda free: run("quickstart", objectives={"m": dict}), "extends distill.Objective"),
    "overrides of an object": (lambda free: run(load("toy/lagrangian"), ["seed=2"]), "dataclasses.replace"),
    "contradiction": (lambda free: run("toy/lagrangian", ["student.parameterisation={name: one_time}"]), "t = 1 alone"),
    "contradiction in an object": (
        lambda free: run(
            replace(load("toy/lagrangian", TINY), student=StudentConfig(parameterisation=OneTime(), init="random"))
        ),
        "trains two|student",
    ),
    "no teacher in an object": (lambda free: run(replace(load("toy/lagrangian", TINY), teacher=None)), "teacher"),
    "not a run": (lambda free: resume(free), "not a run folder"),
    "overrides in a text": (
        lambda free: evaluate(free, "evaluation.samples=100", out="new.json"),
        r"overrides must be a list of 'key\.path=value', got the text 'evaluation\.samples=100'",
    ),
    "overrides of a plan in a text": (lambda free: plan("quickstart", "seed=2"), "list of 'key.*the text 'seed=2'"),
    "overrides of a check in a text": (lambda free: check_teacher("quickstart", "seed=2"), "list of 'key.*'seed=2'"),
    "a report of a text": (lambda free: report("runs/x"), "folders must be a list of run folders, got.*'runs/x'"),
    "a report of a path": (lambda free: report(Path("x")), "folders must be a list"),  # type: ignore[arg-type]
    "a report of nothing": (lambda free: report([]), "at least one run folder"),
    "samples in a folder that is none": (lambda free: sample(free, "no/s.npy", n=1), "no folder no"),
    "no embeddings": (lambda free: sample(free, "s.npy", n=1, embeddings="e.st"), "e.st: no such"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_creates_nothing(what: str, untouched: Path) -> None:
    call, reason = BAD[what]
    with pytest.raises(InputError, match=reason):
        call(untouched)


# --- wandb


def records(file: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: a log of 32 KiB blocks, each part with crc, length and kind before it."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def finished(file: Path) -> list[Any]:
    """All `records`, once wandb has written the last one: its own process does so, perhaps after `finish`."""
    end = time.monotonic() + 60
    while not any(record.HasField("exit") for record in records(file)):
        assert time.monotonic() < end, f"{file}: has no end"
        time.sleep(0.1)
    return list(records(file))


def test_wandb_offline_receives_every_metric(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(cwd / "home"))
    monkeypatch.setenv("NETRC", str(cwd / "home" / "netrc"))
    wandb = ("tracking.wandb=auto", "tracking.project=tests", "tracking.samples_every=6")
    folder = run("toy/lagrangian", [*TINY, *wandb])
    (file,) = folder.rglob("*.wandb")
    found = list(records(file))
    assert next(r.run.project for r in found if r.HasField("run")) == "tests"
    assert next(r.run.display_name for r in found if r.HasField("run")) == "toy-lagrangian"
    config = {
        u.key or ".".join(u.nested_key): u.value_json for r in found if r.HasField("run") for u in r.run.config.update
    }
    config |= {u.key: u.value_json for r in found if r.HasField("config") for u in r.config.update}
    assert any("lagrangian" in value for value in config.values())
    history = [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.HasField("history")
    ]
    rows = [{k: row[k] for k in ("loss", "grad_norm", "lr")} for row in history if "loss" in row]
    assert rows == [{k: row[k] for k in ("loss", "grad_norm", "lr")} for row in logged(folder)]
    assert any("samples" in str(row) for row in history)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        *((call, "unplugged") for call in ("make", "hyperparams", "metrics", "image", "finish")),
        ("metrics", "[/bold] unplugged"),  # not markup
    ],
)
def test_wandb_cannot_stop_a_run(
    call: str,
    error: str,
    toy_run: Path,
    cwd: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[str] = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(call)
        raise RuntimeError(error)

    class Fake:
        """What is called of Lightning's wandb logger; one of its calls fails."""

        def __init__(self) -> None:
            self.experiment = self
            for name, word in {
                "log_hyperparams": "hyperparams",
                "log_metrics": "metrics",
                "log_image": "image",
                "finish": "finish",
            }.items():
                setattr(self, name, fail if call == word else lambda *args, **kwargs: None)

    monkeypatch.setattr("distill.training.logger._wandb", fail if call == "make" else lambda *args: Fake())
    folder = run("toy/lagrangian", [*TINY, "tracking.wandb=offline", "tracking.samples_every=6"])
    assert calls == [call]  # once, then it is switched off
    assert (folder / "report.html").is_file()
    lines = [{k: v for k, v in row.items() if k != "rmse_to_teacher"} for row in logged(folder)]
    assert lines == logged(toy_run)
    assert trained(folder) == trained(toy_run)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"wandb is off for the rest of this run: {error}" in shown


@pytest.mark.parametrize(
    ("wandb", "environment", "expected"),
    [
        ("auto", None, ["online", "offline"]),
        ("auto", "online", ["online", "offline"]),
        ("auto", "offline", ["offline"]),
        ("auto", "disabled", []),
        ("online", None, ["online"]),
        ("online", "disabled", ["online"]),
        ("offline", None, ["offline"]),
        ("offline", "disabled", ["offline"]),
    ],
)
def test_wandb_online_without_a_network_is_told_and_passed_over(
    wandb: Any, environment: str | None, expected: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, mode: str, **kwargs: Any) -> Any:
        modes.append(mode)
        if mode == "online":
            raise OSError("no route to host")
        return MagicMock()

    modes: list[str] = []
    monkeypatch.setattr("wandb.init", offline)
    monkeypatch.setattr("wandb.login", lambda **kwargs: True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    loggers = make_loggers(cwd, TrackingConfig(wandb=wandb), 0, {}, Console(quiet=True))
    assert modes == expected
    assert [isinstance(logger, GuardedWandb) for logger in loggers] == ([False, True] if expected else [False])
    loggers[0].finalize("success")


def test_a_wandb_run_of_the_caller_is_left_alone(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(cwd / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("mine", "ours"):
        (cwd / folder).mkdir()
    mine = wandb.init(project="mine", dir=cwd / "mine", mode="offline")
    config = TrackingConfig(wandb="offline", project="ours")
    loggers = make_loggers(cwd / "ours", config, 0, {"a": 1}, Console(quiet=True), "0123abcd")
    for logger in loggers:
        logger.log_metrics({"loss": 0.5}, 3)
        logger.finalize("success")
    assert wandb.run is mine
    mine.log({"x": 1})
    mine.finish()
    for project, key, others in (("mine", "x", "loss"), ("ours", "loss", "x")):
        (file,) = (cwd / project).rglob("*.wandb")
        found = finished(file)
        assert {r.run.project for r in found if r.HasField("run")} == {project}
        keys = {item.key or ".".join(item.nested_key) for r in found for item in r.history.item}
        assert key in keys and others not in keys


# --- divergence


@dataclass(frozen=True, kw_only=True)
class Breaking(Lagrangian):
    """At `steps` the loss of rows 3 and 5 is not a number, or only the gradient is not."""

    steps: tuple[int, ...] = (7,)
    what: str = "loss"
    now: ClassVar[list[int]] = [0]

    def draw(self, batch: Any, path: Any, generator: Any, step: int) -> Any:
        self.now[0] = step
        return super().draw(batch, path, generator, step)

    def loss(self, student: Any, target: Any, velocity: Any, draw: Any) -> distill.Loss:
        loss = super().loss(student, target, velocity, draw)
        if self.now[0] not in self.steps:
            return loss
        if self.what == "gradient":  # sqrt(0) is 0, its slope is not finite
            return distill.Loss(loss.per_sample + (0 * loss.per_sample).sqrt())
        bad = torch.zeros(len(loss.per_sample), dtype=torch.bool)
        bad[[3, 5]] = True
        return distill.Loss(torch.where(bad, torch.nan, loss.per_sample))


@pytest.mark.parametrize(("what", "said"), [
    ("loss", "the loss is nan for samples 7/3, 7/5"),
    ("gradient", "the gradient's norm is nan though every loss is finite, in the batch of samples 7/0, 7/1"),
])  # fmt: skip
def test_a_step_that_is_not_finite_is_left_out(
    what: str, said: str, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "breaking", Breaking)
    overrides = (f"objective={{name: breaking, steps: [7], what: {what}}}", "trainer.checkpoint_every=1")
    assert main(["run", "toy/lagrangian", *TINY, *overrides, "trainer.keep=100"]) == 0
    assert f"step 7 was left out: {said}" in " ".join(capsys.readouterr().out.split())
    folder = Path("runs/toy-lagrangian")
    tensors = [[load_file(f) for f in sorted(checkpoints(folder)[n].glob("*.safetensors"))] for n in (5, 6, 7, 8)]
    for before, after in zip(*[[v for part in parts for v in part.values()] for parts in tensors[1:3]], strict=True):
        assert torch.equal(before, after)  # student, average and optimizer after steps 7 and 8
    assert not torch.equal(tensors[0][2].popitem()[1], tensors[1][2].popitem()[1])
    assert [row.get("skipped_steps") for row in logged(folder)] == [None, None, None, 1, 1, 1]
    resumed = Path(shutil.copytree(folder, "runs/again"))
    for path in checkpoints(resumed)[9:]:
        shutil.rmtree(path)
    assert main(["resume", str(resumed)]) == 0
    assert [row.get("skipped_steps") for row in logged(resumed)] == [None, None, None, 1, 1, 1]
    assert trained(resumed) == trained(folder)


def test_too_many_of_them_go_back_and_then_stop(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "breaking", Breaking)
    overrides = ("objective={name: breaking, steps: [5, 7]}", "trainer.skip=1")
    assert main(["run", "toy/lagrangian", *TINY, *overrides]) == 78
    said = capsys.readouterr()
    out = " ".join(said.out.split())
    assert "step 5 was left out" in out and "going back to runs/toy-lagrangian/checkpoints/step-00000004" in out
    assert "step 7: the loss is nan for samples 7/3, 7/5; 2 steps since the last checkpoint" in said.err
    folder = Path("runs/toy-lagrangian")
    assert str(folder) in said.err
    assert [verified(path) for path in checkpoints(folder)] == [4]
    assert [row["step"] for row in logged(folder)] == [2, 4, 6]
    assert not (folder / "evaluation.json").exists() and not (folder / "export").exists()


def test_checkpoints_between_steps_that_are_left_out_are_no_end_to_counting(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "breaking", Breaking)
    overrides = ("objective={name: breaking, steps: [4, 6, 7, 8, 9]}", "trainer.skip=2", "trainer.checkpoint_every=1")
    assert main(["run", "toy/lagrangian", *TINY, *overrides]) == 78
    assert "step 8: the loss is nan for samples 8/3, 8/5; 3 steps since the last checkpoint" in capsys.readouterr().err


def test_the_norm_that_is_not_finite_is_named() -> None:
    said: list[str] = []
    guard = Guard(1, said.append)
    guard.saw(torch.ones(2), ("a", "b"))
    assert not guard.passes(3, [torch.tensor(0.5), torch.tensor(torch.inf)])
    assert said == ["step 3 was left out: the gradient's norm is inf though every loss is finite, in the batch of "
                    "samples a, b"]  # fmt: skip


def test_what_was_left_out_counts_after_a_stop_too() -> None:
    """A checkpoint on the way to a stop changes nothing; a due one begins anew, if a step was made."""
    guard = Guard(2, lambda text: None)
    bad, good = [torch.tensor(torch.nan)], [torch.tensor(1.0)]
    assert [guard.passes(step, norms) for step, norms in enumerate((bad, good, bad))] == [False, True, False]
    again = Guard(2, lambda text: None)
    again.restore(guard.state())
    for one in (guard, again):
        with pytest.raises(Diverged, match=r"step 3: .*; 3 steps since the last checkpoint"):
            one.passes(3, bad)
    again.restore({"skipped": 2, "recent": 2, "made": 1})
    again.saves()
    assert not again.passes(4, bad) and not again.passes(5, bad)
    again.saves()
    with pytest.raises(Diverged):
        again.passes(6, bad)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step(kind: signal.Signals, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first picture is drawn, when Lightning would have its own answer to SIGTERM."""
    monkeypatch.setattr(Pictures, "_picture", lambda *given: os.kill(os.getpid(), kind))
    overrides = ("trainer.accumulate=2", "tracking.samples_every=100")
    assert main(["run", "toy/lagrangian", *TINY, *overrides]) == 128 + kind
    assert [verified(path) for path in checkpoints(Path("runs/toy-lagrangian"))] == [1]


def test_what_does_not_come_again_is_passed_after_going_back(
    cwd: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = [7]

    @dataclass(frozen=True, kw_only=True)
    class Once(Breaking):
        def loss(self, student: Any, target: Any, velocity: Any, draw: Any) -> distill.Loss:
            loss = super().loss(student, target, velocity, draw)
            if self.now[0] in once:
                once.clear()
                return distill.Loss(loss.per_sample * torch.nan)
            return loss

    monkeypatch.setitem(OBJECTIVES, "once", Once)
    assert main(["run", "toy/lagrangian", *TINY, "objective={name: once, steps: []}", "trainer.skip=0"]) == 0
    assert "going back to" in capsys.readouterr().out
    assert [row["step"] for row in logged(Path("runs/toy-lagrangian"))] == [2, 4, 6, 8, 10, 12]
    ours, theirs = (load_weights(checkpoints(f)[-1], "raw") for f in (Path("runs/toy-lagrangian"), toy_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # as if it had not been


def test_weights_that_overflow_are_never_saved(cwd: Path) -> None:
    overrides = ("trainer.lr=1.0e+39", "trainer.warmup=0", "trainer.checkpoint_every=1")
    with pytest.raises(Diverged, match=r"step 1: weights of student\.network\..* are not finite"):
        run("toy/lagrangian", [*TINY, *overrides])
    assert not list(Path("runs/toy-lagrangian").glob("checkpoints/*"))


@dataclass(frozen=True, kw_only=True)
class Broken(Lagrangian):
    """No batch but the four rows that are looked at first has a loss."""

    until: int = 100

    def loss(self, student: Any, target: Any, velocity: Any, draw: Any) -> distill.Loss:
        loss = super().loss(student, target, velocity, draw)
        return distill.Loss(loss.per_sample * (torch.nan if draw.stage < self.until and len(draw.s) > 4 else 1))

    def draw(self, batch: Any, path: Any, generator: Any, step: int) -> Any:
        return replace(super().draw(batch, path, generator, step), stage=step)


def test_a_run_without_a_single_step_is_told(cwd: Path) -> None:
    """There is no checkpoint of it, which would hold no optimizer."""
    overrides = [*TINY, "trainer.skip=20", "trainer.steps=8", "trainer.checkpoint_every=4"]
    broken: dict[str, Any] = {"objectives": {"broken": Broken}}
    with pytest.raises(Diverged, match="step 8: not one step was made, every one was left out"):
        run("toy/lagrangian", [*overrides, "objective={name: broken}"], **broken)
    assert not list(Path("runs/toy-lagrangian").glob("checkpoints/*"))
    folder = run("toy/lagrangian", [*overrides, "objective={name: broken, until: 5}", "name=late"], **broken)
    assert [verified(path) for path in checkpoints(folder)] == [8]


def test_diverged_resumes_to_the_same_end(cwd: Path) -> None:
    overrides = [*TINY, "objective={name: breaking}", "trainer.skip=0"]
    with pytest.raises(Diverged):
        run("toy/lagrangian", overrides, objectives={"breaking": Breaking})
    with pytest.raises(Diverged, match="step 7"):
        resume("runs/toy-lagrangian", objectives={"breaking": Breaking})
