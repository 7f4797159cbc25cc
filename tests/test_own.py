"""A torch module of anyone's as a teacher: what it is fed, what its students start from, how they are loaded."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from helpers import written
from proof import derivatives_are_exact, student_starts_at
from torch import Tensor, nn
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

import distill
import teachers
from distill.job import evaluate, resume, run
from distill.lora import Adapted, LoRA
from distill.student import StudentConfig
from teachers.adapters.native import Native
from teachers.errors import CheckpointError, InputError
from teachers.fields import FieldError
from teachers.networks import from_entry
from teachers.networks.own import Own, OwnConfig
from teachers.space import DataSpace, Embedding
from teachers.velocity import Teacher

PLANE, CLASSES = DataSpace((2,)), DataSpace((2,), 3)
TEXT = DataSpace((2,), None, None, (Embedding("text", (3, 4)),))
close = torch.testing.assert_close


class Net(nn.Module):
    """A smooth function of x, time, and what conditions, with dropout that must never act."""

    def __init__(self, classes: int = 0, text: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 16))
        self.enter, self.leave = nn.Linear(2, 16), nn.Linear(16, 2)
        self.blocks = nn.ModuleList([nn.Linear(16, 16)])
        self.label = nn.Embedding(classes + 1, 16) if classes else None
        self.text = nn.Linear(4, 16) if text else None
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, given: Any = None) -> Tensor:
        h = self.enter(x) + self.time(t[:, None])
        if self.label is not None:
            h = h + self.label(given)
        if self.text is not None:
            h = h + self.text(given["text"]).mean(1)
        return self.leave(self.dropout(self.blocks[0](h.tanh()).tanh()))


def net(space: DataSpace = PLANE, **more: Any) -> Net:
    return Net(space.classes or 0, bool(space.embeddings), **more)


def teacher(space: DataSpace = PLANE, convention: Any = None, **more: Any) -> Teacher:
    null = space.null if space.classes else None
    return teachers.from_module(net(space), space, convention, **{"second_time": "time", "null": null, **more})


CONVENTIONS = {
    "ours": None,
    "reversed": teachers.Flow(noise_time=1),
    "cosine": teachers.Flow(native="cosine", prediction="noise", margin=1e-3),
    "levels": teachers.Discrete(),
}
conventions = pytest.mark.parametrize("convention", CONVENTIONS)


# --- what it is fed


def test_times_and_signs_are_as_declared() -> None:
    module, x, t = net(), torch.randn(5, 2), torch.rand(5, dtype=torch.float64)
    kept = deepcopy(module).eval()
    plain = teachers.from_module(module, PLANE)
    close(plain(x, t, None), kept(x, t.float()), atol=0, rtol=0)
    turned = teachers.from_module(deepcopy(module), PLANE, teachers.Flow(noise_time=1))
    close(turned(x, t, None), -kept(x, (1 - t).float()), atol=0, rtol=0)
    data = teachers.from_module(deepcopy(module), PLANE, teachers.Flow(prediction="data"))
    close(data(x, t, None), (kept(x, t.float()) - x) / (1 - t).float()[:, None])
    assert (turned(x, t, None) - plain(x, t, None)).abs().max() > 0.1


@pytest.mark.parametrize("noise_std", [1.0, 2.0])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "score"])
def test_every_prediction_of_a_gaussian_is_its_velocity(prediction: Any, noise_std: float) -> None:
    """Of data N(0, s^2) and x_r = r x_1 + (1 - r) c e, conditional means are linear in x_r; the score is -x_r / var."""
    s2, c = 1.7**2, noise_std

    class Best(nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            r = r[:, None]
            var = r**2 * s2 + (c * (1 - r)) ** 2
            data, noise = r * s2 / var, c * (1 - r) / var
            return x * {"velocity": data - c * noise, "noise": noise, "data": data, "score": -1 / var}[prediction]

    margin = 1e-3 if prediction in ("noise", "score") else 0.0
    flow = teachers.Flow(prediction=prediction, noise_std=noise_std, margin=margin)
    of = teachers.from_module(Best(), PLANE, flow)
    x, t = torch.randn(9, 2), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    exact = (t * s2 - (1 - t)) / (t**2 * s2 + (1 - t) ** 2)
    close(of(x, (t - flow.first) / (1 - flow.first), None), (1 - flow.first) * exact.float()[:, None] * x, atol=1e-5,
          rtol=1e-5)  # fmt: skip
    assert of(of.path.start(x), torch.zeros(9), None).isfinite().all()


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_a_convention_that_is_infinite_at_the_noise_is_refused(prediction: Any) -> None:
    for native in ("linear", "cosine", "linear_vp"):
        with pytest.raises(FieldError, match=r"Flow.margin must be in \(0, 0.5\), e.g. 1e-3: the velocity is infinite"):
            teachers.Flow(native=native, prediction=prediction)
    assert teachers.Flow(native="vp", prediction=prediction).first > 0
    assert teachers.Flow(native="linear").first == 0


@pytest.mark.parametrize("space", [PLANE, CLASSES, TEXT], ids=["plain", "classes", "text"])
def test_conditioning_reaches_it(space: DataSpace) -> None:
    of, x, t = teacher(space), torch.randn(3, 2), torch.rand(3, dtype=torch.float64)
    cond: dict[str, Tensor] = {}
    if space.classes:
        cond["class"] = torch.tensor([0, 1, 2])
    if space.embeddings:
        cond["text"] = torch.randn(3, 3, 4)
    v = of(x, t, cond or None)
    assert v.shape == x.shape
    if cond:
        other = {k: v.flip(0) for k, v in cond.items()}
        assert (of(x, t, other) - v).abs().max() > 0.05
        with pytest.raises(ValueError, match=rf"conditioned on {next(iter(cond))}"):
            of(x, t, None)
    assert (of.null is not None) == (space is CLASSES)


def test_it_is_frozen_and_named() -> None:
    module = net()
    of = teachers.from_module(module, PLANE, licence="CC0-1.0", name="mine")
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert of.network is None  # nothing was said of its time embedding
    assert of.info.items() >= {"id": "mine", "licence": "CC0-1.0", "family": "own"}.items()
    assert teacher().info["licence"] == "unknown" and teacher().info["id"].endswith("test_own.Net")
    digests = [teachers.from_module(net(seed=seed), PLANE).info["digest"] for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_half_precision() -> None:
    of, x, t = teachers.from_module(net().bfloat16(), PLANE, second_time="time"), torch.randn(3, 2), torch.rand(3)
    assert of(x, t, None).dtype == torch.float32
    text = teachers.from_module(net(TEXT).bfloat16(), TEXT)
    assert text(x, t, {"text": torch.randn(3, 3, 4)}).dtype == torch.float32


class Sinusoids(nn.Module):
    """As many have it: angles in float32, then the weights' dtype. strict: it takes no time of another dtype than x."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.out, self.strict = nn.Linear(64, 16), nn.Linear(18, 2), strict
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(t)
        if self.strict and t.dtype != x.dtype:
            raise RuntimeError("expected another dtype")
        angles = t.float()[:, None] * torch.exp(-9.2 * torch.arange(32) / 32)
        features = self.time(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype))
        return self.out(torch.cat([x, features], 1))


def test_half_precision_does_not_round_the_time() -> None:
    """At 1000 t bfloat16 has steps of 4."""
    x, t = torch.randn(64, 2), torch.rand(64, dtype=torch.float64)
    convention, module = teachers.Flow(noise_time=1, scale=1000.0), Sinusoids().bfloat16()
    v = teachers.from_module(Sinusoids(), PLANE, convention)(x, t, None)
    found = teachers.from_module(module, PLANE, convention)(x, t, None)
    assert torch.equal(module.seen[-1], (1000 * (1 - t)).float())
    assert (found - v).norm() < 0.02 * v.norm()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_module_that_takes_times_of_its_own_dtype_alone_is_given_them(dtype: torch.dtype, strict: bool) -> None:
    module = Sinusoids(strict).to(dtype)
    of = teachers.from_module(module, PLANE, second_time="time")
    of(torch.randn(3, 2), torch.rand(3, dtype=torch.float64), None)
    rounded = strict and dtype == torch.bfloat16
    assert module.seen[-1].dtype == (dtype if rounded or dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("strict", [True, False])
def test_one_that_is_put_in_half_precision_later_is_found_out_at_its_first_call(strict: bool) -> None:
    module = Sinusoids(strict)
    network = OwnConfig(of="Sinusoids", place="time", width=64).around(module, PLANE).bfloat16()
    for _ in range(2):
        assert network(torch.randn(3, 2).bfloat16(), torch.rand(3), None).dtype == torch.bfloat16
        assert module.seen[-1].dtype == (torch.bfloat16 if strict else torch.float32)


# --- its students


@conventions
@pytest.mark.parametrize("space", [PLANE, CLASSES], ids=["plain", "classes"])
def test_a_student_starts_at_it_and_has_exact_derivatives(convention: str, space: DataSpace) -> None:
    of = teacher(space, CONVENTIONS[convention])
    student = student_starts_at(of)
    derivatives_are_exact(student, of)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["whole", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32], ids=str)
def test_a_student_of_any_precision_is_trained_in_single(dtype: torch.dtype, lora: LoRA | None) -> None:
    of = teachers.from_module(net().to(dtype), PLANE, second_time="time")
    student = StudentConfig(lora=lora).build(of, PLANE, 0)
    x, s = torch.randn(3, 2), torch.rand(3, dtype=torch.float64)
    close(student.mean_velocity(x, s, s), of(x, s, None), atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    merged = student.merged()
    close(merged.mean_velocity(x, s, s), of(x, s, None), atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_the_module_stays_in_eval_mode() -> None:
    student = StudentConfig().build(teacher(), PLANE, 0)
    assert student.training
    x, s = torch.randn(3, 2), torch.rand(3, dtype=torch.float64)
    assert torch.equal(student.mean_velocity(x, s, s), student.mean_velocity(x, s, s))
    student.train()
    assert all(not m.training for m in student.network.modules() if isinstance(m, nn.Dropout))


def test_the_second_time_is_the_same_each_time() -> None:
    of, found = teacher(), []
    assert of.network is not None
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        found.append(of.network.second_time().state_dict())  # type: ignore[operator]
        assert torch.equal(torch.random.get_rng_state(), state)
    first, again = found
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_second_time_leaves_nothing_behind() -> None:
    """Within a derivative, within another call and after an error."""
    module = net()
    own = Own(module, PLANE, "time", 16)
    x, t, shift = torch.randn(3, 2), torch.rand(3, dtype=torch.float64), torch.randn(3, 16)
    plain, with_shift = own(x, t, None), own(x, t, None, shift)
    assert (plain - with_shift).abs().max() > 0.05
    h = (module.enter(x) + module.time(t.float()[:, None]) + shift).tanh()
    close(with_shift, module.leave(module.blocks[0](h).tanh()))
    _, slope = jvp(lambda s: own(x, t, None, s), (shift,), (torch.ones_like(shift),))
    up, down = own(x, t, None, shift + 1e-3), own(x, t, None, shift - 1e-3)
    close(slope, (up - down) / 2e-3, atol=1e-3, rtol=0)

    def nested(part: nn.Module, given: Any, out: Tensor) -> Tensor:
        return out + 0 * own(x, t, None, 2 * shift).sum() if not deep.append(1) and len(deep) == 1 else out

    deep: list[int] = []
    handle = module.leave.register_forward_hook(nested)
    close(own(x, t, None, shift), with_shift)
    handle.remove()
    with pytest.raises(RuntimeError):
        own(torch.randn(3, 5), t, None, shift)
    assert torch.equal(own(x, t, None), plain)
    assert not module.time._forward_hooks
    assert torch.equal(deepcopy(own)(x, t, None, shift), with_shift)


def test_calls_in_several_threads_do_not_meet() -> None:
    own = Own(net(), PLANE, "time", 16)
    own.module.enter.register_forward_pre_hook(lambda *_: sleep(0.02))  # so that they would
    x, t = torch.randn(3, 2), torch.rand(3, dtype=torch.float64)
    shifts = [None, *torch.randn(3, 3, 16)]
    one_by_one = [own(x, t, None, shift) for shift in shifts]
    with ThreadPoolExecutor(len(shifts)) as pool:
        at_once = list(pool.map(lambda shift: own(x, t, None, shift), shifts))
    assert all(map(torch.equal, one_by_one, at_once))


def test_a_student_can_be_pickled() -> None:
    student = StudentConfig().build(teacher(), PLANE, 0)
    x = student.sample(3)
    assert torch.equal(pickle.loads(pickle.dumps(student)).sample(3), x)


def test_what_is_computed_again_in_another_thread() -> None:
    """As by autograd's threads, in the backward pass."""
    own = Own(net(), PLANE, "time", 16)
    x, t, shift = torch.randn(3, 2), torch.rand(3, dtype=torch.float64), torch.randn(3, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(own(x, t, None, shift).sum(), shift)
    said = checkpoint(own, x, t, None, shift, use_reentrant=False)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(said.sum().backward).result()
    assert torch.equal(shift.grad, expected)


def test_adapters_over_it() -> None:
    of = teacher()
    student = StudentConfig(lora=LoRA(rank=2)).build(of, PLANE, 0)
    assert isinstance(student.network, Adapted)
    x, s, t = torch.randn(3, 2), torch.full((3,), 0.2).double(), torch.full((3,), 0.7).double()
    assert torch.equal(student.mean_velocity(x, s, t), of(x, s, None))
    for parameter in student.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    close(student.merged().mean_velocity(x, s, t), student.mean_velocity(x, s, t), atol=1e-5, rtol=0)


# --- what is told


class TimeFirst(Net):
    def forward(self, t: Tensor, x: Tensor, given: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, t)


class Wide(Net):
    def forward(self, x: Tensor, t: Tensor, given: Any = None) -> Tensor:
        return torch.cat([super().forward(x, t)] * 2, 1)


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "second_time", "said"),
    [
        (TimeFirst, None, r"TimeFirst cannot be called as module\(x, t\) with x \[2, 2\], t \[2\]: .*wrap it"),
        (Wide, None, r"Wide answers \[2, 4\] for x \[2, 2\]: it must answer its shape"),
        (Net, "t_embedder", r"has no part 't_embedder'; it has time, enter, leave, blocks"),
        (Unused, "unused", r"the part 'unused' is not called; it must give the embedding"),
    ],
)
def test_what_does_not_hold_is_told(make: Any, second_time: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        teachers.from_module(make(), PLANE, second_time=second_time)


def test_a_time_embedding_that_is_no_vector_is_told() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Unflatten(1, (1, 1))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + self.time(t[:, None]).flatten(1)

    with pytest.raises(InputError, match=r"the part 'time' gives \[2, 1, 1\]"):
        teachers.from_module(Maps(), PLANE, second_time="time")


NULL = torch.tensor(3)
BAD_NULLS = [
    (CLASSES, {"y": NULL}, r"for each field, .*: 'class' torch.int64 \[\]; got 'y' torch.int64 \[\]"),
    (CLASSES, {}, "got no fields"),
    (CLASSES, {"class": 3}, "got 'class' 3"),
    (CLASSES, {"class": torch.tensor(3.0)}, r"got 'class' torch.float32 \[\]"),
    (CLASSES, {"class": torch.tensor([3])}, r"got 'class' torch.int64 \[1\]"),
    (CLASSES, True, "got True"),
    (CLASSES, {"class": torch.tensor(7)}, r"module\(x, t, y\) .*, y of null: IndexError: index out of range"),
    (TEXT, {"text": torch.zeros(4)}, r"'text' torch.float32 \[3, 4\]; got 'text' torch.float32 \[4\]"),
    (PLANE, {"class": NULL}, "conditioned on nothing: leave it out"),
]


@pytest.mark.parametrize(("space", "null", "said"), BAD_NULLS)
def test_a_null_that_is_no_row_of_conditioning_is_told(space: DataSpace, null: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        teachers.from_module(net(space), space, second_time="time", null=null)
    assert teachers.from_module(net(CLASSES), CLASSES, null={"class": NULL}).null == {"class": NULL}
    assert teachers.from_module(net(TEXT).bfloat16(), TEXT, null={"text": torch.zeros(3, 4)}).null is not None


@pytest.mark.parametrize("error", [AssertionError(), KeyError("foo"), AttributeError("no foo")], ids=repr)
def test_what_the_module_itself_raises_is_told(error: Exception) -> None:
    class Raises(Net):
        def forward(self, x: Tensor, t: Tensor, given: Any = None) -> Tensor:
            raise error

    with pytest.raises(InputError, match=rf"Raises cannot be called .*{type(error).__name__}: .*wrap it") as told:
        teachers.from_module(Raises(), PLANE)
    assert told.value.__cause__ is error


def test_memory_that_is_out_is_no_fault_of_the_module() -> None:
    class Large(Net):
        def forward(self, x: Tensor, t: Tensor, given: Any = None) -> Tensor:
            raise torch.OutOfMemoryError("out")

    with pytest.raises(torch.OutOfMemoryError):
        teachers.from_module(Large(), PLANE)


def test_what_is_no_module_or_no_convention_is_told() -> None:
    with pytest.raises(InputError, match=r"module must be a torch.nn.Module, got a function: wrap"):
        teachers.from_module(lambda x, t: -x, PLANE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"convention must be one, as teachers.Flow\(noise_time=1\) .*, got 'flow'"):
        teachers.from_module(net(), PLANE, "flow")  # type: ignore[arg-type]


# --- jobs and exports


def recipe(folder: Path, **more: Any) -> Path:
    return written(folder, {
        "name": "own",
        "objective": {"name": "endpoint", "pairs": {"solver": "euler", "steps": 4}},
        "trainer": {"steps": 12, "batch": 16, "checkpoint_every": 6},
        "tracking": {"wandb": "disabled", "samples_every": 0},
        "evaluation": {"samples": 50, "reference_steps": 4},
        **more,
    })  # fmt: skip


def test_a_whole_job(cwd: Path) -> None:
    of = teacher(CLASSES, teachers.Flow(noise_time=1), licence="CC0-1.0")
    folder = run(recipe(cwd), teacher=of)
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["licence"] == "CC0-1.0"
    said = {"name": "own", "place": "time", "width": 16, "null_class": True}
    assert config["network"]["network"].items() >= said.items()
    assert config["network"]["network"]["of"].endswith("test_own.Net")
    from_entry(config["network"])
    assert "network=Net(...)" in (folder / "export" / "README.md").read_text()
    fresh = net(CLASSES, seed=7)
    before = deepcopy(fresh.state_dict())
    student = distill.load(folder / "export", network=fresh)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    resumed = resume(folder, teacher=of)
    again = distill.load(resumed / "export", network=net(CLASSES))
    assert torch.equal(student.sample(9, seed=3), again.sample(9, seed=3))
    assert student.sample(9).shape == (9, 2)
    found = evaluate(folder / "export", out="again.json", teacher=of)
    first = json.loads((folder / "evaluation.json").read_text())["student"]["1"]["metrics"]
    assert json.loads(found.read_text())["student"]["1"]["metrics"] == first
    with pytest.raises(CheckpointError, match=r"of the class .*Net of its author, which no file holds.*network=Net\("):
        distill.load(folder / "export")
    with pytest.raises(CheckpointError, match="do not fit the network"):
        distill.load(folder / "export", network=net(PLANE))
    for other in (nn.Linear(2, 2), TimeFirst(3)):  # the latter of equal shapes
        with pytest.raises(CheckpointError, match=rf"of the class .*\.Net, .*\.{type(other).__name__}: pass one"):
            distill.load(folder / "export", network=other)


def test_another_network_is_not_replaced(toy_run: Path) -> None:
    with pytest.raises(CheckpointError, match="no network is to be passed"):
        distill.load(toy_run / "export", network=net())


def test_a_velocity_of_ones_own_class_is_loaded_in_python(cwd: Path) -> None:
    of = teacher()
    objective = {"name": "reflow", "pairs": {"solver": "euler", "steps": 4}}
    folder = run(recipe(cwd, objective=objective), teacher=of)
    with pytest.raises(CheckpointError, match="which no file holds"):
        Native(path=str(folder / "export")).load()
    assert distill.load(folder / "export", network=net()).kind == "velocity"
