"""Files of weights: found, mapped once, strict to the last key; what is wrong is named with its remedy."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import environment
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.student import StudentConfig
from teachers.adapters.base import InDtype
from teachers.adapters.sit import SiT
from teachers.checkpoints import Checkpoint, read, sha256
from teachers.convert import convert
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


def test_dots_lead_to_weights_that_lie_deeper(tmp_path: Path) -> None:
    file = str(saved(tmp_path, {"state": {"ema": tensors(), "model": tensors(1)}, "step": 3}))
    found = read(file, ("ema", "model"), "state.ema")
    same(found, tensors())
    assert found.weights == "state.ema" and found.about["step"] == 3
    same(read(file, (), "state.model"), tensors(1))
    dotted = str(saved(tmp_path, {"state.ema": tensors(2), "state": {"ema": tensors()}}, "dotted.pt"))
    same(read(dotted, (), "state.ema"), tensors(2))
    convert(Path(file), tmp_path / "x.safetensors")
    same(read(str(tmp_path / "x.safetensors"), (), "ema"), tensors())
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"state": {"ema": {"a": np.ones(2)}, "raw": {"a": np.zeros(2)}}}))
    assert read(str(tmp_path / "x.pkl"), (), "state.raw").tensors["a"].sum() == 0


def test_prefixes_of_wrapping_code_are_named_and_taken_off(tmp_path: Path) -> None:
    """As Lightning saves a module that holds the network, and a second for its average."""
    both = {f"{part}.{k}": v for seed, part in enumerate(("net", "ema.module")) for k, v in tensors(seed).items()}
    whole = str(saved(tmp_path, {"state_dict": {**both, "ema.n_averaged": torch.tensor(3)}, "epoch": 1}))
    with pytest.raises(
        CheckpointError, match=r"begin with ema\.module\. or net\., .*: state_dict.ema.module or state_dict.net$"
    ):
        read(whole, ("state_dict",)).shape("blocks.0.weight")
    same(read(whole, ("ema",), "state_dict.net"), tensors())
    same(read(whole, (), "state_dict.ema"), tensors(1))  # the counter of torch's AveragedModel is no weight
    for name in ("plain.pt", "plain.safetensors"):
        torch.save(both, tmp_path / name) if name.endswith(".pt") else save_file(both, tmp_path / name)
        same(read(str(tmp_path / name), (), "net"), tensors())
        with pytest.raises(CheckpointError, match=r"set teacher.weights: ema.module or net$"):
            read(str(tmp_path / name)).shape("blocks.0.weight")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.pkl"])
def test_weights_that_a_file_does_not_have_are_not_passed_over(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "x.pkl":
        file.write_bytes(pickle.dumps({"a": np.ones(2)}))
    else:
        torch.save(tensors(), file) if name == "x.pt" else save_file(tensors(), file)
    with pytest.raises(
        CheckpointError, match=r"holds one set of weights alone, and .* remove teacher.weights, which says e"
    ):
        read(str(file), ("model",), "ema")
    read(str(file), ("model",))


def test_a_converted_file_has_the_weights_it_was_made_of(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", {"weights": "ema"})
    same(read(str(tmp_path / "x.safetensors"), (), "ema"), tensors())
    with pytest.raises(CheckpointError, match=r"holds the weights ema, and no names in it begin with model\.; remove"):
        read(str(tmp_path / "x.safetensors"), (), "model")
    with pytest.raises(CheckpointError, match=r"remove teacher\.weights, which says model"):
        replace(sit(tmp_path), weights="model").outline()


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
    "named by numbers": (
        lambda f: saved(f, {1: torch.ones(2)}), r"its tensors are named by 1, ..., not by words; save the model's st",
    ),
    "numbers inside": (
        lambda f: saved(f, {"ema": {1: torch.ones(2)}}), r"it holds ema \(dict\); looked for ema, model; save the",
    ),
    "weights deep inside": (
        lambda f: saved(f, {"state": {"shadow": tensors(), "raw": tensors(1)}, "step": 3}),
        r"name the part with teacher.weights \(state.shadow, state.raw\), or .*distill teachers convert .*safetensors$",
    ),
    "parts of layers": (
        lambda f: saved(f, {"layer": {"a": {"kernel": torch.ones(2), "more": {}}}}),
        r"save the model's state_dict\(\) alone, or take its weights out: distill teachers convert",
    ),
    "shards alone": (
        lambda f: (shards(f).rename(f / "x.json"), [p.rename(f / p.name.replace("-", "-0000")
                   .replace(".saf", "-of-00002.saf")) for p in f.glob("model-*")], f)[-1],
        r"has shards of weights \(model-00000-of-00002.safetensors, ...\) without their index .*copy the whole folder",
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


@pytest.mark.parametrize(
    ("many", "few", "expected"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_of_several_precisions_the_widest_is_the_networks(
    many: torch.dtype, few: torch.dtype, expected: torch.dtype, tmp_path: Path
) -> None:
    config = sit(tmp_path)
    held = {
        k: v.to(few if k == "pos_embed" or "t_embedder" in k else many) for k, v in read(config.path).tensors.items()
    }
    save_file(held, tmp_path / "x.safetensors")
    teacher = config.load()
    assert {v.dtype for v in teacher.network.state_dict().values()} == {expected}
    assert all(torch.equal(v, held[k].to(expected)) for k, v in teacher.network.state_dict().items())
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2, dtype=torch.float64), {"class": torch.arange(2)}
    assert teacher(x, t, cond).isfinite().all()
    assert {v.dtype for v in config.outline().network.state_dict().values()} == {expected}
    half = sit(tmp_path, dtype="bfloat16")
    save_file(held, tmp_path / "x.safetensors")
    assert {v.dtype for v in half.load().network.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("outline", [True, False])
@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float8_e4m3fn, "pos_embed is float8_e4m3fn, in which networks do not compute; set placement.dtype: bfl"),
        (torch.int64, "pos_embed is int64, expected floating point numbers: it is quantised or damaged; take the"),
        (torch.complex64, "pos_embed is complex64, expected floating point numbers: it is quantised or damaged;"),
    ],
)
def test_numbers_that_no_network_computes_in_are_named(
    dtype: torch.dtype, said: str, outline: bool, tmp_path: Path
) -> None:
    config = sit(tmp_path)
    held = dict(read(config.path).tensors)
    held["pos_embed"] = held["pos_embed"].to(dtype)
    save_file(held, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: {said}"):
        (config.outline if outline else config.load)()
    asked = replace(config, placement=Placement(dtype="float32"))
    if dtype.is_floating_point:
        assert asked.load().network.state_dict()["pos_embed"].dtype == torch.float32
    else:
        with pytest.raises(CheckpointError, match=said):
            asked.load()


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
