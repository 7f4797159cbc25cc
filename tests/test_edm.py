"""EDM and its baselines, against numbers of their own code: denoised images, Euler step by step, and its Heun."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import golden
from proof import outline_reads_no_weights, student_starts_at, what_starts_from
from torch import Tensor, nn

from teachers.adapters.edm import EDM
from teachers.convert import convert
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.networks.converted import Converted
from teachers.networks.noise_levels import NoiseLevels
from teachers.velocity import Teacher

ALL, GOLDEN = golden("edm")
SHARED = {"vp": "ddpmpp", "ve": "ncsnpp", "iddpm": "adm"}
NAMES = ("ddpmpp", "ncsnpp", "skips", "adm", "vp", "ve", "iddpm")
CLASSES = {"vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond"}
TAPS = {"ncsnpp": (1, 3, 3, 1), "ve": (1, 3, 3, 1), "skips": (1, 3, 3, 1)}
LABELLED = ("ddpmpp", "adm", "vp", "iddpm")
RESAMPLED = {
    "ddpmpp": ("enc.4x4_down.{}", "dec.8x8_up.{}"),
    "adm": ("enc.4x4_down.{}", "dec.8x8_up.{}"),
    "ncsnpp": ("enc.4x4_down.{}", "dec.8x8_up.{}", "enc.4x4_aux_residual"),
    "skips": ("enc.4x4_down.{}", "dec.8x8_up.{}", "enc.4x4_aux_down", "dec.8x8_aux_up"),
}


def state(name: str) -> dict[str, Tensor]:
    """What state_dict() of the original network holds."""
    arch = SHARED.get(name, name)
    weights = {k.partition(":")[2]: v for k, v in ALL.items() if k.startswith(f"{arch}:")}
    weights |= {k.partition(":")[2]: v for k, v in ALL.items() if k.startswith(f"{name}:")}
    weights = {k: 16 * v if k.endswith("freqs") else v for k, v in weights.items()}
    row = torch.tensor(TAPS.get(name, (1, 1))).float()
    kernel = torch.outer(row, row)[None, None] / row.sum() ** 2
    for place in RESAMPLED[arch]:
        for part in ("conv0", "skip") if "{}" in place else ("",):
            weights[f"model.{place.format(part)}.resample_filter"] = kernel
    if name == "iddpm":
        weights["u"] = torch.zeros(1001)
    return weights


# --- their files, without their code


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("the code of the file ran")


class Persistent:
    """An object of theirs: pickled it carries the source of its class."""

    def __init__(self, name: str, state: Mapping[str, Any]) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('ran')", "class_name": name,
                     "state": dict(state)}  # fmt: skip

    def __reduce__(self) -> Any:
        return _reconstruct_persistent_obj, (self.meta,)


def module(tensors: Mapping[str, Tensor], name: str = "Linear", **further: Any) -> Persistent:
    """A module of theirs with a state_dict."""
    own = {k: v for k, v in tensors.items() if "." not in k}
    buffers = {k: v for k, v in own.items() if k in ("u", "freqs", "phases", "resample_filter")}
    parts = dict.fromkeys(k.partition(".")[0] for k in tensors if "." in k)
    under = {p: {k.partition(".")[2]: v for k, v in tensors.items() if k.partition(".")[0] == p} for p in parts}
    state = {
        "training": False,
        "_parameters": {k: nn.Parameter(v, requires_grad=False) for k, v in own.items() if k not in buffers},
        "_buffers": {**buffers, "unused": None},
        "_non_persistent_buffers_set": set(),
        "_modules": {**{p: module(v) for p, v in under.items()}, "none": None} if under else {},
        **further,
    }
    return Persistent(name, state)


@pytest.fixture(autouse=True)
def their_module(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("torch_utils.persistence")
    theirs._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", theirs)
    monkeypatch.setattr(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence")


def saved(folder: Path, name: str, weights: Mapping[str, Tensor] | None = None, **init: Any) -> str:
    """As their training loop writes it."""
    kwargs = {"img_resolution": 8, "img_channels": 3, "label_dim": 5, "model_type": "SongUNet", **init}
    net = module(weights or state(name), CLASSES.get(name, "EDMPrecond"), _init_args=(), _init_kwargs=kwargs)
    held = {"ema": net, "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}), "augment_pipe": None,
            "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "path": "x.zip"}}  # fmt: skip
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(held))
    return str(folder / f"{name}.pkl")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    return {}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def teacher(name: str, teachers: dict[str, Teacher], tmp_path: Path) -> Teacher:
    if name not in teachers:
        teachers[name] = EDM(path=saved(tmp_path, name)).load()
    return teachers[name]


# --- their numbers


def velocity(teacher: Teacher, z: Tensor, t: Tensor, classes: Tensor) -> Tensor:
    """Of the linear path from its very start, at z and t ``[b]`` in float64."""
    first = teacher.path(torch.zeros(1, dtype=torch.float64)).alpha.item()
    cond = {"class": classes} if teacher.space.classes else None
    return teacher(z, ((t - first) / (1 - first)).clamp(0, 1), cond) / (1 - first)


def denoised(teacher: Teacher, x: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
    """D(x; sigma) of points x_1 + sigma x_0."""
    t = 1 / (1 + sigma)
    scale = t[:, None, None, None]
    z = scale * x
    return z + (1 - scale) * velocity(teacher, z.float(), t, classes)


def grid(name: str, steps: int) -> Tensor:
    """EDM's levels, and 0 behind them."""
    high, low = 80 ** (1 / 7), {"ve": 0.02, "iddpm": LEAST}.get(name, 0.002) ** (1 / 7)
    levels = (high + torch.arange(steps, dtype=torch.float64) / (steps - 1) * (low - high)) ** 7
    if name == "iddpm":
        levels = torch.tensor([IDDPM.nearest(level) for level in levels.tolist()], dtype=torch.float64)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


IDDPM = NoiseLevels(form="iddpm")
LEAST = IDDPM.nearest(0.0)


def size(of: Tensor) -> float:
    return max(1.0, of.abs().max().item())


def test_denoised_images_are_theirs(name: str, teacher: Teacher) -> None:
    sigma = GOLDEN["sigma_iddpm" if name == "iddpm" else "sigma"].double()
    x = GOLDEN["x"][:, : teacher.space.shape[0]] * (1 + sigma)[:, None, None, None]
    wanted = GOLDEN[f"{name}:D"]
    found = denoised(teacher, x, sigma, GOLDEN["classes"])
    assert (found - wanted).abs().max() < 2e-6 * size(wanted) * (10 if name in ("vp", "iddpm") else 1)
    wrong = denoised(teacher, x, 1 / sigma, GOLDEN["classes"])  # the time flipped
    assert (wrong - wanted).abs().max() > 0.1
    assert teacher.info["weights"] == "ema"
    assert teacher.space.classes == (5 if name in LABELLED else None)
    if name != "iddpm":
        assert (teacher.path.first, teacher.path.std) == (1 / 81, 80 / 81)  # type: ignore[attr-defined]


def test_euler_is_theirs_step_by_step(name: str, teacher: Teacher) -> None:
    levels = grid(name, 5)
    times = 1 / (1 + levels)
    z = teacher.path.start(GOLDEN["noise"][:, : teacher.space.shape[0]])
    points = [z]
    for s, t in pairwise(times):
        points.append(points[-1] + (t - s).float() * velocity(teacher, points[-1], s.expand(2), GOLDEN["class"]))
    wanted = GOLDEN[f"{name}:euler"]
    scales = (1 / times).float()[-len(wanted) :, None, None, None, None]
    got = torch.stack(points[-len(wanted) :]) * scales
    tolerance = {"vp": 3e-4, "ve": 1e-4, "iddpm": 3e-4}.get(name, 3e-6)
    assert ((got - wanted).abs() / scales.clamp_max(80)).max() < tolerance


def test_their_heun_through_our_velocity(name: str, teacher: Teacher) -> None:
    levels = grid(name, 4)
    x = GOLDEN["noise"][:, : teacher.space.shape[0]] * levels[0]  # in float64, as theirs
    for sigma, following in pairwise(levels):
        at, then = sigma.expand(2), following.expand(2)
        slope = (x - denoised(teacher, x, at, GOLDEN["class"])) / sigma
        step = following - sigma
        end = x + step * slope
        if following > 0:
            slope = (slope + (end - denoised(teacher, end, then, GOLDEN["class"])) / following) / 2
        x = x + step * slope
    wanted = GOLDEN[f"{name}:heun"]
    assert (x - wanted).abs().max() < 2e-5 * size(wanted)  # the last correction divides by sigma


@pytest.mark.parametrize("name", ["ddpmpp", "adm"], indirect=True)
@pytest.mark.parametrize("change", [{"sigma_data": 1.0}, {"form": "ve"}, {"form": "vp"}, {"form": "iddpm"}])
def test_another_dressing_is_another_function(teacher: Teacher, name: str, change: dict[str, Any]) -> None:
    network = teacher.network
    assert isinstance(network, Converted)
    dressed = Converted(network.network, replace(network.convention, **change))  # type: ignore[type-var]
    other = replace(teacher, velocity=dressed, network=dressed)
    sigma = GOLDEN["sigma"].double()
    x = GOLDEN["x"] * (1 + sigma)[:, None, None, None].float()
    assert (denoised(other, x, sigma, GOLDEN["classes"]) - GOLDEN[f"{name}:D"]).abs().max() > 0.05


# --- as every teacher


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "skips", "adm", "vp", "ve", "iddpm"], indirect=True)
def test_what_starts_from_it(teacher: Teacher, tmp_path: Path) -> None:
    what_starts_from(teacher, tmp_path)


def test_velocities_are_finite_at_both_ends_and_none_of_none(teacher: Teacher) -> None:
    x = GOLDEN["x"][:2, : teacher.space.shape[0]]
    assert teacher(x[:0], torch.zeros(0), {"class": torch.zeros(0, dtype=torch.long)}).shape == x[:0].shape
    cond = teacher.space.cond_for(0, 2)
    for t in (0.0, 1.0):
        assert teacher(x, torch.full((2,), t, dtype=torch.float64), cond).isfinite().all()


def test_files_in_each_form_are_the_same_teacher(tmp_path: Path) -> None:
    file = Path(saved(tmp_path, "adm"))
    found = EDM(path=str(file)).load()
    said = convert(file, tmp_path / "a.safetensors")
    assert "of ema" in said and "kept beside them: augment_pipe, dataset_kwargs, class, init" in said
    assert "left out: loss_fn (persistent.EDMLoss)" in said
    torch.save(state("adm"), tmp_path / "a.pt")
    x, t, cond = GOLDEN["x"], torch.tensor([0.1, 0.5, 0.9]).double(), {"class": GOLDEN["classes"]}
    for config in (EDM(path=str(tmp_path / "a.safetensors")), EDM(path=str(tmp_path / "a.pt"), preconditioning="edm")):
        other = config.load()
        assert torch.equal(found(x, t, cond), other(x, t, cond))
        assert other.network_config == found.network_config


def test_an_outline_reads_no_weights(name: str, tmp_path: Path) -> None:
    config = EDM(path=saved(tmp_path, name))
    outline = outline_reads_no_weights(config)
    assert outline.info["licence"] == "CC-BY-NC-SA-4.0"


def test_without_a_null_class_there_is_no_guidance(tmp_path: Path) -> None:
    teacher = EDM(path=saved(tmp_path, "ddpmpp")).load()
    with pytest.raises(InputError, match="never saw a null condition"):
        guided(teacher, 2.0, (0.0, 1.0))
    with pytest.raises(ValueError, match=r"classes must be in \[0, 4\]"):
        teacher(GOLDEN["x"], torch.rand(3), {"class": torch.tensor([0, 1, 5])})


def test_a_null_class_that_was_trained_is_known(tmp_path: Path) -> None:
    teacher = EDM(path=saved(tmp_path, "ddpmpp", label_dropout=0.1)).load()
    assert teacher.null is not None and teacher.null["class"] == 5
    weights = state("ddpmpp")
    weights["model.map_label.weight"] = torch.zeros_like(weights["model.map_label.weight"])
    without = EDM(path=saved(tmp_path, "ddpmpp", weights)).load()
    x, t, cond = GOLDEN["x"], torch.rand(3).double(), {"class": GOLDEN["classes"]}
    v, none = teacher(x, t, cond), without(x, t, cond)
    assert (v - none).abs().max() > 0.01
    torch.testing.assert_close(guided(teacher, 2.0, (0.0, 1.0))(x, t, cond), 2 * v - none, atol=1e-5, rtol=0)
    student_starts_at(teacher)


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    torch.save(state("ddpmpp"), tmp_path / "a.pt")
    with pytest.raises(FieldError, match="does not say it") as error:
        EDM(path=str(tmp_path / "a.pt")).load()
    assert set(error.value.problems) == {"preconditioning"}
    with pytest.raises(FieldError, match=r"is vp, but .*ddpmpp\.pkl says edm"):
        EDM(path=saved(tmp_path, "ddpmpp"), preconditioning="vp").load()
    with pytest.raises(FieldError, match="sigma_max"):
        EDM(path="x.pkl", sigma_max=0.001)


def test_a_network_made_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ddpmpp\.pkl: its network was made with beta_d=3\.0"):
        EDM(path=saved(tmp_path, "ddpmpp", beta_d=3.0)).load()


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda w: w.pop("model.map_layer1.bias"), "missing: map_layer1.bias"),
    "extra": (lambda w: w.update({"model.map_layer2.bias": torch.ones(1)}), "unexpected: map_layer2.bias"),
    "renamed": (lambda w: w.update({"model.enc.8x8_block0.c.weight": w.pop("model.enc.8x8_block0.conv0.weight")}),
                r"missing: enc.8x8_block0.conv0.weight; unexpected: enc.8x8_block0.c.weight"),
    "size": (lambda w: w.update({"model.map_layer1.bias": torch.ones(3)}), r"wrong size: map_layer1.bias is \(3,\)"),
    "no level": (lambda w: [w.pop(k) for k in list(w) if "8x8_conv" in k], r"no enc.8x8_conv.weight"),
    "another family": (lambda w: [w.pop(k) for k in list(w) if ".enc." in k], "has no levels enc.NxN_"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    change, said = WRONG[what]
    weights = state("ddpmpp")
    change(weights)
    config = EDM(path=saved(tmp_path, "ddpmpp", weights))
    for make in (config.load, config.outline):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_a_file_that_is_cut_short_or_hostile_is_refused(tmp_path: Path) -> None:
    file = Path(saved(tmp_path, "ddpmpp"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"ddpmpp\.pkl: "):
        EDM(path=str(file)).load()
    hostile = whole.replace(b"torch_utils.persistence", b"torch_utils.persistenza")
    file.write_bytes(hostile)
    with pytest.raises(CheckpointError, match=r"asks to call torch_utils\.persistenza"):
        EDM(path=str(file)).load()
