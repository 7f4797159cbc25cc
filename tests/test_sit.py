"""SiT, REPA and DiT against what their own code and their own samplers made."""

from __future__ import annotations

import math
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import golden
from proof import batch, derivatives_are_exact, outline_reads_no_weights, student_starts_at, what_starts_from
from safetensors.torch import save_file
from torch import Tensor

import distill
from distill.export import Facts, write
from distill.student import StudentConfig
from teachers.adapters.sit import REPA, DiT, SiT
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.networks.converted import Converted
from teachers.path import PATHS, Linear, expand_like
from teachers.solvers import euler, rk4
from teachers.space import Latent
from teachers.velocity import Rule, Teacher, Velocity

SIT, SIT_GOLDEN = golden("sit")
REPA_WEIGHTS, REPA_GOLDEN = golden("repa")
QK_NORM, QK_NORM_GOLDEN = golden("repa_qk_norm")
DIT, DIT_GOLDEN = golden("dit")
LATENT = Latent(autoencoder="stabilityai/sd-vae-ft-ema", scale=0.18215)
NATIVE = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}

close = torch.testing.assert_close
Family = SiT | REPA | DiT


def saved(folder: Path, weights: dict[str, Tensor], **args: Any) -> Path:
    """As the train.py of each writes it: the averaged weights beside others."""
    file = Path(tempfile.mkdtemp(dir=folder)) / "0400000.pt"  # weights are mapped: no file is written twice
    raw = {k: v + 0.05 for k, v in weights.items()}
    torch.save({"model": raw, "ema": weights, "opt": {"state": {}}, "args": Namespace(**args)}, file)
    return file


def sit(folder: Path, native: str = "linear", head: str = "velocity", **said: Any) -> SiT:
    file = saved(folder, SIT, path_type=NATIVE[native], prediction=head, num_classes=10, vae="ema")
    return SiT(**{"path": str(file), "heads": 4, **said})


def repa(folder: Path, native: str = "linear", state: dict[str, Tensor] = REPA_WEIGHTS, **said: Any) -> REPA:
    file = saved(folder, state, path_type=native, num_classes=1000, encoder_depth=1)
    return REPA(**{"path": str(file), "heads": 4, "latent": LATENT, **said})


def dit(folder: Path, **said: Any) -> DiT:
    return DiT(**{"path": str(saved(folder, DIT, num_classes=10, vae="ema")), "heads": 4, **said})


def double(teacher: Teacher) -> Teacher:
    assert teacher.network is not None
    teacher.network.double()
    return teacher


def at(teacher: Teacher, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The velocity in the linear path's own time, of which the teacher's path may be a part."""
    first = 0.0 if isinstance(teacher.path, Linear) else cast(Any, teacher.path).first
    return teacher(x, (t - first) / (1 - first), cond) / (1 - first)


def follows(velocity: Velocity, points: Tensor, grid: Tensor, cond: dict[str, Tensor]) -> float:
    """The largest difference along a trajectory of Euler steps, beside its size."""
    x, off = points[0], 0.0
    for (s, t), expected in zip(pairwise(grid.double()), points[1:], strict=True):
        x = euler(velocity, x, torch.stack([s, t]), cond)
        off = max(off, (x - expected).abs().max().item())
    return off / points.abs().max().item()


def ends(point: Tensor, velocity: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    """x_1 and x_0 from the velocity of their own time. path: their alpha, sigma and derivatives, ``[4, b]``."""
    b, a, db, da = (expand_like(c, point) for c in path)
    determinant = a * db - da * b
    return (a * velocity - da * point) / determinant, (db * point - b * velocity) / determinant


# --- SiT


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_sit_is_theirs_on_every_path_for_every_prediction(path: str, prediction: str, tmp_path: Path) -> None:
    """Their drift at a point of their path gives x_1 and x_0, whose difference our velocity is at the same point."""
    teacher = double(sit(tmp_path, path, prediction).load())
    x, cond = SIT_GOLDEN["x"].double(), {"class": SIT_GOLDEN["class"]}
    own = SIT_GOLDEN[f"{NATIVE[path]}_path"]
    x_1, x_0 = ends(x, SIT_GOLDEN[f"{NATIVE[path]}_{prediction}"].double(), own)
    expected, size = x_1 - x_0, own[0] + own[1]
    t, z = own[0] / size, x / expand_like(size, x)
    scale = expected.abs().max()
    close(at(teacher, z, t, cond) / scale, expected / scale, atol=2e-6, rtol=0)
    for wrong in (
        at(teacher, z, 1 - t, cond),
        -at(teacher, z, t, cond),
        at(teacher, z, t, {"class": cond["class"] + 1}),
    ):
        assert (wrong - expected).abs().max() > 1e-3 * scale
    for other in ("velocity", "noise", "score"):
        if other != prediction:
            off = at(double(sit(tmp_path, path, other).load()), z, t, cond) - expected
            assert off.abs().max() > 0.03 * scale


def test_sit_starts_where_its_sampler_does(tmp_path: Path) -> None:
    x = SIT_GOLDEN["x"]
    assert sit(tmp_path).load().path == Linear()
    noise = sit(tmp_path, "linear", "noise").load().path
    assert torch.equal(noise.start(x), x)
    assert cast(Any, noise).first == pytest.approx(1e-3)
    for prediction in ("velocity", "noise"):  # the VP path never reaches pure noise
        path = sit(tmp_path, "vp", prediction).load().path
        alpha = math.exp(-19.9 / 4 - 0.05)
        assert cast(Any, path).first == pytest.approx(alpha / (alpha + (1 - alpha**2) ** 0.5), rel=1e-3)
        close(path.start(x) * (alpha + (1 - alpha**2) ** 0.5), x, atol=1e-5, rtol=0)


def test_euler_of_sit_is_theirs_step_by_step(tmp_path: Path) -> None:
    """With n numbers in their sampler's steps, it makes n - 1 of them."""
    cond = {"class": SIT_GOLDEN["class"][:2]}
    teacher = sit(tmp_path).load()
    points, grid = SIT_GOLDEN["euler"], torch.linspace(0, 1, 5)
    assert torch.equal(points[0], SIT_GOLDEN["x"][:2])
    assert follows(teacher, points, grid, cond) < 1e-6
    noise = sit(tmp_path, "linear", "noise").load()
    assert follows(noise, SIT_GOLDEN["euler_noise"], torch.linspace(0, 0.998 / 0.999, 3), cond) < 2e-6
    wrong: list[Velocity] = [
        lambda x, t, c: teacher(x, 1 - t, c),
        lambda x, t, c: -teacher(x, t, c),
        lambda x, t, c: teacher(x, 1000 * t, c),
        sit(tmp_path, heads=8).load(),
        sit(tmp_path, weights="model").load(),
        sit(tmp_path, "gvp").load(),
        noise,
    ]
    assert min(follows(velocity, points, grid, cond) for velocity in wrong) > 1e-3


def test_another_path_of_sit_ends_where_its_own_sampler_does(tmp_path: Path) -> None:
    """Other steps in another time, the same flow: where GVP and VP end is met up to the error of the solver."""
    x, cond = SIT_GOLDEN["x"][:2], {"class": SIT_GOLDEN["class"][:2]}
    for path, r in (("gvp", (0.0, 1.0)), ("vp", (0.0, 0.999))):
        teacher = sit(tmp_path, path).load()
        own = PATHS[{"gvp": "cosine", "vp": "vp"}[path]]()(torch.tensor(r, dtype=torch.float64))
        size = own.alpha + own.sigma
        first, last = own.alpha / size
        logits = torch.linspace(*torch.logit(torch.stack([first, last]), eps=1e-3 if path == "gvp" else 0), 31)
        t = torch.cat([first[None], torch.sigmoid(logits.double())[1:-1], last[None]])
        with torch.no_grad():
            end = size[1].float() * rk4(teacher, teacher.path.start(x), (t - first) / (1 - first), cond)
        expected = SIT_GOLDEN[f"{NATIVE[path]}_end"]
        close(end, expected, atol=2e-4, rtol=0)
        assert (SIT_GOLDEN["euler"][-1] - expected).abs().max() > 1e-2


def test_sit_guides_three_channels(tmp_path: Path) -> None:
    teacher = sit(tmp_path).load()
    cond = {"class": SIT_GOLDEN["class"][:2]}
    points, grid = SIT_GOLDEN["euler_guided"], torch.linspace(0, 1, 5)
    assert teacher.rule.channels == 3
    assert follows(guided(teacher, 4.0, (0.0, 1.0)), points, grid, cond) < 1e-6
    assert follows(guided(teacher, 3.0, (0.0, 1.0)), points, grid, cond) > 1e-3
    assert follows(guided(replace(teacher, rule=Rule()), 4.0, (0.0, 1.0)), points, grid, cond) > 1e-3


# --- REPA


def test_repa_is_theirs_with_its_time_turned(tmp_path: Path) -> None:
    cond, r = {"class": REPA_GOLDEN["class"]}, REPA_GOLDEN["r"].double()
    teacher = repa(tmp_path).load()
    close(-teacher(REPA_GOLDEN["x_0"], 1 - r, cond), REPA_GOLDEN["field"], atol=3e-6, rtol=0)
    assert (-teacher(REPA_GOLDEN["x_0"], r, cond) - REPA_GOLDEN["field"]).abs().max() > 1e-2
    assert (teacher.space.classes, teacher.space.shape, teacher.rule.channels) == (1000, (4, 8, 8), None)


def test_repa_on_the_cosine_path_is_theirs(tmp_path: Path) -> None:
    teacher = repa(tmp_path, "cosine").load()
    x, own = REPA_GOLDEN["x_0"].double(), REPA_GOLDEN["cosine_path"]
    x_1, x_0 = ends(x, REPA_GOLDEN["field"].double(), own)
    size = own[0] + own[1]
    said = double(teacher)(x / expand_like(size, x), own[0] / size, {"class": REPA_GOLDEN["class"]})
    close(said, x_1 - x_0, atol=3e-6, rtol=0)
    assert (x_1 - x_0 + REPA_GOLDEN["field"]).abs().max() > 0.1


def test_euler_of_repa_is_theirs_step_by_step_guided_in_an_interval(tmp_path: Path) -> None:
    teacher, cond, grid = repa(tmp_path).load(), {"class": REPA_GOLDEN["class"]}, torch.linspace(0, 1, 6)
    assert follows(teacher, REPA_GOLDEN["euler"], grid, cond) < 1e-6
    points, interval = REPA_GOLDEN["euler_guided"], (0.3, 1.0)
    assert list(interval) == teacher.info["sampler"]["interval"]
    assert follows(guided(teacher, 1.8, interval), points, grid, cond) < 1e-6
    assert follows(guided(teacher, 1.8, (0.0, 0.7)), points, grid, cond) > 1e-3
    assert follows(guided(teacher, 1.8, (0.0, 1.0)), points, grid, cond) > 1e-3


def test_old_files_of_repa_count_late_blocks_anew(tmp_path: Path) -> None:
    new = repa(tmp_path).load()
    old = {}
    for name, tensor in REPA_WEIGHTS.items():
        number = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        old[name.replace(f"blocks.{number}.", f"decoder_blocks.{number - 1}.") if number else name] = tensor
    assert sum(name.startswith("decoder_blocks.1.") for name in old) > 5
    x, t, cond = REPA_GOLDEN["x_0"], torch.tensor([0.2, 0.7], dtype=torch.float64), {"class": REPA_GOLDEN["class"]}
    assert torch.equal(repa(tmp_path, state=old).load()(x, t, cond), new(x, t, cond))
    torch.save(old, tmp_path / "last.pt")
    config = REPA(path=str(tmp_path / "last.pt"), path_type="linear", heads=4, latent=LATENT)
    with pytest.raises(FieldError) as error:
        config.load()
    assert set(error.value.problems) == {"encoder_depth"}
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.|two of its names"):
        REPA(path=config.path, path_type="linear", heads=4, latent=LATENT, encoder_depth=2).load()


def test_queries_and_keys_may_be_normalised(tmp_path: Path) -> None:
    """As REPA's option qk-norm has it; the norms' width tells the number of heads."""
    config = repa(tmp_path, state=QK_NORM, heads=None)
    teacher, cond = config.load(), {"class": QK_NORM_GOLDEN["class"]}
    said = -teacher(QK_NORM_GOLDEN["x_0"], 1 - QK_NORM_GOLDEN["r"].double(), cond)
    close(said, QK_NORM_GOLDEN["field"], atol=3e-6, rtol=0)
    without = {k: v for k, v in QK_NORM.items() if "_norm." not in k}
    off = -repa(tmp_path, state=without).load()(QK_NORM_GOLDEN["x_0"], 1 - QK_NORM_GOLDEN["r"].double(), cond)
    assert (off - said).abs().max() > 1e-3
    derivatives_are_exact(student_starts_at(teacher), teacher)


# --- DiT


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_ddim_of_dit_is_euler_step_by_step(scale: float, tmp_path: Path) -> None:
    """From the noisiest of 8 levels to the data, guided on three channels. Their points are of variance one."""
    teacher, cond = dit(tmp_path).load(), {"class": DIT_GOLDEN["class"]}
    abar = torch.cat([DIT_GOLDEN["abar"].flip(0), torch.ones(1)]).double()
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    t = alpha / (alpha + sigma)
    assert cast(Any, teacher.path).first == pytest.approx(t[0].item(), abs=1e-9)
    grid = ((t - t[0]) / (1 - t[0])).clamp(0, 1)
    points = DIT_GOLDEN["ddim" if scale == 1 else "ddim_guided"] / (alpha + sigma).float().reshape(-1, 1, 1, 1, 1)
    close(teacher.path.start(DIT_GOLDEN["x_0"]), points[0], atol=1e-6, rtol=0)
    velocity: Velocity = teacher if scale == 1 else guided(teacher, scale, (0.0, 1.0))
    # their tables are of float32, and the first step multiplies by 158
    assert follows(velocity, points, grid, cond) < 1e-5
    wrong: list[Velocity] = [lambda x, t, c: -teacher(x, t, c), lambda x, t, c: velocity(x, t**2, c)]
    assert min(follows(other, points, grid, cond) for other in wrong) > 1e-3


def test_dit_knows_its_levels(tmp_path: Path) -> None:
    """At a level's own time the network is given that level, and the noise comes out of the velocity."""
    teacher, k = dit(tmp_path).load(), DIT_GOLDEN["k"]
    assert isinstance(teacher.network, Converted)
    ratio = cast(Any, teacher.network.convention).ratios[k.long()].exp()
    t = 1 / (1 + ratio)
    norm = (t**2 + (1 - t) ** 2).sqrt()
    z = DIT_GOLDEN["x_0"] * expand_like(norm, DIT_GOLDEN["x_0"])
    v = at(teacher, z, t, {"class": DIT_GOLDEN["class"]})
    close(z - expand_like(t, z) * v, DIT_GOLDEN["noise"], atol=1e-5, rtol=0)
    assert teacher.info["licence"] == "CC-BY-NC-4.0"


# --- all three


MAKE: list[Callable[[Path], Family]] = [
    sit,
    lambda folder: sit(folder, "gvp"),
    lambda folder: sit(folder, "vp", "score"),
    lambda folder: sit(folder, "linear", "noise"),
    repa,
    lambda folder: repa(folder, "cosine"),
    dit,
]
NAMES = ["sit", "sit-gvp", "sit-vp-score", "sit-noise", "repa", "repa-cosine", "dit"]


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_what_starts_from_it(make: Callable[[Path], Family], tmp_path: Path) -> None:
    config = make(tmp_path)
    teacher = config.load()
    what_starts_from(teacher, tmp_path)
    outline_reads_no_weights(config)
    assert teacher.info["weights"] == "ema"


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
@pytest.mark.parametrize("split", [0, 1, 2])
def test_a_split_student_is_the_teacher_on_the_diagonal(
    make: Callable[[Path], Family], split: int, tmp_path: Path
) -> None:
    """The blocks from number `split` on see the end: at s = t nothing is new, bit for bit; elsewhere they do see it."""
    teacher = make(tmp_path).load()
    x, s, t, cond = batch(teacher)
    student = StudentConfig(split=split).build(teacher, teacher.space, 0)
    assert student.gap is None
    assert torch.equal(student.mean_velocity(x, s, s, cond), teacher(x, s, cond))
    assert (student.mean_velocity(x, s, t, cond) - teacher(x, s, cond)).abs().max() > 1e-6
    told: list[Tensor] = []
    backbone = cast(Any, student.network.network if isinstance(student.network, Converted) else student.network)
    for part in (*backbone.blocks, backbone.final_layer):
        part.register_forward_hook(lambda module, given, said: told.append(given[1]))
    for times in ((s, s), (t, t), (s, t)):
        student.mean_velocity(x, *times, cond)
    at_start, at_end, at_both = (told[n : n + len(told) // 3] for n in range(0, len(told), len(told) // 3))
    assert [torch.equal(a, b) for a, b in zip(at_both, at_start, strict=True)] == [
        n < split for n in range(len(at_both))
    ]
    assert [torch.equal(a, b) for a, b in zip(at_both, at_end, strict=True)] == [
        n >= split for n in range(len(at_both))
    ]
    derivatives_are_exact(student, teacher)


def test_an_exported_split_student_is_loaded_as_it_was(tmp_path: Path) -> None:
    teacher = sit(tmp_path, "gvp").load()
    student = StudentConfig(split=1).build(teacher, teacher.space, 0).eval()
    (tmp_path / "export").mkdir()
    assert teacher.network_config is not None
    write(tmp_path / "export", student, student.state_dict(), Facts(
        name="x", network=teacher.network_config, steps=(1,), teacher=None, licence="MIT", trained_on={"steps": 1},
        metrics={}, recipe="",
    ))  # fmt: skip
    x, s, t, cond = batch(teacher)
    loaded = distill.load(tmp_path / "export")
    assert torch.equal(loaded.mean_velocity(x, s, t, cond), student.mean_velocity(x, s, t, cond))


def test_published_files_hold_the_weights_alone(tmp_path: Path) -> None:
    """They say nothing of path, prediction or autoencoder: the recipe does."""
    torch.save(SIT, tmp_path / "SiT-XL-2-256.pt")
    save_file(SIT, tmp_path / "sit.safetensors")
    trained = sit(tmp_path).load()
    x, t, cond = SIT_GOLDEN["x"], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), {"class": SIT_GOLDEN["class"]}
    said: dict[str, Any] = {"path_type": "linear", "prediction": "velocity", "latent": LATENT, "heads": 4}
    for name in ("SiT-XL-2-256.pt", "sit.safetensors"):
        teacher = SiT(path=str(tmp_path / name), **said).load()
        assert torch.equal(teacher(x, t, cond), trained(x, t, cond))
        assert (teacher.space, teacher.latent, teacher.info["weights"]) == (trained.space, LATENT, "the file's")
    assert trained.latent == LATENT
    for missing in ("path_type", "prediction", "latent"):
        for make in ("load", "outline"):
            with pytest.raises(FieldError) as error:
                getattr(SiT(path=str(tmp_path / "SiT-XL-2-256.pt"), **{**said, missing: None}), make)()
            assert set(error.value.problems) == {missing}


def test_what_the_recipe_says_holds(tmp_path: Path) -> None:
    x, t, cond = SIT_GOLDEN["x"], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), {"class": SIT_GOLDEN["class"]}
    other = sit(tmp_path, "vp", "score", path_type="linear", prediction="velocity").load()
    assert torch.equal(other(x, t, cond), sit(tmp_path).load()(x, t, cond))


def test_without_dropped_classes_there_is_no_null(tmp_path: Path) -> None:
    file = saved(tmp_path, SIT, path_type="Linear", prediction="velocity", num_classes=11, vae="ema")
    teacher = SiT(path=str(file), heads=4).load()
    assert (teacher.space.classes, teacher.null) == (11, None)
    with pytest.raises(InputError, match="never saw a null condition"):
        guided(teacher, 1.5, (0.0, 1.0))


def test_weights_of_distributed_or_compiled_training_are_the_same(tmp_path: Path) -> None:
    x, t, cond = SIT_GOLDEN["x"], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), {"class": SIT_GOLDEN["class"]}
    expected = sit(tmp_path).load()(x, t, cond)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        named = {prefix + k: v for k, v in SIT.items()}
        file = saved(tmp_path, named, path_type="Linear", prediction="velocity", num_classes=10, vae="ema")
        assert torch.equal(SiT(path=str(file), heads=4).load()(x, t, cond), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), r"0400000\.pt.*missing: blocks.1.attn.qkv.bias"),
        (lambda w: w.update({"blocks.0.x": torch.ones(1)}), r"unexpected: blocks.0.x"),
        (lambda w: w.update({"projectors.0.0.weight": torch.ones(1)}), r"unexpected: projectors.0.0.weight"),
        (lambda w: w.update({"t_embedder.mlp.0.bias": torch.ones(3)}), r"wrong size: t_embedder.mlp.0.bias is \(3,\)"),
        (lambda w: w.update({"pos": w.pop("pos_embed")}), "has no pos_embed, so it is not of this family.*distill ls"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 15, 64)}), r"wrong size: pos_embed is \(1, 15, 64\)"),
        (
            lambda w: w.update({"final_layer.linear.weight": torch.ones(48, 64)}),
            r"wrong size: .*final_layer.linear.weight is \(48, 64\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    weights = dict(SIT)
    change(weights)
    file = saved(tmp_path, weights, path_type="Linear", prediction="velocity", num_classes=10, vae="ema")
    for make in ("load", "outline"):
        with pytest.raises(CheckpointError, match=said):
            getattr(SiT(path=str(file), heads=4), make)()


def test_other_files_are_refused(tmp_path: Path) -> None:
    config = sit(tmp_path)
    file = Path(config.path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-500])
    with pytest.raises(CheckpointError, match=r"0400000\.pt: cut short"):
        config.load()
    save_file(SIT, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cut short"):
        SiT(path=str(tmp_path / "x.safetensors")).load()
    torch.save({"state": SIT, "step": 3}, file)
    with pytest.raises(CheckpointError, match=r"it holds state .*looked for ema, model.*teacher\.weights"):
        config.load()
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds a list, not weights by name"):
        config.outline()


@pytest.mark.parametrize(
    ("family", "args", "text"),
    [
        pytest.param(SiT, {"path_type": "Cubic", "prediction": "velocity"}, "with path_type Cubic, which", id="path"),
        pytest.param(SiT, {"path_type": "GVP", "prediction": "flow"}, "with prediction flow, which", id="prediction"),
        pytest.param(REPA, {"path_type": "GVP"}, "with path_type GVP, which is not read", id="path of repa"),
        pytest.param(DiT, {"path_type": "Linear"}, "no DiT .*set teacher.name: sit", id="flow as dit"),
    ],
)
def test_arguments_of_another_training_are_refused(
    family: type[Family], args: dict[str, str], text: str, tmp_path: Path
) -> None:
    config = family(path=str(saved(tmp_path, SIT, vae="ema", **args)), heads=4, latent=LATENT)
    with pytest.raises(CheckpointError, match=text):
        config.outline()


def test_a_checkpoint_without_arguments_asks_for_them(tmp_path: Path) -> None:
    torch.save({"ema": SIT, "args": None}, tmp_path / "x.pt")
    with pytest.raises(FieldError) as error:
        SiT(path=str(tmp_path / "x.pt"), heads=4, latent=LATENT).outline()
    assert error.value.problems.keys() == {"path_type", "prediction"}


def test_heads_divide_the_width_and_are_asked_for_where_sizes_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"heads must divide the width of .*, 64, got 5"):
        sit(tmp_path, heads=5).outline()
    config = SiT(path=str(saved(tmp_path, narrow(), path_type="Linear", prediction="velocity", vae="ema")))
    with pytest.raises(FieldError, match=r"heads is needed: .* its width of 48 is none"):
        config.outline()


def narrow() -> dict[str, Tensor]:
    """A width of 48."""
    return {"x_embedder.proj.weight": torch.zeros(48, 4, 2, 2), **{k: v for k, v in SIT.items() if "x_emb" not in k}}


def test_latents_by_channel_have_the_channels(tmp_path: Path) -> None:
    three = Latent(autoencoder="x", mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(FieldError, match=r"latent has mean and std of 3 channels, .* works on 4"):
        sit(tmp_path, latent=three).outline()


def test_a_tensor_of_another_number_of_dimensions_is_of_the_wrong_size(tmp_path: Path) -> None:
    for name in ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"):
        file = saved(tmp_path, {**SIT, name: torch.zeros(64)}, path_type="Linear", prediction="velocity", vae="ema")
        with pytest.raises(CheckpointError, match=rf"wrong size: {name} is \(64,\), expected \d dimensions"):
            SiT(path=str(file), heads=4).outline()


def test_a_file_trained_without_dropping_labels_is_told_its_classes(tmp_path: Path) -> None:
    name = "y_embedder.embedding_table.weight"
    torch.save({**SIT, name: SIT[name][:10].clone()}, tmp_path / "x.pt")
    config = SiT(path=str(tmp_path / "x.pt"), path_type="linear", prediction="velocity", heads=4, latent=LATENT)
    for said, classes, null in ((None, 9, True), (9, 9, True), (10, 10, False)):
        teacher = replace(config, classes=said).load()
        assert (teacher.space.classes, teacher.null is not None) == (classes, null)
    with pytest.raises(FieldError, match=r"classes must be 9, or 10 where it was trained without .* got 11"):
        replace(config, classes=11).outline()
