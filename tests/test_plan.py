"""The plan of a job against what the job really takes: exact parts, activations as the allocator saw them."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment, written
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from distill.data.reader import ShardReader
from distill.data.shards import Shards
from distill.memory import replica_bytes
from distill.one_step import Measured, one_step
from distill.outline import DIGITS, outlined
from distill.parts import Job, RunError, shared
from distill.plan import Plan, make_plan, show
from distill.recipe import Recipe, load
from distill.training.module import DistillModule
from distill.training.recompute import recompute
from teachers.path import PATHS
from teachers.space import DataSpace
from teachers.velocity import Teacher

QUIET = Console(quiet=True)
DIT = "student={init: random, network: {name: dit, patch: 2, width: 48, depth: 3, heads: 4}}"
MLP = "student={init: random, network: {name: mlp, width: 96, depth: 3}}"
LORA = "student.lora={rank: 4}"
CASES = {
    "teacher's network, lagrangian": (),
    "mlp, eulerian": (MLP, "objective={name: eulerian}"),
    "mlp, shortcut with a slow copy": (MLP, "objective={name: shortcut}"),
    "dit, lagrangian": (DIT, "objective={name: lagrangian}"),
    "dit, eulerian in full": (DIT, "objective={name: eulerian, gradient: full}"),
    "dit, shortcut": (DIT, "objective={name: shortcut}"),
    "dit, two networks": (DIT, "objective={name: data_free}", "data=null"),
    "dit, learned weight": (DIT, "objective={name: lagrangian, gradient: stop, weight: {learned: log}}"),
    "dit, finite differences": (DIT, "objective={name: lagrangian, derivative: finite_difference}"),
    "dit, bfloat16": (DIT, "trainer.precision=bfloat16"),
    "dit, muon": (DIT, "objective={name: data_free}", "data=null", "trainer.optimizer=muon"),
    "dit, recomputed": (DIT, "objective={name: eulerian}", "trainer.recompute=true"),
    "adapters": (LORA,),
    "adapters, slow copy": (
        LORA,
        "objective={name: lagrangian, source: target, times: {name: uniform_triangle, diagonal: 0.25}}",
    ),
}


def recipe_of(built: Path, *overrides: str) -> Recipe:
    return load("quickstart", ["trainer.batch=64", f"data.path={built}", *overrides])


def test_a_teacher_guided_on_another_path_is_outlined_as_it_is(built: Path) -> None:
    weak = "guidance={scale: 1.5, weak: {name: native, path: digits}}"
    recipe = recipe_of(built, "student={init: random, network: {name: mlp, width: 8}, path: cosine}", weak)
    reference, outline = real(recipe)[0].reference, outlined(recipe)
    assert reference is not None and outline.teacher is not None
    assert outline.teacher.path == reference.path == PATHS["cosine"]()
    sizes = [{id(m): sum(p.numel() for p in m.parameters()) for m in t.modules()} for t in (reference, outline.teacher)]
    assert sorted(sizes[0].values()) == sorted(sizes[1].values()) and len(sizes[0]) == 2


def real(recipe: Recipe) -> tuple[Job, DistillModule]:
    """What training makes of a recipe, with its weights."""
    job = Job(Path(), recipe, recipe.teacher.load() if recipe.teacher else None, QUIET)
    assert job.reference is not None
    job.reference.freeze()
    student = job.new_student()
    if recipe.trainer.recompute:
        recompute(student.network)
    module = DistillModule(
        student, recipe.objective, job.reference, recipe.trainer, recipe.seed, {}, job.new_networks(), recipe.guidance
    )
    return job, module


def size(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes at addresses that were not seen before."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    new = {at: count for at, count in found.items() if at not in seen}
    seen.update(new)
    return sum(new.values())


def every(*modules: nn.Module | None) -> Iterator[Tensor]:
    return (t for m in modules if m is not None for t in (*m.parameters(), *m.buffers()))


def stepped(job: Job, module: DistillModule) -> torch.optim.Optimizer:
    """One real step."""
    optimizer = module.configure_optimizers()
    batch = next(job.reader.batches(0, job.recipe.trainer.batch, 0))
    module.optimizer_step(0, 0, optimizer, lambda: module.training_step(batch, 0).backward())
    return optimizer


def parts(job: Job, module: DistillModule, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    assert job.reference is not None
    seen: set[int] = set()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "teacher": size(every(*job.reference.modules()), seen),
        "parameters": size(every(module.student, module.networks, module.log_variance), seen),
        "gradients": size((p.grad for p in trained), seen),
        "optimizer": size((v for p in trained for v in optimizer.state[p].values()), seen),
        "ema": size(every(module.ema), seen),
        "target": size(every(module.target), seen),
    }


# --- against the real thing


@pytest.mark.parametrize("case", CASES)
def test_parts_are_what_training_holds(built: Path, case: str) -> None:
    """Every byte of parameters, gradients, moments, EMA, slow copy and teacher after a real step."""
    recipe = recipe_of(built, *CASES[case])
    job, module = real(recipe)
    student, *further = [
        module.student,
        *module.networks.values(),
        *([module.log_variance] * bool(module.log_variance)),
    ]
    assert job.reference is not None
    replica = replica_bytes(
        student,
        further,
        job.reference.modules(),
        target=module.target is not None,
        optimizer=recipe.trainer.optimizer,
    )
    found = parts(job, module, stepped(job, module))
    plan = make_plan(recipe)
    assert asdict(plan.held) == found
    assert replica == plan.held.total == sum(found.values())
    assert (plan.strategy, plan.whole, plan.sent) == ("single", 0, 0)


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_the_allocator_gave(built: Path, case: str) -> None:
    """The most that was allocated in a real loss and backward pass, as torch's profiler recorded it."""
    recipe = recipe_of(built, *CASES[case])
    job, module = real(recipe)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    batch = next(job.reader.batches(0, recipe.trainer.batch, 0))
    module.training_step(batch, 0).backward()
    step = make_plan(recipe).step
    assert step is not None
    assert most(lambda: module.training_step(batch, 0).backward()) == pytest.approx(step.loss, rel=0.03)


def most(work: object) -> int:
    assert callable(work)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert memory
    return max(accumulate(e.nbytes() for e in memory))


def test_a_step_of_the_student_alone(built: Path) -> None:
    """`plain` is a forward and a backward pass; a Lagrangian step takes more, one that recomputes blocks less."""
    recipe = recipe_of(built, DIT)
    _, module = real(recipe)
    student = module.student
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, s = torch.randn(64, 1, 8, 8), torch.rand(64, dtype=torch.float64)
    cond = {"class": torch.zeros(64, dtype=torch.int64)}

    def work() -> None:
        student.mean_velocity(x, s, s, cond).square().mean().backward()

    work()
    step = make_plan(recipe).step
    less = make_plan(recipe_of(built, DIT, "trainer.recompute=true")).step
    assert step is not None and less is not None
    assert most(work) == pytest.approx(step.plain, rel=0.03)
    assert step.loss > 1.5 * step.plain and less.plain < 0.7 * step.plain and less.loss < 0.7 * step.loss


def test_rows_are_those_of_a_part_of_a_share(built: Path) -> None:
    whole, part = (make_plan(recipe_of(built, DIT, *words), n) for n, words in ((1, ()), (4, ["trainer.accumulate=2"])))
    assert (whole.rows, part.rows) == (64, 8)
    assert whole.step is not None and part.step is not None
    assert part.step.loss < whole.step.loss / 7


SHARDS = """
import json, sys
from pathlib import Path
import torch
import test_plan as t
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
torch.distributed.init_process_group("gloo")
job, module = t.real(t.recipe_of(Path(sys.argv[1]), *json.loads(sys.argv[2])))
module._share_teacher = True
module._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
module.configure_model()
optimizer = t.stepped(job, module)
size = t.size
t.size = lambda tensors, seen: size((x.to_local() if isinstance(x, DTensor) else x for x in tensors), seen)
if torch.distributed.get_rank() == 0:
    print("parts", json.dumps(t.parts(job, module, optimizer)))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dit, learned weight", "mlp, shortcut with a slow copy", "dit, muon"])
def test_shards_are_those_of_two_real_processes(built: Path, tmp_path: Path, case: str) -> None:
    """FSDP2 over gloo: what the first process holds of each part after a step, byte for byte."""
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    done = subprocess.run(
        [sys.executable, *launch, str(built), json.dumps(CASES[case])], env=env, capture_output=True, text=True
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("parts ")), None)
    assert line is not None, done.stderr
    plan = make_plan(recipe_of(built, *CASES[case], "trainer.strategy=fsdp2"), 2)
    assert asdict(plan.held) == json.loads(line.removeprefix("parts "))


# --- many processes that do not exist


def test_shards_of_128_processes(built: Path) -> None:
    """Of each parameter the first process has ceil(rows / 128) rows; buffers are whole everywhere."""
    _, module = real(recipe_of(built, DIT))
    shards = [-(-len(p) // 128) * p[0].numel() * 4 for p in module.student.parameters()]
    buffers = sum(b.nbytes for b in module.student.buffers())
    # data that are not there have any number of shards
    plan = make_plan(recipe_of(built / "none", DIT, "trainer.batch=128", "trainer.strategy=fsdp2"), 128)
    assert plan.strategy == "fsdp2" and plan.held.gradients == sum(shards)
    assert plan.held.parameters == sum(shards) + buffers and plan.held.ema == sum(shards) + buffers + 8
    assert plan.held.optimizer == 2 * sum(shards) + 4 * len(shards)
    assert not torch.distributed.is_initialized()
    largest = [sorted(units(part))[-2:] for part in (module.student, module._teacher[0].network)]  # type: ignore[union-attr]
    assert plan.whole == sum(sorted([*largest[0], *largest[1]])[-2:]) + sum(largest[0])


def units(part: nn.Module) -> list[int]:
    """Bytes of what FSDP2 gathers at once: a block, a second time's embedding, or what is left of the network."""
    blocks = [
        m for name, m in part.named_modules() if name.endswith("gap") or name.rpartition(".")[0].endswith("blocks")
    ]
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    return [*sizes, sum(p.nbytes for p in part.parameters()) - sum(sizes)]


def test_what_a_step_sends(built: Path) -> None:
    """DDP: a ring sends all gradients twice but for a share. FSDP2: gathers for every pass through a network, forward
    and backward, and the gradients once; here two passes of the slow copy, and forward and backward of the student."""
    words = (MLP, "objective={name: shortcut}")
    _, module = real(recipe_of(built, *words))
    weights = sum(p.nbytes for p in module.student.parameters())
    ddp = make_plan(recipe_of(built, *words, "trainer.strategy=ddp", "trainer.accumulate=2"), 4)
    assert ddp.sent == 2 * 3 * weights // 4 and ddp.whole == 0
    teacher = sum(p.nbytes for p in every(module._teacher[0].network) if isinstance(p, nn.Parameter))  # type: ignore[union-attr]
    fsdp2 = make_plan(recipe_of(built, *words, "trainer.strategy=fsdp2", "trainer.accumulate=2"), 4)
    assert fsdp2.step is not None
    assert fsdp2.step.gathered == 4 * weights + teacher
    assert fsdp2.sent == 2 * (3 * (4 * weights + teacher) // 4 + 3 * fsdp2.held.gradients)


def test_auto_takes_shards_where_a_replica_is_too_large(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    recipe = recipe_of(built)
    assert shared(recipe, 2, lambda: 60, 100) == "ddp" and shared(recipe, 2, lambda: 61, 100) == "fsdp2"
    total = make_plan(recipe).held.total
    for memory, expected in ((2 * total, "ddp"), (total, "fsdp2")):
        monkeypatch.setattr("distill.plan.MEMORY", memory)
        if not torch.cuda.is_available():
            assert make_plan(recipe, 2).strategy == expected
    monkeypatch.setattr("distill.plan.MEMORY", 1)
    assert make_plan(recipe_of(built, LORA), 2).strategy == "ddp"  # adapters cannot be sharded


# --- what it leaves alone, and says


def test_nothing_is_built_and_the_given_teacher_stays(untouched: Path) -> None:
    """The recipe's data, which are not there, are not made; weights keep their values."""
    recipe = load("quickstart")
    assert make_plan(recipe, 2).step is not None
    assert make_plan(load("teachers/digits")).step is not None
    assert recipe.teacher is not None
    teacher = recipe.teacher.load()
    assert teacher.network is not None
    teacher.network.train().requires_grad_(True)
    before = [p.clone() for p in teacher.network.parameters()]
    given = make_plan(recipe, 2, teacher=teacher)
    assert given.held.teacher == sum(t.nbytes for t in every(teacher.network))
    assert teacher.network.training
    for value, parameter in zip(before, teacher.network.parameters(), strict=True):
        assert torch.equal(value, parameter) and parameter.requires_grad


def test_space_of_data_that_are_not_built(built: Path) -> None:
    assert ShardReader(Shards(path=str(built))).space == DIGITS


def test_a_batch_that_cannot_be_shared(built: Path) -> None:
    with pytest.raises(RunError, match=r"trainer.batch: 64 cannot be shared by 24 processes in 1 parts each: make it"):
        make_plan(recipe_of(built), 24)
    with pytest.raises(RunError, match=r"by 16 processes in 8 parts each: make it a multiple, or change"):
        make_plan(recipe_of(built, "trainer.accumulate=8"), 16)
    with pytest.raises(RunError, match="strategy is single, but there are 2 processes"):
        make_plan(recipe_of(built, "trainer.strategy=single"), 2)
    said = printed(make_plan(recipe_of(built), 64))  # which the shards have to be built for
    assert "caution: 64 readers (64 processes x 1 workers) but 16 streams: build more shards" in " ".join(said.split())
    assert "caution" not in printed(make_plan(recipe_of(built), 16))


def test_a_loss_that_looks_at_values(built: Path) -> None:
    """Its memory is not known; the rest is."""
    space = DataSpace((1, 8, 8), 10, (-1.0, 1.0))
    teacher = Teacher(velocity=lambda x, t, cond: x * x.sum().item(), space=space, info={"digest": "none"})
    plan = make_plan(recipe_of(built, DIT), 2, teacher=teacher)
    assert plan.step is None and plan.total is None and plan.held.parameters > 0
    text = printed(plan)
    assert (
        "not known" in text and plan.unknown in text and "item" in plan.unknown.replace("_local_scalar_dense", "item")
    )


def printed(plan: Plan, **said: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(plan, console, **said)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_days_are_printed_only_from_a_step_time(built: Path) -> None:
    plan = make_plan(recipe_of(built, "trainer.steps=864000", "trainer.accumulate=2", "trainer.strategy=ddp"), 4)
    plan = replace(plan, held=replace(plan.held, parameters=2_500_000_000))
    text = printed(plan)
    assert "days" not in text and "2.5 GB" in text and "quickstart on 4 GPUs: ddp" in text
    assert "a batch of 64, 16 a GPU, in 2 parts of 8; 864,000 steps, 55,296,000 samples" in text
    assert "2.5 days at 0.25 s a step" in printed(plan, seconds=0.25)
    measured = Measured(seconds=0.5, memory=10**6, device="this CPU", rows=16)
    assert "5 days at 0.5 s a step" in printed(plan, measured=measured)
    assert "2.5 days at 0.25 s a step" in printed(plan, measured=measured, seconds=0.25)


def test_one_step_is_real(untouched: Path, built: Path) -> None:
    """It trains on the share of one process, in parts, and leaves nothing behind; more rows take longer."""
    recipe = recipe_of(built, MLP, "trainer.batch=4096", "trainer.accumulate=2", "trainer.device=cpu")
    job, _ = real(recipe)
    large, *small = one_step(job), one_step(job, 16), one_step(job, 16)
    assert (large.rows, small[0].rows, large.device) == (4096, 256, "this CPU")
    assert large.seconds > 1.3 * min(step.seconds for step in small) > 0 and large.memory >= 0


# --- the largest recipe


LARGEST = """
import resource, sys, time
from distill.plan import make_plan
from distill.recipe import load
recipe = load(sys.argv[1])
start = time.process_time()
plan = make_plan(recipe, 128)
print(plan.held.gradients, plan.total, round(time.process_time() - start),
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def flux(folder: Path) -> nn.Module:
    """FLUX.1-dev as it is published, its 24 GB of weights a hole in a file. Returns it without them."""
    import diffusers

    with torch.device("meta"):
        network: nn.Module = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    network.save_config(folder / "transformer")  # type: ignore[operator]
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    sizes = {name: value.numel() * 2 for name, value in network.state_dict().items()}
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    header = json.dumps(
        {n: {"dtype": "BF16", "shape": list(v.shape), "data_offsets": [ends[n] - sizes[n], ends[n]]}
         for n, v in network.state_dict().items()}
    ).encode()  # fmt: skip
    with (folder / "transformer" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + sum(sizes.values()))
    return network


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_128_processes_of_the_largest_recipe(tmp_path: Path) -> None:
    """12 billion parameters, sharded and followed through a step in less than 2 GB and in minutes."""
    network = flux(tmp_path)
    teacher = {
        "name": "diffusers", "path": str(tmp_path), "size": [128, 128], "tokens": 512, "embedded_guidance": 3.5,
        "latent": {"autoencoder": "flux", "scale": 0.3611, "shift": 0.1159},
    }  # fmt: skip
    data = {"name": "shards", "path": str(tmp_path / "none"), "source": "digits", "field": "latent",
            "cond": ["pooled", "text"]}  # fmt: skip
    trainer = {"steps": 100_000, "batch": 128, "precision": "bfloat16", "recompute": True}
    recipe = {
        "name": "largest",
        "teacher": teacher,
        "objective": {"name": "eulerian"},
        "data": data,
        "trainer": trainer,
    }
    done = subprocess.run(
        [sys.executable, "-c", LARGEST, str(written(tmp_path, recipe))],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    gradients, total, seconds, memory = map(int, done.stdout.split())
    # of the student, which is trained in float32; the embedding of its second time is on top
    shards = sum(-(-len(p) // 128) * p[0].numel() * 4 for p in network.parameters())
    assert shards < gradients < 1.01 * shards
    assert 4 * gradients < total < 80e9
    assert seconds < 900 and memory < 2e9
