"""shortcut-models: JAX pickles as teachers and as finished students, against what their own code made."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import golden, weights
from proof import export_keeps, outline_reads_no_weights, student_starts_at, what_starts_from
from torch import Tensor

import distill
from distill import finished
from teachers.adapters.shortcut_models import LATENT, ShortcutModels
from teachers.adapters.sit import SiT
from teachers.errors import CheckpointError
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.networks.shortcut import ShortcutConfig, StepEmbedder
from teachers.networks.sit import SiTConfig
from teachers.solvers import euler, uniform_grid
from teachers.space import DataSpace

_MADE, GOLDEN = golden("shortcut_models")
COND = {"class": GOLDEN["class"]}
T, K = GOLDEN["t"].double(), GOLDEN["k"].double()


def kept_in_size(name: str, tensor: Tensor) -> Tensor:
    """What comes in is in front of what goes out, here."""
    return tensor * (tensor[0].numel() / tensor[..., 0].numel()) ** 0.5 if name.endswith("kernel") else tensor


WEIGHTS = {name: kept_in_size(name, tensor) for name, tensor in _MADE.items()}


def near(got: Tensor, name: str, tolerance: float = 4e-6) -> None:
    torch.testing.assert_close(got, GOLDEN[name], atol=tolerance, rtol=0)


def tree(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """By layer, as flax has them."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *above, last = name.split(".")
        place = found
        for key in above:
            place = place.setdefault(key, {})
        place[last] = tensor.numpy()
    return found


def saved(folder: Path, averaged: dict[str, Tensor] = WEIGHTS) -> str:
    """As its Checkpoint writes it: one pickle, without a suffix."""
    raw = {name: tensor + 1 for name, tensor in averaged.items()}
    state = {"params": tree(raw), "params_ema": tree(averaged), "opt_state": (tree(raw),), "step": 810_000}
    (folder / "model810001").write_bytes(pickle.dumps({"train_state": state, "_timestamp": 1.7e9}))
    return str(folder / "model810001")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ShortcutModels:
    return ShortcutModels(path=saved(tmp_path_factory.mktemp("shortcut")), size=8, heads=4, licence="MIT")


def test_the_velocity_is_theirs_at_the_finest_steps(config: ShortcutModels) -> None:
    teacher = config.load()
    near(teacher(GOLDEN["x_0"], T, COND), "velocity")
    for wrong in (teacher(GOLDEN["x_0"], 1 - T, COND), teacher(GOLDEN["x_0"], 128 * T, COND)):
        assert (wrong - GOLDEN["velocity"]).abs().max() > 0.02
    coarse = ShortcutModels(path=config.path, size=8, heads=4, finest=1).load()
    assert (coarse(GOLDEN["x_0"], T, COND) - GOLDEN["velocity"]).abs().max() > 0.02
    heads = ShortcutModels(path=config.path, size=8, heads=2).load()
    assert (heads(GOLDEN["x_0"], T, COND) - GOLDEN["velocity"]).abs().max() > 0.02
    assert teacher.info["weights"] == "train_state.params_ema"
    assert (teacher.space.shape, teacher.space.classes, teacher.latent) == ((4, 8, 8), 10, LATENT)


@pytest.mark.parametrize("wrong", ["keys and queries exchanged", "attention by the root", "positions turned"])
def test_what_their_attention_needs(wrong: str, config: ShortcutModels, tmp_path: Path) -> None:
    """The twins of the layout."""
    teacher = config.load()
    state = teacher.network.state_dict()  # type: ignore[union-attr]
    if wrong == "positions turned":
        state["network.pos_embed"] = state["network.pos_embed"].roll(32, dims=-1)
    for key in state if wrong != "positions turned" else ():
        if ".attn.qkv." in key:
            query, key_, value = state[key].chunk(3)
            three = (key_, query, value) if "exchanged" in wrong else (4 * query, key_, value)
            state[key] = torch.cat(three)
    teacher.network.load_state_dict(state)  # type: ignore[union-attr]
    assert (teacher(GOLDEN["x_0"], T, COND) - GOLDEN["velocity"]).abs().max() > 0.003


def test_guided_euler_is_theirs(config: ShortcutModels) -> None:
    near(euler(guided(config.load(), 1.5, (0.0, 1.0)), GOLDEN["x_0"], uniform_grid(8), COND), "euler8", 1e-5)


def test_the_whole_is_a_shortcut_student(config: ShortcutModels, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    finished.export(config, folder)
    for student in (finished.student(config), distill.load(folder)):
        near(student.mean_velocity(GOLDEN["x_0"], T, T + 2**-K, COND), "u")
        near(student.mean_velocity(GOLDEN["x_0"], T, T, COND), "velocity")
        for steps in (1, 2, 4):
            near(student.generate(GOLDEN["x_0"], steps, COND), f"sample{steps}", 1e-5)
        assert (student.kind, student.finest) == ("shortcut", 128)
        with pytest.raises(ValueError, match="power of two"):
            student.generate(GOLDEN["x_0"], 3, COND)
    assert (student.mean_velocity(GOLDEN["x_0"], T, T, COND) - GOLDEN["u"]).abs().max() > 0.02


def test_one_class_means_none(tmp_path: Path) -> None:
    """Trained on "no class" alone."""
    table = "LabelEmbedder_0.Embed_0.embedding"
    config = ShortcutModels(path=saved(tmp_path, WEIGHTS | weights({table: (2, 64)})), size=8, heads=4)
    teacher = config.load()
    assert (teacher.space.classes, teacher.null) == (None, None)
    student = finished.student(config)
    near(student.mean_velocity(GOLDEN["x_0"], T, T + 2**-K, None), "unconditional")
    export_keeps(student_starts_at(teacher), teacher, tmp_path / "export")


def test_what_starts_from_the_diagonal(config: ShortcutModels, tmp_path: Path) -> None:
    teacher = config.load()
    what_starts_from(teacher, tmp_path)


def test_steps_are_told_by_their_number_and_have_a_slope_everywhere() -> None:
    embedder = StepEmbedder(16, 128)
    told = super(StepEmbedder, embedder).forward
    lengths = torch.tensor([1.0, 0.5, 2.0**-7, 2.0**-8, 0.0], dtype=torch.float64)
    assert torch.equal(embedder(lengths), told(torch.tensor([0.0, 1.0, 7.0, 7.0, 7.0], dtype=torch.float64)))
    _, slope = torch.func.jvp(embedder, (lengths,), (torch.ones_like(lengths),))
    assert slope.isfinite().all()
    assert slope[1].any() and not slope[-1].any()
    network = ShortcutConfig(network=SiTConfig(width=16, depth=1, heads=2), finest=4).build(DataSpace((1, 4, 4), 3))
    new = network.second_time()
    assert isinstance(new, StepEmbedder)
    assert torch.equal(new.mlp[0].weight, network.network.t_embedder.mlp[0].weight)
    assert not new(lengths).any()


def test_an_outline_reads_no_weights(config: ShortcutModels) -> None:
    outline_reads_no_weights(config)


def test_what_the_file_does_not_say_is_asked_for(config: ShortcutModels) -> None:
    with pytest.raises(FieldError, match="side of what it works on") as error:
        ShortcutModels(path=config.path).outline()
    assert set(error.value.problems) == {"size"}
    with pytest.raises(FieldError, match="finest must be a power of two"):
        ShortcutModels(path=config.path, finest=100)
    with pytest.raises(FieldError, match="null_class must be false without classes"):
        ShortcutConfig(network=SiTConfig()).check(DataSpace((4, 8, 8)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("DiTBlock_1.Dense_2.bias"), r"of 2 blocks; missing: DiTBlock_1.Dense_2.bias"),
        (lambda w: w.pop("TimestepEmbedder_1.Dense_1.kernel"), r"missing: TimestepEmbedder_1.Dense_1.kernel"),
        (lambda w: w.update({"DiTBlock_1.Dense_7.bias": torch.ones(1)}), r"unexpected: DiTBlock_1.Dense_7.bias"),
        (lambda w: w.update({"FinalLayer_0.Dense_1.bias": torch.ones(3)}), r"final_layer.linear.bias is \(3,\)"),
        (lambda w: w.pop("PatchEmbed_0.Conv_0.kernel"), r"has no PatchEmbed_0.Conv_0.kernel"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    changed = dict(WEIGHTS)
    change(changed)
    config = ShortcutModels(path=saved(tmp_path, changed), size=8, heads=4)
    for make in (config.load, config.outline, config.two_time):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_a_cut_file_and_another_family_are_told(config: ShortcutModels, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"teacher\.name: shortcut_models"):
        SiT(path=config.path).outline()
    path = Path(saved(tmp_path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="model810001: cut short"):
        ShortcutModels(path=str(path), size=8).outline()
