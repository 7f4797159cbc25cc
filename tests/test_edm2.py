"""EDM2 against numbers of its own code: denoised latents, Euler and Heun, alone and guided by a second network."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import golden
from proof import batch, derivatives_are_exact, export_keeps, learner
from test_edm import Persistent, denoised, module, size, velocity
from test_edm import their_module as their_module
from torch import Tensor

from teachers.adapters.edm import EDM2
from teachers.convert import convert
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.guidance import guided
from teachers.networks.edm2_unet import EDM2UNetConfig
from teachers.space import Latent
from teachers.velocity import Teacher

ALL, GOLDEN = golden("edm2")
LATENT = Latent(autoencoder="stabilityai/sd-vae-ft-mse", scale=0.5, mean=(5.81, 3.25, 0.12, -2.15),
                std=(4.17, 4.62, 3.71, 3.28), spread=0.5)  # fmt: skip


def state(name: str) -> dict[str, Tensor]:
    """What state_dict() of the original network holds, as it is stored: in half precision."""
    own = {k.partition(":")[2]: v for k, v in ALL.items() if k.startswith(f"{name}:")}
    scales = {"freqs": 30, "gain": 5}
    return {k: (v * next((s for end, s in scales.items() if k.endswith(end)), 1)).half() for k, v in own.items()}


def saved(folder: Path, name: str, weights: Mapping[str, Tensor] | None = None, encoder: Any = 0, **init: Any) -> str:
    """As their training loop writes it."""
    kwargs = {"img_resolution": 8, "img_channels": 4, "label_dim": 5, "model_channels": 32, **init}
    net = module(weights or state(name), "Precond", _init_args=(), _init_kwargs=kwargs)
    encoder = Persistent("StabilityVAEEncoder", {"_init_kwargs": {}, "_vae": None}) if encoder == 0 else encoder
    held = {"ema": net, "encoder": encoder, "dataset_kwargs": {"use_labels": True}}
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(held))
    return str(folder / f"{name}.pkl")


@pytest.fixture
def main(tmp_path: Path) -> Teacher:
    return EDM2(path=saved(tmp_path, "main")).load()


@pytest.fixture
def guide(tmp_path: Path) -> Teacher:
    return EDM2(path=saved(tmp_path, "guide")).load()


def test_denoised_latents_are_theirs(main: Teacher, guide: Teacher) -> None:
    sigma = GOLDEN["sigma"]
    x = GOLDEN["x"] * (1 + sigma)[:, None, None, None]
    for name, teacher in (("main", main), ("guide", guide)):
        wanted = GOLDEN[f"{name}:D"]
        assert (denoised(teacher, x, sigma, GOLDEN["classes"]) - wanted).abs().max() < 1e-6 * size(wanted)
        assert (denoised(teacher, x, 1 / sigma, GOLDEN["classes"]) - wanted).abs().max() > 0.1
    others = denoised(main, x, sigma, GOLDEN["classes"].flip(0))
    assert (others - GOLDEN["main:D"]).abs().max() > 0.003
    assert next(main.network.parameters()).dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_euler_is_theirs_step_by_step(scale: float, main: Teacher, guide: Teacher) -> None:
    teacher = main if scale == 1 else guided(main, scale, (0.0, 1.0), guide)
    levels = grid(5)
    times = 1 / (1 + levels)
    z = teacher.path.start(GOLDEN["noise"])
    for (s, t), wanted in zip(pairwise(times), GOLDEN[f"euler{scale}"], strict=True):
        z = z + (t - s).float() * velocity(teacher, z, s.expand(2), GOLDEN["class"])
        assert (z - t.float() * wanted).abs().max() < 5e-6
    if scale != 1:
        assert (z - GOLDEN["euler1.0"][-1]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_their_heun_through_our_velocity(scale: float, main: Teacher, guide: Teacher) -> None:
    teacher = main if scale == 1 else guided(main, scale, (0.0, 1.0), guide)
    x = GOLDEN["noise"] * 80.0
    x = x.double()
    for sigma, following in pairwise(grid(4)):
        slope = (x - denoised(teacher, x, sigma.expand(2), GOLDEN["class"])) / sigma
        end = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (end - denoised(teacher, end, following.expand(2), GOLDEN["class"])) / following) / 2
        x = x + (following - sigma) * slope
    wanted = GOLDEN[f"heun{scale}"]
    assert (x - wanted).abs().max() < 2e-5 * size(wanted)


def grid(steps: int) -> Tensor:
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = (high + torch.arange(steps, dtype=torch.float64) / (steps - 1) * (low - high)) ** 7
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def test_the_student_starts_there_and_its_gain_learns(main: Teacher, tmp_path: Path) -> None:
    student, learning = learner(main)
    assert learning == {"gain"}
    assert all(p.grad.isfinite().all() and p.grad.abs().max() < 100 for p in student.parameters() if p.grad is not None)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    student.train()
    student.mean_velocity(*batch(main))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())  # theirs writes its weights
    derivatives_are_exact(student, main)
    export_keeps(student, main, tmp_path / "export")


def test_velocities_are_finite_at_both_ends_and_none_of_none(main: Teacher) -> None:
    assert main(GOLDEN["x"][:0], torch.zeros(0), {"class": GOLDEN["classes"][:0]}).shape == (0, 4, 8, 8)
    for t in (0.0, 1.0):
        v = main(GOLDEN["x"], torch.full((3,), t, dtype=torch.float64), {"class": GOLDEN["classes"]})
        assert v.isfinite().all()


# --- what the file says


def test_the_file_names_its_latents(main: Teacher, tmp_path: Path) -> None:
    assert main.latent == LATENT
    assert main.info["autoencoder_range"] == [0.0, 1.0]
    assert (main.space.shape, main.space.classes, main.space.value_range) == ((4, 8, 8), 5, None)
    other = Persistent("StabilityVAEEncoder", {"_init_kwargs": {"final_std": 1.0}})
    assert EDM2(path=saved(tmp_path, "main", encoder=other)).outline().latent == replace(LATENT, scale=1.0, spread=1.0)


def test_latents_that_it_does_not_name_are_asked_for(tmp_path: Path) -> None:
    torch.save(state("main"), tmp_path / "a.pt")
    for path in (str(tmp_path / "a.pt"), saved(tmp_path, "main", encoder=None)):
        with pytest.raises(FieldError, match="latent is needed") as error:
            EDM2(path=path).load()
        assert set(error.value.problems) == {"latent"}
        assert EDM2(path=path, latent=LATENT).outline().latent == LATENT


def test_files_in_each_form_are_the_same_teacher(main: Teacher, tmp_path: Path) -> None:
    file = Path(saved(tmp_path, "main"))
    assert "float16" in convert(file, tmp_path / "a.safetensors")
    torch.save(state("main"), tmp_path / "a.pt")
    x, t, cond = GOLDEN["x"], torch.tensor([0.1, 0.5, 0.9]).double(), {"class": GOLDEN["classes"]}
    for config in (EDM2(path=str(tmp_path / "a.safetensors")), EDM2(path=str(tmp_path / "a.pt"), latent=LATENT)):
        other = config.load()
        assert torch.equal(main(x, t, cond), other(x, t, cond))
        assert other.latent == LATENT and other.network_config == main.network_config


def test_an_outline_reads_no_weights(main: Teacher, tmp_path: Path) -> None:
    outline = EDM2(path=saved(tmp_path, "main")).outline()
    assert all(p.is_meta for p in outline.network.parameters())  # type: ignore[union-attr]
    assert (outline.space, outline.network_config, outline.path) == (main.space, main.network_config, main.path)


def test_pixels_have_a_range(tmp_path: Path) -> None:
    """img64: the same network on three channels."""
    weights = state("main")
    conv, out = "unet.enc.8x8_conv.weight", "unet.out_conv.weight"
    weights |= {conv: weights[conv][:, :4].clone(), out: weights[out][:3].clone()}
    encoder = Persistent("StandardRGBEncoder", {"_init_kwargs": {}})
    teacher = EDM2(path=saved(tmp_path, "main", weights, encoder)).load()
    assert (teacher.space.shape, teacher.space.value_range, teacher.latent) == ((3, 8, 8), (-1.0, 1.0), None)


def test_guidance_is_by_a_second_network_of_the_same_task(main: Teacher, guide: Teacher) -> None:
    with pytest.raises(InputError, match=r"never saw a null condition.*guidance\.weak"):
        guided(main, 2.0, (0.0, 1.0))
    both = guided(main, 2.0, (0.0, 1.0), guide)
    assert both.calls == 2 and guide.space.classes is None
    with pytest.raises(InputError, match="two models of the same task"):
        guided(guide, 2.0, (0.0, 1.0), main)  # the class of the weak one is not known
    with pytest.raises(InputError, match="two models of the same task"):
        guided(main, 2.0, (0.0, 1.0), replace(guide, space=replace(guide.space, shape=(4, 16, 16))))
    with pytest.raises(ValueError, match=r"classes must be in \[0, 4\]"):
        main(GOLDEN["x"], torch.rand(3), {"class": torch.tensor([0, 1, 5])})
    with pytest.raises(ValueError, match="pass cond"):
        main(GOLDEN["x"], torch.rand(3), None)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda w: w.pop("unet.out_gain"), "missing: out_gain"),
    "extra": (lambda w: w.update({"unet.out_bias": torch.ones(1)}), "unexpected: out_bias"),
    "size": (lambda w: w.update({"unet.emb_fourier.phases": torch.ones(3)}), r"size: emb_fourier.phases is \(3,\)"),
    "another family": (lambda w: w.pop("unet.emb_noise.weight"), "has no emb_noise.weight, so it is not of this"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    change, said = WRONG[what]
    weights = state("main")
    change(weights)
    config = EDM2(path=saved(tmp_path, "main", weights))
    for make in (config.load, config.outline):
        with pytest.raises(CheckpointError, match=said):
            make()


def test_a_network_made_otherwise_is_refused_or_followed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"made with clip_act=3"):
        EDM2(path=saved(tmp_path, "main", clip_act=3)).load()
    entry = EDM2(path=saved(tmp_path, "main", res_balance=0.4)).outline().network_config
    assert entry is not None and entry["network"]["res_balance"] == 0.4
    for config in ({"widths": (96,)}, {"blocks": 0}, {"attention": (4,)}, {"label_balance": 1.0}):
        with pytest.raises(FieldError, match=f"EDM2UNetConfig.{next(iter(config))}"):
            EDM2UNetConfig(**config)  # type: ignore[arg-type]
