"""What is read from a folder of diffusers, and what is refused, with the remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_models import TINY, module, said, save, scheduler
from proof import conditioning
from safetensors.torch import load_file, save_file

from teachers.adapters.diffusers import Diffusers
from teachers.adapters.diffusers_folder import Folder
from teachers.adapters.diffusers_rows import ROWS
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.fill import Placement
from teachers.guidance import guided
from teachers.networks.diffusers import DiffusersConfig, DiffusersNetwork
from teachers.networks.diffusers_forms import FORMS
from teachers.space import Latent
from teachers.velocity import Rule, Teacher

SD3, FLUX, UNET, DIT = "SD3Transformer2DModel", "FluxTransformer2DModel", "UNet2DModel", "DiTTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a class; made once, to be read only."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name), module(name), scheduler(name))
        return made[name]

    return folder


@pytest.fixture
def sd3(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(saved(SD3), tmp_path / "sd3"))


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file, or with None take them out."""
    held = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def velocity(teacher: Teacher, **changed: torch.Tensor) -> torch.Tensor:
    """At two points."""
    x = torch.randn(2, *teacher.space.shape, generator=torch.Generator().manual_seed(0))
    cond = {**(conditioning(teacher.space, 2) or {}), **changed}
    return teacher(x, torch.tensor([0.3, 0.8], dtype=torch.float64), cond or None)


def test_every_class_has_a_form_a_row_and_a_model_to_test_it() -> None:
    assert FORMS.keys() == ROWS.keys() == TINY.keys()
    assert len(FORMS) == 21


# --- what is read


def test_what_the_folder_says_is_in_the_teacher(sd3: Path) -> None:
    (sd3 / "README.md").write_text("---\nlicense: other\nlicense_name: stability-community\n---\n# Hello\n")
    teacher = said(SD3, sd3).load()
    assert {key: teacher.info[key] for key in ("family", "class", "weights", "licence", "embedded_guidance")} == {
        "family": "diffusers", "class": SD3, "weights": "transformer", "licence": "stability-community",
        "embedded_guidance": None,
    }  # fmt: skip
    assert teacher.info["sampler"] == {"solver": "euler", "steps": 28, "guidance": 7.0, "shift": 3.0}
    assert len(teacher.info["digest"]) == 64
    assert teacher.space.shape == (4, 4, 4) and teacher.space.value_range is None
    assert [(e.name, e.shape, e.dtype) for e in teacher.space.embeddings] == [
        ("pooled", (10,), "float32"), ("text", (5, 12), "float32"),
    ]  # fmt: skip
    assert teacher.latent == Latent(autoencoder="AutoencoderKL of sd3", scale=0.5, shift=0.1)
    assert teacher.null is not None and teacher.null["text"].shape == (5, 12)
    assert said(SD3, sd3, licence="mine").load().info["licence"] == "mine"


def test_what_a_pipeline_saves_is_read(tmp_path: Path) -> None:
    parts = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(4, 4), norm_num_groups=2, shift_factor=0.2,
                                  down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    made, plan = module(SD3), scheduler(SD3)
    diffusers.StableDiffusion3Pipeline(transformer=made, scheduler=plan, vae=vae, **parts).save_pretrained(tmp_path)
    teacher = said(SD3, tmp_path).load()
    assert teacher.latent is not None and (teacher.latent.scale, teacher.latent.shift) == (0.18215, 0.2)
    x, cond = torch.randn(2, 4, 4, 4), conditioning(teacher.space, 2) or {}
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    own = made(x, cond["text"], cond["pooled"], 1000 * (1 - t).float(), return_dict=False)[0]
    assert torch.equal(teacher(x, t, cond), -own)


def test_latents_are_those_of_the_autoencoder(saved: Callable[[str], Path]) -> None:
    raw = torch.randn(2, 4, 2, 4, 6)
    latent = said("MochiTransformer3DModel", saved("MochiTransformer3DModel")).outline().latent
    assert latent is not None
    mean, std = (torch.tensor(v).reshape(1, 4, 1, 1, 1) for v in ([0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.5, 1.0]))
    torch.testing.assert_close(latent.to_latent(raw), (raw - mean) * 0.5 / std)
    shifted = said(SD3, saved(SD3)).outline().latent
    assert shifted is not None
    torch.testing.assert_close(shifted.to_latent(raw), (raw - 0.1) * 0.5)  # first the shift, then the scale


def test_latents_of_flux2_are_normalised_as_its_autoencoder_was(tmp_path: Path) -> None:
    name = "Flux2Transformer2DModel"
    folder = save(name, tmp_path, module(name), scheduler(name))
    change(folder / "vae" / "config.json", _class_name="AutoencoderKLFlux2", batch_norm_eps=0.5,
           scaling_factor=None)  # fmt: skip
    mean, variance = torch.randn(16), torch.rand(16)
    save_file({"bn.running_mean": mean, "bn.running_var": variance}, folder / "vae" / WEIGHTS)
    latent = said(name, folder).load().latent
    assert latent is not None
    raw = torch.randn(2, 16, 2, 3)
    expected = (raw - mean[:, None, None]) / (variance + 0.5).sqrt()[:, None, None]
    torch.testing.assert_close(latent.to_latent(raw), expected)
    save_file({"bn.running_mean": mean}, folder / "vae" / WEIGHTS)
    with pytest.raises(CheckpointError, match="has no bn"):
        said(name, folder)


def test_without_an_autoencoder_samples_are_pixels(saved: Callable[[str], Path]) -> None:
    teacher = said(UNET, saved(UNET)).outline()
    assert teacher.latent is None and teacher.space.value_range == (-1.0, 1.0) and teacher.space.classes is None


def test_classes_and_their_null(saved: Callable[[str], Path]) -> None:
    teacher = said(DIT, saved(DIT)).load()
    assert teacher.space.classes == 1000 and teacher.null == {"class": torch.tensor(1000)}
    assert teacher.network_config is not None and teacher.network_config["network"]["backbone"] == DIT


def test_a_u_net_of_classes_has_no_null(tmp_path: Path) -> None:
    made = module(UNET, num_class_embeds=3)
    teacher = Diffusers(path=str(save(UNET, tmp_path, made, scheduler(UNET)))).load()
    assert teacher.space.classes == 3
    first, second = (velocity(teacher, **{"class": torch.tensor([c, c])}) for c in (0, 1))
    assert not torch.equal(first, second)
    with pytest.raises(InputError, match="never saw a null condition"):
        guided(teacher, 2.0, (0.0, 1.0))


def test_the_length_under_guidance_can_be_chosen(saved: Callable[[str], Path]) -> None:
    name = "Lumina2Transformer2DModel"
    assert said(name, saved(name)).outline().rule == Rule(renorm="width")
    assert said(name, saved(name), renorm="none").outline().rule == Rule()
    assert said(name, saved(name), renorm="cap").outline().rule == Rule(renorm="cap")


@pytest.mark.parametrize("name", [SD3, FLUX, "CogView4Transformer2DModel"])
def test_the_shift_is_that_of_the_schedulers_grid(name: str, saved: Callable[[str], Path]) -> None:
    plan = scheduler(name)
    teacher = said(name, saved(name)).outline()
    shift, tokens = teacher.info["sampler"]["shift"], teacher.space.shape[-2] // 2 * (teacher.space.shape[-1] // 2)
    own = torch.tensor([1.0, 0.7, 0.2])
    mu: dict[str, float] = {}
    if name == FLUX:
        mu = {"mu": 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)}
    elif name != SD3:
        mu = {"mu": 0.25 + 0.75 * (tokens / 256) ** 0.5}
    plan.set_timesteps(sigmas=own.tolist(), **mu)
    torch.testing.assert_close(plan.sigmas[:-1], shift * own / (1 + (shift - 1) * own))


def test_an_outline_reads_no_weights(saved: Callable[[str], Path]) -> None:
    outline = said(SD3, saved(SD3)).outline()
    assert isinstance(outline.network, torch.nn.Module)
    assert all(p.is_meta for p in outline.network.parameters())
    assert outline.info["digest"] == "not read"


def test_the_networks_folder_alone_will_do(sd3: Path) -> None:
    whole, part = said(SD3, sd3), Diffusers(path=str(sd3 / "transformer"), tokens=5)
    assert torch.equal(velocity(whole.load()), velocity(part.load()))


def test_what_lies_beside_a_network_saved_alone_says_nothing_of_it(sd3: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(sd3 / "transformer", tmp_path / "lcm-experiments" / "network"))
    (alone.parent / "README.md").write_text("---\nlicense: mit\n---\n")
    (alone.parent / "vae").mkdir()
    (alone.parent / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.1}))
    latent = Latent(autoencoder="x")
    assert Diffusers(path=str(alone), tokens=5, latent=latent).outline().info["licence"] == "unknown"
    with pytest.raises(FieldError, match=r"latent is needed: .*network has no vae"):
        Diffusers(path=str(alone), tokens=5).outline()


def test_shards_variants_and_averages(sd3: Path) -> None:
    made = module(SD3)
    expected = velocity(said(SD3, sd3).load())
    shutil.rmtree(sd3 / "transformer")
    made.save_pretrained(sd3 / "transformer", max_shard_size="8KB")
    assert len(list((sd3 / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(velocity(said(SD3, sd3).load()), expected)
    (sd3 / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink(missing_ok=True)
    next((sd3 / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="not beside it; copy the whole folder again"):
        said(SD3, sd3)

    shutil.rmtree(sd3 / "transformer")
    half = module(SD3)
    for parameter in half.parameters():
        parameter.mul_(0.5)
    made.save_pretrained(sd3 / "transformer")
    half.save_pretrained(sd3 / "transformer", variant="fp16")
    assert torch.equal(velocity(said(SD3, sd3).load()), expected)
    other = said(SD3, sd3, weights="fp16").load()
    assert not torch.equal(velocity(other), expected)
    with pytest.raises(CheckpointError, match="has no weights of the variant int8"):
        said(SD3, sd3, weights="int8")

    half.save_pretrained(sd3 / "transformer", variant="fp16", max_shard_size="8KB")
    assert (sd3 / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert torch.equal(velocity(said(SD3, sd3, weights="fp16").load()), velocity(other))

    half.save_pretrained(sd3 / "transformer_ema")
    averaged = said(SD3, sd3).load()
    assert averaged.info["weights"] == "transformer_ema" and torch.equal(velocity(averaged), velocity(other))
    assert torch.equal(velocity(said(SD3, sd3, weights="transformer").load()), expected)


def test_half_precision_does_not_round_the_time(saved: Callable[[str], Path]) -> None:
    """At 1000 t bfloat16 has steps of 4: the embedding of the time must not see them."""
    teacher = said(FLUX, saved(FLUX), placement=replace(said(FLUX, saved(FLUX)).placement, dtype="bfloat16")).load()
    seen = []
    assert isinstance(teacher.network, torch.nn.Module)
    network = next(m for m in teacher.network.modules() if isinstance(m, DiffusersNetwork))
    embedder = network.module.get_submodule("time_text_embed.timestep_embedder.linear_1")
    embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(2, *teacher.space.shape)
    v = teacher(x, torch.tensor([0.0217, 0.0203], dtype=torch.float64), conditioning(teacher.space, 2))
    assert v.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16
    angle = torch.tensor([978.3, 979.7])
    torch.testing.assert_close(seen[0][:, 0].float(), angle.cos(), atol=4e-3, rtol=0)
    assert (angle.cos() - angle.bfloat16().float().cos()).abs().max() > 0.1


def test_accelerate_places_it(saved: Callable[[str], Path]) -> None:
    config = said(DIT, saved(DIT))
    placed = replace(config, placement=replace(config.placement, device_map="auto")).load()
    torch.testing.assert_close(velocity(placed), velocity(config.load()))


def test_it_stays_in_eval_mode(saved: Callable[[str], Path]) -> None:
    """diffusers' DiT drops labels, and activations, in train mode."""
    teacher = said(DIT, saved(DIT)).load()
    before = velocity(teacher)
    assert isinstance(teacher.network, torch.nn.Module)
    teacher.network.train()
    assert all(torch.equal(velocity(teacher), before) for _ in range(3))
    inner = next(m for m in teacher.network.modules() if isinstance(m, DiffusersNetwork)).module
    inner.train()
    assert not all(torch.equal(velocity(teacher), before) for _ in range(3))


# --- what is refused


@pytest.mark.parametrize(
    ("name", "key", "text"),
    [
        (SD3, "tokens", "does not say how many tokens"),
        (FLUX, "size", r"does not say it \(\[height, width\]"),
        (FLUX, "embedded_guidance", r"is told a scale of guidance \(3.5 is usual\)"),
        ("LTXVideoTransformer3DModel", "frame_rate", "how many frames a second"),
    ],
)
def test_what_the_configs_do_not_say_is_asked_for(name: str, key: str, text: str, saved: Callable[[str], Path]) -> None:
    with pytest.raises(FieldError, match=text) as error:
        Diffusers(path=str(saved(name)), **{**TINY[name].said, key: None}).outline()
    assert set(error.value.problems) == {key}


def test_latents_need_an_autoencoder_and_sizes_its_levels(sd3: Path, saved: Callable[[str], Path]) -> None:
    shutil.rmtree(sd3 / "vae")
    with pytest.raises(FieldError, match="has no vae, and 4 channels are latents") as error:
        said(SD3, sd3)
    assert set(error.value.problems) == {"latent"}
    assert said(SD3, sd3, latent=Latent(autoencoder="mine", scale=2.0)).outline().latent is not None
    sized = Path(shutil.copytree(saved("CogView4Transformer2DModel"), sd3 / "cogview4"))
    change(sized / "vae" / "config.json", block_out_channels=None, _class_name="TeaModel")
    with pytest.raises(FieldError, match=r"is told \[height, width\] of its pictures") as error:
        said("CogView4Transformer2DModel", sized)
    assert set(error.value.problems) == {"pixels"}
    said("CogView4Transformer2DModel", sized, pixels=(32, 32))


@pytest.mark.parametrize(
    "held",
    [
        {"text": torch.zeros(5, 12)},
        {"text": torch.zeros(4, 12), "pooled": torch.zeros(10)},
        {"text": torch.zeros(1, 5, 12), "pooled": torch.zeros(1, 10)},
        {"text": torch.zeros(5, 12), "pooled": torch.zeros(10), "more": torch.zeros(1)},
    ],
)
def test_an_embedding_of_no_prompt_has_every_field_once(held: dict[str, torch.Tensor], sd3: Path) -> None:
    save_file(held, sd3 / "none.safetensors")
    with pytest.raises(FieldError, match=r"must hold one row of each of pooled \[10\], text \[5, 12\]") as error:
        Diffusers(path=str(sd3), tokens=5, null=str(sd3 / "none.safetensors")).outline()
    assert set(error.value.problems) == {"null"}


def test_guidance_asks_for_the_embedding_of_no_prompt(sd3: Path) -> None:
    with pytest.raises(InputError, match=r"name a file that holds it \(teacher.null\)"):
        guided(Diffusers(path=str(sd3), tokens=5).load(), 3.0, (0.0, 1.0))


def _lcm(folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchLCMScheduler")


def _turbo(folder: Path) -> None:
    change(folder / "transformer" / "config.json", _name_or_path="stabilityai/stable-diffusion-3.5-large-turbo")


def _sprint(folder: Path) -> None:
    change(folder / "model_index.json", _class_name="SanaSprintPipeline")


@pytest.mark.parametrize("mark", [_lcm, _turbo, _sprint])
def test_a_model_of_few_steps_is_no_teacher_unless_it_is_asked_for(mark: Callable[[Path], None], sd3: Path) -> None:
    mark(sd3)
    with pytest.raises(FieldError, match="was distilled to few steps already") as error:
        Diffusers(path=str(sd3), tokens=5).outline()
    assert set(error.value.problems) == {"distilled"}
    Diffusers(path=str(sd3), tokens=5, distilled=True).outline()


def test_schnell_and_consistency_models_are_known_by_their_configs(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    flux = Path(shutil.copytree(saved(FLUX), tmp_path / "flux"))
    change(flux / "transformer" / "config.json", guidance_embeds=False)
    change(flux / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False)
    with pytest.raises(FieldError, match="schnell"):
        Diffusers(path=str(flux), **TINY[FLUX].said).outline()
    name = "UNet2DConditionModel"
    unet = Path(shutil.copytree(saved(name), tmp_path / "unet"))
    change(unet / "unet" / "config.json", time_cond_proj_dim=8)
    with pytest.raises(FieldError, match="latent consistency"):
        Diffusers(path=str(unet), tokens=5).outline()


def test_an_unknown_class_is_answered_with_the_known(sd3: Path) -> None:
    change(sd3 / "transformer" / "config.json", _class_name="KandinskyTransformer9DModel")
    with pytest.raises(CheckpointError, match=r"KandinskyTransformer9DModel, which is not read here; known: AuraFlow"):
        Diffusers(path=str(sd3), tokens=5).outline()


@pytest.mark.parametrize(
    ("part", "key", "value", "text"),
    [
        (
            "transformer",
            "num_attention_heads",
            "three",
            r"transformer/config.json: .*do not build a SD3Transformer2DModel",
        ),
        ("transformer", "num_layers", -1, r"transformer/diffusion_pytorch_model.safetensors: .*unexpected"),
        ("vae", "scaling_factor", "big", r"vae/config.json: scaling_factor is 'big', no number; copy it again"),
    ],
)
def test_nonsense_in_a_config_is_told(part: str, key: str, value: Any, text: str, sd3: Path) -> None:
    change(sd3 / part / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=text):
        Diffusers(path=str(sd3), tokens=5).outline()


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Diffusers(path=str(tmp_path / "nowhere")).outline()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(CheckpointError, match=r"no transformer/config.json and no unet/config.json \(it holds readme"):
        Diffusers(path=str(tmp_path)).outline()


def test_what_diffusers_keeps_in_float32_makes_all_float32(saved: Callable[[str], Path], tmp_path: Path) -> None:
    name = "WanTransformer3DModel"
    wan = Path(shutil.copytree(saved(name), tmp_path / "wan"))
    made = getattr(diffusers, name).from_pretrained(wan / "transformer", torch_dtype=torch.bfloat16)
    made.save_pretrained(wan / "transformer")
    assert {v.dtype for v in load_file(wan / "transformer" / WEIGHTS).values()} == {torch.bfloat16, torch.float32}
    teacher = said(name, wan).load()
    assert {v.dtype for v in teacher.network.state_dict().values()} == {torch.float32}
    assert velocity(teacher).isfinite().all()
    assert velocity(said(name, wan, placement=Placement(dtype="bfloat16")).load()).isfinite().all()


def test_two_experts_are_two_teachers(saved: Callable[[str], Path], tmp_path: Path) -> None:
    name = "WanTransformer3DModel"
    wan = Path(shutil.copytree(saved(name), tmp_path / "wan"))
    shutil.copytree(wan / "transformer", wan / "transformer_2")
    with pytest.raises(CheckpointError, match=r"weights: transformer \(early\) or transformer_2 \(late\)"):
        said(name, wan)
    assert said(name, wan, weights="transformer_2").load().info["weights"] == "transformer_2"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("prediction_type", "tea", "prediction_type tea"),
        ("beta_schedule", "laplace", "beta_schedule laplace"),
        ("trained_betas", [0.1, 0.2], "no trained_betas"),
        ("predict_epsilon", False, "DDIMScheduler with predict_epsilon false.* write prediction_type sample"),
        ("snr_shift_scale", 3.0, "DDIMScheduler with snr_shift_scale, which changes its noise levels"),
    ],
)
def test_noise_levels_that_are_not_known(
    key: str, value: Any, text: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved(UNET), tmp_path / "unet"))
    change(folder / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=text):
        Diffusers(path=str(folder)).outline()


def test_keys_that_a_scheduler_leaves_out_are_its_class_own(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """As in the files of Stable Diffusion 1, which diffusers wrote before it knew prediction_type."""
    folder = Path(shutil.copytree(saved(UNET), tmp_path / "unet"))
    file = folder / "scheduler" / "scheduler_config.json"
    seen = {}
    for name in ("PNDMScheduler", "LCMScheduler", "TeaScheduler"):
        file.write_text(json.dumps({"_class_name": name, "beta_schedule": "scaled_linear", "beta_end": 0.012}))
        if name == "TeaScheduler":
            with pytest.raises(CheckpointError, match="TeaScheduler, without beta_start, num_train_timesteps, predict"):
                Diffusers(path=str(folder)).outline()
        else:
            seen[name] = Diffusers(path=str(folder), distilled=True).outline().network_config["convention"]
    said = {"betas": "scaled_linear", "beta_end": 0.012, "steps": 1000, "prediction": "noise", "zero_snr": False}
    assert said.items() <= seen["PNDMScheduler"].items() and said.items() <= seen["LCMScheduler"].items()
    assert (seen["PNDMScheduler"]["beta_start"], seen["LCMScheduler"]["beta_start"]) == (1e-4, 0.00085)


def test_keys_of_a_flow_that_are_left_out_are_its_class_own(saved: Callable[[str], Path], tmp_path: Path) -> None:
    name = "CogView4Transformer2DModel"
    folder = Path(shutil.copytree(saved(name), tmp_path / "cogview"))
    file = folder / "scheduler" / "scheduler_config.json"
    whole = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    found = []
    full = {"base_shift": 0.5, "max_shift": 1.15, "time_shift_type": "exponential", "base_image_seq_len": 256}
    for more in ({}, full):
        file.write_text(json.dumps(whole | more))
        found.append(said(name, folder).outline().network_config["convention"]["shift"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "where", "scale", "channels"),
    [
        ("AutoencoderKL", "vae", 0.18215, None),
        ("VQModel", "vqvae", 0.18215, None),
        ("AutoencoderKLCogVideoX", "vae", 1.15258426, None),
        ("AutoencoderKLHunyuanVideo", "vae", 0.476986, None),
        ("AutoencoderKLWan", "vae", 1.0, 16),
        ("AutoencoderKLQwenImage", "vae", 1.0, 16),
        ("AutoencoderKLMochi", "vae", 1.0, 12),
        ("AutoencoderDC", "vae", 1.0, None),
        ("TeaModel", "vae", 1.0, None),
    ],
)
def test_what_an_autoencoder_leaves_out_is_its_class_own(
    name: str, where: str, scale: float, channels: int | None, tmp_path: Path
) -> None:
    """As in the file of sd-vae-ft-mse, which diffusers wrote before it knew scaling_factor."""
    (tmp_path / where).mkdir()
    config = tmp_path / where / "config.json"
    config.write_text(json.dumps({"_class_name": name}))
    found = Folder(tmp_path, tmp_path / "unet").latent
    assert found is not None and (found.scale, found.shift) == (scale, 0.0)
    assert (found.mean and len(found.mean), found.std and len(found.std)) == (channels, channels)
    none = dict.fromkeys(("scaling_factor", "shift_factor", "latents_mean", "latents_std"))
    config.write_text(json.dumps({"_class_name": name, **none}))  # null is a word too
    found = Folder(tmp_path, tmp_path / "unet").latent
    assert found is not None and (found.scale, found.shift, found.mean, found.std) == (1.0, 0.0, None, None)


def test_a_network_needs_its_own_kind_of_scheduler(saved: Callable[[str], Path], sd3: Path) -> None:
    folder = Path(shutil.copytree(saved(UNET), sd3 / "unet-alone"))
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(CheckpointError, match="without a scheduler it is not known which noise levels"):
        Diffusers(path=str(folder)).outline()
    shutil.rmtree(sd3 / "scheduler")
    shutil.copytree(saved(UNET) / "scheduler", sd3 / "scheduler")
    with pytest.raises(CheckpointError, match="DDIMScheduler, whose noise levels are not those of the flow"):
        Diffusers(path=str(sd3), tokens=5).outline()


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["proj_out.bias"]


def _more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_in.bias"] = torch.zeros(3)


def _wrong(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_without, "missing: proj_out.bias"),
        (_more, "unexpected: proj_in.bias"),
        (_wrong, r"wrong size: proj_out.bias is \(3,\), expected \(16,\)"),
    ],
)
def test_every_tensor_is_accounted_for(damage: Callable[[dict[str, torch.Tensor]], None], text: str, sd3: Path) -> None:
    file = sd3 / "transformer" / WEIGHTS
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    for read in (Diffusers(path=str(sd3), tokens=5).outline, Diffusers(path=str(sd3), tokens=5).load):
        with pytest.raises(CheckpointError, match=text) as error:
            read()
        assert WEIGHTS in str(error.value)


def test_a_file_cut_short(sd3: Path) -> None:
    file = sd3 / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short, damaged or not safetensors"):
        Diffusers(path=str(sd3), tokens=5).load()


def test_configs_that_are_damaged_or_of_another_version(sd3: Path) -> None:
    config = sd3 / "transformer" / "config.json"
    change(config, tea=3)
    with pytest.raises(CheckpointError, match="has tea, which SD3Transformer2DModel of the installed diffusers"):
        Diffusers(path=str(sd3), tokens=5).outline()
    config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Diffusers(path=str(sd3), tokens=5).outline()


def test_samples_that_the_network_cannot_take(sd3: Path, saved: Callable[[str], Path]) -> None:
    with pytest.raises(FieldError, match=r"size does not fit: .*for samples \[4, n 2, n 2\], here \[4, 5, 5\]$"):
        Diffusers(path=str(sd3), tokens=5, size=(5, 5)).outline()
    with pytest.raises(FieldError, match=r"here \[4, 4, 8\]"):
        Diffusers(path=str(saved(DIT)), size=(4, 8)).outline()


@pytest.mark.parametrize(
    ("key", "value"),
    [("addition_embed_type", "text_image"), ("class_embed_type", "projection"), ("in_channels", 9)],
)
def test_other_u_nets(key: str, value: Any, saved: Callable[[str], Path], tmp_path: Path) -> None:
    name = "UNet2DConditionModel"
    folder = Path(shutil.copytree(saved(name), tmp_path / "unet"))
    change(folder / "unet" / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match="which is not read here"):
        Diffusers(path=str(folder), tokens=5).outline()


def test_conditioning_that_is_missing_is_named(saved: Callable[[str], Path]) -> None:
    teacher = said(SD3, saved(SD3)).load()
    x, t = torch.zeros(2, 4, 4, 4), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="is conditioned on text, pooled: pass cond with pooled"):
        teacher(x, t, {"text": torch.zeros(2, 5, 12)})


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(FieldError, match=r"not installed: pip install 'flow-distill\[diffusers\]'"):
        DiffusersConfig(backbone=SD3, settings={"sample_size": 4})
