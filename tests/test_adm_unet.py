"""torchcfm and flow_matching: one U-Net, two families, against what their own code made."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from families import golden
from proof import outline_reads_no_weights, what_starts_from
from safetensors.torch import save_file
from torch import Tensor

from teachers.adapters.flow_matching import FlowMatching
from teachers.adapters.torchcfm import TorchCFM
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.networks.adm_unet import ADMUNet, ADMUNetConfig
from teachers.networks.convention import Convention
from teachers.networks.conventions import Flow, FlowToSigmaMin
from teachers.path import Linear, expand_like
from teachers.solvers import euler, heun, rk4, uniform_grid
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher, Velocity

OTCFM, OTCFM_GOLDEN = golden("torchcfm")
CLASSES, CLASSES_GOLDEN = golden("torchcfm_classes")
CIFAR, CIFAR_GOLDEN = golden("flow_matching_cifar")
IMAGENET, IMAGENET_GOLDEN = golden("flow_matching_imagenet")
IMAGENET["label_emb.weight"][-1] = 0  # as it is kept in training

close = torch.testing.assert_close
Solver = Callable[[Velocity, Tensor, Tensor, Cond], Tensor]


def torchcfm(folder: Path, state: dict[str, Tensor], prefix: str = "", **said: Any) -> TorchCFM:
    """As train_cifar10.py writes it; with a prefix if on several devices."""
    file = Path(tempfile.mkdtemp(dir=folder)) / "otcfm_cifar10_weights_step_400000.pt"  # mapped: none is written twice
    named = {prefix + k: v for k, v in state.items()}
    held = {"ema_model": named, "net_model": {k: v + 0.05 for k, v in named.items()}}
    torch.save({**held, "sched": {"last_epoch": 1}, "optim": {"state": {}}, "step": 400000}, file)
    return TorchCFM(**{"path": str(file), "size": 8, "head_width": 32, "variant": "otcfm", **said})


def flow_matching(folder: Path, state: dict[str, Tensor], **said: Any) -> FlowMatching:
    """As train.py writes it with use_ema: the raw weights by name, the averaged ones by number."""
    file = Path(tempfile.mkdtemp(dir=folder)) / "checkpoint-899.pth"
    model = {f"model.{k}": v + 0.05 for k, v in state.items()}
    averaged = {f"shadow_params.{i}": v for i, v in enumerate(state.values())}
    args = Namespace(
        **{"discrete_flow_matching": False, "class_drop_prob": 0.2, "cfg_scale": 0.2, **said.pop("args", {})}
    )
    held = {"num_updates": torch.tensor(7), **model, **averaged}
    torch.save({"model": held, "optimizer": {}, "lr_schedule": {}, "epoch": 899, "scaler": {}, "args": args}, file)
    return FlowMatching(**{"path": str(file), "size": 8, **said})


def cifar(folder: Path, **said: Any) -> FlowMatching:
    return flow_matching(folder, CIFAR, heads=2, **said)


def imagenet(folder: Path, **said: Any) -> FlowMatching:
    return flow_matching(folder, IMAGENET, head_width=16, **said)


def midpoint(velocity: Velocity, x: Tensor, grid: Tensor, cond: Cond) -> Tensor:
    for s, t in pairwise(grid):
        half = x + (t - s) / 2 * velocity(x, s.expand(len(x)), cond)
        x = x + (t - s) * velocity(half, ((s + t) / 2).expand(len(x)), cond)
    return x


def follows(solver: Solver, velocity: Velocity, points: Tensor, grid: Tensor, cond: Cond = None) -> float:
    """The largest difference along a trajectory; every step starts where the last one ended."""
    x, off = points[0], 0.0
    for (s, t), expected in zip(pairwise(grid.double()), points[1:], strict=True):
        x = solver(velocity, x, torch.stack([s, t]), cond)
        off = max(off, (x - expected).abs().max().item())
    return off


# --- torchcfm


def test_euler_of_torchcfm_is_theirs_step_by_step(tmp_path: Path) -> None:
    teacher = torchcfm(tmp_path, OTCFM).load()
    points = OTCFM_GOLDEN["euler"]
    assert follows(euler, teacher, points, uniform_grid(8)) < 2e-6
    assert teacher.space == DataSpace((3, 8, 8), None, (-1.0, 1.0))
    assert teacher.path == Linear()
    assert teacher.info["weights"] == "ema_model"
    assert teacher.info["coupling"] == "optimal transport within a batch"
    wrong: list[Velocity] = [
        lambda x, t, c: teacher(x, 1 - t, c),
        lambda x, t, c: -teacher(x, t, c),
        lambda x, t, c: teacher(x, 1000 * t, c),
        torchcfm(tmp_path, OTCFM, weights="net_model").load(),
        torchcfm(tmp_path, OTCFM, attention_order="new", head_width=16).load(),
        torchcfm(tmp_path, OTCFM, head_width=16).load(),
        torchcfm(tmp_path, OTCFM, variant="si").load(),
    ]
    assert min(follows(euler, velocity, points[:3], uniform_grid(8)[:3]) for velocity in wrong) > 1e-3


def test_classes_of_torchcfm_have_no_null(tmp_path: Path) -> None:
    teacher = torchcfm(tmp_path, CLASSES).load()
    cond = {"class": CLASSES_GOLDEN["class"]}
    assert follows(euler, teacher, CLASSES_GOLDEN["euler"], uniform_grid(8), cond) < 2e-6
    assert follows(euler, teacher, CLASSES_GOLDEN["euler"], uniform_grid(8), {"class": cond["class"] - 1}) > 3e-3
    assert (teacher.space.classes, teacher.null) == (5, None)
    assert teacher.network_config is not None and not teacher.network_config["null_class"]
    with pytest.raises(InputError, match="never saw a null condition"):
        guided(teacher, 1.5, (0.0, 1.0))


@pytest.mark.parametrize(("variant", "sigma"), [("si", 0.0), ("fm", 0.1), ("icfm", 0.0)])
def test_every_variant_ends_where_its_own_flow_does(variant: str, sigma: float, tmp_path: Path) -> None:
    """One network is another flow in each of their times; solved in theirs or in ours it ends at the same point."""
    teacher = torchcfm(tmp_path, OTCFM, variant=variant, sigma=sigma).load()
    assert teacher.path == Linear()
    x = teacher.path.start(OTCFM_GOLDEN["x_0"])
    end = (1 + sigma) * rk4(teacher, x, uniform_grid(8) / (1 + sigma))
    close(end, OTCFM_GOLDEN["end"], atol=3e-5, rtol=0)
    other = torchcfm(tmp_path, OTCFM, variant="icfm" if variant == "si" or sigma else "si").load()
    assert (
        other(x, torch.full((2,), 0.5, dtype=torch.float64), None) - teacher(x, torch.full((2,), 0.5), None)
    ).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "convention"), [("si", Flow(native="cosine")), ("fm", FlowToSigmaMin(sigma_min=0.1))])
def test_conventions_are_those_of_their_matchers(name: str, convention: Convention) -> None:
    """Told the velocity that a matcher regresses on, at the matcher's point, the convention gives x_1 - x_0."""
    x_0, x_1, native, point, velocity = (
        OTCFM_GOLDEN[f"{name}_{part}"] for part in ("x_0", "x_1", "t", "point", "velocity")
    )
    own = (
        (torch.sin(native * torch.pi / 2), torch.cos(native * torch.pi / 2))
        if name == "si"
        else (native, 1 - 0.9 * native)
    )
    t, size = own[0] / sum(own), own[0] + own[1]
    x = point / expand_like(size, point)
    close(x, Linear().point(x_0, x_1, t), atol=1e-12, rtol=0)
    entered, label = convention.enter(x, t)
    close(entered, point, atol=1e-12, rtol=0)
    close(label, native, atol=1e-12, rtol=0)
    close(convention.leave(velocity, x, t), x_1 - x_0, atol=1e-12, rtol=0)
    assert (Flow().leave(velocity, x, t) - (x_1 - x_0)).abs().max() > 0.05


def test_sigma_is_for_the_path_that_shrinks_to_it(tmp_path: Path) -> None:
    for variant in ("otcfm", "icfm", "si"):
        with pytest.raises(FieldError, match="noise is then added to the whole path") as error:
            torchcfm(tmp_path, OTCFM, variant=variant, sigma=0.1).load()
        assert set(error.value.problems) == {"sigma"}
    with pytest.raises(FieldError, match="sigma must be in"):
        torchcfm(tmp_path, OTCFM, sigma=1.0)


def test_weights_of_data_parallel_training_are_the_same(tmp_path: Path) -> None:
    x, t = OTCFM_GOLDEN["x_0"], torch.tensor([0.2, 0.7], dtype=torch.float64)
    alone = torchcfm(tmp_path, OTCFM).load()(x, t, None)
    assert torch.equal(torchcfm(tmp_path, OTCFM, prefix="module.").load()(x, t, None), alone)


# --- flow_matching


def test_heun_of_flow_matching_is_theirs_step_by_step(tmp_path: Path) -> None:
    teacher = cifar(tmp_path).load()
    points, grid = CIFAR_GOLDEN["heun"], CIFAR_GOLDEN["grid"]
    assert follows(heun, teacher, points, grid) < 2e-6
    assert teacher.info["weights"] == "shadow_params (averaged)"
    assert (teacher.space.classes, teacher.null) == (None, None)
    wrong = [cifar(tmp_path, attention_order="legacy").load(), cifar(tmp_path, weights="model").load()]
    assert min(follows(heun, velocity, points[:3], grid[:3]) for velocity in wrong) > 1e-3


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.5])
def test_guidance_of_flow_matching_is_one_more_than_theirs(scale: float, tmp_path: Path) -> None:
    teacher = imagenet(tmp_path).load()
    points, grid, cond = (
        IMAGENET_GOLDEN[f"midpoint_{scale}"],
        IMAGENET_GOLDEN["grid"],
        {"class": IMAGENET_GOLDEN["class"]},
    )
    assert follows(midpoint, guided(teacher, 1 + scale, (0.0, 1.0)), points, grid, cond) < 2e-6
    assert follows(midpoint, guided(teacher, scale, (0.0, 1.0)), points, grid, cond) > 3e-4
    assert teacher.null is not None and teacher.null["class"] == teacher.space.classes == 5
    assert teacher.info["sampler"]["guidance"] == 1.2


@pytest.mark.parametrize(("make", "numbers"), [(cifar, CIFAR_GOLDEN), (imagenet, IMAGENET_GOLDEN)])
def test_raw_weights_are_taken_if_asked_for(
    make: Callable[..., FlowMatching], numbers: dict[str, Tensor], tmp_path: Path
) -> None:
    teacher = make(tmp_path, weights="model").load()
    cond = {"class": numbers["class"]} if "class" in numbers else None
    t = torch.tensor([0.3, 0.6])  # their float32
    close(teacher(numbers["x_0"], t, cond), numbers["raw"], atol=3e-5, rtol=0)
    assert teacher.info["weights"] == "model"
    assert (make(tmp_path).load()(numbers["x_0"], t, cond) - numbers["raw"]).abs().max() > 0.05


def test_without_averaged_weights_the_names_stand_alone(tmp_path: Path) -> None:
    averaged = cifar(tmp_path).load()
    torch.save({"model": CIFAR, "optimizer": {}, "epoch": 1}, tmp_path / "raw.pth")
    save_file(CIFAR, tmp_path / "raw.safetensors")
    x, t = CIFAR_GOLDEN["x_0"], torch.tensor([0.3, 0.6], dtype=torch.float64)
    for name in ("raw.pth", "raw.safetensors"):
        config = FlowMatching(path=str(tmp_path / name), size=8, heads=2)
        assert torch.equal(config.load()(x, t, None), averaged(x, t, None))
        with pytest.raises(CheckpointError, match="without use_ema"):
            replace(config, weights="shadow_params").load()


def test_a_null_that_was_never_drawn_does_not_guide(tmp_path: Path) -> None:
    teacher = imagenet(tmp_path, args={"class_drop_prob": 0.0}).load()
    assert teacher.null is None
    with pytest.raises(InputError, match="never saw a null condition"):
        guided(teacher, 1.5, (0.0, 1.0))


def test_a_discrete_flow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-899.pth: a discrete flow.*without discrete_flow_matching"):
        cifar(tmp_path, args={"discrete_flow_matching": True}).load()
    held = {f"unet.{k}": v for k, v in CIFAR.items()} | {"pixel_embedding.embedding_table.weight": torch.ones(257, 9)}
    torch.save({"model": held}, tmp_path / "discrete.pth")
    with pytest.raises(CheckpointError, match="a discrete flow"):
        FlowMatching(path=str(tmp_path / "discrete.pth"), size=8, heads=2).outline()


# --- both


CONFIGS: list[Callable[[Path], TorchCFM | FlowMatching]] = [
    lambda folder: torchcfm(folder, OTCFM),
    lambda folder: torchcfm(folder, CLASSES, variant="si"),
    lambda folder: torchcfm(folder, OTCFM, variant="fm", sigma=0.1),
    cifar,
    imagenet,
]
NAMES = ["otcfm", "si", "fm", "cifar", "imagenet"]


@pytest.mark.parametrize("make", CONFIGS, ids=NAMES)
def test_what_starts_from_it(make: Callable[[Path], TorchCFM | FlowMatching], tmp_path: Path) -> None:
    config = make(tmp_path)
    teacher = config.load()
    what_starts_from(teacher, tmp_path)
    outline_reads_no_weights(config)


PUBLISHED: list[tuple[ADMUNetConfig, type[TorchCFM | FlowMatching], dict[str, Any], int | None, int]] = [
    (ADMUNetConfig(head_width=64), TorchCFM, {"variant": "icfm"}, None, 32),
    (ADMUNetConfig(widths=(256,) * 3, blocks=4, order="new", scale_shift=True, resample="pool"), FlowMatching, {}, None,
     32),
    (ADMUNetConfig(width=192, widths=(192, 384, 576, 768), blocks=3, attention=(1, 2, 3), head_width=64, order="new",
                   scale_shift=True, resample="block", null_class=True), FlowMatching, {"size": 64}, 1000, 64),
]  # fmt: skip


@pytest.mark.parametrize(("network", "family", "said", "classes", "size"), PUBLISHED)
def test_published_networks_are_known_by_their_shapes(
    network: ADMUNetConfig,
    family: type[TorchCFM | FlowMatching],
    said: dict[str, Any],
    classes: int | None,
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with init_empty_weights():
        shapes = network.build(DataSpace((3, size, size), classes)).state_dict()
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: shapes)
    (tmp_path / "x.pt").touch()
    teacher = family(path=str(tmp_path / "x.pt"), **said).outline()
    entry = dict(teacher.network_config or {})
    assert entry.pop("name") == "adm_unet"
    assert ADMUNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}) == network
    assert teacher.space == DataSpace((3, size, size), classes, (-1.0, 1.0))


@pytest.mark.parametrize(("resample", "levels"), [("conv", 1), ("conv", 3), ("pool", 3), ("block", 2), ("block", 3)])
def test_levels_are_read_from_the_names(resample: str, levels: int, tmp_path: Path) -> None:
    network = ADMUNetConfig(width=8, widths=(32,) * levels, blocks=2, attention=(levels - 1,), resample=resample)  # type: ignore[arg-type]
    torch.save(network.build(DataSpace((1, 8, 8))).state_dict(), tmp_path / "x.pt")
    teacher = TorchCFM(path=str(tmp_path / "x.pt"), size=8, heads=1, variant="icfm").outline()
    entry = teacher.network_config or {}
    assert (entry["widths"], entry["blocks"], entry["attention"]) == ([32] * levels, 2, [levels - 1])
    assert entry["resample"] == resample


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("middle_block.1.qkv.bias"), r"400000\.pt.*missing: middle_block.1.qkv.bias"),
        (lambda w: w.update({"input_blocks.1.0.x": torch.ones(1)}), r"unexpected: input_blocks.1.0.x"),
        (lambda w: w.update({"out.2.bias": torch.ones(2)}), r"wrong size: out.2.bias is \(2,\), expected \(3,\)"),
        (
            lambda w: w.update({"time_embedding.0.weight": w.pop("time_embed.0.weight")}),
            "has no time_embed.0.weight, so it",
        ),
        (
            lambda w: w.update({"out.2.weight": torch.ones(6, 32, 3, 3)}),
            "3 channels enter and 6 leave.*learned variance",
        ),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("input_blocks.3.")], "do not make|missing"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    weights = dict(OTCFM)
    change(weights)
    config = torchcfm(tmp_path, weights)
    for make in (config.load, config.outline):
        with pytest.raises(CheckpointError, match=said):
            make()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("shadow_params.7"), r"899\.pth.*do not agree on shadow_params.7; .*teacher.weights: model"),
        (lambda s: s.update({"shadow_params.7": torch.ones(3)}), "wrong size"),
        (lambda s: s.update({"shadow_params.999": torch.ones(3)}), "do not agree on shadow_params.999"),
        (lambda s: s.pop("model.out.0.bias"), "missing: out.0.bias"),
        (lambda s: s.update({"model.out.0.x": torch.ones(3)}), "unexpected: out.0.x"),
        (lambda s: s.update({"stray": torch.ones(3)}), "unexpected: stray"),
    ],
)
def test_averaged_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    config = cifar(tmp_path)
    held = torch.load(config.path, weights_only=False)
    change(held["model"])
    torch.save(held, config.path)
    for make in (config.load, config.outline):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_other_files_are_refused(tmp_path: Path) -> None:
    config = torchcfm(tmp_path, OTCFM)
    file = Path(config.path)
    torch.save({"model_state": OTCFM, "epoch": 3}, file)
    with pytest.raises(CheckpointError, match=r"holds model_state .*looked for ema_model, net_model.*teacher.weights"):
        config.load()
    torch.save(OTCFM, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        config.load()
    with pytest.raises(FieldError, match="must be shadow_params, model or null"):
        cifar(tmp_path, weights="ema").load()


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({"variant": None}, {"variant"}),
        ({"size": None}, {"size"}),
        ({"head_width": None}, {"heads"}),
        ({"size": None, "head_width": None}, {"size", "heads"}),
        ({"heads": 2}, {"heads"}),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(said: dict[str, Any], asked: set[str], tmp_path: Path) -> None:
    for make in ("load", "outline"):
        with pytest.raises(FieldError) as error:
            getattr(torchcfm(tmp_path, OTCFM, **said), make)()
        assert set(error.value.problems) == asked


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"widths": (48,)}, {"widths"}),
        ({"widths": ()}, {"widths"}),
        ({"attention": (4,)}, {"attention"}),
        ({"heads": 3}, {"heads"}),
        ({"head_width": 48}, {"head_width"}),
        ({"width": 7, "blocks": 0}, {"width", "blocks"}),
        ({"order": "old", "resample": "fft"}, {"order", "resample"}),
    ],
)
def test_out_of_range_arguments_are_named(config: dict[str, Any], wrong: set[str]) -> None:
    with pytest.raises(FieldError) as error:
        ADMUNetConfig(**config)
    assert wrong <= set(error.value.problems)


def test_images_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(FieldError, match="multiples of 8"):
        ADMUNetConfig().check(DataSpace((3, 28, 28)))
    with pytest.raises(FieldError, match="without classes"):
        ADMUNetConfig(null_class=True).check(DataSpace((3, 32, 32)))


def test_time_enters_every_block_the_class_too(tmp_path: Path) -> None:
    teacher: Teacher = imagenet(tmp_path).load()
    assert isinstance(teacher.network, ADMUNet)
    x, t = IMAGENET_GOLDEN["x_0"], torch.tensor([0.3, 0.6], dtype=torch.float64)
    with pytest.raises(ValueError, match="conditioned on 5 classes"):
        teacher(x, t, None)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 5\]"):
        teacher(x, t, {"class": torch.tensor([0, 6])})
