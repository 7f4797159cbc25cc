"""The comparison on Fashion-MNIST: what it adds to evaluation.json means what it says, and its page is its results."""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import FAST, ROOT, data_in

from distill.data.shards import Shards
from distill.evaluation.features import load_features
from distill.evaluation.judge import Judge, like
from distill.guidance import GuidanceInput, with_guidance
from distill.job import run
from distill.recipe import load
from distill.recipe_files import names
from distill.sampling import generate, student_generator
from distill.student import StudentConfig
from teachers.adapters.native import Native

BENCH = ROOT / "bench"
BLOCKS = ("students", "steps", "changed", "looks", "teacher", "guidance", "scales")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, cwd: Path) -> tuple[ModuleType, ModuleType]:
    """bench/results.py, whose page and pictures are new and in the test's own folder, and bench/teacher.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("results", "teacher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import results
    import teacher

    monkeypatch.setattr(results, "PAGE", cwd / "results.md")
    monkeypatch.setattr(results, "README", cwd / "README.md")
    monkeypatch.setattr(results, "PICTURES", cwd)
    (cwd / "README.md").write_text("<!-- results -->\n<!-- / -->\n")
    (cwd / "results.md").write_text("".join(f"said\n<!-- {name} -->\nold\n<!-- / -->\n" for name in BLOCKS))
    return results, teacher


def test_runs_become_a_page(bench: tuple[ModuleType, ModuleType], built: Path, cwd: Path) -> None:
    results, teacher = bench
    overrides = (*FAST, f"data.path={built}", "evaluation.cache=kept", "evaluation.steps=[1, 2]")
    folder = run("quickstart", [*overrides, "name=one", "trainer.batch=64"])
    provenance = json.loads((folder / "provenance.json").read_text())

    def began_with(command: str) -> None:
        (folder / "provenance.json").write_text(json.dumps(provenance | {"command": command}))

    began_with("python mine.py fashion/one")
    with pytest.raises(SystemExit, match="fashion/one: began a run of no row"):
        results.collect([folder])
    began_with("distill run fashion/one 'objective.weight={power: 1.0}'")
    with pytest.raises(SystemExit, match="none is of a recipe as it is and without guidance"):
        results.collect([folder])
    assert results.read() == ([], {})
    began_with("distill run fashion/one name=one data.source=/some/folder trainer.precision=float32")
    results.collect([folder])
    [student], shown = results.read()
    other = {**student, "recipe": "fashion/other"}
    (cwd / "students.json").write_text(json.dumps([{**student, "steps": 7}, other]))
    results.collect([folder])  # its own row alone is new
    assert [(r["recipe"], r["steps"]) for r in results.read()[0]] == [
        ("fashion/other", student["steps"]), ("fashion/one", student["steps"])
    ]  # fmt: skip
    began_with("distill run fashion/one 'objective.weight={power: 1.0}' name=two")
    results.collect([folder])
    changed = results.read()[0][2]
    assert changed["recipe"] == "fashion/one 'objective.weight={power: 1.0}'"
    assert changed["evaluation"] == student["evaluation"] and "looks" not in changed
    found = json.loads((folder / "evaluation.json").read_text())
    assert "seconds_per_sample" in str(found) and "seconds_per_sample" not in str(student["evaluation"])
    for n in ("1", "2"):
        assert student["looks"][n]["rmse"] == pytest.approx(found["student"][n]["paired"]["endpoint_rmse"], rel=1e-3)
    assert student["seconds_per_step"] > 0
    assert student["hours"] == pytest.approx(student["steps"] * student["seconds_per_step"] / 3600, rel=1e-3)

    of, features, samples = Native(path="digits").load(), load_features("digits"), found["protocol"]["samples"]
    real = Shards(path=str(built)).open(of).everything()
    judge = Judge(real, features, like(real, of.space))
    measured = {f"1 {n}": teacher.of_teacher(of, n, samples, judge) for n in (1, 2)}
    for n in ("1", "2"):
        same = found["teacher_steps"][n]["metrics"]
        assert {key: measured[f"1 {n}"][key] for key in ("fd", "kid", "precision", "recall", "label_accuracy")} == {
            key: pytest.approx(same[key], rel=1e-5) for key in ("fd", "kid", "precision", "recall", "label_accuracy")
        }
        assert measured[f"1 {n}"]["nfe"] == int(n)

    told = StudentConfig().build(of, of.space, 0, guidance=GuidanceInput(low=1.0, high=3.0, scale=2.0))
    assert told.guide is not None
    for weight in told.guide.parameters():
        torch.nn.init.normal_(weight)
    at_3 = teacher.of_student(told, 2, 3.0, samples, judge)
    asked = partial(with_guidance, device=torch.device("cpu"), guidance=3.0)
    made = generate(student_generator(told, 2), told.space, samples, 30, teacher.SEED,
                    lambda first, count: asked(judge.conditions(first, count), count))  # fmt: skip
    assert at_3["fd"] == pytest.approx(judge(made).metrics["fd"], rel=1e-5) and at_3["nfe"] == 2
    with pytest.raises(ValueError, match="guidance must be in"):
        teacher.of_student(told, 1, 4.0, samples, judge)

    results.write(
        [changed, other, student],
        shown | {"fashion/other": shown["fashion/one"]},
        {"runs": measured, "student": {"3 2": at_3}},
    )
    page = (cwd / "results.md").read_text()
    assert f"| steps | scale 3 |\n| --- | ---: |\n| 2 | {at_3['fd']:.1f} (" in page
    assert "old" not in page and page.count("said") == len(BLOCKS) and "`fashion/one`" in page
    assert f"| 2 | {measured['1 2']['fd']:.1f} |" in page
    assert f" {found['student']['1']['metrics']['fd']:.1f} |" in page
    short = [f"{found[of][n]['metrics']['fd']:.1f}" for of in ("student", "teacher_steps") for n in ("1", "2")]
    readme = (cwd / "README.md").read_text()
    assert readme.count("`fashion/one") == 1 and page.count("`fashion/other`") == 3  # changed ones in a table of theirs
    of_changed = page[page.index("<!-- changed") : page.index("<!-- looks")]
    assert of_changed.index("`fashion/one`") < of_changed.index(f"`{changed['recipe']}`") and "other" not in of_changed
    assert f"| `fashion/one` | {short[0]} | {short[1]} |" in readme
    assert f"| the teacher | {short[2]} | {short[3]} |" in readme
    assert (cwd / "curves.png").stat().st_size > 5000 and (cwd / "one-step.png").stat().st_size > 5000

    other["evaluation"] = {**other["evaluation"], "protocol": found["protocol"] | {"samples": 9}}
    (cwd / "students.json").write_text(json.dumps([other]))
    with pytest.raises(SystemExit, match="not measured as fashion/other is"):
        results.collect([folder])


def test_every_row_is_of_its_recipe_as_it_is_now(cwd: Path) -> None:
    rows = json.loads((ROOT / "docs" / "results" / "students.json").read_text())
    recipes = {name for name in names() if name.startswith("fashion/")}
    assert {r["recipe"] for r in rows if " " not in r["recipe"]} == recipes
    for r in rows:
        recipe, *overrides = shlex.split(r["recipe"])
        now = load(recipe, [*data_in(cwd, recipe), *overrides])
        said = (now.trainer.steps, now.trainer.batch, now.trainer.lr, now.guidance.scale if now.guidance else 1.0)
        assert said == (r["steps"], r["batch"], r["lr"], r["guidance"]), r["recipe"]
        assert now.evaluation.samples == r["evaluation"]["protocol"]["samples"]
        fd = r["evaluation"]["student"]["1"]["metrics"]["fd"]
        assert overrides or f"one-step fd {fd:.1f}, " in str(now.about.result), r["recipe"]


def test_looks(bench: tuple[ModuleType, ModuleType]) -> None:
    looks = partial(bench[0].looks, classes=torch.arange(400) % 10)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(400, 1, 12, 12, generator=generator)
    by_class = 0.25 * (1 - 2 * (torch.arange(400) % 2))[:, None, None, None]  # odd classes darker, even ones brighter
    shifted = looks(teacher + by_class, teacher)
    assert shifted["drift"] == pytest.approx(1) and shifted["rmse"] == pytest.approx(0.25)
    assert shifted["sharpness"] == pytest.approx(1, abs=1e-6)
    scattered = looks(teacher + 0.25 * torch.randn(teacher.shape, generator=generator), teacher)
    assert scattered["drift"] == pytest.approx(10 / 400, rel=0.1)  # of 40 samples a class 1/40 does not cancel
    assert looks(teacher.mean((2, 3), keepdim=True) + 0.5 * (teacher - teacher.mean((2, 3), keepdim=True)), teacher)[
        "sharpness"
    ] == pytest.approx(0.25, rel=1e-5)
