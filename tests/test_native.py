"""Our own exports as teachers: read strictly, and every refusal names the file and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import normal, uniform
from safetensors.torch import load_file, save_file

from distill.evaluation.features import load_features
from distill.evaluation.metrics import agreement
from distill.export import Facts, write
from distill.recipe import load
from distill.sampling import generate, teacher_generator
from distill.student import Student
from teachers import families
from teachers.adapters import native
from teachers.adapters.native import Native
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError
from teachers.networks import NETWORKS, AnyConfig, to_entry
from teachers.networks.conventions import Flow
from teachers.networks.converted import ConvertedConfig
from teachers.networks.sit import SiTConfig
from teachers.path import Linear
from teachers.space import DataSpace, Latent

SPACE = DataSpace((1, 4, 4), 3, (-1.0, 1.0))
NETWORK = {"name": "mlp", "width": 16, "depth": 2, "frequencies": 4, "highest": 6.0}
Change = Callable[[Path, dict[str, Any]], None]


def write_config(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")


def seal(folder: Path, config: dict[str, Any]) -> None:
    """State the weights as they lie there, so that the checks behind size and digest are reached."""
    file = folder / "model.safetensors"
    config["weights"] = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
    write_config(folder, config)


@pytest.fixture
def export(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A velocity export, written by hand."""
    folder = tmp_path / "export"
    folder.mkdir()
    arguments = {k: v for k, v in NETWORK.items() if k != "name"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS["mlp"](**arguments).build(SPACE)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    save_file({f"network.{k}": v for k, v in network.state_dict().items()}, folder / "model.safetensors")
    config = (
        dict.fromkeys(native.KEYS)
        | {"steps": [1], "trained_on": {"steps": 1}, "recipe": ""}
        | {
            "format": 1,
            "kind": "velocity",
            "network": NETWORK,
            "path": "cosine",
            "space": {"shape": [1, 4, 4], "classes": 3, "range": [-1, 1]},
            "student": {"finest": 1, "parameterisation": {"name": "mean_velocity"}, "own_output": True, "split": None},
            "licence": "CC0-1.0",
        }
    )
    seal(folder, config)
    return folder, config


def test_an_export_is_a_frozen_teacher(export: tuple[Path, dict[str, Any]]) -> None:
    folder, config = export
    before = torch.random.get_rng_state()
    teacher = Native(path=str(folder)).load()
    assert torch.equal(torch.random.get_rng_state(), before)  # building it draws nothing from the global generator
    assert teacher.space == SPACE
    assert teacher.path.name == "cosine"
    assert teacher.network_config == NETWORK
    assert teacher.info == {
        "id": str(folder),
        "family": "native",
        "digest": config["weights"]["sha256"],
        "weights": "unknown",
        "licence": "CC0-1.0",
    }
    assert teacher.network is not None
    assert not teacher.network.training
    assert not any(p.requires_grad for p in teacher.network.parameters())
    x, t, cond = normal(3, 1, 4, 4).float(), uniform(3), {"class": torch.arange(3)}
    v = teacher(x, t, cond)
    assert v.any()
    written = load_file(folder / "model.safetensors")
    fresh = NETWORKS["mlp"](width=16, depth=2, frequencies=4, highest=6.0).build(SPACE)
    fresh.load_state_dict({k.removeprefix("network."): value for k, value in written.items()})
    assert torch.equal(v, fresh(x, t, cond))


def exported(folder: Path, network: AnyConfig, space: DataSpace, teacher: Any = None) -> Path:
    """A velocity export of a fresh network."""
    student = Student(network.build(space), space, Linear(), "velocity")
    folder.mkdir()
    write(folder, student, student.state_dict(), Facts(
        name="x", network=to_entry(network), steps=(100,), teacher=teacher, licence="MIT", trained_on={"steps": 1},
        metrics={}, recipe="",
    ))  # fmt: skip
    return folder


@pytest.mark.parametrize("knows", [True, False])
def test_the_null_class_is_known_behind_a_convention(knows: bool, tmp_path: Path) -> None:
    plain = SiTConfig(width=32, depth=1, heads=2, null_class=knows)
    turned = ConvertedConfig(network=plain, convention=Flow(noise_time=1))
    for name, network in {"plain": plain, "turned": turned}.items():
        null = Native(path=str(exported(tmp_path / name, network, DataSpace((4, 8, 8), 10)))).load().null
        assert null == ({"class": torch.tensor(10)} if knows else None)


LATENT = Latent(autoencoder="vavae", scale=0.5, mean=(1.0, 2.0, 3.0, 4.0), std=(5.0, 6.0, 7.0, 8.0), spread=0.5)
LATENTS, OF_LATENTS = DataSpace((4, 8, 8), 10), SiTConfig(width=32, depth=1, heads=2)


@pytest.mark.parametrize("latent", [LATENT, Latent(autoencoder="sd", scale=0.18215), None], ids=["channel", "sd", "no"])
def test_a_velocity_of_latents_is_of_the_latents_it_was_trained_on(latent: Latent | None, tmp_path: Path) -> None:
    facts = {"id": "a.pt", "latent": None if latent is None else asdict(latent)}
    teacher = Native(path=str(exported(tmp_path / "export", OF_LATENTS, LATENTS, facts))).load()
    assert teacher.latent == latent
    assert teacher.info.get("latent") == facts["latent"]  # and so is what is exported of its students


@pytest.mark.parametrize(
    "said", ["vavae", [], {}, {"id": "vavae"}, {"autoencoder": "a", "scale": 0}, {"autoencoder": "a", "scale": "1"},
             {"autoencoder": "a", "mean": [0.0], "std": [1.0]}, {"autoencoder": "a", "mean": 0.0, "std": 1.0}]
)  # fmt: skip
def test_a_latent_map_that_is_none_is_refused(said: Any, tmp_path: Path) -> None:
    folder = exported(tmp_path / "export", OF_LATENTS, LATENTS, {"latent": said})
    with pytest.raises(CheckpointError, match=r"config\.json: teacher\.latent is .*export again"):
        Native(path=str(folder)).load()


SHIPPED = sorted(file.parent.name for file in families.WEIGHTS.glob("*/config.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_of_a_shipped_teacher_is_one_of_today(name: str) -> None:
    """By it the teacher is measured again."""
    config = json.loads((families.WEIGHTS / name / "config.json").read_text(encoding="utf-8"))
    assert load(name, text=config["recipe"]).name == f"teacher-{name}"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_teacher_draws_the_classes_that_its_classifier_sees(name: str) -> None:
    folder, teacher, features = families.WEIGHTS / name, Native(path=name).load(), load_features(name)
    assert (folder / "LICENSE.md").is_file() and (folder / "model.safetensors").stat().st_size < 16 * 10**6
    assert 0.85 < features.accuracy < 1
    count = 20 * (teacher.space.classes or 0)
    teacher.freeze()
    x = generate(teacher_generator(teacher, 20), teacher.space, count, count, 0).x
    cond = teacher.space.cond_for(0, count)
    assert cond is not None
    assert agreement(features(x)[1], cond["class"]) > 0.8


def test_a_shipped_teacher_is_found_by_name(
    export: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = export
    monkeypatch.setattr(native, "WEIGHTS", tmp_path)
    monkeypatch.setattr(families, "WEIGHTS", tmp_path)
    assert Native(path="export").load().info["id"] == "export"
    assert set(families.shipped()) == {"export"}
    assert families.shipped()["export"]["licence"] == "CC0-1.0"
    with pytest.raises(CheckpointError, match=r"exprt: no such folder.*shipped: export"):
        native.locate("exprt")
    assert native.locate(str(folder)) == folder


def test_only_a_folder_that_has_what_is_asked_hides_a_shipped_teacher_of_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "empty"):
        Path(name).mkdir()
    assert native.locate("digits") == native.WEIGHTS / "digits"
    assert load_features("digits").channels == 1
    assert native.locate("empty") == Path("empty")  # so that the error names it
    Path("digits/config.json").touch()
    assert native.locate("digits") == Path("digits")
    assert native.locate("digits", "features") == native.WEIGHTS / "digits"


def retitle(**entries: Any) -> Change:
    return lambda folder, config: write_config(folder, config | entries)


def without(key: str) -> Change:
    return lambda folder, config: write_config(folder, {k: v for k, v in config.items() if k != key})


def truncate(folder: Path, config: dict[str, Any]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip(folder: Path, config: dict[str, Any]) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def reweigh(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(folder: Path, config: dict[str, Any]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        seal(folder, config)

    return apply


def no_safetensors(folder: Path, config: dict[str, Any]) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
    seal(folder, config)


LEAVE = "network.leave.bias"
REFUSALS: dict[str, tuple[Change, str, str]] = {
    "no config": (lambda f, c: (f / "config.json").unlink(), "export: no config.json", "RUN/export"),
    "not JSON": (lambda f, c: write_config(f, '{"format": 1,'), "config.json: not JSON", "export again"),
    "no object": (lambda f, c: write_config(f, "[1]"), "config.json: format is 'list'", "reads 1"),
    "other format": (retitle(format=2), "config.json: format is 2", "reads 1"),
    "foreign config": (
        lambda f, c: write_config(f, '{"_class_name": "DiT"}'),
        "config.json: format is None",
        "another",
    ),
    "unknown key": (retitle(colour=3), r"config.json: unknown keys \['colour'\]", "export again"),
    "missing key": (without("licence"), r"config.json: .*missing keys \['licence'\]", "export again"),
    "unknown kind": (retitle(kind="vlocity"), "config.json: kind is 'vlocity'", "velocity, flow_map"),
    "a student": (retitle(kind="flow_map"), "already distilled flow_map student", "distill the student's own teacher"),
    "no weights": (lambda f, c: (f / "model.safetensors").unlink(), "model.safetensors: missing", "copy the whole"),
    "truncated": (truncate, "model.safetensors: not the file config.json describes", "copy or export it again"),
    "flipped": (flip, "model.safetensors: not the file config.json describes", "sha256"),
    "no safetensors": (no_safetensors, "model.safetensors: not a safetensors file", ""),
    "missing tensor": (reweigh(lambda w: w.pop(LEAVE)), "model.safetensors: .*missing: leave.bias", "config.json"),
    "extra tensor": (
        reweigh(lambda w: w.update({"network.extra": torch.zeros(1)})),
        "model.safetensors: .*unexpected: extra",
        "config.json",
    ),
    "wrong size": (
        reweigh(lambda w: w.update({LEAVE: torch.zeros(7)})),
        r"wrong size: leave.bias is \(7,\), expected \(16,\)",
        "config.json",
    ),
    "unknown network": (retitle(network={"name": "mpl"}), "config.json: unknown network 'mpl'", "known: mlp"),
    "nameless network": (retitle(network={"width": 4}), "config.json: network is {'width': 4}", "known: mlp"),
    "wrong argument": (retitle(network={"name": "mlp", "girth": 4}), "'mlp' cannot be built", "girth"),
    "out of range": (retitle(network={"name": "mlp", "width": 0}), "'mlp' cannot be built", "at least 1"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_name_file_and_remedy(what: str, export: tuple[Path, dict[str, Any]]) -> None:
    change, wrong, remedy = REFUSALS[what]
    folder, config = export
    change(folder, dict(config))
    with pytest.raises(CheckpointError, match=wrong) as error:
        Native(path=str(folder)).load()
    assert str(folder) in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize("key", ["path", "space", "network", "weights"])
def test_a_section_of_the_wrong_kind_is_refused(key: str, export: tuple[Path, dict[str, Any]]) -> None:
    folder, config = export
    for value in (None, 3, "nonsense", {}, []):
        write_config(folder, config | {key: value})
        with pytest.raises(CheckpointError) as error:
            Native(path=str(folder)).load()
        assert str(folder) in str(error.value)


def test_weights_lie_inside_the_folder(export: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A config cannot name a file elsewhere."""
    folder, config = export
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    write_config(folder, config | {"weights": config["weights"] | {"file": "../model.safetensors"}})
    with pytest.raises(CheckpointError, match=r"weights is .*must be \{file: name"):
        Native(path=str(folder)).load()


def test_a_wider_checkpoint_does_not_load_silently(export: tuple[Path, dict[str, Any]]) -> None:
    folder, config = export
    write_config(folder, config | {"network": NETWORK | {"width": 8}})
    with pytest.raises(CheckpointError, match="wrong size"):
        Native(path=str(folder)).load()
