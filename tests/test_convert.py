"""Other people's checkpoints become safetensors, with what was known beside the weights, whole or not at all."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from teachers.checkpoints import read
from teachers.convert import convert
from teachers.errors import CheckpointError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.arange(4), persistent=False)


class Foreign:
    def __init__(self) -> None:
        self.x = 1


def converted(folder: Path, held: Any, name: str = "a.pt") -> tuple[str, dict[str, torch.Tensor], dict[str, str]]:
    """(what is said, tensors, metadata)."""
    if name.endswith(".pkl"):
        (folder / name).write_bytes(pickle.dumps(held))
    else:
        torch.save(held, folder / name)
    said = convert(folder / name, folder / "out.safetensors")
    with safe_open(folder / "out.safetensors", "pt") as opened:
        return said, {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_a_training_checkpoint_gives_its_averaged_weights_and_arguments(tmp_path: Path) -> None:
    net = Net()
    ema = {k: v + 1 for k, v in net.state_dict().items()}
    args = argparse.Namespace(path_type="linear", lr=1e-4, nested={"a": [1, None]})
    held = {"model": net.state_dict(), "ema": ema, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}, "args": args,
            "step": 7, "logger": Foreign()}  # fmt: skip
    said, tensors, metadata = converted(tmp_path, held)
    assert tensors.keys() == ema.keys() and all(torch.equal(tensors[k], ema[k]) for k in ema)
    assert json.loads(metadata["about"])["args"] == {"path_type": "linear", "lr": 1e-4, "nested": {"a": [1, None]}}
    assert metadata["source"] == "a.pt"
    assert "3 tensors, 11 numbers (float32, int64), of ema" in said
    assert "kept beside them: args, step" in said
    left = said.splitlines()[-1]
    assert left.startswith("left out: model (3 tensors), ")
    assert "opt (1 tensors)" in left and "logger (test_convert.Foreign)" in left
    checkpoint = read(str(tmp_path / "out.safetensors"), ("ema", "model"))
    assert checkpoint.weights == "ema"
    assert checkpoint.about["args"]["path_type"] == "linear"


@pytest.mark.parametrize("name", ["a.pt", "a.pkl"])
def test_a_whole_module_gives_its_state(name: str, tmp_path: Path) -> None:
    net = Net()
    said, tensors, _ = converted(tmp_path, net, name)
    assert tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(tensors[k], v) for k, v in net.state_dict().items())
    assert "of the file's" in said


def test_nested_arrays_are_named_by_their_way(tmp_path: Path) -> None:
    params = {"Dense_0": {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)}}
    state = {"params": {"Dense_0": {"kernel": np.zeros((2, 3), np.float32)}}, "params_ema": params, "step": 3}
    said, tensors, metadata = converted(tmp_path, {"train_state": state, "_timestamp": 1.5}, "model.pkl")
    assert tensors.keys() == {"Dense_0.kernel", "Dense_0.bias"} and tensors["Dense_0.kernel"].all()
    assert "of train_state.params_ema" in said and "train_state.params (1 tensors)" in said
    assert json.loads(metadata["about"])["_timestamp"] == 1.5


def test_several_networks_of_equal_standing_are_all_kept(tmp_path: Path) -> None:
    held = {"encoder": {"w": torch.ones(2)}, "decoder": {"w": torch.zeros(2)}, "optimizer": {"m": torch.ones(1)}}
    said, tensors, _ = converted(tmp_path, {**held, "epoch": 1})
    assert tensors.keys() == {"encoder.w", "decoder.w"}
    assert "optimizer (1 tensors)" in said


def test_a_part_may_be_asked_for(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", ("model",))
    assert read(str(tmp_path / "b.safetensors")).tensors["w"].all()


def test_a_list_in_itself_many_times_ends(tmp_path: Path) -> None:
    said, tensors, metadata = converted(tmp_path, {"w": torch.ones(1), "lr": 0.5, "l": doubled(60)})
    assert tensors.keys() == {"w"} and json.loads(metadata["about"]) == {"lr": 0.5}
    assert "left out: l (list)" in said


def test_tied_and_turned_tensors(tmp_path: Path) -> None:
    w = torch.arange(6.0).view(2, 3)
    _, tensors, _ = converted(tmp_path, {"a": w, "b": w, "c": w.t(), "d": w[1], "h": w.bfloat16()})
    assert torch.equal(tensors["b"], w) and torch.equal(tensors["c"], w.t()) and torch.equal(tensors["d"], w[1])
    assert tensors["h"].dtype == torch.bfloat16


def refused(tmp_path: Path, said: str, source: str = "a.pt", out: str = "b.safetensors") -> None:
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / source, tmp_path / out)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_cannot_be_written_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "old.safetensors").write_bytes(b"old")
    refused(tmp_path, r"old\.safetensors: is there already", out="old.safetensors")
    refused(tmp_path, "name it .*b.safetensors", out="b.bin")
    refused(tmp_path, r"no\.pt: no such file", source="no.pt")
    refused(tmp_path, "is safetensors already", source="old.safetensors")

    def half(_: object, file: Path, *__: object) -> None:
        file.write_bytes(b"ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("teachers.convert.save_file", half)
    refused(tmp_path, "cannot be written.*No space left")


def test_a_file_that_comes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.setattr("teachers.convert._umask", lambda: (tmp_path / "b.safetensors").write_bytes(b"new") and 0o022)
    with pytest.raises(CheckpointError, match="is there already"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


def hidden(depth: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = {"a": value}
    return value


def doubled(times: int) -> Any:
    value: Any = [1]
    for _ in range(times):
        value = [value, value]
    return value


def endless() -> Any:
    net = Net()
    net.again = net  # type: ignore[assignment]
    return net


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no weights": (lambda: {"lr": 1.0}, r"holds no tensors by name \(lr\)"),
    "a list of numbers": (lambda: [1, 2], "holds no tensors by name"),
    "too deep": (lambda: hidden(200), "nested deeper"),
    "a module in itself": (endless, "nested deeper"),
    "one tensor a thousand times": (
        lambda: (lambda t: {str(i): t[:] for i in range(1000)})(torch.ones(10000)), "repeat what is in it"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_holds_no_weights_is_refused(what: str, tmp_path: Path) -> None:
    make, said = BAD[what]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(0))
    torch.save(make(), tmp_path / "a.pt")
    refused(tmp_path, said)
