"""Jobs over shards: workers, mirrors, skipped samples and mixtures from a recipe to an export."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FAST, ROOT, environment, problems, trained
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from distill.data.manifest import read_manifest
from distill.data.shards import Shards
from distill.evaluation.features import load_features
from distill.evaluation.metrics import frechet_distance
from distill.job import resume, run
from distill.parts import Job
from distill.recipe import load
from distill.run_folder import RunError, locked
from teachers.checkpoints import sha256
from teachers.families import WEIGHTS

JOB = (*FAST, "student.init=random", "student.network={name: mlp, width: 16, depth: 1}")


def job(built: Path, *overrides: str) -> Path:
    return run("quickstart", [*JOB, f"data.path={built}", *overrides])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_workers_change_nothing(built: Path, cwd: Path) -> None:
    assert trained(job(built)) == trained(job(built, "data.workers=2"))
    with pytest.raises(ValueError, match=r"32 readers .* but 16 streams"):
        job(built, "data.workers=32", "trainer.batch=64")


def test_a_run_goes_on_with_other_workers(built: Path, cwd: Path) -> None:
    whole = job(built)
    folder = job(built, "data.workers=2")
    for step in (8, 12):
        for file in (folder / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
        (folder / "checkpoints" / f"step-{step:08d}").rmdir()
    assert not (folder / "checkpoints" / "step-00000012").exists()
    resolved = folder / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("workers: 2", "workers: 1"))
    resume(folder)
    assert trained(folder) == trained(whole)


def test_skipped_samples_are_named_and_counted(folder: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = folder / "digits-000001.tar"
    content = bytearray(tar.read_bytes())
    content[1540] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match="sample 000000100, offset 1536"):
        job(folder)
    assert not Path("runs").exists()
    made = job(folder, "data.skip=3", "trainer.batch=400", "trainer.steps=6")
    said = capsys.readouterr().out
    assert re.search(r"skipped: .*digits-000001.tar, sample 000000100, offset 1536", said)
    assert rows(made)[-1]["skipped"] == 1


def idx_files(folder: Path) -> str:
    """Noise of ten classes as idx files, 60 to train on and 40 to be held out."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 40)):
        images = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        head = b"\0\0\x08\x03" + struct.pack(">3I", *images.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = bytes(n % 10 for n in range(count))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", count) + labels)
    return str(folder)


def test_samples_are_compared_with_held_out_data(cwd: Path) -> None:
    """Both splits are built where they are missing."""
    source = idx_files(cwd / "files")
    split = ("data={name: shards, path: train, source: files}",
             "evaluation.data={name: shards, path: test, source: files, split: test}")  # fmt: skip
    assert problems("teachers/digits", *JOB, *split) == []
    folder = run("teachers/digits", [*JOB, *split, "evaluation.features=digits"])
    found = json.loads((folder / "evaluation.json").read_text())
    digests = {name: read_manifest(Path(name)).digest for name in ("train", "test")}
    assert found["protocol"]["reference"] == digests["test"] != digests["train"]
    assert json.loads((folder / "provenance.json").read_text())["digests"]["data"] == digests["train"]
    features = load_features("digits")
    train, test = (features(Shards(path=name).open(None).everything()[0])[0] for name in ("train", "test"))
    assert found["floor"]["trained_on"]["fd"] == pytest.approx(frechet_distance(train, test))
    assert 0 < found["floor"]["label_accuracy"] < 1
    resume(folder)
    shutil.rmtree(source)
    assert problems("teachers/digits", *JOB, *split) == []  # built already
    assert run("teachers/digits", [*JOB, *split, "evaluation.features=digits"]).exists()
    shutil.rmtree("test")
    said, features = problems("teachers/digits", *JOB, *split, "evaluation.features=nowhere")
    assert "evaluation.features: nowhere: no such folder" in features  # every problem at once
    assert "evaluation.data.source: files: is not there, and neither are shards in test" in said
    shutil.rmtree("train")
    assert any("data.source: files: is not there, and neither are shards in train" in said for said in
               problems("teachers/digits", *JOB, *split))  # fmt: skip


def test_held_out_data_must_be_of_the_same_kind(built: Path, photos: Path, cwd: Path) -> None:
    other = f"evaluation.data={{name: shards, path: {photos}}}"
    with pytest.raises(ValueError, match=r"evaluation.data: .*16.*the job makes .*8.*set it to data of that shape"):
        job(built, other)
    for source in ("null", str(photos.parent / "images")):  # built already, and not yet
        path = photos if source == "null" else "images"
        with pytest.raises(
            ValueError, match=r"evaluation.features: sees images of 1 channels in 10 classes, here .*16"
        ):
            run("teachers/digits", [*JOB, f"data={{name: shards, path: {path}, source: {source}}}",
                                    "evaluation.features=digits"])  # fmt: skip
    assert not Path("runs").exists()
    assert "evaluation.data: must have the name shards" in str(
        problems("quickstart", f"data.path={built}", "evaluation.data={name: teacher_law}")
    )


def test_runs_share_the_teachers_samples(built: Path, cwd: Path) -> None:
    first, again = (job(built, "evaluation.cache=kept", f"seed={n}") for n in range(2))
    [file] = Path("kept").iterdir()
    one, two = (json.loads((made / "evaluation.json").read_text())["teacher"] for made in (first, again))
    assert {**one, "seconds_per_sample": 0} == {**two, "seconds_per_sample": 0}

    def kept(*overrides: str) -> Path | None:
        recipe = load("quickstart", [*JOB, f"data.path={built}", "evaluation.cache=kept", *overrides])
        assert recipe.teacher is not None
        return Job(Path(), recipe, recipe.teacher.load(), Console()).kept_samples()

    same = ("seed=3", "objective.name=eulerian", "evaluation.steps=[1]", "trainer.steps=3", "evaluation.features=null")
    assert {kept(override) for override in same} == {file}
    others = ("evaluation.seed=1", "evaluation.reference_steps=3", "evaluation.samples=90", "evaluation.batch=9",
              "student.path=cosine")  # fmt: skip
    assert len({kept(), *(kept(override) for override in others)}) == 6
    weak = "guidance={scale: 2, weak: {name: native, path: digits}}"
    told, within = (kept(weak, f"guidance.{key}") for key in ("scales=[1, 3]", "interval=[0, 0.5]"))
    assert told == kept(weak) and len({file, told, within}) == 3
    assert kept("evaluation.cache=null") is None


def test_other_weights_of_a_weak_teacher_are_another_teacher(built: Path, cwd: Path) -> None:
    weak = Path(shutil.copytree(WEIGHTS / "digits", "weak"))
    guidance = "guidance={scale: 2, weak: {name: native, path: weak}}"

    def found() -> tuple[Path | None, str]:
        recipe = load("quickstart", [*JOB, f"data.path={built}", "evaluation.cache=kept", guidance])
        assert recipe.teacher is not None
        one = Job(Path(), recipe, recipe.teacher.load(), Console())
        return one.kept_samples(), one.identity["teacher"]

    first, file = found(), weak / "model.safetensors"
    assert found() == first
    save_file({name: value * 0.9 for name, value in load_file(file).items()}, file)
    config = json.loads((weak / "config.json").read_text())
    config["weights"] |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (weak / "config.json").write_text(json.dumps(config))
    other = found()
    assert other[0] != first[0] and other[1] != first[1]


def test_held_out_classes_have_the_names_of_those_trained_on(cwd: Path) -> None:
    for folder, names in (("train", "ab"), ("test", "ab"), ("other", "ba c")):
        for n, name in enumerate(names.split() if " " in names else names):
            (cwd / folder / name).mkdir(parents=True)
            for k in range(4):
                image = np.full((8, 8), 20 * n + k, np.uint8)
                Image.fromarray(image).save(cwd / folder / name / f"{k}.png")
    data = "data={name: shards, path: one, source: train}"
    held_out = "evaluation.data={{name: shards, path: {0}-shards, source: {0}}}"

    def one(name: str) -> Job:
        recipe = load("teachers/digits", [*JOB, data, held_out.format(name)])
        return Job(Path(), recipe, None, Console())

    assert one("test").held_out is not None
    with pytest.raises(RunError, match=r"evaluation.data: class 0 is ba, in the data trained on a: build"):
        _ = one("other").held_out


def test_waiting_for_data_is_logged(built: Path, cwd: Path) -> None:
    assert all(0 < row["waiting_for_data"] < 1 for row in rows(job(built)))


@contextmanager
def started(cwd: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A long run of its own process group, after its first line of metrics. Killed if it is left early."""
    long = ("trainer.steps=100000", "trainer.checkpoint_every=100000")
    command = [sys.executable, "-m", "distill", "run", "quickstart", *JOB, *long, *overrides]
    with subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        try:
            lines = cwd / "runs" / "quickstart" / "metrics.jsonl"
            while not lines.exists() or not lines.stat().st_size:
                time.sleep(0.1)
                assert process.poll() is None
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_killed_in_training_ends_the_run_with_its_sample(built: Path, cwd: Path) -> None:
    with started(cwd, f"data.path={built}", "data.workers=1") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        worker = next(int(c) for c in children if b"quickstart" in Path(f"/proc/{c}/cmdline").read_bytes())
        os.kill(worker, signal.SIGKILL)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert re.search(r"data died \(killed by SIGKILL\); the last sample it read: .*digits-\d{6}.tar, sample", said)
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_stops_a_run_with_workers(kind: signal.Signals, built: Path, cwd: Path) -> None:
    """Ctrl-C, and what SLURM and systemd send: the run still needs its data up to the checkpoint."""
    with started(cwd, f"data.path={built}", "data.workers=2", "trainer.batch=1600") as process:
        os.killpg(process.pid, kind)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 128 + kind and "Traceback" not in said, said
    assert len(list((cwd / "runs" / "quickstart" / "checkpoints").iterdir())) == 1


def test_workers_do_not_outlive_a_killed_run(built: Path, cwd: Path) -> None:
    """They hold its lock."""
    with started(cwd, f"data.path={built}", "data.workers=2") as process:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGSTOP)
        process.kill()
        process.wait()
        end = time.monotonic() + 60
        while True:
            try:
                with locked(cwd / "runs" / "quickstart"):
                    break
            except RunError:
                assert time.monotonic() < end
                time.sleep(0.1)


# --- mixtures


MIXTURE = """extends: quickstart
name: two
data:
  name: mixture
  sources:
    - weight: 3
      shards: {{path: {built}}}
    - weight: 1
      shards:
        path: {built}
        strems: 4
"""


def test_a_mixture_is_a_job(built: Path, cwd: Path) -> None:
    file = cwd / "two.yaml"
    file.write_text(MIXTURE.format(built=built).replace("strems", "streams"))
    made = run(file, JOB)
    assert (made / "export" / "config.json").is_file()
    assert "streams: 16" in (made / "recipe.resolved.yaml").read_text()
    assert trained(run(file, [*JOB, "data.workers=3"])) == trained(made)


def test_what_is_wrong_with_a_source_has_its_line(built: Path, cwd: Path) -> None:
    file = cwd / "two.yaml"
    file.write_text(MIXTURE.format(built=built))
    (found,) = problems(file)
    assert f"{file}:11: data.sources.1.shards.strems: unknown key, did you mean 'streams'?" in found
    file.write_text(MIXTURE.format(built=built).replace("strems", "streams").replace("weight: 1", "weight: 0"))
    (found,) = problems(file)
    assert f"{file}:8: data.sources.1.weight: must be above 0, got 0" in found
    (found,) = problems("quickstart", "data={name: mixture, sources: 3}")
    assert "data.sources: must be a list of sections, got 3" in found


def test_the_python_of_docs_data_runs(built: Path, cwd: Path) -> None:
    (cwd / "data").mkdir()
    (cwd / "data" / "digits").symlink_to(built)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code + "    break\n", found := {})
    assert found["batch"].x_1.shape == (16, 1, 8, 8) and found["batch"].first == 16
