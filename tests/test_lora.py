"""Adapters: the teacher's weights are shared and stay as they are; an export needs no peft."""

from __future__ import annotations

import dataclasses
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import diffusers_models
import pytest
import torch
from helpers import FAST, ROOT, checkpoints, logged, problems, trained, uniform
from proof import batch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import distill
from distill import lora as lora_module
from distill.derivative import check
from distill.job import resume, run
from distill.lora import Adapted, LoRA, copied
from distill.objectives.base import Batch, Objective
from distill.objectives.consistency import ConsistencyTrajectory
from distill.objectives.data_free import DataFree
from distill.run_folder import open_run
from distill.student import Student, StudentConfig
from distill.training.checkpoint import load_weights
from distill.training.config import TrainerConfig
from distill.training.module import DistillModule
from teachers.adapters.base import InDtype
from teachers.errors import InputError
from teachers.networks import NETWORKS, to_entry
from teachers.networks.base import muted
from teachers.networks.conventions import Flow
from teachers.networks.converted import Converted, ConvertedConfig
from teachers.networks.embeddings import TimeEmbedding
from teachers.networks.sit import SiTConfig
from teachers.networks.song_unet import SongUNetConfig
from teachers.space import Cond, DataSpace
from teachers.velocity import Teacher

IMAGE = DataSpace((1, 4, 4), 3)
close = torch.testing.assert_close


class Convolutions(nn.Module):
    """Every kind of layer that is adapted, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeEmbedding(8)
        self.blocks = nn.ModuleList(
            [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 4, stride=2, padding=1), nn.Conv2d(8, 8, 1)]
        )
        self.tokens = nn.ModuleList([nn.Conv1d(8, 8, 1)])
        self.attention = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])
        self.wide = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 1, groups=2)])
        self.leave = nn.Linear(8, 4)

    def second_time(self) -> nn.Module:
        return muted(self.time, "out")

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        embedding = self.time(t) if shift is None else self.time(t) + shift
        h = self.blocks[0](x).tanh() + embedding[:, :, None, None]
        h = self.wide[1](self.wide[0](self.blocks[2](self.blocks[1](h).tanh()))).tanh()
        tokens = self.tokens[0](h.flatten(2)).transpose(1, 2)
        return nn.functional.pixel_shuffle(self.leave(tokens).transpose(1, 2).unflatten(-1, (2, 2)), 2)


def network(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "convolutions":
        return Convolutions(), {"name": "mlp"}
    if name == "sit":
        config = SiTConfig(width=16, depth=2, heads=2)
        flow = Flow(native="cosine", prediction="noise", margin=1e-3)
        return Converted(config.build(IMAGE), flow), to_entry(ConvertedConfig(network=config, convention=flow))
    if name == "song_unet":  # it has layers that resample, which are left as they are
        unet = SongUNetConfig(width=8, widths=(8, 8), blocks=1, features=8, embedding=16, encoder="residual")
        return unet.build(IMAGE), to_entry(unet)
    own = NETWORKS[name](width=16, depth=2)
    return own.build(IMAGE), to_entry(own)


def teacher(name: str = "mlp", dtype: torch.dtype = torch.float32) -> Teacher:
    """A frozen teacher whose every weight is random."""
    torch.manual_seed(0)
    module, entry = network(name)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    module.to(dtype)
    flow = Flow(native="cosine", prediction="noise", margin=1e-3)
    found = Teacher(
        velocity=module if dtype == torch.float32 else InDtype(module),
        space=IMAGE,
        path=flow.path if name == "sit" else Flow().path,
        network=module,
        network_config=entry,
        info={"id": name, "licence": "CC0-1.0", "digest": "0"},
    )
    found.freeze()
    return found


class Half(nn.Linear):
    """A layer that does something else with its weight, which adapters know nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Halved(nn.Conv2d):
    """The same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


NAMES = ("mlp", "dit", "sit", "song_unet", "convolutions")
names = pytest.mark.parametrize("name", NAMES)


def points(b: int = 4) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    s = uniform(b, low=0.1, high=0.5, seed=1)
    cond = IMAGE.cond_for(0, b)
    assert cond is not None
    return torch.randn(b, *IMAGE.shape), s, s + uniform(b, low=0.1, high=0.4, seed=2), dict(cond)


def student(of: Teacher, lora: LoRA | None = None, **more: Any) -> Student:
    return StudentConfig(lora=lora or LoRA(rank=2, alpha=3.0), **more).build(of, IMAGE, 0)


def stirred(module: Any) -> Any:
    """With every trained weight random, as after training."""
    for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    return module


def bits(module: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in module.state_dict().items()}


def places(module: nn.Module) -> set[int]:
    """Where the storage of every parameter and buffer lies."""
    return {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}


# --- the student and the teacher


@names
def test_a_student_starts_at_its_teacher_bit_for_bit(name: str) -> None:
    of = teacher(name)
    made, (x, s, t, cond) = student(of), points()
    assert torch.equal(made.mean_velocity(x, s, t, cond), of(x, s, cond))
    assert made.gap is not None
    made.mean_velocity(x, s, t, cond).square().mean().backward()
    own = dict(made.named_parameters())
    assert all(v.grad is None for k, v in own.items() if not v.requires_grad)
    ups = [v.grad for k, v in own.items() if "lora_B" in k]
    assert len(ups) >= 3 and all(g is not None and g.abs().max() > 0 for g in ups)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [*made.gap.parameters()][-2:])
    assert not torch.equal(stirred(made).mean_velocity(x, s, t, cond), of(x, s, cond))


@names
def test_the_teacher_is_the_adapters_switched_off(name: str) -> None:
    of, (x, s, _, cond) = teacher(name), points()
    before, weights = of(x, s, cond), bits(cast(nn.Module, of.network))
    made = stirred(student(of))
    assert torch.equal(of(x, s, cond), before)
    assert not any("lora" in key for key, _ in cast(nn.Module, of.network).named_modules())
    with_adapters = made.network(x, s, cond)
    assert not torch.equal(with_adapters, before)
    for layer in made.network.modules():
        if hasattr(layer, "enable_adapters"):
            layer.enable_adapters(False)
    assert torch.equal(made.network(x, s, cond), before)
    assert bits(cast(nn.Module, of.network)) == weights


@names
def test_weights_are_one_in_memory(name: str) -> None:
    of = teacher(name)
    made = student(of)
    assert of.network is not None
    assert places(of.network) <= places(made)
    own = [p for p in made.parameters() if p.data_ptr() not in places(of.network)]
    assert {id(p) for p in own} == {id(p) for p in made.parameters() if p.requires_grad}
    twin = copied(made)
    assert {p for p in places(twin) if p in places(made)} == places(of.network)
    whole = deepcopy(made)
    assert not places(whole) & places(made)


def test_a_copy_of_anything_else_is_whole() -> None:
    made = StudentConfig().build(teacher(), IMAGE, 0)
    assert bits(copied(made)) == bits(made)
    assert not places(copied(made)) & places(made)
    assert made.merged() is made


@pytest.mark.parametrize("split", [None, 1])
def test_adapters_are_drawn_from_the_seed_alone(split: int | None) -> None:
    of, config = teacher("dit"), StudentConfig(lora=LoRA(rank=2), split=split)
    state = torch.random.get_rng_state()
    first, again, other = (config.build(of, IMAGE, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bits(first) == bits(again)
    assert bits(first) != bits(other)
    x, s, t, cond = points()
    assert torch.equal(first.mean_velocity(x, s, s, cond), of(x, s, cond))
    assert first.mean_velocity(x, s, t, cond).shape == x.shape


@names
def test_derivatives_are_exact_and_leave_the_teacher_alone(name: str) -> None:
    of, (x, s, t, cond) = teacher(name), points()
    assert of.network is not None
    before = bits(of.network)
    check(stirred(student(of)), x, s, t, cond, torch.randn_like(x))
    assert bits(of.network) == before
    assert next(of.network.parameters()).dtype == torch.float32


def test_a_teacher_of_diffusers(tmp_path: Path) -> None:
    name = "SD3Transformer2DModel"
    diffusers_models.save(name, tmp_path, diffusers_models.module(name), diffusers_models.scheduler(name))
    of = diffusers_models.said(name, tmp_path).load()
    assert of.network is not None
    made = StudentConfig(lora=LoRA(rank=2)).build(of, of.space, 0)
    x, s, t, cond = batch(of)
    assert torch.equal(made.mean_velocity(x, s, t, cond), of(x, s, cond))
    assert places(of.network) <= places(made)
    u = stirred(made).mean_velocity(x, s, t, cond)
    close(made.merged().mean_velocity(x, s, t, cond), u, atol=3e-5 * u.abs().max().item(), rtol=0)
    assert (u - of(x, s, cond)).abs().max() > 0.1


def test_a_teacher_of_half_precision() -> None:
    of, (x, s, t, cond) = teacher(dtype=torch.bfloat16), points()
    made = student(of)
    out = made.mean_velocity(x, s, t, cond)
    assert out.dtype == torch.float32
    assert torch.equal(out, of(x, s, cond))
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    assert of.network is not None and places(of.network) <= places(made)
    merged = stirred(made).merged()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    close(merged.mean_velocity(x, s, t, cond), made.mean_velocity(x, s, t, cond), atol=0.05, rtol=0.05)


# --- merging


@names
def test_merged_weights_give_the_same(name: str) -> None:
    of, (x, s, t, cond) = teacher(name), points()
    assert of.network is not None
    before = bits(of.network)
    made = stirred(student(of)).eval()
    merged = made.merged()
    assert not merged.training
    assert not any("lora" in key or "base_layer" in key for key in merged.state_dict())
    plain = StudentConfig().build(of, IMAGE, 0).state_dict()
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in plain.items()}
    u, expected = (m.mean_velocity(x, s, t, cond) for m in (merged, made))
    close(u, expected, atol=3e-5 * expected.abs().max().item(), rtol=0)
    double = deepcopy(made).double()
    exactly = [m.mean_velocity(x.double(), s, t, cond) for m in (double.merged(), double)]
    close(*exactly, atol=1e-13 * expected.abs().max().item(), rtol=0)
    assert (u - of(x, s, cond)).abs().max() > 0.01
    assert bits(of.network) == before
    assert not places(merged) & places(made)


# --- which layers


def test_layers_of_the_blocks_are_adapted() -> None:
    def of(name: str, *targets: str) -> list[str]:
        return LoRA(targets=targets or None).layers(network(name)[0])

    blocks = [f"blocks.{n}.{layer}" for n in range(2) for layer in ("modulation", "up", "down")]
    assert of("mlp") == blocks
    assert of("mlp", "*.up", "enter") == ["enter", "blocks.0.up", "blocks.1.up"]
    assert {name.partition("blocks.0.")[2] for name in of("sit") if ".0." in name} >= {"attn.qkv", "mlp.fc1"}
    assert of("convolutions") == ["blocks.0", "blocks.1", "blocks.2", "tokens.0"]
    assert LoRA().layers(nn.ModuleList([Half(2, 2), Halved(2, 2, 1), nn.Linear(2, 2)])) == ["2"]
    assert LoRA().layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ["0"]  # no blocks: all there are
    with pytest.raises(InputError, match=r"'\*\.qkv' fits no layer.* has blocks\.\*\.down, blocks\.\*\.modulation"):
        of("mlp", "*.up", "*.qkv")
    with pytest.raises(InputError, match="no layer that can be adapted"):
        LoRA().layers(nn.Embedding(3, 2))


def test_what_is_added_is_alpha_over_rank_of_a_product() -> None:
    layer = nn.Linear(5, 4)
    of = nn.ModuleDict({"layer": layer})
    made = stirred(Adapted(of, LoRA(rank=2, alpha=3.0), 0))
    (a, b), x = (p for p in made.parameters() if p.requires_grad), torch.randn(3, 5)
    assert (a.shape, b.shape) == ((2, 5), (4, 2))
    close(made.network["layer"](x), layer(x) + 1.5 * x @ a.T @ b.T)


def test_only_what_is_named_is_adapted() -> None:
    of = teacher("dit")
    made = student(of, LoRA(rank=3, targets=("*.attention.project",)))
    shapes = {k: tuple(v.shape) for k, v in made.network.state_dict().items()}
    assert len(shapes) == 4
    assert shapes["network.blocks.1.attention.project.lora_A.default.weight"] == (3, 16)
    assert shapes["network.blocks.1.attention.project.lora_B.default.weight"] == (48, 3)


def test_adapters_do_not_reach_the_second_time() -> None:
    """Its embedding is a copy of the teacher's, also where that one is adapted."""
    of = teacher()
    made = student(of, LoRA(rank=2, targets=("time_embedding.*",)))
    assert made.gap is not None
    assert not any("lora" in key for key in made.gap.state_dict())
    x, s, t, cond = points()
    assert torch.equal(made.mean_velocity(x, s, t, cond), of(x, s, cond))


# --- what is saved


def test_a_state_is_what_is_trained() -> None:
    of = teacher()
    made = stirred(student(of))
    state = made.state_dict()
    assert set(state) == {k for k, v in made.named_parameters() if v.requires_grad} | {
        k for k, _ in made.named_buffers() if k in state
    }
    assert all("lora_" in key or key.startswith("gap.") for key in state)
    fresh = student(of)
    fresh.load_state_dict(state)
    x, s, t, cond = points()
    assert torch.equal(fresh.mean_velocity(x, s, t, cond), made.mean_velocity(x, s, t, cond))


@pytest.mark.parametrize("change", ["missing", "extra", "of the teacher"])
def test_another_state_is_refused_and_never_reaches_the_teacher(change: str) -> None:
    of = teacher()
    assert of.network is not None
    made = student(of)
    before, state = bits(of.network), dict(made.state_dict())
    layer = "network.network.blocks.0.up"
    if change == "missing":
        del state[f"{layer}.lora_A.default.weight"]
    else:
        key = f"{layer}.base_layer.weight" if change == "of the teacher" else f"{layer}.lora_C.weight"
        state[key] = torch.zeros(32, 16)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up"):
        made.load_state_dict(state)
    assert bits(of.network) == before


# --- training


class Stepped(DistillModule):
    global_step = 0  # type: ignore[assignment]


def module(objective: Objective, of: Teacher) -> Stepped:
    def build(kind: Any) -> Student:
        return StudentConfig(lora=LoRA(rank=2)).build(of, IMAGE, 0, kind, objective.finest)

    networks = {name: build("velocity") for name in objective.networks}
    settings = TrainerConfig(steps=100, warmup=0, lr=1e-2, schedule="constant")
    return Stepped(build(objective.kind), objective, of, settings, 0, {}, networks)


def test_every_copy_shares_the_teacher_and_trains_its_own() -> None:
    of, batch = teacher(), Batch(torch.randn(8, *IMAGE.shape), IMAGE.cond_for(0, 8), tuple("abcdefgh"))
    assert of.network is not None
    base, before = places(of.network), bits(of.network)
    for objective, more in ((ConsistencyTrajectory(), 1), (DataFree(corrected=0.5), 1)):
        owner = module(objective, of)
        parts = [owner.student, owner.averaged_student, *owner.networks.values()]
        parts += [owner.target] if owner.target else []
        assert len(parts) == 2 + more
        assert all(base <= places(cast(nn.Module, part)) for part in parts)
        own = [places(cast(nn.Module, part)) - base for part in parts]
        assert sum(map(len, own)) == len(set().union(*own))  # nothing else is shared
        assert not any(key.split("network.")[-1].startswith(("enter", "leave")) for key in owner.state_dict())
        optimizer: Any = owner.configure_optimizers()
        assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
        for _ in range(3):
            optimizer.zero_grad()
            owner.training_step(batch, 0).backward()
            owner.optimizer_step(0, 0, optimizer, lambda: None)
        assert bits(of.network) == before
        moved = [{k: v for k, v in bits(cast(nn.Module, part)).items() if "lora_B" in k} for part in parts]
        assert all(any(v.strip(b"\0") for v in part.values()) for part in moved[: 1 if owner.target else 2])
        assert moved[0] != moved[1]
        owner.load_state_dict(owner.state_dict())


def test_averages_and_slow_copies_are_right() -> None:
    owner = module(ConsistencyTrajectory(decay=0.75), teacher())
    assert owner.target is not None
    key = "network.network.blocks.0.up.lora_A.default.weight"
    optimizer: Any = owner.configure_optimizers()
    expected = [owner.student.state_dict()[key].clone()] * 2
    for n in range(3):
        with torch.no_grad():
            owner.student.get_parameter(key).add_(1.0)
        owner.optimizer_step(0, 0, optimizer, lambda: None)
        now = owner.student.get_parameter(key).detach()
        decay = 0.0 if n == 0 else (1 + n) / (10 + n)
        expected = [decay * expected[0] + (1 - decay) * now, 0.75 * expected[1] + 0.25 * now]
    close(owner.averaged_student.state_dict()[key], expected[0])
    close(owner.target.state_dict()[key], expected[1])


# --- recipes and jobs


@pytest.mark.usefixtures("untouched")
def test_what_does_not_go_together_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*overrides: str) -> str:
        return "\n".join(problems("quickstart", *overrides))

    assert said("student.lora={}") == said("student.lora={rank: 4, targets: ['*.up']}") == ""
    random = said("student={init: random, network: {name: mlp}, lora: {rank: 4}}")
    assert "student.lora" in random and "set student.init to teacher" in random
    assert "student.lora.rank: must be at least 1, got 0" in said("student.lora={rank: 0}")
    unknown = said("student.lora={targets: ['*.q_proj']}")
    assert "student.lora.targets" in unknown and "it has blocks.*" in unknown
    assert "did you mean" in said("student.lora={rnak: 4}")
    monkeypatch.setattr(lora_module, "find_spec", lambda name: None)
    assert "install with the extra [lora]" in said("student.lora={rank: 4}")


def test_its_keys_are_in_the_docs() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    start = text.index("`lora` needs the extra")
    for f in dataclasses.fields(LoRA):
        assert f"`{f.name}`" in text[start : start + 500]


JOB = (*FAST, "student.lora={rank: 2, alpha: 4}", "trainer.lr=0.02", "trainer.warmup=1", "trainer.checkpoint_every=3")


def test_a_whole_job(built: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = (*JOB, f"data.path={built}")
    whole = run("quickstart", [*jobs, "name=whole"])
    newest = checkpoints(whole)[-1]
    for file in ("student", "ema", "optimizer"):
        held = load_file(newest / f"{file}.safetensors")
        assert held and all("lora_" in k or ".gap." in k or file != "student" for k in held)
        assert not any("base_layer" in k or "class_embedding" in k for k in held)
    job = open_run(whole, Console(quiet=True))
    made, _ = job.trained_student(job.trained())
    exported = distill.load(whole / "export")
    x = exported.sample(20, steps=2, seed=5)
    assert torch.equal(made.sample(20, steps=2, seed=5), x)
    adapted = job.new_student()
    adapted.load_state_dict(load_weights(newest, "ema"))
    assert isinstance(adapted.network, Adapted)
    close(adapted.eval().sample(20, steps=2, seed=5), x, atol=1e-5, rtol=0)
    assert (distill.load(whole / "export").sample(20, seed=5) - job.new_student().sample(20, seed=5)).abs().max() > 0.01
    assert job.teacher is not None
    assert exported.config["licence"] == job.teacher.info["licence"]
    assert set(exported.state_dict()) == set(StudentConfig().build(job.teacher, job.space, 0).state_dict())
    monkeypatch.setitem(sys.modules, "peft", None)
    assert torch.equal(distill.load(whole / "export").sample(20, steps=2, seed=5), x)
    monkeypatch.undo()
    monkeypatch.chdir(cwd)

    step = DistillModule.training_step

    def fails(self: DistillModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            raise KeyError("power")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", fails)
    with pytest.raises(KeyError):
        run("quickstart", [*jobs, "name=broken"])
    monkeypatch.setattr(DistillModule, "training_step", step)
    resume("runs/broken")
    assert trained(Path("runs/broken")) == trained(whole)
    assert logged(Path("runs/broken")) == logged(whole)
    exports = [load_file(Path(f"runs/{name}/export/model.safetensors")) for name in ("broken", "whole")]
    assert all(torch.equal(v, exports[1][k]) for k, v in exports[0].items())
