"""The comparison of objectives: every preset is in it, a run of it measures what it says, its page is its results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT

from distill.recipe import load

BENCH, DOCS = ROOT / "bench", ROOT / "docs"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark, as it is when its folder is where Python was started; it keeps its results in a new folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    known = set(sys.modules)
    import objectives
    import problems

    for module in (objectives, problems):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "results")
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(problems, "COUNT", 512)
    monkeypatch.setattr(objectives, "PROBE", 32)
    yield objectives
    for name in set(sys.modules) - known:
        if Path(str(getattr(sys.modules[name], "__file__", None))).parent == BENCH:
            del sys.modules[name]


def test_every_toy_recipe_is_compared_on_every_problem_by_both_budgets(bench: Any) -> None:
    runs = [*bench.comparison(), *bench.experiments()]
    assert len({run.name for run in runs}) == len(runs)
    toys = {file.stem for file in (ROOT / "recipes" / "toy").glob("*.yaml")}
    for budget in ("seconds", "evaluations"):
        found = {(run.problem, run.preset) for run in bench.comparison() if run.budget == budget}
        assert found == {(problem, toy) for problem in bench.PROBLEMS for toy in toys}
    assert all(run.asks for run in bench.experiments())


def test_the_results_are_those_of_the_runs_there_are(bench: Any) -> None:
    kept = json.loads((DOCS / "objectives" / "results.json").read_text())["runs"]
    assert {run["name"] for run in kept} == {run.name for run in (*bench.comparison(), *bench.experiments())}


@pytest.mark.parametrize("name", ["cd", "ect", "ict", "scd", "sct", "rcm"])
def test_noise_levels_are_for_the_deviation_of_the_data(name: str, bench: Any) -> None:
    """Published ones for data of deviation 0.5, of rcm 1, in the recipe and where other data take its place."""
    published = 1.0 if name == "rcm" else 0.5
    recipe: Any = load(f"toy/{name}")
    weights, means, stds = (
        np.array(part) for part in (recipe.teacher.weights, recipe.teacher.means, recipe.teacher.stds)
    )
    deviation = (weights * (means**2 + stds**2)).sum(1) ** 0.5  # of each coordinate, whose mean is 0
    assert recipe.objective.times.sigma_data * deviation == pytest.approx(published, rel=0.02)
    from loop import fitted

    objective, parameterisation = (
        fitted(part, 1.0, 2.0) for part in (recipe.objective, recipe.student.parameterisation)
    )
    assert objective.times.sigma_data * 2.0 == pytest.approx(published, rel=0.02)
    assert parameterisation.sigma_data == getattr(objective, "sigma_data", 2.0) == 2.0


def test_a_run_trains_for_its_budget_and_is_measured(bench: Any) -> None:
    run = bench.Run("mixture-try", "mixture", "lagrangian", evaluations=700.0, lr=5e-3)
    result = bench.perform(run)
    assert result["step"]["evaluations"] == 7.0 and result["steps"] == 100
    assert result["kind"] == "flow_map" and result["diverged"] is None
    assert result["seconds_spent"] > 0 and result["step"]["bytes"] > 10**6
    assert 0.01 < result["map_1"] < 0.9 and result["map_4"] < result["map_1"]  # the identity has 1.06
    assert len(result["curve"]) == 10 and result["curve"][-1][1] < result["curve"][0][1]
    assert (run.file.parent / "mixture-try.npy").exists()
    timed = bench.steps_of(
        bench.Run("more", "mixture", "lagrangian", seconds=2.0, lr=5e-3), bench.PROBLEMS["mixture"]()
    )
    assert timed[0] == max(20, round(2.0 / timed[1].seconds))


def test_the_page_is_its_results(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import objectives_report as report

    page = Path(shutil.copy(DOCS / "objectives.md", tmp_path))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    report.write(lambda name: tmp_path / "nothing" / name)
    assert page.read_text() == (DOCS / "objectives.md").read_text()
    assert (tmp_path / "map-error.png").stat().st_size > 10_000
