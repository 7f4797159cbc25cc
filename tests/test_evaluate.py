"""The measure itself: exact where the answer is known, the same for teacher and student, on any number of processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAST, LAWS, Exact, compose, environment, normal, timeless, uniform
from torch import Tensor, nn

from distill.evaluation.config import EvaluationConfig
from distill.evaluation.evaluate import evaluate, main_numbers
from distill.evaluation.judge import Judge, like
from distill.evaluation.metrics import kernel_distance, precision_recall, rmse
from distill.evaluation.report import verdict
from distill.job import run
from distill.parallel import spread
from distill.rows import chosen, noise
from distill.sampling import Samples, generate, teacher_generator
from teachers.errors import InputError
from teachers.solvers import uniform_grid
from teachers.space import DataSpace
from teachers.velocity import Teacher

CONFIG = EvaluationConfig(samples=2000, batch=300, steps=(1, 2), reference_steps=200, bootstrap=0)


class Map(nn.Module):
    """A flow map in the clothes of a student."""

    def __init__(self, flow_map: Any, space: DataSpace, kind: str = "flow_map") -> None:
        super().__init__()
        self.flow_map, self.space, self.kind, self.finest = flow_map, space, kind, 1

    def generate(self, x_0: Tensor, steps: int, cond: Any = None, fresh: Any = None) -> Tensor:
        return compose(self.flow_map, x_0, uniform_grid(steps), cond)


def measure(student: Any, teacher: Teacher | None, config: EvaluationConfig = CONFIG, **more: Any) -> dict[str, Any]:
    real = more.pop("real", None)
    return evaluate(student, teacher, real, None, config, weights="ema", reference="test", **more)


@pytest.mark.parametrize("law", LAWS)
def test_the_exact_map_is_as_good_as_its_teacher(law: str) -> None:
    exact = LAWS[law]("linear")
    teacher = exact.load()
    d = teacher.space.shape[0]
    generator = torch.Generator().manual_seed(5)
    real = exact.data(
        torch.randn(4000, d, generator=generator), torch.rand(4000, d, generator=generator, dtype=torch.float64)
    ).float()
    found = measure(Map(Exact(exact), teacher.space), teacher, real=(real, None))
    scale = float(real.std())
    for steps, entry in found["student"].items():
        assert entry["nfe"] == int(steps)
        assert entry["paired"]["exact_rmse"] < 1e-4 * scale
        assert entry["paired"]["endpoint_rmse"] < 0.02 * scale  # of Euler with 200 steps
        assert abs(found["gap"][steps]["fd"] - 1) < 0.25
        assert entry["metrics"]["fd"] < 3 * found["floor"]["fd"]
        assert found["speedup"][steps] > 0
    assert found["gap"].keys() == found["speedup"].keys() == {"1", "2"}
    assert found["teacher"]["paired"]["exact_rmse"] == pytest.approx(
        found["student"]["1"]["paired"]["endpoint_rmse"], rel=1e-2
    )
    # and it bites: the teacher itself in one step is far from all of that
    one = found["teacher_steps"]["1"]
    assert one["paired"]["exact_rmse"] > 0.1 * scale
    assert one["metrics"]["fd"] > 3 * found["teacher"]["metrics"]["fd"]
    wrong = measure(
        Map(lambda x, s, t, cond: 0.9 * Exact(exact)(x, s, t, cond), teacher.space), teacher, real=(real, None)
    )
    assert wrong["student"]["1"]["paired"]["exact_rmse"] > 0.05 * scale
    assert wrong["gap"]["1"]["fd"] > 1.25


class Still:
    """The identity, as a flow map."""

    def __call__(self, x_s: Tensor, s: Tensor, t: Tensor, cond: Any) -> Tensor:
        return x_s


def test_teacher_and_student_start_from_the_same_noise() -> None:
    space = DataSpace((3,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    config = EvaluationConfig(samples=70, batch=32, steps=(1, 4), reference_steps=3)
    found = measure(Map(Still(), space), teacher, config)
    for entry in (*found["student"].values(), *found["teacher_steps"].values()):
        assert entry["paired"]["endpoint_rmse"] == 0
    assert found["gap"]["1"]["fd"] == 1.0
    again = measure(Map(Still(), space), teacher, config)
    assert again["teacher"]["metrics"] == found["teacher"]["metrics"]
    other = measure(Map(Still(), space), teacher, EvaluationConfig(samples=70, seed=1, steps=(1,), reference_steps=3))
    assert other["teacher"]["metrics"] != found["teacher"]["metrics"]


def test_without_data_the_teacher_stands_in_from_other_noise() -> None:
    space = DataSpace((2,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    config = EvaluationConfig(samples=100, batch=64, steps=(1,), reference_steps=2)
    found = measure(Map(Still(), space), teacher, config)
    real = noise(1, 0, 100, (2,))  # of the next seed
    assert found["teacher"]["metrics"]["fd"] > 0
    same = measure(Map(Still(), space), teacher, config, real=(real, None))
    assert same["teacher"]["metrics"] == found["teacher"]["metrics"]
    assert same["floor"] == found["floor"]


def test_protocol_and_times_are_recorded() -> None:
    teacher = LAWS["gaussian"]("linear").load()
    config = EvaluationConfig(samples=50, batch=20, seed=3, steps=(1, 3), reference_steps=7)
    said: list[str] = []
    found = evaluate(
        Map(Exact(LAWS["gaussian"]("linear")), teacher.space),  # type: ignore[arg-type]
        teacher,
        (torch.randn(60, 3), None),
        None,
        config,
        weights="raw",
        reference="abc",
        progress=said.append,
    )
    assert found["protocol"] == {"features": "raw", "reference": "abc", "samples": 50, "seed": 3, "weights": "raw",
                                 "batch": 20, "solver": "euler", "reference_steps": 7}  # fmt: skip
    assert found["teacher"]["steps"] == found["teacher"]["nfe"] == 7
    entries = [found["teacher"], *found["teacher_steps"].values(), *found["student"].values()]
    assert [entry["nfe"] for entry in entries] == [7, 1, 3, 1, 3]
    assert all(entry["seconds_per_sample"] > 0 for entry in entries)
    for steps, entry in found["student"].items():
        ratio = found["teacher"]["seconds_per_sample"] / entry["seconds_per_sample"]
        assert found["speedup"][steps] == pytest.approx(ratio)
    assert [word.rstrip("s") for word in said] == [
        f"{who}, {n} step"
        for who, n in (("teacher", 7), ("teacher", 1), ("teacher", 3), ("student", 1), ("student", 3))
    ] + ["interval"]
    numbers = main_numbers(found)
    assert numbers["3"]["fd_over_teacher"] == found["gap"]["3"]["fd"]
    assert numbers["3"].items() >= found["student"]["3"]["metrics"].items()
    json.dumps(found, allow_nan=False)


def test_intervals_are_of_distances_and_of_their_excess() -> None:
    law = LAWS["gaussian"]("linear")
    teacher = law.load()
    worse = Map(lambda x, s, t, cond: 0.8 * Exact(law)(x, s, t, cond), teacher.space)
    real = (law.data(normal(900, 3, seed=4), uniform(900, seed=5)).float(), None)
    config = EvaluationConfig(samples=800, batch=400, steps=(1, 2), reference_steps=6)
    found = measure(worse, teacher, config, real=real)
    floor, best = found["floor"]["fd"], found["teacher"]["metrics"]["fd"]
    for entry in (found["teacher"], *found["teacher_steps"].values(), *found["student"].values()):
        low, high = entry["interval"]["fd"]
        assert low < entry["metrics"]["fd"] < high < 3 * low + 1
    for steps, gap in found["gap"].items():
        fd = found["student"][steps]["metrics"]["fd"]
        assert gap["excess"] == pytest.approx((fd - floor) / (best - floor))
        low, high = gap["interval"]["excess"]
        assert low < gap["excess"] < high
    # of the same noise: nearly the teacher's samples are surer to be as good as these than either is to be good
    near = Map(law, teacher.space)
    near.generate = lambda x_0, n, cond, fresh=None: 1.001 * teacher_generator(teacher, 3)(x_0, cond, None)  # type: ignore[method-assign]
    coarse = measure(near, teacher, replace(config, reference_steps=3), real=real)
    low, high = coarse["gap"]["1"]["interval"]["excess"]
    bounds, best = coarse["teacher"]["interval"]["fd"], coarse["teacher"]["metrics"]["fd"]
    assert high - low < 0.1 * (bounds[1] - bounds[0]) / (best - floor)
    alone = measure(worse, teacher, replace(config, bootstrap=0), real=real)
    assert "interval" not in alone["teacher"] and "interval" not in alone["gap"]["1"]
    assert alone["gap"]["1"]["excess"] == found["gap"]["1"]["excess"]


def test_beside_a_teacher_that_may_be_at_the_floor_an_excess_has_no_interval() -> None:
    law = LAWS["gaussian"]("linear")
    teacher = law.load()
    real = (1.03 * law.data(normal(900, 3, seed=4), uniform(900, seed=5)).float(), None)
    config = EvaluationConfig(samples=800, batch=400, steps=(1,), reference_steps=60)
    found = measure(Map(lambda x, s, t, c: 0.8 * Exact(law)(x, s, t, c), teacher.space), teacher, config, real=real)
    floor, best = found["floor"]["fd"], found["teacher"]
    assert best["interval"]["fd"][0] < floor < best["metrics"]["fd"]  # so that this is the case in question
    assert found["gap"]["1"]["excess"] > 1 and "interval" not in found["gap"]["1"]


def test_samples_have_the_classes_of_the_real_ones() -> None:
    space = DataSpace((2,), classes=4)
    labels = torch.tensor([3, 1, 1, 1, 0, 1, 3, 1])  # 0 once, 1 five times, 2 never, 3 twice
    conditions = like((torch.zeros(8, 2), labels), space)

    def classes(first: int, count: int) -> Tensor:
        cond = conditions(first, count)
        assert cond is not None
        return cond["class"]

    for period in range(3):
        assert classes(8 * period, 8).bincount(minlength=4).tolist() == [1, 5, 0, 2]
    assert torch.equal(torch.cat([classes(0, 5), classes(5, 20)]), classes(0, 25))
    for n in (4, 8, 20):  # at every moment about as often
        assert (classes(0, n).bincount(minlength=4) - n * torch.tensor([1, 5, 0, 2]) / 8).abs().max() <= 1
    even = like((torch.zeros(8, 2), torch.tensor([3, 3, 0, 0, 1, 1, 2, 2])), space)
    for found, asked in ((even, space), (like((torch.zeros(8, 2), None), space), space), (like(None, space), space)):
        assert str(found(3, 9)) == str(asked.cond_for(3, 9))
    assert like((torch.zeros(8, 2), None), DataSpace((2,)))(0, 3) is None


def test_unequal_classes_are_no_distance() -> None:
    """A teacher that makes each class as it is stands at the floor, whatever the shares; others are seen."""
    labels = torch.tensor([0] * 9 + [1]).repeat(60)
    centers = torch.tensor([[-8.0, 0.0], [8.0, 0.0]])
    real = centers[labels] + noise(3, 0, 600, (2,))
    space = DataSpace((2,), classes=2)
    teacher = Teacher(velocity=lambda x, t, cond: centers[cond["class"]], space=space)
    config = EvaluationConfig(samples=900, steps=(1,), reference_steps=2, bootstrap=20)
    found = measure(Map(Still(), space), teacher, config, real=(real, labels))
    assert found["teacher"]["metrics"]["fd"] < 3 * found["floor"]["fd"] < 0.1
    even = measure(Map(Still(), space), teacher, config, real=(real, labels), conditions=space.cond_for)
    assert even["teacher"]["metrics"]["fd"] > 5


def test_intervals_of_classes_with_one_sample_have_a_width() -> None:
    real, space = noise(3, 0, 400, (2,)), DataSpace((2,), classes=40)
    judge = Judge((real, torch.arange(400) % 40), None, space.cond_for)
    for n in (40, 400):
        spread = judge.errors([noise(4, 0, n, (2,))], 30).std()
        fresh = torch.tensor([judge(Samples(noise(100 + k, 0, n, (2,)), 0.0)).metrics["fd"] for k in range(30)]).std()
        assert 0.5 * fresh < spread < 3 * fresh


def test_what_cannot_be_measured_is_said() -> None:
    space = DataSpace((2,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    broken = Map(lambda x, s, t, cond: torch.where(x > 1, torch.nan, x), space)
    config = EvaluationConfig(samples=50, steps=(1,), reference_steps=2)
    with pytest.raises(InputError, match=r"\d+ of 50 samples are not finite"):
        measure(broken, teacher, config, real=(noise(5, 0, 80, (2,)), None))
    with pytest.raises(InputError, match="compares with 3 real samples: at least 4 are needed"):
        measure(Map(Still(), space), teacher, config, real=(noise(5, 0, 3, (2,)), None))


def test_a_better_student_than_the_floor_has_no_excess() -> None:
    space = DataSpace((2,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    real = (noise(0, 0, 200, (2,)), None)  # what the teacher makes
    found = measure(
        Map(Still(), space), teacher, EvaluationConfig(samples=200, steps=(1,), reference_steps=2), real=real
    )
    assert found["gap"]["1"]["excess"] is None and "interval" not in found["gap"]["1"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("samples", "real", "few"), [(50, 20, False), (50, 4, True), (2, 20, True)])
def test_a_floor_of_few_samples_is_called_rough(samples: int, real: int, few: bool) -> None:
    space = DataSpace((2,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    config = EvaluationConfig(samples=samples, steps=(1,), reference_steps=2, bootstrap=0)
    found = measure(Map(Still(), space), teacher, config, real=(noise(5, 0, real, (2,)), None))
    assert found["floor"]["few"] == few == ("are rough: there are fewer samples than features." in verdict(found))


def test_training_data_are_judged_as_if_they_were_samples() -> None:
    space = DataSpace((2,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    config = EvaluationConfig(samples=100, batch=64, steps=(1,), reference_steps=2)
    own = noise(0, 0, 100, (2,))
    found = measure(Map(Still(), space), teacher, config, real=(noise(5, 0, 300, (2,)), None), trained_on=own)
    assert found["floor"]["trained_on"] == found["teacher"]["metrics"]


@pytest.mark.parametrize("order", ["in turn", "sorted"])
def test_of_more_training_data_than_samples_some_of_all_classes_are_judged(order: str) -> None:
    space, own = DataSpace((2,)), noise(1, 0, 400, (2,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    config = EvaluationConfig(samples=100, batch=64, steps=(1,), reference_steps=2, bootstrap=0)
    own[torch.arange(400) % 4 < 1 if order == "in turn" else torch.arange(400) < 100] += 9
    found = measure(Map(Still(), space), teacher, config, real=(own, None), trained_on=own)
    assert found["floor"]["trained_on"]["fd"] < 1 < found["teacher"]["metrics"]["fd"]


def test_of_many_real_samples_some_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    space = DataSpace((2,))
    teacher = Teacher(velocity=lambda x, t, cond: torch.zeros_like(x), space=space)
    real, config = noise(5, 0, 300, (2,)), EvaluationConfig(samples=100, steps=(1,), reference_steps=2, bootstrap=0)
    every = measure(Map(Still(), space), teacher, config, real=(real, None))["teacher"]["metrics"]
    monkeypatch.setattr("distill.evaluation.judge._MOST", 60)
    found = measure(Map(Still(), space), teacher, config, real=(real, None))["teacher"]["metrics"]
    made = noise(0, 0, 100, (2,))
    some = real[chosen(60, 300)]
    assert len(some.unique(dim=0)) == 60
    assert (found["precision"], found["recall"]) == precision_recall(made, some)
    assert found["kid"] == kernel_distance(made, some) != every["kid"]
    assert (found["fd"], found["sw2"]) == (every["fd"], every["sw2"])


def test_the_teachers_samples_are_kept(tmp_path: Path) -> None:
    space, calls = DataSpace((2,)), [0]

    def velocity(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        calls[0] += 1
        return torch.zeros_like(x)

    teacher, file = Teacher(velocity=velocity, space=space), tmp_path / "deep" / "kept.safetensors"
    config = EvaluationConfig(samples=60, batch=30, steps=(1,), reference_steps=50)
    real = (noise(5, 0, 80, (2,)), None)

    def found() -> tuple[Any, int]:
        before = calls[0]
        result = measure(Map(Still(), space), teacher, config, real=real, kept=file)
        return result["teacher"], calls[0] - before

    first, making = found()
    again, reading = found()
    assert again["metrics"] == first["metrics"] and again["paired"] == first["paired"]
    assert again["seconds_per_sample"] != first["seconds_per_sample"]  # of this machine, now
    assert making - reading == 50  # one of two batches
    file.write_bytes(file.read_bytes()[:40])
    mended, repeated = found()
    assert mended["metrics"] == first["metrics"] and repeated == making
    assert found()[1] == reading


def test_a_teacher_in_training_is_compared_with_data_alone() -> None:
    law = LAWS["gaussian"]("linear")
    config = EvaluationConfig(samples=40, steps=(1, 2), reference_steps=5)
    found = measure(Map(Exact(law), DataSpace((3,)), "velocity"), None, config, real=(torch.randn(60, 3), None))
    assert list(found["student"]) == ["1", "2", "5"]
    assert found["teacher"] is None and found["gap"] == found["speedup"] == found["teacher_steps"] == {}
    assert all(entry["paired"] == {} for entry in found["student"].values())


# --- sampling


@pytest.mark.parametrize("batch", [1, 7, 32, 100])
def test_samples_are_those_of_their_index(batch: int) -> None:
    space = DataSpace((2, 3), classes=4)
    seen: list[Tensor] = []

    def generator(x_0: Tensor, cond: Any, fresh: Any) -> Tensor:
        seen.append(cond["class"])
        return 2 * x_0

    found = generate(generator, space, 50, batch, 9)
    assert torch.equal(found.x, 2 * noise(9, 0, 50, (2, 3)))
    assert torch.equal(torch.cat(seen), torch.arange(50) % 4)
    assert [len(c) for c in seen] == [min(batch, 50 - first) for first in range(0, 50, batch)]
    assert found.seconds_per_sample > 0


def test_the_clock_runs_for_the_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("distill.sampling.time.perf_counter", lambda: now[0])

    def generator(x_0: Tensor, cond: Any, fresh: Any) -> Tensor:
        now[0] += 3.0
        return x_0

    def slow_noise(*args: Any) -> Tensor:
        now[0] += 100.0
        return noise(*args)

    monkeypatch.setattr("distill.sampling.noise", slow_noise)
    assert generate(generator, DataSpace((1,)), 10, 4, 0).seconds_per_sample == pytest.approx(
        0.75
    )  # batches of 4, 4, 2


def test_the_reference_is_euler() -> None:
    x_0 = torch.ones(2, 1)
    linear = teacher_generator(Teacher(velocity=lambda x, t, cond: x, space=DataSpace((2,))), 4)
    assert torch.allclose(linear(x_0, None, None), torch.full((2, 1), 1.25**4))


def test_work_is_spread_in_order() -> None:
    assert spread(range(5), lambda i: i * i) == [0, 1, 4, 9, 16]
    assert spread([], lambda i: i) == []


def torchrun(count: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment(), timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SPREAD = """
import sys
import torch
import distill
from distill.parallel import is_main, spread
from distill.sampling import generate

student = distill.load(sys.argv[1])
found = generate(lambda x, c, fresh: student.generate(x, 2, c), student.space, 230, 50, 3)
assert found.seconds_per_sample > 0
assert spread(range(7), lambda i: 10 * i) == [0, 10, 20, 30, 40, 50, 60]
if is_main():
    torch.save(found.x, sys.argv[2])
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_samples_do_not_depend_on_the_number_of_processes(digits_run: Path, cwd: Path) -> None:
    (cwd / "spread.py").write_text(SPREAD)
    export = str(digits_run / "export")
    subprocess.run([sys.executable, "spread.py", export, "1.pt"], env=environment(), check=True)
    one = torch.load("1.pt", weights_only=True)
    assert one.shape == (230, 1, 8, 8)
    for count in (2, 3):
        torchrun(count, "spread.py", export, f"{count}.pt")
        assert torch.equal(torch.load(f"{count}.pt", weights_only=True), one)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_evaluation_may_be_spread(digits_run: Path, cwd: Path) -> None:
    folder = Path(shutil.copytree(digits_run, "run"))
    expected = timeless(folder / "evaluation.json")
    for name, source in (("run", folder), ("export", folder / "export")):
        # several batches, so that both processes have some
        torchrun(2, "-m", "distill", "evaluate", str(source), "evaluation.batch=30", "--out", f"{name}-2.json")
        spread_over_two = timeless(Path(f"{name}-2.json"))
        assert (
            rmse(
                torch.tensor([e["metrics"]["fd"] for e in spread_over_two["student"].values()]),
                torch.tensor([e["metrics"]["fd"] for e in expected["student"].values()]),
            )
            < 1e-3 * expected["student"]["1"]["metrics"]["fd"]
        )
        subprocess.run(
            [sys.executable, "-m", "distill", "evaluate", str(source), "evaluation.batch=30",
             "--out", f"{name}-1.json"],
            env=environment(), check=True, capture_output=True,
        )  # fmt: skip
        assert timeless(Path(f"{name}-1.json")) == spread_over_two


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_evaluation_that_trains_its_features_may_be_spread(built: Path, cwd: Path) -> None:
    overrides = (*FAST, f"data.path={built}", "evaluation.features=null")
    folder = run("quickstart", overrides)
    assert (folder / "features" / "config.json").is_file()
    expected = timeless(folder / "evaluation.json")
    shutil.rmtree(folder / "features")
    for name, source in (("run", folder), ("export", folder / "export")):
        torchrun(2, "-m", "distill", "evaluate", str(source), "--out", f"{name}.json")
        assert timeless(Path(f"{name}.json")) == expected
