"""Checkpoints: whole or not there, believed only when they verify, and never another run's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import FAST, TINY, checkpoints, files, logged, trained, verified
from safetensors import SafetensorError
from safetensors.torch import load_file

from distill.cli import main
from distill.job import evaluate, export, resume, run
from distill.parts import RunError
from distill.training import checkpoint
from distill.training.checkpoint import load_weights, newest, verify
from distill.training.logger import JsonlLogger
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError

FILES = {"student.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def identity(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "manifest.json").read_text())["identity"]
    assert isinstance(found, dict)
    return found


# --- what is in one


def test_a_checkpoint_is_safetensors_and_json(toy_run: Path, digits_run: Path) -> None:
    for run_folder in (toy_run, digits_run):
        for folder in checkpoints(run_folder):
            assert {p.name for p in folder.iterdir()} == FILES
            manifest = json.loads((folder / "manifest.json").read_text())
            assert manifest["files"].keys() == FILES - {"manifest.json"}
            for name, facts in manifest["files"].items():
                assert facts == {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
            assert f"step-{manifest['step']:08d}" == folder.name
            assert verified(folder) == manifest["step"]
            assert manifest["identity"] == json.loads((run_folder / "provenance.json").read_text())["digests"]
            json.loads((folder / "state.json").read_text())
            for file in folder.glob("*.safetensors"):
                assert load_file(file)


def test_nothing_in_a_run_is_a_pickle(toy_run: Path, digits_run: Path) -> None:
    for folder in (toy_run, digits_run):
        suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
        assert suffixes == {".safetensors", ".json", ".jsonl", ".yaml", ".html", ".png", ".md"}
        for name, content in files(folder).items():
            assert not content.startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")), name


def test_the_teacher_is_not_in_it(digits_run: Path) -> None:
    folder = checkpoints(digits_run)[-1]
    student = load_file(folder / "student.safetensors")
    ema = load_file(folder / "ema.safetensors")
    assert all(name.startswith("state_dict.student.") for name in student)
    assert all(name.startswith("state_dict.ema.") for name in ema)
    count = sum(v.numel() for v in student.values())
    assert sum(v.numel() for v in ema.values()) == count + 1  # and how many there were
    assert count == sum(v.numel() for v in load_file(digits_run / "export" / "model.safetensors").values())
    teacher = load_file(Path(checkpoint.__file__).parents[2] / "teachers/weights/digits/model.safetensors")
    kept = [v for file in folder.glob("*.safetensors") for v in load_file(file).values()]
    for name, value in teacher.items():
        if value.numel() > 100:
            assert not any(v.shape == value.shape and torch.equal(v, value) for v in kept), name


def test_optimizer_state_covers_every_parameter(toy_run: Path) -> None:
    folder = checkpoints(toy_run)[-1]
    moments = load_file(folder / "optimizer.safetensors")
    assert len(moments) == 3 * len(load_file(folder / "student.safetensors"))  # two moments and a count
    steps = [v.item() for name, v in moments.items() if name.endswith(".step")]
    assert steps and set(steps) == {12.0}


def test_weights_come_under_the_students_own_names(toy_run: Path) -> None:
    folder = checkpoints(toy_run)[-1]
    raw, ema = load_weights(folder, "raw"), load_weights(folder, "ema")
    assert raw.keys() == ema.keys() == load_file(toy_run / "export" / "model.safetensors").keys()
    assert any(not torch.equal(raw[k], ema[k]) for k in raw)


def test_what_the_manifest_does_not_list_is_not_read(toy: Path, toy_run: Path) -> None:
    """Files laid beside its own: another's weights, and a copy of them."""
    folder = checkpoints(toy)[-1]
    shutil.copy(folder / "student.safetensors", folder / "student-mine.safetensors")
    shutil.copy(checkpoints(toy)[0] / "ema.safetensors", folder / "ema-old.safetensors")
    assert verified(folder) == 12
    for which in ("raw", "ema"):
        expected = load_weights(checkpoints(toy_run)[-1], which)
        assert all(torch.equal(value, expected[name]) for name, value in load_weights(folder, which).items())


# --- damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "grow": grow, "remove": Path.unlink}


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_file_named(name: str, damage: str, toy: Path) -> None:
    old, new = checkpoints(toy)
    DAMAGES[damage](new / name)
    with pytest.raises(CheckpointError, match=f"{new}/{name}"):
        verify(new)
    path, refused = newest(toy / "checkpoints", identity(old))
    assert path == old
    assert len(refused) == 1 and f"{new}/{name}" in refused[0]


MANIFESTS = {
    "missing": None,
    "empty": "",
    "cut": '{"format": 1, "step": 12, "fi',
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "no files": '{"format": 1, "step": 12, "identity": {}}',
    "an empty list of files": '{"format": 1, "step": 12, "identity": {}, "files": {}}',
    "files that are a list": '{"format": 1, "step": 12, "identity": {}, "files": [1]}',
    "facts that are none": '{"format": 1, "step": 12, "identity": {}, "files": {"state.json": 3}}',
    "no digest": '{"format": 1, "step": 12, "identity": {}, "files": {"state.json": {"bytes": 1}}}',
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_is_none_is_no_checkpoint(what: str, toy: Path) -> None:
    old, new = checkpoints(toy)
    content = MANIFESTS[what]
    file = new / "manifest.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=str(new)):
        verify(new)
    path, refused = newest(toy / "checkpoints", identity(old))
    assert path == old and str(new) in refused[0]


def test_no_byte_of_a_manifest_can_mislead(toy: Path) -> None:
    old, new = checkpoints(toy)
    expected, file = identity(old), new / "manifest.json"
    content = file.read_bytes()
    meaning = json.loads(content)
    passed_over = 0
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        path, refused = newest(toy / "checkpoints", expected)
        if path == new:  # then what counts still stands there
            found = json.loads(file.read_text())
            assert found["files"] == meaning["files"] and found["identity"] == meaning["identity"]
        else:
            assert path == old and refused
            passed_over += 1
    assert passed_over > 100


def test_an_older_one_serves_and_that_is_said(toy: Path, toy_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(checkpoints(toy)[-1] / "ema.safetensors")
    evaluate(toy)
    assert "passed over a checkpoint" in capsys.readouterr().out
    assert json.loads((toy / "evaluation.json").read_text())["step"] == 8
    resume(toy)
    said = capsys.readouterr().out.replace("\n", "")
    assert "passed over a checkpoint" in said and "step-00000012/ema.safetensors" in said
    assert f"continuing from {checkpoints(toy)[0]}" in said
    assert trained(toy) == trained(toy_run)
    assert logged(toy) == logged(toy_run)


@pytest.mark.parametrize("verb", ["resume", "evaluate", "export"])
def test_nothing_is_done_when_none_is_good(verb: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in checkpoints(toy):
        flip(path / "student.safetensors")
    before = files(toy)
    assert main([verb, str(toy)]) == 2
    said = capsys.readouterr().err
    assert "none of the checkpoints can be used" in said and "Restore one" in said
    assert all(f"{path.name}/student.safetensors" in said for path in checkpoints(toy))
    assert files(toy) == before


def test_without_any_a_run_begins_again(toy: Path, toy_run: Path) -> None:
    shutil.rmtree(toy / "checkpoints")
    for call in (evaluate, export):
        with pytest.raises(CheckpointError, match=f"no checkpoint yet; train first: distill resume {toy}"):
            call(toy)
    resume(toy)
    assert trained(toy) == trained(toy_run)
    assert logged(toy) == logged(toy_run)


# --- another run's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("seed=1",), "another recipe"),
        (("trainer.lr=0.01",), "another recipe"),
        (("trainer.batch=8",), "another recipe"),
        (("objective={name: eulerian}",), "another recipe"),
        (("teacher.stds=[[0.3, 0.3, 0.3], [0.3, 0.3, 0.3]]",), "another"),
        (("teacher.path=cosine",), "another"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(change: tuple[str, ...], words: str, toy: Path) -> None:
    other = run("toy/lagrangian", [*TINY, *change, "name=other"])
    shutil.rmtree(toy / "checkpoints")
    shutil.copytree(other / "checkpoints", toy / "checkpoints")
    before = files(toy)
    for call in (resume, evaluate, export):
        with pytest.raises(CheckpointError, match=words):
            call(toy)
        assert files(toy) == before


def test_what_does_not_change_training_may_change(toy: Path, toy_run: Path) -> None:
    shutil.rmtree(checkpoints(toy)[-1])
    file = toy / "recipe.resolved.yaml"
    values = yaml.safe_load(file.read_text())
    values["trainer"] |= {"checkpoint_every": 3, "keep": 5, "device": "cpu"}
    values["evaluation"] |= {"samples": 50}
    values["tracking"] |= {"log_every": 1}
    file.write_text(yaml.safe_dump(values))
    resume(toy)
    assert [p.name for p in checkpoints(toy)] == ["step-00000008", "step-00000009", "step-00000012"]
    assert trained(toy) == trained(toy_run)


def test_another_teacher_is_refused(velocity_run: Path, built: Path, cwd: Path) -> None:
    mine = Path(shutil.copytree(velocity_run / "export", cwd / "teacher"))
    overrides = [*FAST, f"data.path={built}", f"teacher={{name: native, path: {mine}}}", "trainer.steps=2"]
    folder = run("quickstart", overrides)
    shutil.rmtree(mine)
    shutil.copytree(Path(checkpoint.__file__).parents[2] / "teachers/weights/digits", mine)
    before = files(folder)
    for call in (resume, evaluate, export):
        with pytest.raises(RunError, match="its teacher had the digest"):
            call(folder)
    assert files(folder) == before
    shutil.rmtree(mine)
    shutil.copytree(velocity_run / "export", mine)
    assert resume(folder) == folder


def test_other_data_are_refused(digits_run: Path, cwd: Path) -> None:
    folder = Path(shutil.copytree(digits_run, "run"))
    assert main(["shards", "build", "digits", "other", "--shard-size", "60"]) == 0
    file = folder / "recipe.resolved.yaml"
    values = yaml.safe_load(file.read_text())
    values["data"]["path"] = "other"
    file.write_text(yaml.safe_dump(values))
    before = files(folder)
    for call in (resume, evaluate, export):
        with pytest.raises(RunError, match="its data had the digest"):
            call(folder)
    assert files(folder) == before


# --- how many stay


@pytest.mark.parametrize(("keep", "stay"), [(1, [12]), (2, [9, 12]), (3, [6, 9, 12]), (9, [3, 6, 9, 12])])
def test_the_newest_stay(keep: int, stay: list[int], cwd: Path) -> None:
    folder = run("toy/lagrangian", [*TINY, "trainer.checkpoint_every=3", f"trainer.keep={keep}"])
    assert [verified(path) for path in checkpoints(folder)] == stay


def test_damaged_ones_do_not_push_out_the_good(toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 8 is good; 12 is damaged, and so is what claims to come after it
    shutil.copytree(toy / "checkpoints" / "step-00000012", toy / "checkpoints" / "step-00000020")
    for path in checkpoints(toy)[1:]:
        flip(path / "state.json")
    removed: list[str] = []
    original = shutil.rmtree

    def watched(path: Any, *args: Any, **kwargs: Any) -> None:
        if "step-00000008" in Path(path).name:
            others = [p for p in checkpoints(toy) if p != Path(path) and _good(p)]
            assert others
        removed.append(Path(path).name)
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    resume(toy)
    good = [verified(p) for p in checkpoints(toy) if _good(p)]
    assert good == [8, 12]
    assert trained_at(toy, 12) == trained(toy_run)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_are_not_counted_as_kept(keep: int, toy: Path) -> None:
    # a save at a step before the damaged ones must leave what was written last
    file = toy / "recipe.resolved.yaml"
    file.write_text(
        file.read_text().replace("checkpoint_every: 4", "checkpoint_every: 1").replace("keep: 2", f"keep: {keep}")
    )
    flip(checkpoints(toy)[-1] / "ema.safetensors")
    resume(toy)
    assert [verified(p) for p in checkpoints(toy)] == [11, 12][-keep:]


def _good(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def trained_at(folder: Path, step: int) -> dict[str, bytes]:
    """`trained`, of the checkpoint at a step."""
    for path in checkpoints(folder):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return trained(folder)


# --- a full disk


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_safetensors(*args: Any, **kwargs: Any) -> Any:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["tensors", "flush", "rename", "manifest", "metrics"])
def test_a_full_disk_leaves_what_there_was(
    where: str, toy_run: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_step_8(broken: Callable[..., Any], whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            there = Path("runs/toy-lagrangian/checkpoints/step-00000004").exists()
            return (broken if there else whole)(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        if where == "tensors":
            patched.setattr(checkpoint, "save_file", from_step_8(full_for_safetensors, checkpoint.save_file))
        elif where == "flush":
            patched.setattr(os, "fsync", from_step_8(full, os.fsync))
        elif where == "rename":
            patched.setattr(os, "replace", from_step_8(full, os.replace))
        elif where == "manifest":
            patched.setattr(Path, "write_text", from_step_8(full, Path.write_text))
        else:
            log = JsonlLogger.log_metrics

            def to_full(self: JsonlLogger, *args: Any) -> None:
                self._stream.close()
                self._stream = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
                log(self, *args)

            patched.setattr(JsonlLogger, "log_metrics", from_step_8(to_full, log))
        assert main(["run", "toy/lagrangian", *TINY]) == 1
    folder = Path("runs/toy-lagrangian")
    said = capsys.readouterr().err
    assert "No space left on device" in said and f"distill resume {folder}" in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    assert verified(folder / "checkpoints" / "step-00000004") == 4
    assert not [p.name for p in folder.rglob(".*")]
    assert main(["resume", str(folder)]) == 0
    assert trained(folder) == trained(toy_run)
    assert logged(folder) == logged(toy_run)


def test_a_disk_that_is_really_full(toy_run: Path, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = cwd / "runs"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=170k", "none", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        return  # not permitted here: the test above stands in
    try:
        assert main(["run", "toy/lagrangian", *TINY, "trainer.keep=1"]) == 1
        said = capsys.readouterr().err
        assert "No space left on device" in said and "distill resume runs/toy-lagrangian" in said
        folder = Path("runs/toy-lagrangian")
        assert [verified(path) for path in checkpoints(folder)] == [4]
        assert not [p.name for p in folder.rglob(".*")]
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert main(["resume", str(folder)]) == 0
        assert trained(folder) == trained(toy_run)
        assert logged(folder) == logged(toy_run)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
