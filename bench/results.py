"""The students of recipes/fashion side by side: docs/results.md, README's table, pictures, docs/results/students.json.

    python bench/results.py runs/NAME ...      measures what evaluation.json does not say; new rows, the others stay
    python bench/results.py                    the pages alone, from docs/results

Runs of one protocol, whose teacher's samples are kept (evaluation.cache). The time of a step is measured here: let
nothing else run.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from objectives_report import fill, rounded, table
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.evaluation.judge import like
from distill.evaluation.metrics import rmse
from distill.evaluation.pictures import compare, png
from distill.evaluation.report import read_run
from distill.one_step import one_step
from distill.run_folder import open_run
from distill.sampling import generate, student_generator
from teachers.space import DataSpace

ROOT = Path(__file__).resolve().parents[1]
README, PAGE, PICTURES = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "results"
TEACHER = PICTURES / "teacher.json"
SHOWN = 14  # samples of a row of the picture
PLACES = ("name", "data.source", "data.path", "evaluation.data.source", "evaluation.data.path", "evaluation.cache",
          "trainer.precision")  # fmt: skip
"""Keys that leave a row what it is: where things lie, and how a CPU multiplies."""
Result = dict[str, Any]


# --- what a run folder says


def collect(folders: Sequence[Path]) -> None:
    """Puts the results of finished runs, and their first samples, beside those that PICTURES holds of others."""
    students, shown = read()
    for folder in folders:
        result, pixels = _of_run(folder)
        protocol = result["evaluation"]["protocol"]
        students = [r for r in students if r["recipe"] != result["recipe"]]
        for other in students:
            if other["evaluation"]["protocol"] != protocol:
                raise SystemExit(f"{folder}: not measured as {other['recipe']} is: {protocol}")
        students.append(rounded(result))
        shown |= pixels
    if not any(r["guidance"] == 1 and not _is_changed(r) for r in students):
        raise SystemExit("none is of a recipe as it is and without guidance: run one, the pages begin with it")
    (PICTURES / "students.json").write_text(json.dumps(students, indent=1) + "\n")
    save_file(shown, PICTURES / "samples.safetensors")


def read() -> tuple[list[Result], dict[str, Tensor]]:
    """The results, and pixels ``[SHOWN, c, h, w]`` by recipes and by teachers' names, that PICTURES holds."""
    if not (PICTURES / "students.json").exists():
        return [], {}
    return json.loads((PICTURES / "students.json").read_text()), load_file(PICTURES / "samples.safetensors")


def _teacher_name(result: Result) -> str:
    guided = f" x{result['guidance']:g}" if result["guidance"] != 1 else ""
    return f"teacher{guided}, {result['evaluation']['teacher']['steps']}"


def _of_run(folder: Path) -> tuple[Result, dict[str, Tensor]]:
    """Its result, and what `read` returns of it. Of a run that changed its recipe the evaluation is all that counts."""
    run, job = read_run(folder), open_run(folder, Console())
    config, trainer = job.recipe.evaluation, job.recipe.trainer
    student, step = job.trained_student(job.trained())
    result: Result = {
        "recipe": _asked(run.provenance["command"]),
        "guidance": job.recipe.guidance.scale if job.recipe.guidance else 1.0,
        "steps": step,
        "batch": trainer.batch,
        "lr": trainer.lr,
        "evaluation": _untimed(run.evaluation),
    }
    if _is_changed(result):
        return result, {}
    kept = job.kept_samples()
    if kept is None or not kept.exists():
        raise SystemExit(f"{folder}: the teacher's samples are not kept: set evaluation.cache, then evaluate it again")
    samples = {"teacher": load_file(kept)["x"]}
    conditions = like(job.compared_with()[0], student.space)
    asked = conditions(0, config.samples)
    assert asked is not None
    with job.threads():
        seconds = one_step(job).seconds  # other work may have slowed the run itself
        for n in run.evaluation["student"]:
            make = student_generator(student, int(n))
            samples[n] = generate(make, student.space, config.samples, config.batch, config.seed, conditions).x
    result |= {
        "seconds_per_step": seconds,
        "hours": step * seconds / 3600,
        "looks": {n: looks(samples[n], samples["teacher"], asked["class"]) for n in run.evaluation["student"]},
    }
    pixels = {n: student.space.pixels(x[:SHOWN]) for n, x in samples.items()}
    return result, {_teacher_name(result): pixels["teacher"], result["recipe"]: pixels["1"]}


def _is_changed(result: Result) -> bool:
    return " " in result["recipe"]


def _asked(command: str) -> str:
    """Of the command that began a run: its recipe, and what it changed in it but for names and places."""
    program, *words = shlex.split(command)
    if program != "distill" or words[:1] != ["run"]:
        raise SystemExit(f"{command}: began a run of no row; only one begun by `distill run RECIPE` can be run again")
    return shlex.join(word for word in words[1:] if word.split("=")[0] not in PLACES)


def _untimed(evaluation: Any) -> Any:
    """Without the time of a sample, which says little where several runs share a machine."""
    if not isinstance(evaluation, dict):
        return evaluation
    return {k: _untimed(v) for k, v in evaluation.items() if k not in ("seconds_per_sample", "speedup")}


def looks(x: Tensor, teacher: Tensor, classes: Tensor) -> dict[str, float]:
    """How samples ``[n, c, h, w]`` of ``classes: [n]`` differ from the teacher's of the same noise.

    sharpness: energy of what a 3x3 binomial blur takes away, over that of the teacher's: below 1 is smoother. drift:
    the share of the mean squared difference that all samples of a class have in common: 0 is scatter, 1 a shift.
    """
    difference = (x - teacher).double()
    common = torch.stack([difference[classes == k].mean(0) for k in classes.unique()]).square().mean()
    return {
        "sharpness": float(_detail(x) / _detail(teacher)),
        "drift": float(common / difference.square().mean()),
        "rmse": rmse(x, teacher),
    }


def _detail(x: Tensor) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    blurred = torch.nn.functional.conv2d(x.double(), kernel, padding=1, groups=x.shape[1])
    return (x.double() - blurred)[..., 1:-1, 1:-1].square().mean()


# --- the pages


def write(students: Sequence[Result], samples: Mapping[str, Tensor], teacher: Mapping[str, Any]) -> None:
    """Tables and pictures: of the recipes as they are, but for the table of changed ones."""
    changed = _changed(students)
    students = _best_first(r for r in students if not _is_changed(r))
    blocks = {
        "students": _students(students),
        "steps": _by_steps(students),
        "changed": _by_steps(changed),
        "looks": _looks(students),
        "teacher": _teacher(teacher),
        "guidance": _guidance(teacher["runs"]),
        "scales": _guidance(teacher["student"]),
    }
    fill(PAGE, blocks)
    fill(README, {"results": _short(students)})
    (PICTURES / "curves.png").write_bytes(_curves(students))
    names = dict.fromkeys(name for r in students for name in (_teacher_name(r), r["recipe"]))
    rows = {name.removeprefix("fashion/"): samples[name] for name in names}
    space = DataSpace(shape=tuple(samples[students[0]["recipe"]].shape[1:]), value_range=(0, 255))
    (PICTURES / "one-step.png").write_bytes(compare(rows, space))


COUNTS = ("1", "2", "4", "8")
BY_STEPS = [f"{n} step{'s' if n != '1' else ''}" for n in COUNTS]


def _short(students: Sequence[Result]) -> str:
    """Frechet distances of what is not guided; the teacher's are in every evaluation."""
    plain = [r for r in students if r["guidance"] == 1]
    lines = {f"`{r['recipe']}`": r["evaluation"]["student"] for r in plain}
    lines |= {"the teacher": plain[0]["evaluation"]["teacher_steps"]}
    return table(
        ["recipe", *BY_STEPS],
        [[name, *(f"{of[n]['metrics']['fd']:.1f}" if n in of else "" for n in COUNTS)] for name, of in lines.items()],
    )


def _range(bounds: Sequence[float], digits: int) -> str:
    return " to ".join(f"{bound:.{digits}f}" for bound in bounds)


def _excess(gap: Mapping[str, Any]) -> tuple[str, str]:
    """Of a student's comparison with its teacher, with its interval; unknown of a teacher at the floor."""
    excess = "?" if gap["excess"] is None else f"{gap['excess']:.2f}"
    return excess, _range(gap["interval"]["excess"], 2) if "interval" in gap else "?"


def _best_first(students: Iterable[Result]) -> list[Result]:
    return sorted(students, key=lambda r: r["evaluation"]["student"]["1"]["metrics"]["fd"])


def _changed(students: Sequence[Result]) -> list[Result]:
    """Runs that changed their recipe, after that of the recipe as it is."""
    recipes = {r["recipe"].split()[0] for r in students if _is_changed(r)}
    return sorted((r for r in students if r["recipe"].split()[0] in recipes), key=lambda r: r["recipe"])


def _students(students: Sequence[Result]) -> str:
    rows = []
    for r in students:
        found = r["evaluation"]
        one, gap = found["student"]["1"], found["gap"]["1"]
        rows.append([
            f"`{r['recipe']}`", str(r["steps"]), f"{r['seconds_per_step']:.2f}",
            f"{r['hours']:.2f}", f"{found['teacher']['metrics']['fd']:.1f}", f"{one['metrics']['fd']:.1f}",
            _range(one["interval"]["fd"], 1),
            *_excess(gap), f"{one['metrics']['precision']:.3f}",
            f"{one['metrics']['recall']:.3f}", f"{one['metrics']['kid']:.3g}",
            f"{one['paired']['endpoint_rmse']:.3f}", f"{one['paired']['class_agreement']:.3f}",
        ])  # fmt: skip
    return table(["recipe", "steps", "s a step", "hours", "teacher's fd", "fd", "95 %", "excess", "95 %", "prec",
                  "recall", "kid", "rmse", "class"], rows)  # fmt: skip


def _by_steps(students: Sequence[Result]) -> str:
    rows = []
    for r in students:
        excess = {n: " (".join(_excess(gap)) + ")" for n, gap in r["evaluation"]["gap"].items()}
        rows.append([f"`{r['recipe']}`", *(excess.get(n, "") for n in COUNTS)])
    return table(["recipe", *BY_STEPS], rows)


def _looks(students: Sequence[Result]) -> str:
    rows = [
        [f"`{r['recipe']}`"]
        + [f"{r['looks'][n][key]:.{digits}f}" if n in r["looks"] else ""
           for key, digits in (("sharpness", 2), ("drift", 3), ("rmse", 3)) for n in ("1", "4", "8")]
        for r in students
    ]  # fmt: skip
    return table(["recipe", *(f"{key} {n}" for key in ("sharpness", "drift", "rmse") for n in (1, 4, 8))], rows)


def _teacher(teacher: Mapping[str, Any]) -> str:
    rows = []
    for name, run in teacher["runs"].items():
        scale, steps = name.split()
        if scale == "1":
            shares = [f"{run[key]:.3f}" for key in ("precision", "recall", "label_accuracy")]
            kid = f"{run['kid']:.3g}"
            rows.append([steps, f"{run['fd']:.1f}", _range(run["interval"], 1), kid, *shares])
    return table(["Euler steps", "fd", "95 %", "kid", "prec", "recall", "label"], rows)


def _guidance(runs: Mapping[str, Any]) -> str:
    scales = sorted({name.split()[0] for name in runs}, key=float)
    steps = sorted({name.split()[1] for name in runs}, key=int)
    rows = [[n] + [_setting(runs.get(f"{scale} {n}")) for scale in scales] for n in steps]
    return table(["steps", *(f"scale {scale}" for scale in scales)], rows)


def _setting(run: Mapping[str, Any] | None) -> str:
    return "" if run is None else f"{run['fd']:.1f} ({run['precision']:.2f}, {run['recall']:.2f})"


def _curves(students: Sequence[Result]) -> bytes:
    figure = Figure(figsize=(7.2, 4.4))
    axis: Any = figure.subplots()
    for k, r in enumerate(students):
        label = r["recipe"].removeprefix("fashion/")
        axis.plot(*_curve(r["evaluation"]["student"]), marker="o", color=f"C{k % 10}", ls=("-", "--")[k // 10 % 2],
                  label=label)  # fmt: skip
    plain = next(r["evaluation"] for r in students if r["guidance"] == 1)
    own = _curve(plain["teacher_steps"] | {plain["teacher"]["steps"]: plain["teacher"]})
    axis.plot(*own, color="black", marker=".", label="teacher")
    axis.axhline(plain["floor"]["fd"], color="#555555", ls=":", label="floor")
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="Frechet distance")
    axis.set_xticks(own[0], [str(n) for n in own[0]])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, ncol=2)
    return png(figure)


def _curve(entries: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    return [int(n) for n in entries], [entry["metrics"]["fd"] for entry in entries.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description="docs/results.md and README's table from finished runs.")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders; without any the pages alone")
    asked = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    if asked.runs:
        collect(asked.runs)
    write(*read(), json.loads(TEACHER.read_text()))


if __name__ == "__main__":
    main()
