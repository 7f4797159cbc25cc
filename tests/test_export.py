"""Exports: what is loaded is what was trained, with torch, safetensors and numpy alone, and damage is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_networks
import torch
from helpers import checkpoints, environment, normal
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import distill
from distill.export import Facts, write
from distill.flow_map import SUPPORTS, Kind
from distill.guidance import GuidanceInput
from distill.parameterisation import Endpoint, MeanVelocity, OneTime, Parameterisation, Trig
from distill.rows import noise
from distill.run_folder import open_run
from distill.student import Student
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError
from teachers.networks import NETWORKS, MLPConfig, to_entry
from teachers.path import PATHS, Linear
from teachers.space import DataSpace, Embedding


@pytest.fixture(params=["toy", "digits", "velocity"])
def finished(request: pytest.FixtureRequest) -> Path:
    """A finished run: of points, of images with classes, of a teacher."""
    return Path(request.getfixturevalue(f"{request.param}_run"))


@pytest.fixture(scope="module")
def digits(digits_run: Path) -> Student:
    return distill.load(digits_run / "export")


@pytest.fixture(scope="module")
def toy_student(toy_run: Path) -> Student:
    return distill.load(toy_run / "export")


# --- round trip


def test_what_is_loaded_is_what_was_trained(finished: Path) -> None:
    job = open_run(finished, Console(quiet=True))
    student, step = job.trained_student(job.trained())
    loaded = distill.load(str(finished / "export"))
    assert step == loaded.config["trained_on"]["steps"] == 12
    assert (loaded.kind, loaded.space, loaded.path) == (student.kind, student.space, student.path)
    ours, theirs = student.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for steps in (1, 3):
        assert torch.equal(student.sample(11, steps, seed=3), loaded.sample(11, steps, seed=3))
    s = torch.rand(5)
    t = torch.ones(5) if student.kind == "flow_map" else s
    x = normal(5, *student.space.shape).float()
    cond = student.space.cond_for(0, 5)
    assert torch.equal(student(x, s, t, cond), loaded(x, s, t, cond))


def test_it_is_loaded_to_be_used(digits_run: Path) -> None:
    before = torch.random.get_rng_state()
    student = distill.load(digits_run / "export")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not student.training and not any(p.requires_grad for p in student.parameters())
    assert not student.sample(2).requires_grad
    assert student.config == json.loads((digits_run / "export" / "config.json").read_text())


LOAD_ALONE = """
import sys

ALLOWED = {"distill", "teachers", "torch", "safetensors", "numpy", *sys.stdlib_module_names}
OF_TORCH = {"torchgen", "functorch", "sympy", "mpmath", "typing_extensions", "jinja2", "markupsafe", "networkx",
            "filelock", "fsspec", "setuptools"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED | OF_TORCH:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Block())
for name in ("yaml", "omegaconf", "pytorch_lightning", "webdataset", "wandb", "rich", "PIL", "matplotlib", "sklearn",
             "scipy", "accelerate"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} is not blocked")
import numpy as np
import distill
student = distill.load(sys.argv[1])
x = student.sample(7, seed=2)
np.save(sys.argv[2], x.numpy())
if student.space.is_image:
    student.images(x)
"""


def test_loading_needs_torch_safetensors_and_numpy_alone(finished: Path, cwd: Path) -> None:
    export, out = shutil.copytree(finished / "export", cwd / "given"), cwd / "x.npy"
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, export, out], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    expected = distill.load(finished / "export").sample(7, seed=2).numpy()
    assert np.array_equal(np.load(out), expected)


@dataclass(frozen=True)
class Form:
    """How a student is made; guided: on scales and intervals."""

    kind: Kind
    parameterisation: Parameterisation
    own_output: bool = True
    split: int | None = None
    guided: bool = False


TWO_TIMES: tuple[Kind, ...] = ("flow_map", "shortcut", "grid")
OF_TWO_TIMES = (MeanVelocity(), Endpoint(), Trig(sigma_data=0.7))
FORMS = [
    *(Form(kind, p, split=split) for kind in TWO_TIMES for p in OF_TWO_TIMES for split in (None, 0, 2)),
    *(Form("consistency", p) for p in (*OF_TWO_TIMES, OneTime(sigma_data=0.4, sigma_min=0.01))),
    *(Form(kind, Trig(sigma_data=0.7), own_output=False) for kind in (*TWO_TIMES, "consistency")),
    *(Form(kind, MeanVelocity(), guided=True) for kind in SUPPORTS),
    Form("flow_map", Endpoint(), own_output=False, split=1, guided=True),
    Form("velocity", MeanVelocity()),
]
FACTS = Facts(
    name="made by hand",
    network={"name": "mlp", "width": 16, "depth": 3},
    steps=(1,),
    teacher=None,
    licence="MIT",
    trained_on={"steps": 0},
    metrics={},
    recipe="",
)


def made(form: Form) -> Student:
    network = NETWORKS["mlp"](width=16, depth=3).build(DataSpace((3,), classes=4))
    guidance = GuidanceInput(low=1, high=3, scale=1.5, interval=(0.1, 0.8), intervals=True) if form.guided else None
    student = Student(
        network,
        DataSpace((3,), classes=4),
        PATHS["cosine"](),
        form.kind,
        finest=4 if form.kind == "shortcut" else 1,
        parameterisation=form.parameterisation,
        own_output=form.own_output,
        split=form.split,
        guidance=guidance,
    )
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    return student.eval()


def exported(form: Form, folder: Path) -> Student:
    student = made(form)
    folder.mkdir()
    write(folder, student, student.state_dict(), FACTS)
    return student


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_a_student_is_loaded_as_it_was(form: Form, tmp_path: Path) -> None:
    student = exported(form, tmp_path / "export")
    loaded = distill.load(tmp_path / "export")
    for name in ("kind", "finest", "parameterisation", "own_output", "split", "guidance", "path", "space", "support"):
        assert getattr(loaded, name) == getattr(student, name)
    steps = 4 if form.kind in ("velocity", "shortcut") else 1
    asked: dict[str, Any] = {"guidance": 2.5, "interval": (0.2, 0.6)} if form.guided else {}
    with torch.no_grad():
        before, after = student.sample(9, steps, **asked), loaded.sample(9, steps, **asked)
    assert torch.equal(before, after) and before.abs().max() > 0.1
    if form.guided:
        assert not torch.equal(after, loaded.sample(9, steps))


PRECISIONS = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-5}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("form", FORMS[::5], ids=str)
def test_an_export_samples_in_any_precision(form: Form, dtype: torch.dtype, tmp_path: Path) -> None:
    exported(form, tmp_path / "export")
    plain, other = distill.load(tmp_path / "export"), distill.load(tmp_path / "export").to(dtype)
    steps = 4 if form.kind in ("velocity", "shortcut") else 1
    x, found = plain.sample(64, steps), other.sample(64, steps)
    assert found.dtype == torch.float32 and not torch.equal(found, x)
    assert (found - x).square().mean() < PRECISIONS[dtype] ** 2 * x.square().mean()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", small_networks.CONFIGS)
def test_an_export_of_any_network_samples_in_any_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = small_networks.student(small_networks.teacher(name, tmp_path))
    facts = replace(FACTS, network=to_entry(small_networks.CONFIGS[name]))
    write(tmp_path, made, made.state_dict(), facts)
    plain, other = distill.load(tmp_path), distill.load(tmp_path).to(dtype)
    x, found = plain.sample(3), other.sample(3)
    assert found.dtype == torch.float32
    assert (found - x).square().mean() < PRECISIONS[dtype] ** 2 * x.square().mean()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_a_default_precision_of_torch_changes_nothing(dtype: torch.dtype, toy_run: Path, digits_run: Path) -> None:
    for folder in (toy_run, digits_run):
        before = distill.load(folder / "export")
        x = before.sample(5)
        torch.set_default_dtype(dtype)
        try:
            after = distill.load(folder / "export")
            assert torch.get_default_dtype() == dtype
            assert {p.dtype for p in after.parameters()} == {torch.float32}
            assert torch.equal(before.sample(5), x) and torch.equal(after.sample(5), x)
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_default_device_of_torch_changes_nothing(digits_run: Path) -> None:
    plain = distill.load(digits_run / "export")
    x, zeros = plain.sample(5), plain.sample(5, cond={"class": 0})
    with torch.device("meta"):  # of which no number could be had
        student = distill.load(digits_run / "export")
        assert torch.equal(student.sample(5), x)
        assert torch.equal(student.sample(5, cond={"class": 0}), zeros)


FORM_DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "own_output left out": ("student", lambda v: v.pop("own_output"), "student is .*must be a mapping with finest, "),
    "split left out": ("student", lambda v: v.pop("split"), "student is .*must be a mapping with finest, "),
    "a further key": ("student", lambda v: v.update(splt=1), "student is .*'splt'"),
    "another name": ("student", lambda v: v["parameterisation"].update(name="x0"), "must be one of mean_velocity, "),
    "no sigma_data": ("student", lambda v: v["parameterisation"].pop("sigma_data"), "must have the keys name, sigma_"),
    "a bad value": ("student", lambda v: v["parameterisation"].update(sigma_data=-1), "sigma_data must be above 0"),
    "no scale": ("guidance", lambda v: v.pop("scale"), "guidance is .*must have the keys low, high, scale"),
    "no intervals": ("guidance", lambda v: v.pop("intervals"), "guidance is .*must have the keys low, high, scale"),
}


@pytest.mark.parametrize("what", FORM_DAMAGES)
def test_a_form_that_is_not_whole_is_refused(what: str, tmp_path: Path) -> None:
    exported(Form("flow_map", Trig(sigma_data=0.7), guided=True), tmp_path / "export")
    key, damage, words = FORM_DAMAGES[what]
    file = tmp_path / "export" / "config.json"
    config = json.loads(file.read_text())
    damage(config[key])
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        distill.load(tmp_path / "export")
    assert str(file) in str(caught.value)


# --- sampling


def test_samples_are_floats_of_the_datas_shape_and_range(digits: Student, toy_student: Student) -> None:
    x = digits.sample(20)
    assert x.shape == (20, 1, 8, 8) and x.dtype == torch.float32
    assert x.min() == -1.0 and x.max() <= 1.0  # most of a digit's background lies at the very edge
    assert digits.generate(noise(0, 0, 20, (1, 8, 8)), 1, digits.space.cond_for(0, 20)).min() < -1
    points = toy_student.sample(20)
    assert points.shape == (20, 2) and points.dtype == torch.float32
    assert points.abs().max() > 1  # no range, no clamp
    assert toy_student.sample(1).shape == (1, 2)


def test_samples_are_flow_map_steps_from_the_noise_of_their_index(digits: Student, toy_student: Student) -> None:
    x_0 = noise(5, 0, 6, (2,))
    zero, half, one = (torch.full((6,), t) for t in (0.0, 0.5, 1.0))
    assert torch.equal(toy_student.sample(6, 1, seed=5), toy_student(x_0, zero, one))
    assert torch.equal(toy_student.sample(6, 2, seed=5), toy_student(toy_student(x_0, zero, half), half, one))
    cond = {"class": torch.arange(6)}
    one_step = digits(noise(5, 0, 6, (1, 8, 8)), zero, one, cond).clamp(-1, 1)
    assert torch.equal(digits.sample(6, 1, seed=5), one_step)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_sample_does_not_depend_on_how_many_are_drawn(steps: int, digits: Student) -> None:
    many = digits.sample(1003, steps, seed=4)  # more than are made at once
    for n in (1, 7, 33, 500, 501):
        assert (digits.sample(n, steps, seed=4) - many[:n]).abs().max() < 1e-5
    assert not torch.equal(many[:500], many[500:1000])


def test_a_seed_is_one_result(digits: Student) -> None:
    a = digits.sample(4, seed=1)
    torch.manual_seed(99)
    assert torch.equal(a, digits.sample(4, seed=1))
    assert not torch.equal(a, digits.sample(4, seed=2))
    before = torch.random.get_rng_state()
    digits.sample(4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_classes_are_taken_in_turn(digits: Student) -> None:
    n = 1003
    labels = torch.arange(n) % 10
    assert torch.equal(digits.sample(n), digits.sample(n, cond={"class": labels}))
    assert not torch.equal(digits.sample(n)[:20], digits.sample(20, cond={"class": 0}))


def test_classes_are_taken_in_turn_across_what_is_made_at_once() -> None:
    space = DataSpace((2,), classes=7)  # no divisor of it
    network = NETWORKS["mlp"](width=8, depth=1).build(space)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    student = Student(network, space, PATHS["linear"]())
    assert torch.equal(student.sample(1003), student.sample(1003, cond={"class": torch.arange(1003) % 7}))


def test_classes_can_be_asked_for(digits: Student) -> None:
    threes = digits.sample(5, cond={"class": 3})
    for same in ([3] * 5, torch.full((5,), 3), torch.tensor(3), torch.full((5,), 3, dtype=torch.int32), np.full(5, 3)):
        assert torch.equal(digits.sample(5, cond={"class": same}), threes)  # type: ignore[dict-item]
    mixed = digits.sample(5, cond={"class": [3, 3, 4, 3, 9]})
    assert torch.allclose(mixed[[0, 1, 3]], threes[[0, 1, 3]], atol=1e-5)
    assert (mixed[[2, 4]] - threes[[2, 4]]).abs().max() > 0.05


@pytest.mark.parametrize(
    "cond",
    [
        {"class": 10},
        {"class": -1},
        {"class": [0, 1]},
        {"class": torch.zeros(5, 1, dtype=torch.int64)},
        {"class": [0, 1, 2, 3, 10]},
        {"class": 2.5},
        {"class": [0.5] * 5},
        {"label": 3},
        {"class": 3, "text": 1},
        {},
    ],
)
def test_conditioning_that_makes_no_sense_is_refused(cond: Any, digits: Student) -> None:
    with pytest.raises(ValueError, match="class"):
        digits.sample(5, cond=cond)


def test_other_arguments_that_make_no_sense_are_refused(digits: Student, toy_student: Student) -> None:
    for n, steps in ((0, 1), (-1, 1), (1, 0), (3, -2)):
        with pytest.raises(ValueError, match=f"at least 1.*{n}.*{steps}"):
            digits.sample(n, steps)
    counted = np.array([3, 2, 7])  # numpy's integers are integers
    assert torch.equal(digits.sample(counted[0], counted[1], counted[2]), digits.sample(3, 2, 7))
    with pytest.raises(ValueError, match="unconditional"):
        toy_student.sample(5, cond={"class": 1})
    with pytest.raises(ValueError, match="not images"):
        toy_student.images(toy_student.sample(5))


def test_steps_are_those_recommended_unless_given(digits: Student, velocity_run: Path) -> None:
    assert digits.config["steps"] == [1, 2]
    assert torch.equal(digits.sample(3), digits.sample(3, steps=1))
    teacher = distill.load(velocity_run / "export")
    assert teacher.kind == "velocity" and teacher.config["steps"] == [4]
    assert torch.equal(teacher.sample(3), teacher.sample(3, steps=4))
    assert not torch.equal(teacher.sample(3), teacher.sample(3, steps=1))


def test_images_are_bytes(digits: Student) -> None:
    x = digits.sample(9)
    pixels = digits.images(x)
    assert pixels.dtype == torch.uint8 and pixels.shape == x.shape
    assert (pixels.float() / 127.5 - 1 - x).abs().max() <= 1 / 255 + 1e-6
    values = torch.tensor([-1.0, 0.0, 1.0, -3.0, 3.0])[:, None, None, None].expand(5, *digits.space.shape)
    assert digits.images(values)[:, 0, 0, 0].tolist() == [0, 128, 255, 0, 255]
    assert digits.images(x[0]).shape == x.shape[1:]
    for other in (torch.randn(3), x[:, 0], x[..., :4]):
        with pytest.raises(ValueError, match=r"images must be \[\.\.\., 1, 8, 8\], got"):
            digits.images(other)


X, ZERO, ONE, LABEL = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.ones(2), torch.tensor([1, 2])
BAD_CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "float times": ((X, 0.0, 1.0, {"class": LABEL}), r"s must be a tensor \[b\], one a sample, got a float"),
    "one time": ((X, ZERO[0], ONE[0], {"class": LABEL}), r"s must be \[2\], one a sample, got \[\]"),
    "three times": ((X, ZERO, torch.ones(3), {"class": LABEL}), r"t must be \[2\], one a sample, got \[3\]"),
    "one sample": ((X[0], ZERO, ONE, {"class": LABEL}), r"x_s must be \[1, 1, 8, 8\], one a sample, got \[1, 8, 8\]"),
    "another size": ((X[..., :4], ZERO, ONE, {"class": LABEL}), r"x_s must be \[2, 1, 8, 8\]"),
    "no tensor": (([0.0], ZERO, ONE, {"class": LABEL}), r"x_s must be a tensor \[b, 1, 8, 8\]"),
    "one class": ((X, ZERO, ONE, {"class": 3}), r"cond\['class'\] must be a tensor \[b\], one a sample, got a int"),
    "a class for all": ((X, ZERO, ONE, {"class": LABEL[:1]}), r"cond\['class'\] must be \[2\], .*got \[1\]"),
    "no mapping": ((X, ZERO, ONE, LABEL), "cond must be a mapping of fields, .*got a Tensor"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_of_other_shapes_are_refused(case: str, digits: Student) -> None:
    given, said = BAD_CALLS[case]
    with pytest.raises(ValueError, match=said):
        digits(*given)
    assert digits(X, ZERO, ONE, {"class": LABEL}).shape == X.shape


def test_noise_of_another_shape_is_refused(digits: Student) -> None:
    with pytest.raises(ValueError, match=r"x_0 must be \[1, 1, 8, 8\], one a sample, got \[1, 8, 8\]"):
        digits.generate(X[0], 1, {"class": LABEL})


def scaled(space: DataSpace) -> Student:
    guidance = GuidanceInput(low=1.1, high=5, scale=3, intervals=True)
    student = Student(MLPConfig(width=8, depth=1).build(space), space, Linear(), guidance=guidance)
    student.config = {"steps": [1]}
    return student


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"guidance": "3"}, r"guidance must be in \[1.1, 5\], got '3'"),
        ({"interval": (0.2,)}, r"interval must be two increasing times in \[0, 1\], got \(0.2,\)"),
        ({"interval": 0.5}, r"interval must be two increasing times in \[0, 1\], got 0.5"),
        ({"interval": ("0", "1")}, "interval must be two increasing times"),
        ({"cond": 3}, "cond must be a mapping of fields, .*got a int"),
        ({"cond": [1, 2]}, "cond must be a mapping of fields, .*got a list"),
    ],
)
def test_guidance_and_conditioning_of_other_types_are_refused(asked: dict[str, Any], said: str) -> None:
    student = scaled(DataSpace((2,), 3))
    with pytest.raises(ValueError, match=said):
        student.sample(2, **asked)
    assert student.sample(2, guidance=torch.tensor(3.0), interval=[0.1, 0.9]).shape == (2, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["a cat", None])
def test_an_embedding_that_is_none_is_refused(value: Any) -> None:
    student = scaled(DataSpace((2,)))
    student.space = DataSpace((2,), embeddings=(Embedding("text", (3,)),))
    with pytest.raises(ValueError, match=r"cond\['text'\] must be a tensor, the embedding: "):
        student.sample(2, cond={"text": value})


@pytest.mark.parametrize(
    ("field", "value"), [("guidance", 0.0), ("guidance", 50.0), ("guidance", -3.0), ("guidance_low", 2.0)]
)
def test_a_call_takes_no_scale_beyond_the_students(field: str, value: float) -> None:
    student, x = scaled(DataSpace((2,))), torch.randn(2, 2)
    with pytest.raises(ValueError, match=rf"cond\['{field}'\] must be in \[.*\], got \[{value}, 1.0\]"):
        student(x, ZERO, ONE, {field: torch.tensor([value, 1.0])})
    assert student(x, ZERO, ONE, {"guidance": torch.tensor([1.1, 5.0])}).isfinite().all()


def test_supported_times(digits: Student, velocity_run: Path) -> None:
    s, t = torch.tensor([0.0, 0.2, 0.5, 0.7]), torch.tensor([1.0, 0.2, 0.4, 1.2])
    assert digits.supports(s, t).tolist() == [True, True, False, False]
    teacher = distill.load(velocity_run / "export")
    assert teacher.supports(s, t).tolist() == [False, True, False, False]
    assert digits.config["supports"] == "0 <= s <= t <= 1" and teacher.config["supports"] == "s = t"


# --- what it says of itself


def test_the_config_says_what_was_done(digits_run: Path) -> None:
    config = json.loads((digits_run / "export" / "config.json").read_text())
    result = json.loads((digits_run / "evaluation.json").read_text())
    assert (config["format"], config["kind"], config["path"]) == (1, "flow_map", "linear")
    assert config["space"] == {"shape": [1, 8, 8], "classes": 10, "range": [-1.0, 1.0]}
    assert config["recipe"] == (digits_run / "recipe.resolved.yaml").read_text()
    assert config["teacher"].keys() == {"id", "family", "digest", "weights", "licence"}
    assert config["trained_on"].items() >= {"steps": 12, "batch": 16, "weights": "ema", "licence": "CC-BY-4.0"}.items()
    for steps, numbers in config["metrics"].items():
        entry = result["student"][steps]
        assert numbers.items() >= {**entry["metrics"], **entry["paired"]}.items()
        assert numbers["fd_over_teacher"] == result["gap"][steps]["fd"]
        assert numbers["speedup"] == result["speedup"][steps]
    weights = digits_run / "export" / "model.safetensors"
    assert config["weights"] == {"file": weights.name, "bytes": weights.stat().st_size, "sha256": sha256(weights)}


def test_the_model_card_names_licence_and_teacher(finished: Path) -> None:
    card = (finished / "export" / "README.md").read_text()
    config = json.loads((finished / "export" / "config.json").read_text())
    assert f"license: {config['licence'].lower()}" in card and f"licence: {config['licence']}" in card
    assert finished.name in card
    if config["teacher"] is None:
        assert "- teacher: none" in card
    else:
        assert f"- teacher: {config['teacher']['id']} (sha256 {config['teacher']['digest']})" in card
    for steps, numbers in config["metrics"].items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {steps} |")]
        assert f"{numbers['fd']:.4g}" in row


def test_the_cards_snippet_runs(finished: Path) -> None:
    card = (finished / "export" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("this/folder", str(finished / "export"))
    found: dict[str, Any] = {}
    exec(code, found)
    shape = ", ".join(map(str, found["x"].shape))
    assert f"float32 [{shape}]" in card
    assert torch.equal(found["x"], found["model"].sample(16))


# --- damage

Change = Callable[[Path, dict[str, Any]], None]


def put(**values: Any) -> Change:
    """Set keys of config.json."""

    def change(folder: Path, config: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def drop(key: str) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))

    return change


def of_config(content: str) -> Change:
    return lambda folder, config: (folder / "config.json").write_text(content) and None


def of_bytes(edit: Callable[[bytes], bytes]) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return change


def of_tensors(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Other tensors, with size and digest as stated."""

    def change(folder: Path, config: dict[str, Any]) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)
        stated = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
        put(weights=stated)(folder, config)

    return change


DAMAGES: dict[str, tuple[Change, str]] = {
    "no config": (lambda folder, config: (folder / "config.json").unlink(), "no config.json"),
    "cut config": (of_config('{"format": 1, "ki'), "config.json: not JSON"),
    "a list": (of_config("[]"), "config.json: format is"),
    "another format": (put(format=2), "config.json: format is 2"),
    "an unknown key": (put(colour="red"), r"config.json: unknown keys \['colour'\]"),
    "a missing key": (drop("space"), r"missing keys \['space'\]"),
    "another kind": (put(kind="gan"), "config.json: kind is 'gan'"),
    "another path": (put(path="spiral"), "config.json: path is 'spiral'"),
    "another network": (put(network={"name": "unet"}), "config.json: unknown network 'unet'"),
    "a network's argument": (put(network={"name": "mlp", "wdith": 3}), "config.json: network 'mlp' cannot be built"),
    "a wider network": (put(network={"name": "mlp", "width": 32, "depth": 1}), "model.safetensors: the weights do not"),
    "a space": (put(space={"shape": [2]}), "config.json: space is"),
    "no steps": (put(steps=[]), "config.json: steps"),
    "steps that are none": (put(steps="many"), "config.json: steps"),
    "a kind that fits not": (put(kind="velocity"), "export again|unexpected: gap"),
    "no weights": (lambda folder, config: (folder / "model.safetensors").unlink(), "model.safetensors: missing"),
    "a flipped bit": (of_bytes(lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]), "model.safetensors: not the file"),
    "cut weights": (of_bytes(lambda b: b[:-1]), "model.safetensors: not the file"),
    "a missing tensor": (of_tensors(lambda t: t.pop("network.enter.bias")), "missing: network.enter.bias"),
    "an extra tensor": (of_tensors(lambda t: t.update(more=torch.ones(1))), "unexpected: more"),
    "a tensor's size": (
        of_tensors(lambda t: t.update({"network.enter.bias": torch.ones(3)})),
        r"network.enter.bias is \(3,\), expected \(16,\)",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_names_the_file(what: str, toy_run: Path, tmp_path: Path) -> None:
    change, words = DAMAGES[what]
    folder = Path(shutil.copytree(toy_run / "export", tmp_path / "export"))
    change(folder, json.loads((folder / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=words) as caught:
        distill.load(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_none(tmp_path: Path, toy_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; .*RUN/export"):
        distill.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json here.*RUN/export"):
        distill.load(toy_run)
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        distill.load(checkpoints(toy_run)[-1])


def test_a_student_is_no_teacher(toy_run: Path) -> None:
    from teachers.adapters.native import Native

    with pytest.raises(CheckpointError, match="already distilled flow_map student"):
        Native(path=str(toy_run / "export")).load()
