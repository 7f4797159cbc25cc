"""The page about the comparison: tables and pictures from the results. What people wrote around the tables stays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, RESULTS, PICTURES = DOCS / "objectives.md", DOCS / "objectives" / "results.json", DOCS / "objectives"
Result = dict[str, Any]


def collect(files: dict[Path, str], teachers: dict[str, Any], setting: dict[str, Any]) -> None:
    """All results in one file: what the page is made of. files: each with the question that it answers, or none."""
    runs = [rounded(json.loads(file.read_text())) | {"asks": asks} for file, asks in files.items()]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(run) for run in runs)
    head = json.dumps(rounded({"setting": setting, "teachers": teachers}))[1:-1]
    RESULTS.write_text(f'{{{head}, "runs": [\n{lines}\n]}}\n')


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def write(samples: Callable[[str], Path]) -> None:
    """Page and pictures. samples: name of a run -> the file of its one-step samples; pictures of samples are made anew
    where all of them are there."""
    kept = json.loads(RESULTS.read_text())
    teachers = kept["teachers"]
    timed, counted = (
        {
            p: better([r for r in kept["runs"] if not r["asks"] and (r["problem"], r["budget"]) == (p, b)])
            for p in teachers
        }
        for b in ("seconds", "evaluations")
    )
    blocks = {"setting": _setting(kept["setting"]), "verdict": _verdict(timed, teachers), "cost": _costs(timed)}
    for problem, teacher in teachers.items():
        blocks[f"{problem}-seconds"] = _errors(timed[problem], teacher)
        blocks[f"{problem}-evaluations"] = _short(counted[problem])
    blocks["experiments"] = _experiments([r for r in kept["runs"] if r["asks"]], timed)
    fill(PAGE, blocks)
    _dots(timed, counted, teachers)
    if all(samples(r["name"]).exists() for p in ("checkerboard", "digits") for r in timed[p]):
        boards, images = (
            {"teacher": samples(f"teacher-{p}")}
            | {r["preset"]: samples(r["name"]) for r in timed[p] if not r["diverged"]}
            for p in ("checkerboard", "digits")
        )
        _boards(boards)
        _images(images)


def fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Puts each text between the marks of its name in a page; what people wrote around them stays."""
    content = page.read_text()
    for name, text in blocks.items():
        head, end = f"<!-- {name} -->\n", "<!-- / -->"
        before, found, rest = content.partition(head)
        assert found, f"{page}: no block {head}"
        content = before + head + text + rest[rest.index(end) :]
    page.write_text(content)


def better(runs: Sequence[Result]) -> list[Result]:
    """The better learning rate of each preset, best first."""
    found: dict[str, Result] = {}
    for run in sorted(runs, key=_one_step):
        found.setdefault(run["preset"], run)
    return list(found.values())


def _one_step(run: Result) -> float:
    return math.inf if run["diverged"] else float(run["map_1"])


# --- tables


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}"


def share(run: Result, teacher: Any) -> float:
    """One-step excess of W2 over the floor as a share of the teacher's in one step."""
    floor = teacher["floor"]["w2_1"]
    return float((run["w2_1"] - floor) / (teacher["euler 1"]["w2_1"] - floor))


def _errors(runs: Sequence[Result], teacher: Any) -> str:
    head = [
        "preset",
        "rate",
        "steps",
        "CPU s",
        "map 1",
        "map 4",
        "W2 1",
        "W2 4",
        "excess",
        "semigroup",
        "transport",
    ]
    rows = [_error_row(run, teacher) for run in runs]
    for name, own in teacher.items():
        title = "*floor*" if name == "floor" else f"*teacher, {name.capitalize()}*"
        errors = [_number(own["map_1"], 4), "", _number(own["w2_1"]), "", _number(share(own, teacher), 2)]
        rows.append([title, "", "", "", *errors, "", ""])
    return table(head, rows)


def _error_row(run: Result, teacher: Any) -> list[str]:
    row = [f"`{run['preset']}`", f"{run['lr']:g}", str(run["steps"]), _number(run.get("seconds_spent"), 1)]
    if run["diverged"]:
        return [*row, "diverged", *[""] * 6]
    row += [_number(run["map_1"], 4), _number(run["map_4"], 4), _number(run["w2_1"]), _number(run["w2_4"])]
    return [*row, _number(share(run, teacher), 2), _number(run["semigroup"], 4), _number(run["transport"])]


def _short(runs: Sequence[Result]) -> str:
    rows = [
        [f"`{r['preset']}`", f"{r['lr']:g}", str(r["steps"]), _number(r.get("seconds_spent"), 1)]
        + [_number(r.get(k), n) for k, n in (("map_1", 4), ("map_4", 4), ("w2_1", 3), ("w2_4", 3))]
        for r in runs
    ]
    return table(["preset", "rate", "steps", "CPU s", "map 1", "map 4", "W2 1", "W2 4"], rows)


def _costs(timed: dict[str, list[Result]]) -> str:
    names = sorted(r["preset"] for r in timed["mixture"])
    by = {p: {r["preset"]: r["step"] for r in runs} for p, runs in timed.items()}
    rows = []
    for name in sorted(names, key=lambda n: by["mixture"][n]["evaluations"]):
        row = [f"`{name}`", _number(by["mixture"][name]["evaluations"], 1)]
        for steps in by.values():
            row += [_number(1e3 * steps[name]["seconds"], 1), _number(steps[name]["bytes"] / 2**20, 1)]
        rows.append(row)
    return table(["preset", "evaluations", *(f"{p}, {what}" for p in by for what in ("ms", "MiB"))], rows)


def _setting(setting: dict[str, Any]) -> str:
    rates = "; ".join(f"{p} {' and '.join(f'{lr:g}' for lr in both)}" for p, both in setting["rates"].items())
    return (
        f"Budgets: {setting['seconds']:g} CPU seconds of one thread, or {setting['evaluations']:g} network evaluations "
        f"a row; batch {setting['batch']}, AdamW with cosine decay; learning rates: {rates}.\n"
    )


def _verdict(timed: dict[str, list[Result]], teachers: dict[str, Any]) -> str:
    lines = []
    for problem, runs in timed.items():
        shares = {r["preset"]: math.inf if r["diverged"] else share(r, teachers[problem]) for r in runs}
        over = ", ".join(f"`{name}` ({value:.2f})" for name, value in shares.items() if value > 0.2)
        within = sum(value <= 0.2 for value in shares.values())
        floor = teachers[problem]["floor"]
        spread = share({"w2_1": floor["w2_1"] + floor["spread"]}, teachers[problem])
        noise = f" (with other noise the floor varies by {spread:.3f})"
        lines.append(f"- {problem}: {within} of {len(runs)}{noise}" + (f"; not {over}" if over else "") + ".\n")
    best = min(timed["mixture"], key=_one_step)
    return "".join(lines) + f"\nBest one-step map error on the mixture: {best['map_1']:.4f} (`{best['preset']}`).\n"


def _experiments(runs: Sequence[Result], timed: dict[str, list[Result]]) -> str:
    head = ["preset", "problem", "change", "rate", "budget", "map 1", "map 4", "W2 1"]
    text = ""
    for question in dict.fromkeys(r["asks"] for r in runs):
        asked = [r for r in runs if r["asks"] == question]
        about = {(r["problem"], r["preset"]) for r in asked}
        plain = [r for problem, rs in timed.items() for r in rs if (problem, r["preset"]) in about]
        text += f"\n**{question}**\n\n" + table(head, [_experiment_row(r) for r in (*plain, *asked)])
    return text + "\n"


def _experiment_row(run: Result) -> list[str]:
    changes = [f"`{change}`" for change in run["changes"]]
    budget = f"{run['seconds']:g} s" if run["seconds"] is not None else f"{run['evaluations']:g} evaluations"
    row = [f"`{run['preset']}`", run["problem"], ", ".join(changes) or "none", f"{run['lr']:g}", budget]
    if run["diverged"]:
        return [*row, "diverged", "", ""]
    return [*row, _number(run["map_1"], 4), _number(run["map_4"], 4), _number(run["w2_1"])]


# --- pictures


def _save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / name, dpi=80, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _dots(timed: dict[str, list[Result]], counted: dict[str, list[Result]], teachers: dict[str, Any]) -> None:
    """One-step map error of every preset, by either budget, beside the teacher's Euler steps."""
    figure, axes = plt.subplots(1, len(timed), figsize=(15, 8))
    for axis, (problem, found) in zip(axes, timed.items(), strict=True):
        names = [r["preset"] for r in found if not r["diverged"]][::-1]
        for runs, key, mark, label in (
            (found, "map_1", {"marker": "o"}, "equal CPU time"),
            (counted[problem], "map_1", {"marker": "o", "facecolors": "none"}, "equal evaluations"),
            (found, "map_4", {"marker": "d", "s": 12}, "4 steps, equal CPU time"),
        ):
            seen = [r for r in runs if not r["diverged"] and r["preset"] in names and r[key] is not None]
            x, y = [r[key] for r in seen], [names.index(r["preset"]) for r in seen]
            axis.scatter(x, y, edgecolors="C1" if "facecolors" in mark else "C0", label=label, **mark)
        for name, own in teachers[problem].items():
            if name.startswith("euler"):
                axis.axvline(own["map_1"], color="0.7", lw=1)
                axis.text(own["map_1"], len(names) - 0.3, name, ha="center", size=8)
        axis.set_yticks(range(len(names)), names, size=8)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"{problem}: map error from 0 to 1 (rms a feature)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    _save(figure, "map-error.png")


def _boards(files: dict[str, Path]) -> None:
    columns, height = 9, -(-len(files) // 9)
    figure, axes = plt.subplots(height, columns, figsize=(columns * 1.5, height * 1.65))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, file) in zip(axes.flat, files.items(), strict=False):
        x = np.load(file).astype(np.float32)
        axis.scatter(*x.T, s=0.6, lw=0, color="C1" if name == "teacher" else "C0")
        axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
        axis.set_title(name, size=7, pad=1)
    _save(figure, "checkerboard.png")


def _images(files: dict[str, Path]) -> None:
    columns, shown, height = 4, 10, -(-len(files) // 4)
    figure, axes = plt.subplots(height, columns, figsize=(columns * 3.2, height * 0.5))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, file) in zip(axes.flat, files.items(), strict=False):
        x = np.load(file)[:shown, 0].astype(np.float32)
        axis.imshow(np.concatenate(list(x), 1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name, size=7, pad=1)
    _save(figure, "digits.png")
