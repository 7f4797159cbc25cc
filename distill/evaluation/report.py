"""report.html: one file that opens offline. It is made from what lies in the run folders, nothing is computed anew."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from distill.evaluation.pictures import lines
from teachers.errors import InputError

PAIRS = "samples/teacher-student.png"
"""Where a run keeps the picture of teacher and student on the same noise."""

_SHORT = {
    "precision": "prec",
    "label_accuracy": "label",
    "endpoint_rmse": "rmse",
    "class_agreement": "class",
    "exact_rmse": "exact",
}
LEGEND = (
    "fd: Frechet distance to the data; prec, recall: samples among the data, data among samples; "
    "sw2: sliced Wasserstein distance; label: the classifier sees the class asked for; rmse, class: difference from, "
    "and same class as, the reference teacher from the same noise; exact: difference from the exact flow map; ms: "
    "wall-clock a sample; ratio (of fd), excess (of fd above the floor), faster: against the reference teacher"
)
WIDE = ("kid", "fd, 95 %", "excess, 95 %")
"""Columns for which a terminal has no room."""
_WIDE_LEGEND = (
    "; kid: kernel distance to the data; 95 %: what drawing samples and data again gives, where samples of teacher and "
    "student from the same noise are drawn together"
)
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#f5f5f5;padding:1rem;overflow:auto}
.verdict{font-size:1.15rem;border-left:4px solid #2a6f97;padding-left:1rem}.note{color:#666}"""


@dataclass(frozen=True)
class Run:
    """What a finished run folder says of itself. `training` are the lines of metrics.jsonl."""

    folder: Path
    evaluation: Mapping[str, Any]
    provenance: Mapping[str, Any]
    training: Sequence[Mapping[str, Any]]
    recipe: str
    label: str = ""  # among several runs: the folder's name, or its path where names are the same

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """What lies in a run folder. Raises InputError that names a damaged file."""
    try:
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        if (
            not evaluation["student"]
            or not {"protocol", "teacher", "teacher_steps", "floor", "gap", "speedup"} <= evaluation.keys()
        ):
            raise ValueError("keys are missing from evaluation.json")
        if not isinstance(provenance, dict):
            raise ValueError("provenance.json is no mapping")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{folder}: evaluation.json or provenance.json cannot be read ({error}); measure again with "
                         f"`distill evaluate {folder}`") from None  # fmt: skip
    try:
        recipe = (folder / "recipe.resolved.yaml").read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: recipe.resolved.yaml cannot be read ({error}); copy the folder again") from None
    return Run(folder, evaluation, provenance, list(_lines(folder / "metrics.jsonl")), recipe)


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        if isinstance(found, dict) and "step" in found:
            yield found


def report(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of several side by side; runs of different protocols get tables of their own."""
    if len(runs) > 1:
        names = [run.name for run in runs]
        runs = [replace(run, label=run.name if names.count(run.name) == 1 else str(run.folder)) for run in runs]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.evaluation["protocol"], sort_keys=True), []).append(run)
    body = [f"<h1>{escape(title)}</h1>"]
    body += [f'<p class="verdict">{escape(_label(run) + verdict(run.evaluation))}</p>' for run in runs]
    for run in runs:
        body += _pairs(run)
    for group in groups.values():
        body += _quality(group)
    if len(groups) > 1:
        body.append(
            '<p class="note">The runs were measured with different protocols: they are not put in one table.</p>'
        )
    body += _training(runs)
    for run in runs:
        body += _reproduce(run)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def verdict(evaluation: Mapping[str, Any]) -> str:
    """One sentence with the numbers that matter."""
    steps, entry = next(iter(evaluation["student"].items()))
    fd, floor = entry["metrics"]["fd"], evaluation["floor"]["fd"]
    calls = "one network call" if steps == "1" else f"{steps} network calls"
    teacher = evaluation["teacher"]
    few = evaluation["floor"].get("few", False)  # older ones do not say
    rough = _foreign(evaluation["floor"])
    rough += " The floor, and what is above it, are rough: there are fewer samples than features." if few else ""
    if teacher is None:
        last, best = list(evaluation["student"].items())[-1]
        return (
            f"In {last} step{'' if last == '1' else 's'} the model reaches a Frechet distance of "
            f"{best['metrics']['fd']:.3g} to the data, in {calls} {fd:.3g}; real data against real data gives "
            f"{floor:.3g} at this size.{rough}"
        )
    ratio, faster = evaluation["gap"][steps]["fd"], evaluation["speedup"][steps]
    text = f"In {calls} the student reaches a Frechet distance of {fd:.3g}"
    whose = "teacher's" if teacher["solver"] == "own" else f"{teacher['steps']}-step teacher's"
    text += f", {_number(ratio, '.2f')} times the {whose} {teacher['metrics']['fd']:.3g}"
    own = evaluation["teacher_steps"].get(steps)
    text += f" (the teacher itself in {calls}: {own['metrics']['fd']:.3g}" if own else " ("
    text += f"{'; ' if own else ''}real data against real data at this size: {floor:.3g})"
    same = entry["paired"].get("class_agreement")
    text += f"; from the same noise both draw the same class in {same:.1%} of samples" if same is not None else ""
    much = faster is not None and faster >= 1.5
    text += f"; a sample takes {faster:.0f} times less time." if much else "; a sample is not made faster."
    return text + rough


def _foreign(floor: Mapping[str, Any]) -> str:
    """What to think of features that hardly know the real images: they were learned on others."""
    seen, claimed = floor.get("label_accuracy"), floor.get("classifier_accuracy")
    if seen is None or claimed is None or seen > claimed - 0.2:
        return ""
    return (
        f" The features are of other images: their classifier, right on {claimed:.0%} of its own, is right on "
        f"{seen:.0%} of the real ones here; set evaluation.features to null."
    )


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _figure(value: float) -> str:
    """Of three digits, without an exponent below a million: it would not fit into a table of a hundred columns."""
    return f"{float(f'{value:.3g}'):g}"


def _label(run: Run) -> str:
    return f"{run.label}: " if run.label else ""


def _image(content: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _pairs(run: Run) -> list[str]:
    file = run.folder / PAIRS
    if not file.is_file():
        return []
    text = "Each column starts from the same noise."
    return [f"<h2>{escape(_label(run))}Same noise</h2>", f"<p>{text}</p>", _image(file.read_bytes(), text)]


def _quality(runs: Sequence[Run]) -> list[str]:
    protocol, floor = runs[0].evaluation["protocol"], runs[0].evaluation["floor"]
    series, levels = {}, {}
    for run in runs:
        prefix = _label(run)
        found = run.evaluation
        series[f"{prefix}student"] = _curve(found["student"])
        if found["teacher"] is not None:
            series[f"{prefix}teacher"] = _curve(found["teacher_steps"])
            levels[f"{prefix}teacher, {found['teacher']['steps']} steps"] = found["teacher"]["metrics"]["fd"]
    levels["floor: real against real"] = floor["fd"]
    labels = {"x_label": "network calls a sample", "y_label": "Frechet distance"}
    chart = lines(series, levels=levels, log_x=True, log_y=True, **labels)
    note = (
        f"{protocol['samples']:,} samples, seed {protocol['seed']}, {protocol['weights']} weights, features: "
        f"{protocol['features']}, data {protocol['reference']}. Disjoint halves of the real data are "
        f"{floor['fd_halves']:.3g} apart; scaled to the sizes in use that is the floor, {floor['fd']:.3g}: what "
        "perfect samples would score. "
    )
    note += _beside_training_data(runs)
    legend = escape(LEGEND + _WIDE_LEGEND)
    return ["<h2>Quality against number of steps</h2>", _image(chart, "Frechet distance against network calls"),
            _table(runs), f'<p class="note">{legend}.</p><p class="note">{escape(note)}</p>']  # fmt: skip


def _beside_training_data(runs: Sequence[Run]) -> str:
    """What the data that were trained on score, or that they are those compared with: of which run."""
    told: dict[str, list[str]] = {}
    for run in runs:
        own = run.evaluation["floor"].get("trained_on")
        text = "A model can be below it, where it was trained on this very data."
        told.setdefault(f"Training data as samples score {own['fd']:.3g}." if own else text, []).append(run.label)
    return " ".join(f"{', '.join(labels)}: {text}" if len(told) > 1 else text for text, labels in told.items())


def _curve(entries: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    return [float(steps) for steps in entries], [entry["metrics"]["fd"] for entry in entries.values()]


def rows(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of one evaluation as text; `LEGEND` says what its columns are."""
    found = []
    best = evaluation["teacher"]
    entries = [("teacher", str(best["steps"]), best)] if best else []
    entries += [("teacher", steps, entry) for steps, entry in evaluation["teacher_steps"].items()]
    entries += [("student" if best else "model", steps, entry) for steps, entry in evaluation["student"].items()]
    for model, steps, entry in entries:
        row = {"model": model, "steps": steps}
        row |= {_SHORT.get(k, k): _figure(v) for k, v in {**entry["metrics"], **entry["paired"]}.items()}
        if "interval" in entry:
            row["fd, 95 %"] = _range(entry["interval"]["fd"], ".3g")
        row["ms"] = f"{1000 * entry['seconds_per_sample']:.3g}"
        if model == "student" and steps in evaluation["gap"]:
            gap = evaluation["gap"][steps]
            row["ratio"] = _number(gap["fd"], ".2f")
            if "excess" in gap:
                row["excess"] = _number(gap["excess"], ".2f")
            if "interval" in gap:
                row["excess, 95 %"] = _range(gap["interval"]["excess"], ".2f")
            row["faster"] = _number(evaluation["speedup"][steps], ".0f") + "x"
        found.append(row)
    return found


def _range(bounds: Sequence[float], form: str) -> str:
    return " to ".join(format(bound, form) for bound in bounds)


def columns(table: Sequence[Mapping[str, str]]) -> list[str]:
    """The names that occur in any row, in the order in which they first do."""
    return list(dict.fromkeys(name for row in table for name in row))


def _table(runs: Sequence[Run]) -> str:
    table = [({"run": run.label} if run.label else {}) | row for run in runs for row in rows(run.evaluation)]
    names = columns(table)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(row.get(n, ''))}</td>" for n in names) + "</tr>\n" for row in table)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _training(runs: Sequence[Run]) -> list[str]:
    found = ["<h2>Training</h2>"]
    for key, label in (("loss", "loss"), ("grad_norm", "gradient norm before clipping")):
        series = {}
        for run in runs:
            points = [(row["step"], row[key]) for row in run.training if row.get(key)]
            if points:
                series[run.label or run.name] = (
                    [float(step) for step, _ in points],
                    [float(value) for _, value in points],
                )
        if series:
            found.append(_image(lines(series, x_label="step", y_label=label, log_y=True), label))
    return found if len(found) > 1 else []


def _reproduce(run: Run) -> list[str]:
    said = run.provenance
    command = "distill run recipe.resolved.yaml"
    facts = [f"{name} {version}" for name, version in said.get("versions", {}).items()]
    digests = [f"{name} {value}" for name, value in said.get("digests", {}).items()]
    return [
        f"<h2>{escape(_label(run))}Reproduce</h2>",
        f"<p>The run was started with <code>{escape(str(said.get('command', '')))}</code> in "
        f"{escape(', '.join(facts))}. Digests: {escape('; '.join(digests))}. Save the recipe below as "
        f"recipe.resolved.yaml (it lies in the run folder) and run:</p>",
        f"<pre>{escape(command)}</pre>",
        f"<details><summary>recipe.resolved.yaml</summary><pre>{escape(run.recipe)}</pre></details>",
    ]
