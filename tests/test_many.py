"""The same training on any number of processes: every objective, many networks, every way to share a step.

Compared is what the checkpoints hold, which are written by the real training: the optimizer's first moments after one
step, which are the gradients times 1 - beta, and all weights and moments after the last step. What differs is the order
of sums. AdamW divides a gradient by its own size, so that weights whose gradient is zero but for rounding (biases of
keys in attention) move at random by up to the learning rate; all others agree to a thousandth of a step.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAST, ROOT, checkpoints, environment, problems
from safetensors import safe_open
from safetensors.torch import load_file
from small_networks import teacher
from torch import Tensor

import distill
from distill.job import resume, run
from distill.training.checkpoint import load_weights

LR = 1e-3
TRAINER = {
    "steps": 4, "batch": 16, "lr": LR, "warmup": 1, "checkpoint_every": 1, "keep": 9, "clip": 1e9, "threads": 1
}  # fmt: skip
"""Gradients are not clipped: that would hide their size."""
SMALL = (
    *(f"trainer.{key}={value}" for key, value in TRAINER.items()),
    "tracking.wandb=disabled", "tracking.samples_every=0", "tracking.log_every=1",
)  # fmt: skip
TOY = "student.network={name: mlp, width: 16, depth: 3}"
SOON = {  # what begins late, or moves slowly, does so within the steps that are made
    "ctm": ["objective.decay=0.5"],
    "shortcut-published": ["objective.decay=0.5"],
    "ayf": ["objective.tangent.warmup=2"],
    "rcm": ["objective.tangent.warmup=2"],
    "scd": ["objective.tangent.warmup=2"],
    "sct": ["objective.tangent.warmup=2"],
    "ect": ["objective.times.stage_steps=1"],
    "pfmm": ["objective.stage_steps=1", "objective.stages=3"],
    "progressive": ["objective.stage_steps=2", "objective.first=4"],
}
pytestmark = pytest.mark.timeout(900)
WEAK = "{name: gaussian, mean: [0, 0], covariance: [[2, 0], [0, 2]]}"


def recipes(digits: Path) -> dict[str, tuple[str, list[str]]]:
    """Every objective, with and without conditioning and guidance: a recipe and its overrides."""
    found = {}
    for file in sorted((ROOT / "recipes" / "toy").glob("*.yaml")):
        data = [] if file.stem.startswith("freeflow") else ["data.samples=300"]
        found[file.stem] = (f"toy/{file.stem}", [TOY, *data, *SOON.get(file.stem, [])])
    assert len(found) >= 33
    path, null = f"data.path={digits}", "student.network={name: mlp, width: 16, depth: 1, null_class: true}"
    found["quickstart"] = ("quickstart", [path, "trainer.clip=0.01"])
    found["guidable teacher"] = ("teachers/digits-guidable", [path, "objective.drop=0.5", null])
    found["guides itself"] = ("teachers/digits-guidable", [
        path, null, "objective={name: mean_flow, source: data, drop: 0.3, guidance: {scale: 2.0}}",
    ])  # fmt: skip
    found["muon"] = ("toy/freeflow", [TOY, "trainer.optimizer=muon", "trainer.weight_decay=0.1"])
    found["scales"] = ("toy/lagrangian", [
        TOY, "data.samples=300", f"guidance={{scale: 1.5, scales: [1, 2], intervals: true, weak: {WEAK}}}",
    ])  # fmt: skip
    return found


def of_recipe(name: str, recipe: str, overrides: Sequence[str], **more: Any) -> dict[str, Any]:
    return {"name": name, "recipe": recipe, "overrides": [*SMALL, *overrides], **more}


def of_network(name: str, network: str, strategy: str, trainer: dict[str, Any] | None = None, **more: Any) -> Any:
    small = {**TRAINER, "steps": 3, "batch": 4, "strategy": strategy}
    return {"name": name, "network": network, "trainer": {**small, **(trainer or {})}, **more}


def start(n: int, cases: Sequence[dict[str, Any]], out: Path) -> subprocess.Popen[str]:
    """Train the cases on n processes."""
    out.mkdir(exist_ok=True)
    (out / f"cases-{n}.json").write_text(json.dumps(cases))
    launcher = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [sys.executable, *launcher, str(ROOT / "tests" / "many.py"), str(out / f"cases-{n}.json"), str(out)]
    env = environment(PYTHONWARNINGS="ignore", PYTHONFAULTHANDLER="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finished(*processes: subprocess.Popen[str]) -> None:
    said = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-9000:]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, the rows of several files put together."""
    parts: dict[str, list[Tensor]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  not a mapping
                parts.setdefault(key, []).append(opened.get_tensor(key))
    return {key: torch.cat(part) if len(part) > 1 else part[0] for key, part in parts.items()}


def differences(
    one: Path, other: Path, within: float = 1e-5, random: float = 0.0, by_time: bool = True
) -> Iterator[str]:
    """Where two runs differ. within: of gradients, relative to the largest of all, of weights, relative to a hundred
    steps; random: the share of weights that may differ because they have no gradient."""
    mine, theirs = checkpoints(one), checkpoints(other)
    if [p.name for p in mine] != [p.name for p in theirs]:
        yield f"checkpoints {[p.name for p in theirs]}"
    for at in (0, -1):
        a, b = tensors(mine[at]), tensors(theirs[at])
        if a.keys() != b.keys():
            yield f"{mine[at].name}: holds {sorted(a.keys() ^ b.keys())}"
            continue
        for moment in ("exp_avg", "exp_avg_sq", "momentum"):
            names = [name for name in a if name.endswith(f".{moment}")]
            if not names:
                continue
            size = max(float(a[name].abs().max()) for name in names)
            worst = max(names, key=lambda name: float((a[name] - b[name]).abs().max()))
            if not float((a[worst] - b[worst]).abs().max()) <= within * size:
                yield f"{mine[at].name}: {worst}"
        apart = {name: (a[name].double() - b[name].double()).abs() for name in a if name.startswith("state_dict.")}
        far = {name: float((gap > 100 * LR * within).sum()) for name, gap in apart.items()}
        if not sum(far.values()) <= random * sum(gap.numel() for gap in apart.values()):
            yield f"{mine[at].name}: {max(far, key=lambda name: far[name])} and {sum(map(bool, far.values())) - 1} more"
    yield from _logs(one, other, within, by_time)


def _logs(one: Path, other: Path, within: float, by_time: bool) -> Iterator[str]:
    mine, theirs = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                    for run in (one, other))  # fmt: skip
    rounding = 1e-8  # of a mean square of float32 differences
    assert len(mine) >= 3 and all("grad_norm" in row for row in mine)
    for a, b in zip(mine, theirs, strict=True):
        for key in (a.keys() | b.keys()) - {"images_per_second", "waiting_for_data"}:
            x, y = a.get(key, math.nan), b.get(key, math.nan)
            if (by_time or "/" not in key) and not math.isclose(x, y, rel_tol=10 * within, abs_tol=rounding):
                yield f"step {a['step']}: {key} {x} and {y}"


@pytest.mark.slow
def test_every_objective_on_one_and_two_processes(built: Path, tmp_path: Path) -> None:
    jobs = recipes(built)
    one = [of_recipe(f"one/{name}", *job) for name, job in jobs.items()]
    two = [of_recipe(f"{strategy}/{name}", recipe, [*more, f"trainer.strategy={strategy}"])
           for strategy in ("ddp", "fsdp2") for name, (recipe, more) in jobs.items()]  # fmt: skip
    finished(start(1, one, tmp_path), start(2, two, tmp_path))
    found = {f"{strategy}/{name}": list(differences(tmp_path / "one" / name, tmp_path / strategy / name))
             for strategy in ("ddp", "fsdp2") for name in jobs}  # fmt: skip
    assert {name: told for name, told in found.items() if told} == {}


FEW = ("lagrangian", "ctm", "lsd", "improved-meanflow", "freeflow", "muon")
"""Without and with a target, a learned log-variance, a further network, means over all processes, another optimizer."""


@pytest.mark.slow
def test_few_rows_on_four_processes(built: Path, tmp_path: Path) -> None:
    """A row each: some process has none that are corrected, none on the diagonal; shards of unequal size, and empty."""
    jobs = {name: (recipe, [*more, "trainer.batch=4", "student.network={name: mlp, width: 6, depth: 3}"])
            for name, (recipe, more) in recipes(built).items() if name in FEW}  # fmt: skip
    one = [of_recipe(f"one/{name}", *job) for name, job in jobs.items()]
    four = [of_recipe(f"{strategy}/{name}", recipe, [*more, f"trainer.strategy={strategy}"])
            for strategy in ("ddp", "fsdp2") for name, (recipe, more) in jobs.items()]  # fmt: skip
    finished(start(1, one, tmp_path), start(4, four, tmp_path))
    found = {f"{strategy}/{name}": list(differences(tmp_path / "one" / name, tmp_path / strategy / name))
             for strategy in ("ddp", "fsdp2") for name in jobs}  # fmt: skip
    assert {name: told for name, told in found.items() if told} == {}


@pytest.mark.slow
def test_ways_to_share_a_step(built: Path, tmp_path: Path) -> None:
    """Parts of a batch, recomputed activations and mixed precision change nothing, on any number of processes."""
    jobs = {name: job for name, job in recipes(built).items() if name in FEW}
    parts = {"trainer.accumulate=2": set(jobs) - {"freeflow", "muon"}, "trainer.recompute=true": {"lagrangian", "ctm"},
             "trainer.precision=bfloat16": {"lagrangian", "lsd"}}  # fmt: skip
    one, two, pairs = [of_recipe(f"one/{name}", *job) for name, job in jobs.items()], [], []
    for way, names in parts.items():
        for name in sorted(names):
            recipe, more = jobs[name]
            whole, within = f"one/{name}", 1e-5
            one.append(of_recipe(f"one/{way}/{name}", recipe, [*more, way]))
            if "precision" in way:  # a sum of two parts is rounded once more
                whole, within = f"one/{way}/{name}", 2e-2
            else:
                pairs.append((f"one/{name}", f"one/{way}/{name}", 1e-5))
            for strategy in ("ddp", "fsdp2"):
                two.append(of_recipe(f"{strategy}/{way}/{name}", recipe, [*more, way, f"trainer.strategy={strategy}"]))
                pairs.append((whole, f"{strategy}/{way}/{name}", within))
    finished(start(1, one, tmp_path), start(2, two, tmp_path))
    # residuals by time are those of the last part of a step
    found = {b: list(differences(tmp_path / a, tmp_path / b, within, by_time=False)) for a, b, within in pairs}
    assert {name: told for name, told in found.items() if told} == {}
    for name in parts["trainer.precision=bfloat16"]:  # and it is another precision
        assert list(differences(tmp_path / "one" / name, tmp_path / "one/trainer.precision=bfloat16" / name))


def test_what_cannot_be_shared_is_refused() -> None:
    text = "data_free balances its correction by means over the whole batch"
    assert text in problems("toy/freeflow", "trainer.accumulate=2")[0]
    assert problems("toy/freeflow", "trainer.accumulate=2", "objective.corrected=0") == []
    lora = ("student.lora={rank: 2}", "data=null", "objective={name: data_free}")
    assert "cannot be fsdp2 with student.lora" in problems("quickstart", *lora, "trainer.strategy=fsdp2")[0]
    assert problems("quickstart", *lora, "trainer.strategy=ddp") == []


# --- networks

NETWORKS = {
    "dit": {},
    "sit": {"half": True},
    "song_unet": {},
    "edm2_unet": {},  # parameters that are numbers
    "SD3Transformer2DModel": {},
    "DiTTransformer2DModel": {},  # calls a part of its first block
    "QwenImageTransformer2DModel": {},  # has weights that it does not use
}  # fmt: skip
UNDER_DDP = {"dit": {"lora": True}, "QwenImageTransformer2DModel": {}}
RANDOM = 0.01
"""The share of weights without a gradient: biases of keys."""


@pytest.mark.slow
def test_networks_and_their_teachers(tmp_path: Path) -> None:
    one = [of_network(f"one/{name}", name, "single", **more) for name, more in NETWORKS.items()]
    one += [of_network("lora/dit", "dit", "single", lora=True)]
    two = [of_network(f"fsdp2/{name}", name, "fsdp2", **more) for name, more in NETWORKS.items()]
    two += [of_network(f"ddp/{name}", name, "ddp", **more) for name, more in UNDER_DDP.items()]
    finished(start(1, one, tmp_path), start(2, two, tmp_path))
    pairs = [(f"one/{name}", f"fsdp2/{name}") for name in NETWORKS]
    pairs += [("lora/dit", "ddp/dit"), ("one/QwenImageTransformer2DModel", "ddp/QwenImageTransformer2DModel")]
    found = {b: list(differences(tmp_path / a, tmp_path / b, random=RANDOM)) for a, b in pairs}
    assert {name: told for name, told in found.items() if told} == {}
    for _, name in pairs:
        no_teacher(tmp_path / name, name.partition("/")[2], tmp_path)
        gathered(tmp_path / name)


def no_teacher(run: Path, network: str, folder: Path) -> None:
    """The frozen teacher is in no file of a checkpoint, by name or by value."""
    of = teacher(network, folder / f"{run.parent.name}-{network}").network
    assert of is not None
    theirs = [p for p in of.parameters() if p.numel() > 8]
    for checkpoint in checkpoints(run):
        held = tensors(checkpoint)
        assert {name.split(".")[0] for name in held} == {"state_dict", "optimizer_states"}
        assert {name.split(".")[1] for name in held if name.startswith("state")} == {"student", "ema"}
        trained = [name for name in held if name.startswith("state")]
        if run.parent.name == "ddp" and network in UNDER_DDP and UNDER_DDP[network].get("lora"):
            assert all("lora_" in name or ".gap." in name or name.endswith("n_averaged") for name in trained)
            continue
        for name in trained:
            assert not any(p.shape == held[name].shape and torch.equal(p, held[name]) for p in theirs), name


def gathered(run: Path) -> None:
    """What is read from shards is what torch puts together of them, exactly."""
    (file,) = (run / "samples").glob("step-00000003.safetensors")
    whole, read = load_file(file), load_weights(checkpoints(run)[-1], "ema")
    assert whole.keys() == read.keys()
    assert all(torch.equal(whole[name], read[name]) for name in whole)


# --- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [("ctm", ()), ("improved-meanflow", ()), ("lagrangian", ("trainer.optimizer=muon",))]
)
def test_a_run_goes_on_with_other_numbers_of_processes(name: str, more: tuple[str, ...], cwd: Path) -> None:
    """One process, two with all weights, two and four with shards (unequal, some empty), one."""
    small = [*FAST, *more, "trainer.steps=10", "trainer.checkpoint_every=2", "trainer.keep=9", "data.samples=300"]
    odd = "student.network={name: mlp, width: 6, depth: 1}"
    whole = run(f"toy/{name}", [*small, odd, "name=whole"])
    moved = Path(shutil.copytree(whole, "runs/moved"))
    for path in (moved / "export", moved / "evaluation.json", moved / "report.html", *checkpoints(moved)[1:]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    case = {"name": "moved", "recipe": str(moved / "recipe.resolved.yaml")}
    for n, stops in ((2, {"ddp": 4, "fsdp2": 6}), (4, {"fsdp2": 8})):
        cases = [{**case, "overrides": [f"trainer.strategy={strategy}"], "until": step}
                 for strategy, step in stops.items()]  # fmt: skip
        finished(start(n, cases, Path("runs")))
    files = [sorted(p.name for p in path.glob("student*")) for path in checkpoints(moved)]
    one, shards = ["student.safetensors"], lambda n: [f"student-{k:05d}-of-{n:05d}.safetensors" for k in range(n)]
    assert files == [one, one, shards(2), shards(4)]
    resume(moved)
    assert list(differences(whole, moved)) == []
    close = torch.testing.assert_close
    samples = [distill.load(folder / "export").sample(5) for folder in (whole, moved)]
    close(samples[0], samples[1], atol=1e-5, rtol=0)
