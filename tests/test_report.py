"""report.html: one file that opens offline and says what evaluation.json says."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.evaluation import report as module
from distill.evaluation.report import columns, read_run, report, rows, verdict
from teachers.errors import InputError


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text by tag, tables as rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
            if self._open[-1] in ("td", "th"):
                self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(part for tag, parts in self.texts.items() if tag != "style" for part in parts)

    @property
    def pictures(self) -> list[str]:
        return [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]


def page(*folders: Path) -> Page:
    return Page(report([read_run(folder) for folder in folders]))


def copy(folder: Path, to: Path, change: Callable[[dict[str, Any]], Any] = lambda found: None) -> Path:
    """A run folder elsewhere, with a changed evaluation.json."""
    shutil.copytree(folder, to)
    found = json.loads((to / "evaluation.json").read_text())
    change(found)
    (to / "evaluation.json").write_text(json.dumps(found))
    return to


def test_it_needs_nothing_from_outside(digits_run: Path, toy_run: Path, velocity_run: Path) -> None:
    for folder in (digits_run, toy_run, velocity_run):
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert text == report([read_run(folder)])
        found = Page(text)
        names = {tag for tag, _ in found.tags}
        assert {"html", "style", "table", "img", "details"} <= names
        assert not names & {"script", "link", "iframe", "object", "embed", "base", "video", "audio"}
        for tag, attributes in found.tags:
            for name in ("src", "href", "srcset", "action", "data", "background", "poster"):
                if name in attributes:
                    assert tag == "img" and (attributes[name] or "").startswith("data:image/png;base64,")
            assert not any(name.startswith("on") for name in attributes)
        style = "".join(found.texts["style"])
        assert "url(" not in style and "@import" not in style
        assert (digits_run / "report.html").stat().st_size < 3_000_000


def test_pictures_are_pictures(digits_run: Path, velocity_run: Path) -> None:
    pictures = page(digits_run).pictures
    assert len(pictures) == 4  # pairs, quality, loss, gradient norm
    assert len(page(velocity_run).pictures) == 4
    for source in pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 50
    kept = (digits_run / "samples" / "teacher-student.png").read_bytes()
    assert base64.b64encode(kept).decode() in pictures[0]


def test_verdict_has_the_very_numbers(digits_run: Path, toy_run: Path) -> None:
    for folder in (digits_run, toy_run):
        found = json.loads((folder / "evaluation.json").read_text())
        said = verdict(found)
        assert said in page(folder).text
        first = found["student"]["1"]
        for number in (
            f"{first['metrics']['fd']:.3g}",
            f"{found['gap']['1']['fd']:.2f} times",
            f"4-step teacher's {found['teacher']['metrics']['fd']:.3g}",
            f"{found['teacher_steps']['1']['metrics']['fd']:.3g}",
            f"{found['floor']['fd']:.3g}",
        ):
            assert number in said
    found["student"]["1"]["metrics"]["fd"] = 123.456
    found["gap"]["1"]["fd"] = 7.891
    found["speedup"]["1"] = 95.4
    found["floor"]["fd"] = 0.6543
    said = verdict(found)
    assert all(number in said for number in ("of 123,", "7.89 times", "95 times", "0.654"))


def test_verdict_of_a_ratio_that_does_not_exist(toy_run: Path) -> None:
    found = json.loads((toy_run / "evaluation.json").read_text())
    found["gap"]["1"]["fd"] = found["speedup"]["1"] = None
    assert "?" in verdict(found)
    assert rows(found)


def test_figures_of_the_table_are_short(toy_run: Path) -> None:
    found = json.loads((toy_run / "evaluation.json").read_text())
    for fd, said in ((1034.5, "1030"), (0.012345, "0.0123"), (12.0, "12"), (0.0, "0"), (float("nan"), "nan")):
        found["student"]["1"]["metrics"]["fd"] = fd
        assert said in [row["fd"] for row in rows(found) if row["model"] == "student"]


def test_verdict_of_a_teacher_in_training(velocity_run: Path) -> None:
    found = json.loads((velocity_run / "evaluation.json").read_text())
    said = verdict(found)
    assert said in page(velocity_run).text
    for steps in ("1", "4"):
        assert f"{found['student'][steps]['metrics']['fd']:.3g}" in said
    assert f"{found['floor']['fd']:.3g}" in said


def test_the_table_has_every_entry(digits_run: Path) -> None:
    found = json.loads((digits_run / "evaluation.json").read_text())
    (table,) = page(digits_run).tables
    head, *body = table
    assert head == columns(rows(found))
    got = [dict(zip(head, row, strict=True)) for row in body]
    assert [(row["model"], row["steps"]) for row in got] == [
        ("teacher", "4"),
        ("teacher", "1"),
        ("teacher", "2"),
        ("student", "1"),
        ("student", "2"),
    ]
    entries = [found["teacher"], *found["teacher_steps"].values(), *found["student"].values()]
    for row, entry in zip(got, entries, strict=True):
        assert float(row["fd"]) == float(f"{entry['metrics']['fd']:.3g}")
        assert row["fd, 95 %"] == "{:.3g} to {:.3g}".format(*entry["interval"]["fd"])
        assert float(row["kid"]) == float(f"{entry['metrics']['kid']:.3g}")
        assert row["prec"] == f"{entry['metrics']['precision']:.3g}"
        assert row["recall"] == f"{entry['metrics']['recall']:.3g}"
        assert float(row["sw2"]) == float(f"{entry['metrics']['sw2']:.3g}")
        assert row["label"] == f"{entry['metrics']['label_accuracy']:.3g}"
        assert row["ms"] == f"{1000 * entry['seconds_per_sample']:.3g}"
    for row, entry in zip(got[3:], entries[3:], strict=True):
        assert row["rmse"] == f"{entry['paired']['endpoint_rmse']:.3g}"
        assert row["class"] == f"{entry['paired']['class_agreement']:.3g}"
        gap = found["gap"][row["steps"]]
        assert row["ratio"] == f"{gap['fd']:.2f}"
        assert row["excess"] == ("?" if gap["excess"] is None else f"{gap['excess']:.2f}")
        if "interval" in gap:
            assert row["excess, 95 %"] == "{:.2f} to {:.2f}".format(*gap["interval"]["excess"])
        assert row["faster"] == f"{found['speedup'][row['steps']]:.0f}x"
    assert got[0]["rmse"] == got[0]["ratio"] == ""  # nothing to compare the reference with


def test_it_says_how_to_run_the_job_again(digits_run: Path) -> None:
    found = page(digits_run)
    assert "distill run recipe.resolved.yaml" in found.text
    assert (digits_run / "recipe.resolved.yaml").read_text().strip() in found.text
    said = json.loads((digits_run / "provenance.json").read_text())
    assert f"torch {said['versions']['torch']}" in found.text
    assert all(digest in found.text for digest in said["digests"].values())
    assert said["command"] in found.text


def test_several_runs_share_a_table_when_measured_alike(toy_run: Path, tmp_path: Path) -> None:
    def better(found: dict[str, Any]) -> None:
        found["student"]["1"]["metrics"]["fd"] = 0.0625

    other = copy(toy_run, tmp_path / "other", better)
    found = page(toy_run, other)
    (table,) = found.tables
    head, *body = table
    assert head[0] == "run"
    assert [row[0] for row in body] == ["toy-lagrangian"] * 5 + ["other"] * 5
    assert "0.0625" in [row[head.index("fd")] for row in body if row[0] == "other"]
    assert "different protocols" not in found.text
    assert "other: In one network call" in found.text and "toy-lagrangian: In one network call" in found.text


def test_what_is_said_of_training_data_is_said_of_its_run(toy_run: Path, tmp_path: Path) -> None:
    def beside(found: dict[str, Any]) -> None:
        found["floor"]["trained_on"] = {"fd": 7.25}

    other = copy(toy_run, tmp_path / "other", beside)
    score, below = "Training data as samples score 7.25.", "A model can be below it"
    for runs in ((toy_run, other), (other, toy_run)):
        said = page(*runs).text
        assert f"other: {score}" in said and f"toy-lagrangian: {below}" in said
    assert score in page(other).text and below not in page(other).text and ": A model" not in page(toy_run).text


def test_features_of_other_images_are_told(digits_run: Path) -> None:
    found = json.loads((digits_run / "evaluation.json").read_text())
    assert found["floor"]["classifier_accuracy"] > 0.9 and "other images" not in verdict(found)
    found["floor"]["label_accuracy"] = 0.18
    assert "is right on 18% of the real ones here; set evaluation.features to null" in verdict(found)


DAMAGES = {
    "provenance.json": b"[1]",
    "evaluation.json": b'{"student": {"1": {}}, "protocol": {}, "teacher": 1, "teacher_steps": {}, "floor": 1, '
    b'"gap": 1}',
    "recipe.resolved.yaml": b"\xff",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_of_a_run_are_named(name: str, toy_run: Path, tmp_path: Path) -> None:
    (copy(toy_run, tmp_path / "other") / name).write_bytes(DAMAGES[name])
    with pytest.raises(InputError, match=name):
        read_run(tmp_path / "other")


def test_lines_that_are_no_steps_are_passed_over(toy_run: Path, tmp_path: Path) -> None:
    other = copy(toy_run, tmp_path / "other")
    log = other / "metrics.jsonl"
    log.write_text(log.read_text() + '5\n{"loss": 3}\n')
    assert read_run(other).training == read_run(toy_run).training


@pytest.mark.parametrize("key", ["samples", "weights", "reference"])
def test_different_protocols_never_share_a_table(key: str, toy_run: Path, tmp_path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        value = found["protocol"][key]
        found["protocol"][key] = value + 1 if isinstance(value, int) else f"{value}!"
        found["student"]["1"]["metrics"]["fd"] = 77.5

    found = page(toy_run, copy(toy_run, tmp_path / "other", change), copy(toy_run, tmp_path / "third"))
    assert [len(table) for table in found.tables] == [11, 6]
    assert [any("77.5" in row for row in table) for table in found.tables] == [False, True]
    assert "different protocols" in found.text


def test_every_table_says_whose_it_is(toy_run: Path, digits_run: Path) -> None:
    first, second = page(toy_run, digits_run).tables
    assert {row[0] for row in first[1:]} == {toy_run.name}
    assert {row[0] for row in second[1:]} == {digits_run.name}


def test_runs_of_one_name_are_told_apart(toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = module.lines

    def watched(series: Any, **kwargs: Any) -> bytes:
        drawn.append(len(series))
        return original(series, **kwargs)

    monkeypatch.setattr(module, "lines", watched)
    page(copy(toy_run, tmp_path / "a" / "run"), copy(toy_run, tmp_path / "b" / "run"))
    assert drawn == [4, 2, 2]  # students and teachers; losses; gradient norms


NASTY = ["<b>&\"x'", "$x_$ 100%", "_hidden", "ünïcode {0}"]


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text(name: str, toy_run: Path, tmp_path: Path) -> None:
    folder = copy(toy_run, tmp_path / name)
    found = page(folder)
    assert name in found.texts["h1"] and name in found.texts["title"]
    assert "b" not in {tag for tag, _ in found.tags}
    both = page(folder, toy_run)
    assert name in [row[0] for row in both.tables[0]]
    assert any(name in text for text in both.texts["h2"])
    assert "b" not in {tag for tag, _ in both.tags}


def test_everything_else_is_text_too(toy_run: Path, tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script>"

    def change(found: dict[str, Any]) -> None:
        found["protocol"]["features"] = attack

    folder = copy(toy_run, tmp_path / "run", change)
    said = json.loads((folder / "provenance.json").read_text())
    said |= {"command": attack, "versions": {attack: attack}, "digests": {attack: attack}}
    (folder / "provenance.json").write_text(json.dumps(said))
    recipe = folder / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text() + f"# {attack}\n")
    found = page(folder)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(attack) == 7


def test_the_folder_it_is_called_from_has_a_name(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy)
    assert "toy-lagrangian" in page(Path()).texts["h1"]


def test_training_curves_are_left_out_where_there_are_none(toy: Path) -> None:
    (toy / "metrics.jsonl").unlink()
    found = page(toy)
    assert len(found.pictures) == 2 and "Training" not in found.text
    shutil.rmtree(toy / "samples")
    assert len(page(toy).pictures) == 1
