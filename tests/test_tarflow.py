"""TarFlow agrees with its own code; and what a teacher that makes samples and has no velocity can and cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import golden
from helpers import FAST, logged, problems, written
from safetensors.torch import load_file, save_file
from torch import Tensor

import distill
from distill.data.manifest import DataError
from distill.data.pairs import PairsPlan, build_pairs
from distill.job import evaluate, run
from distill.objectives.base import Batch
from distill.objectives.endpoint import Endpoint, Pairs
from distill.rows import Rows
from distill.teacher_check import TeacherError, check_teacher, describe
from teachers.adapters.native import Native
from teachers.adapters.tarflow import TarFlow
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.fill import Placement
from teachers.guidance import guided
from teachers.networks.dit import unpatchify
from teachers.networks.tarflow import TarFlow as Network
from teachers.path import Cosine, Linear
from teachers.path_change import on_path
from teachers.space import DataSpace
from teachers.velocity import Teacher

close = torch.testing.assert_close


def stored(name: str, size: float = 0.2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as its train.py saves it, and the numbers of the original; `size`: of what its blocks say."""
    made, numbers = golden(name)
    made = {k: size * v if "proj_out" in k else v for k, v in made.items()} | {"var": numbers["var"]}
    tokens = len(made["var"])
    blocks = [key.replace("pos_embed", "attn_mask") for key in made if key.endswith(".pos_embed")]
    masks = {key: torch.ones(tokens, tokens).tril() for key in blocks}
    return made | masks, numbers


def saved(folder: Path, state: dict[str, Tensor]) -> str:
    torch.save(state, folder / "tarflow.pth")
    return str(folder / "tarflow.pth")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("tarflow"), stored("tarflow")[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of one channel, of values that are images; no classes."""
    return saved(tmp_path_factory.mktemp("small"), stored("tarflow_vp", 0.1)[0])


def made(file: str, numbers: dict[str, Tensor], **config: Any) -> Tensor:
    teacher = TarFlow(path=file, **{"noise_std": 0.0, **config}).load()
    assert teacher.generator is not None
    x_0 = unpatchify(numbers["noise"], teacher.space.shape, 2)
    return teacher.generator(x_0, {"class": numbers["y"]} if "y" in numbers else None)


# --- against the original


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": 1.5},
    "constant": {"guidance": 1.5, "annealed": False},
    "scale": {"guidance": 1.5, "annealed": False, "guide": "scale", "temperature": 0.8},
    "shift": {"guidance": 1.5, "annealed": False, "guide": "shift", "temperature": 0.8},
    "denoised": {"guidance": 1.5, "noise_std": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_its_own_code(case: str, file: str) -> None:
    """Of size 20; five of ours are as good, and every other setting is not."""
    numbers = golden("tarflow")[1]
    found = made(file, numbers, **CASES[case])
    close(found, numbers[case], atol=1e-4, rtol=0)
    for other in CASES.keys() - {case}:
        assert (found - numbers[other]).abs().max() > 0.05


def test_every_block_back_is_that_of_its_own_code(file: str) -> None:
    numbers, network = golden("tarflow")[1], TarFlow(path=file, noise_std=0.0).load().parts[0]
    assert isinstance(network, Network)
    label, x = numbers["y"], numbers["noise"]
    for step, number in enumerate((2, 1, 0), 1):
        x = network.blocks[number].back(x, label, None, 1.0)
        close(unpatchify(x, (3, 8, 8), 2), numbers[f"plain_{step}"], atol=2e-5, rtol=0)
    without = network.back(unpatchify(numbers["noise"], (3, 8, 8), 2))
    close(without, numbers["mean"], atol=2e-5, rtol=0)


def test_forth_is_that_of_its_own_code_and_undoes_back(file: str) -> None:
    numbers, network = golden("tarflow")[1], TarFlow(path=file, noise_std=0.0).load().parts[0]
    z, volume = network(numbers["plain"], numbers["y"])
    close(z, unpatchify(numbers["z"], (3, 8, 8), 2), atol=1e-5, rtol=0)
    close(volume / z[0].numel(), numbers["logdet"], atol=1e-5, rtol=0)
    close(z, unpatchify(numbers["noise"], (3, 8, 8), 2), atol=1e-5, rtol=0)


def test_the_determinant_and_the_score_are_right() -> None:
    network, x = Network((1, 4, 4), 2, 16, 2, 1, 2, classes=3).double(), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    label = torch.tensor([2])
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, label)[0], x).reshape(16, 16)
    volume = network(x, label)[1][0]
    close(torch.linalg.slogdet(jacobian)[1], volume, atol=1e-12, rtol=0)
    assert abs(volume) > 0.1
    network.requires_grad_(False)
    step = torch.zeros_like(x)
    step[0, 0, 2, 3] = 1e-5

    def log(x: Tensor) -> Tensor:
        z, volume = network(x, label)
        return volume[0] - 0.5 * z.square().sum()

    slope = (log(x + step) - log(x - step)) / 2e-5
    close(network.score(x, label)[0, 0, 2, 3], slope, atol=1e-8, rtol=1e-8)


def test_a_flow_without_scales_and_classes(small: str, tmp_path: Path) -> None:
    state, numbers = stored("tarflow_vp")
    file = saved(tmp_path, state)
    close(made(file, numbers), numbers["plain"], atol=1e-5, rtol=0)
    close(made(file, numbers, guidance=0.7, annealed=False, temperature=0.6), numbers["guided"], atol=1e-5, rtol=0)
    close(made(file, numbers, noise_std=0.3), numbers["denoised"], atol=1e-5, rtol=0)
    assert (made(file, numbers, noise_std=0.3) - numbers["plain"]).abs().max() > 0.05
    teacher = TarFlow(path=small, noise_std=0.1).load()
    assert teacher.space == DataSpace((1, 6, 6), None, (-1.0, 1.0))


def test_half_precision(file: str) -> None:
    half = TarFlow(path=file, noise_std=0.1, placement=Placement(dtype="bfloat16")).load()
    assert half.generator is not None
    x = half.generator(torch.randn(2, 3, 8, 8), {"class": torch.tensor([0, 1])})
    assert x.dtype == torch.float32 and x.isfinite().all()


# --- its file


def test_what_it_is_is_read_from_its_shapes(file: str) -> None:
    teacher = TarFlow(path=file, noise_std=0.07, guidance=1.0, licence="Apple").load()
    assert teacher.space == DataSpace((3, 8, 8), 3, (-1.0, 1.0))
    assert teacher.velocity is None and teacher.network is None and teacher.null is None
    assert teacher.info["licence"] == "Apple"
    assert teacher.info["sampler"]["noise_std"] == 0.07
    json.dumps(dict(teacher.info))
    assert "no velocity" in describe(teacher) and "tarflow" in describe(teacher)
    (flow,) = teacher.parts
    assert isinstance(flow, Network) and not flow.training and not any(p.requires_grad for p in flow.parameters())
    assert len(flow.blocks) == 3 and len(flow.blocks[0].attn_blocks) == 2
    other = TarFlow(path=file, noise_std=0.0, heads=4).load().parts[0]
    assert isinstance(other, Network) and (flow.blocks[0].heads, other.blocks[0].heads) == (2, 4)


def test_its_outline_has_no_weights(file: str) -> None:
    outlined = TarFlow(path=file, noise_std=0.07).outline()
    assert all(p.is_meta for p in outlined.parts[0].parameters())
    assert outlined.space == DataSpace((3, 8, 8), 3, (-1.0, 1.0))


def broken(change: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "blocks.1.attn_blocks.0.attention.qkv.weight"
    if change == "missing":
        del state[key]
    elif change == "renamed":
        state[key.replace("qkv", "kqv")] = state.pop(key)
    elif change == "size":
        state[key] = state[key][:-1]
    elif change == "var":
        del state["var"]
    elif change == "another":
        return {"weight": torch.zeros(3)}
    elif change == "no square":
        return {k: v[:-1] if "pos_embed" in k or k == "var" else v for k, v in state.items()}
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", r"missing: blocks\.1\.attn_blocks\.0\.attention\.qkv\.weight"),
        ("renamed", r"unexpected: blocks\.1\.attn_blocks\.0\.attention\.kqv\.weight"),
        ("size", r"qkv\.weight is \(383, 128\), expected \(384, 128\)"),
        ("var", r"missing: var"),
        ("another", r"has no blocks\.0\.proj_in\.weight, so it is not of this family"),
        ("no square", r"15 patches of 12 numbers are no square image of 1 or 3 channels"),
    ],
)
@pytest.mark.parametrize("way", ["load", "outline"])
def test_another_file_is_refused(change: str, said: str, way: str, tmp_path: Path) -> None:
    file = saved(tmp_path, broken(change, stored("tarflow")[0]))
    with pytest.raises(CheckpointError, match=said) as error:
        getattr(TarFlow(path=file, noise_std=0.1), way)()
    assert "tarflow.pth" in str(error.value)


def test_what_no_file_says_is_asked_for(file: str) -> None:
    with pytest.raises(FieldError, match=r"TarFlow\.noise_std is needed") as error:
        TarFlow(path=file).load()
    assert set(error.value.problems) == {"noise_std"}
    with pytest.raises(CheckpointError, match=r"of 4 channels.*set teacher\.channels"):
        TarFlow(path=file, noise_std=0.1, channels=4).load()
    with pytest.raises(FieldError, match=r"heads must divide the width, 128, got 3"):
        TarFlow(path=file, noise_std=0.1, heads=3).load()
    for key, value in (("noise_std", 1.0), ("guidance", -1.0), ("temperature", 0.0)):
        with pytest.raises(FieldError, match=key):
            TarFlow(path=file, **{key: value})


def test_a_file_cut_short_is_told(file: str, tmp_path: Path) -> None:
    short = tmp_path / "short.pth"
    short.write_bytes(Path(file).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"short\.pth: cut short"):
        TarFlow(path=str(short), noise_std=0.1).load()


def test_safetensors_are_read_too(file: str, tmp_path: Path) -> None:
    state, numbers = stored("tarflow")
    save_file(state, tmp_path / "model.safetensors")
    close(made(str(tmp_path / "model.safetensors"), numbers), numbers["plain"], atol=1e-4, rtol=0)


# --- a teacher of samples alone


def turned(x_0: Tensor, cond: Any) -> Tensor:
    del cond
    return torch.stack([-x_0[:, 1], x_0[:, 0]], 1).tanh()


def samples_alone() -> Teacher:
    return Teacher(generator=turned, space=DataSpace((2,)), info={"id": "a GAN", "licence": "CC0-1.0"})


def test_a_teacher_has_a_velocity_or_makes_samples() -> None:
    with pytest.raises(FieldError, match=r"velocity must be given, or a generator of samples"):
        Teacher(space=DataSpace((2,)))
    teacher, x, t = samples_alone(), torch.randn(3, 2), torch.rand(3)
    with pytest.raises(InputError, match=r"a GAN makes samples and has no velocity.*reflow first"):
        teacher(x, t, None)
    with pytest.raises(TeacherError, match=r"no velocity"):
        check_teacher(teacher, Batch(x, None, ("a", "b", "c")), 0)
    with pytest.raises(InputError, match=r"no velocity to guide: remove the section guidance"):
        guided(teacher, 2.0, (0.0, 1.0))
    with_velocity = Teacher(velocity=lambda x, t, cond: -x, space=DataSpace((2,)), info={"id": "flow"})
    with pytest.raises(InputError, match=r"a GAN makes samples"):
        guided(with_velocity, 2.0, (0.0, 1.0), weak=teacher)
    moved = on_path(teacher, Cosine())
    assert moved.path == Cosine() and moved.generator is turned and moved.velocity is None


def test_pairs_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a GAN has no velocity to solve, but makes samples: --solver own"):
        build_pairs(tmp_path / "pairs", samples_alone(), PairsPlan(samples=10))
    manifest = build_pairs(tmp_path / "pairs", samples_alone(), PairsPlan(samples=10, solver="own"))
    assert manifest.samples == 10 and manifest.source["nfe"] == 1


@pytest.mark.usefixtures("untouched")
def test_what_it_cannot_give_is_told(small: str) -> None:
    values = {
        "name": "samples",
        "teacher": {"name": "tarflow", "path": small, "noise_std": 0.1},
        "student": {"init": "random", "network": {"name": "mlp", "width": 16}},
        "objective": {"name": "endpoint", "pairs": {"solver": "own"}},
        "trainer": {"steps": 10},
    }
    folder = Path.cwd().parent
    file = written(folder, values)

    def said(*overrides: str) -> str:
        return "\n".join(problems(file, *overrides))

    assert said() == said("objective={name: reflow, pairs: {solver: own}}") == ""
    for name in ("lagrangian", "eulerian", "semigroup", "progressive"):
        found = said(f"objective={{name: {name}}}")
        assert "objective: learns from a velocity; this teacher makes samples" in found and "reflow first" in found
    assert "objective.pairs.solver: must be own" in said("objective.pairs.solver=heun")
    assert "objective.pairs.solver: must be own" in said("objective={name: reflow, pairs: {solver: rk4}}")
    assert "no velocity to guide" in said("guidance={scale: 2.0}")
    assert "student.init" in said("student={init: teacher}")
    assert "teacher.noise_std: is needed" in said("teacher.noise_std=null")


JOB = """
name: tarflow
teacher: {{name: tarflow, path: {file}, noise_std: 0.1, guidance: 0.5, licence: Apple}}
student: {{init: random, network: {{name: mlp, width: 64, depth: 2}}}}
objective: {{name: endpoint, pairs: {{solver: own}}}}
trainer: {{steps: 60, batch: 32, lr: 5.0e-3, warmup: 5, ema: 0.9, checkpoint_every: 50}}
tracking: {{wandb: disabled, log_every: 5, samples_every: 50}}
evaluation: {{samples: 100, reference_steps: 7}}
"""


def test_a_whole_job_from_its_file(small: str, cwd: Path) -> None:
    recipe = cwd / "tarflow.yaml"
    recipe.write_text(JOB.format(file=small))
    folder = run(recipe)
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["teacher"]["solver"] == found["protocol"]["solver"] == "own"
    assert found["teacher"]["steps"] == found["teacher"]["nfe"] == 1 and found["teacher_steps"] == {}
    losses = [row["loss"] for row in logged(folder)]
    assert losses[-1] < 0.3 * losses[0]
    # whom the student has to match: the same noise gives the same sample
    teacher = TarFlow(path=small, noise_std=0.1, guidance=0.5).load()
    assert teacher.generator is not None
    student, x_0 = distill.load(folder / "export"), torch.randn(100, 1, 6, 6)
    wanted = teacher.generator(x_0, None)
    off = (student.generate(x_0, 1) - wanted).square().mean().sqrt()
    assert off < 0.5 * wanted.std()
    assert found["student"]["1"]["paired"]["endpoint_rmse"] < 0.5
    assert student.config["licence"] == "Apple"
    assert student.config["teacher"]["family"] == "tarflow"
    text = (folder / "report.html").read_text()
    assert "times the teacher&#x27;s" in text and "7-step" not in text
    again = evaluate(folder / "export", out="again.json")
    assert json.loads(again.read_text())["student"]["1"]["metrics"] == found["student"]["1"]["metrics"]


def test_a_velocity_fitted_by_reflow_is_a_teacher(small: str, cwd: Path) -> None:
    recipe = cwd / "reflow.yaml"
    values = yaml.safe_load(JOB.format(file=small)) | {"objective": {"name": "reflow", "pairs": {"solver": "own"}}}
    recipe.write_text(yaml.safe_dump(values))
    folder = run(recipe, [*FAST, "name=reflow"])
    teacher = Native(path=str(folder / "export")).load()
    assert teacher.velocity is not None and teacher.network is not None
    assert teacher.info["licence"] == "Apple"
    assert "model.safetensors" in {f.name for f in (folder / "export").iterdir()}
    assert load_file(folder / "export" / "model.safetensors")


def test_a_generator_from_python(cwd: Path) -> None:
    recipe = written(cwd, {
        "name": "gan",
        "student": {"init": "random", "network": {"name": "mlp", "width": 32, "depth": 2}},
        "objective": {"name": "endpoint", "pairs": {"solver": "own"}},
        "trainer": {"steps": 150, "batch": 64, "lr": 5e-3, "warmup": 10, "ema": 0.9},
        "tracking": {"wandb": "disabled", "samples_every": 0},
        "evaluation": {"samples": 200},
    })  # fmt: skip
    folder = run(recipe, teacher=samples_alone())
    student, x_0 = distill.load(folder / "export"), torch.randn(200, 2)
    assert (student.generate(x_0, 1) - turned(x_0, None)).square().mean().sqrt() < 0.2
    assert (student.generate(x_0, 1) - x_0).square().mean().sqrt() > 0.5


def test_own_pairs_need_a_generator() -> None:
    objective = Endpoint(pairs=Pairs(solver="own"))
    assert not objective.needs_velocity and Endpoint().needs_velocity
    draw = objective.draw(Batch(torch.zeros(4, 2), None, tuple("abcd")), Linear(), Rows(0, "t", 0, 0, 4), 0)
    close(objective.pairs(samples_alone(), draw), turned(draw.x_0, None))
