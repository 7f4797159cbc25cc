"""Files of weights: found, mapped once, strict to the last key; what is wrong is named with its remedy."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import environment
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.student import StudentConfig
from teachers.adapters.base import InDtype
from teachers.adapters.sit import SiT
from teachers.checkpoints import Checkpoint, read, sha256
from teachers.errors import CheckpointError
from teachers.fill import Placement, fill
from teachers.networks.sit import SiTConfig
from teachers.space import DataSpace, Latent

SPACE = DataSpace((4, 8, 8), 3)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"blocks.{i}.weight": torch.randn(3, 4, generator=generator) for i in range(4)}


def same(found: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)


def test_safetensors_and_their_metadata(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", {"who": "me"})
    found = read(str(tmp_path / "x.safetensors"))
    same(found, tensors())
    assert found.about == {"who": "me"} and found.digest == sha256(tmp_path / "x.safetensors")
    same(read(str(tmp_path)), tensors())  # the only file of a folder


def shards(folder: Path) -> Path:
    held = tensors()
    places = {}
    for n in range(2):
        part = dict(list(held.items())[2 * n : 2 * n + 2])
        save_file(part, folder / f"model-{n}.safetensors")
        places |= dict.fromkeys(part, f"model-{n}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    index = shards(tmp_path)
    same(read(str(index)), tensors())
    same(read(str(tmp_path)), tensors())
    assert read(str(index)).digest != sha256(index)


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path) -> None:
    held = {"model": tensors(1), "ema": {f"module._orig_mod.{k}": v for k, v in tensors().items()},
            "opt": {"state": {}}, "args": argparse.Namespace(path_type="Linear", lr=1e-4), "step": 5}  # fmt: skip
    torch.save(held, tmp_path / "0.pt")
    found = read(str(tmp_path / "0.pt"), ("ema", "model"))
    same(found, tensors())
    assert found.weights == "ema" and found.about["args"] == {"path_type": "Linear", "lr": 1e-4}
    same(read(str(tmp_path / "0.pt"), ("model",)), tensors(1))


def test_files_from_before_the_zip_format_are_read(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(read(str(tmp_path / "old.pth")), tensors())


class Marks:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.file,)


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-20])
    return file


def damaged_index(folder: Path, change: Callable[[dict[str, str]], object]) -> Path:
    index = shards(folder)
    said = json.loads(index.read_text())
    change(said["weight_map"])
    index.write_text(json.dumps(said))
    return index


def saved(folder: Path, held: object, name: str = "x.pt") -> Path:
    torch.save(held, folder / name)
    return folder / name


def page(folder: Path) -> Path:
    (folder / "x.pt").write_text("<html>Not found</html>")
    return folder / "x.pt"


def safe(folder: Path) -> Path:
    save_file(tensors(), folder / "x.safetensors")
    return folder / "x.safetensors"


def several(folder: Path) -> Path:
    for name in ("a.pt", "b.pt"):
        saved(folder, tensors(), name)
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: safe(f).with_name("y.safetensors"), r"y.safetensors: no such file \(in .* there are: x.s"),
    "empty folder": (lambda f: f, "no file of weights in this folder"),
    "several": (several, r"2 files of weights \(a.pt, ...\); name one of them"),
    "another kind": (lambda f: saved(f, {}, "x.onnx"), "not a kind of file that is read .* distill teachers convert"),
    "cut safetensors": (lambda f: cut(safe(f)), "x.safetensors: cut short, damaged or not safetensors .*copy it again"),
    "cut torch": (lambda f: cut(saved(f, tensors())), "x.pt: cut short, damaged or not of torch .*copy it again"),
    "a web page": (lambda f: page(f), "x.pt: damaged, or not a file of torch at all; copy it again$"),
    "no weights": (
        lambda f: saved(f, {"optimizer": {"lr": 1}, "step": 3}),
        r"a training checkpoint without the weights .* it holds optimizer \(dict\), step \(int\); looked for ema,",
    ),
    "a module": (lambda f: saved(f, nn.Linear(2, 2)), "asks for .*Linear, which is code, .*distill teachers convert"),
    "a list": (lambda f: saved(f, [1, 2]), r"holds a list, not weights by name; save a state_dict\(\)"),
    "missing shard": (
        lambda f: damaged_index(f, lambda m: m.update(x="model-9.safetensors")),
        "lists model-9.safetensors, not beside it; copy the whole folder again",
    ),
    "a shard elsewhere": (
        lambda f: damaged_index(f, lambda m: m.update(x="../x.safetensors")), "lists ../x.safetensors, not beside it",
    ),
    "a name too many": (
        lambda f: damaged_index(f, lambda m: m.update(x="model-0.safetensors")), "does not agree with its shards on x;",
    ),
    "no index": (
        lambda f: (f / "x.safetensors.index.json", (f / "x.safetensors.index.json").write_text("[]"))[0],
        "not an index of shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_named_with_its_remedy(what: str, tmp_path: Path) -> None:
    make, said = REFUSED[what]
    file = make(tmp_path)
    with pytest.raises(CheckpointError, match=said) as error:
        read(str(file), ("ema", "model"))
    assert str(tmp_path) in str(error.value)


def test_a_hostile_pickle_leaves_no_mark(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    file = saved(tmp_path, {"model": tensors(), "hook": Marks(mark)})
    with pytest.raises(CheckpointError, match="is code, and code in a checkpoint is never run"):
        read(str(file))
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # it would have


# --- into a network


def network() -> nn.Module:
    return SiTConfig(width=16, depth=2, heads=2).build(SPACE)


def test_a_filled_network_is_frozen_and_holds_the_files_own_tensors(tmp_path: Path) -> None:
    held = network().state_dict()
    save_file(held, tmp_path / "x.safetensors")
    found = fill(network, read(str(tmp_path / "x.safetensors")))
    assert all(torch.equal(value, held[name]) for name, value in found.state_dict().items())
    assert not found.training and not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda s: s.pop("pos_embed"), "missing: pos_embed", id="missing"),
        pytest.param(lambda s: s.update(extra=torch.ones(1)), "unexpected: extra", id="extra"),
        pytest.param(
            lambda s: s.update({"blocks.0.attn.project.bias": s.pop("blocks.0.attn.proj.bias")}),
            "missing: blocks.0.attn.proj.bias; unexpected: blocks.0.attn.project.bias", id="renamed",
        ),
        pytest.param(
            lambda s: s.update({"final_layer.linear.bias": torch.ones(3)}),
            r"wrong size: final_layer.linear.bias is \(3,\), expected \(16,\)", id="size",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("weights", [True, False])
def test_every_key_is_accounted_for(
    change: Callable[[dict[str, Tensor]], object], said: str, weights: bool, tmp_path: Path
) -> None:
    held = network().state_dict()
    change(held)
    save_file(held, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=said) as error:
        fill(network, read(str(tmp_path / "x.safetensors")), weights=weights)
    assert "x.safetensors: the weights do not fit the network" in str(error.value)


def test_what_a_family_does_not_need_is_named_to_be_ignored(tmp_path: Path) -> None:
    held = network().state_dict() | {"projectors.0.weight": torch.ones(2)}
    save_file(held, tmp_path / "x.safetensors")
    checkpoint = read(str(tmp_path / "x.safetensors"))
    fill(network, checkpoint, ignore=(r"projectors\..*",))
    with pytest.raises(CheckpointError, match=r"projectors\.0\.weight"):
        fill(network, checkpoint, ignore=(r"projectors",))  # a pattern means the whole name


def sit(folder: Path, **placement: str) -> SiT:
    generator = torch.Generator().manual_seed(0)
    held = {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in network().state_dict().items()}
    save_file(held, folder / "x.safetensors")
    return SiT(path=str(folder / "x.safetensors"), heads=2, path_type="linear", prediction="velocity",
               latent=Latent(autoencoder="x"), placement=Placement(**placement))  # type: ignore[arg-type]  # fmt: skip


def test_half_precision_is_the_networks_own(tmp_path: Path) -> None:
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2, dtype=torch.float64), {"class": torch.arange(2)}
    exact, half = sit(tmp_path).load(), sit(tmp_path, dtype="bfloat16").load()
    assert isinstance(half.velocity, InDtype) and next(half.velocity.parameters()).dtype == torch.bfloat16
    v = half(x, t, cond)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, exact(x, t, cond), atol=0.2, rtol=0.1)
    assert not torch.equal(v, exact(x, t, cond))
    student = StudentConfig().build(half, half.space, 0)
    assert next(student.parameters()).dtype == torch.float32  # what is trained is trained in float32
    assert torch.equal(sit(tmp_path, device_map="auto").load()(x, t, cond), exact(x, t, cond))


MEASURE = """
import sys, threading, time
import accelerate, torch
from teachers.adapters.sit import SiT
from teachers.space import Latent

def resident():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * 4096
before, most = resident(), [0]
def watch():
    while True: most[0] = max(most[0], resident()); time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
teacher = SiT(path=sys.argv[1], path_type="linear", prediction="velocity", latent=Latent(autoencoder="x")).load()
teacher(torch.randn(1, 4, 8, 8), torch.rand(1).double(), {"class": torch.tensor([1])})
print(most[0] - before)
"""


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_network_is_never_twice_in_memory(name: str, tmp_path: Path) -> None:
    held = SiTConfig(width=512, depth=16, heads=8).build(SPACE).state_dict()
    size = sum(v.numel() * v.element_size() for v in held.values())
    assert size > 3e8
    if name.endswith(".pt"):
        torch.save({"ema": held}, tmp_path / name)
    else:
        save_file(held, tmp_path / name)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / name)], env=environment(), check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert size < int(done.stdout) < 1.6 * size
