"""The check at a job's start: a teacher that is declared wrongly, in time, sign or scale, is found by numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

from distill import cli
from distill.objectives.base import Batch
from distill.teacher_check import Verdict, check_teacher
from teachers.adapters.base import InDtype
from teachers.adapters.native import Native
from teachers.networks.conventions import Flow
from teachers.networks.converted import Converted
from teachers.space import Cond, DataSpace, Latent
from teachers.velocity import Teacher

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.5, -1.5]])
STD = 0.3


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The linear path's velocity for a mixture of Gaussians, by Bayes' rule."""
    t = t.to(x.dtype)[:, None, None]
    means = MEANS.to(x.dtype)[None]
    var = (t * STD) ** 2 + (1 - t) ** 2
    off = x[:, None] - t * means
    share = (-(off**2).sum(-1, keepdim=True) / (2 * var)).softmax(1)
    v = means + (t * STD**2 - (1 - t)) / var * off
    return (share * v).sum(1)


class Network(nn.Module):
    """The exact velocity as a network of a convention: its time is 1 at the noise, its output noise - data."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        return -exact(x, 1 - t)

    def second_time(self) -> nn.Module:
        return nn.Identity()


def data(rows: int = 64) -> Batch:
    pick = torch.arange(rows) % len(MEANS)
    x_1 = MEANS[pick] + STD * normal(rows, 2, seed=3).float()
    return Batch(x_1, None, ("",) * rows)


def teacher(convention: Flow, latent: bool = False) -> Teacher:
    network = Converted(Network(), convention)
    return Teacher(
        velocity=network,
        space=DataSpace((2,)),
        network=network,
        network_config={"name": "converted"},
        latent=Latent(autoencoder="none") if latent else None,
    )


RIGHT = Flow(noise_time=1)


def verdict(convention: Flow = RIGHT, batch: Batch | None = None, latent: bool = False) -> Verdict:
    return check_teacher(teacher(convention, latent), batch or data(), 0)


def test_the_right_declaration_passes() -> None:
    found = verdict(latent=True)
    assert found.wrong is None and found.caution is None
    assert min(found.losses, key=lambda name: found.losses[name]) == "as declared"
    assert found.losses["as declared"] < 0.6


class Negated(Network):
    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        return exact(x, 1 - t)


@pytest.mark.parametrize(
    ("network", "convention", "winner"),
    [
        pytest.param(Network(), Flow(), "time and sign flipped", id="both forgotten"),
        pytest.param(Negated(), RIGHT, "sign flipped", id="sign"),
        pytest.param(Negated(), Flow(), "time flipped", id="time"),
        pytest.param(Network(), replace(RIGHT, scale=1000.0), "times x 0.001", id="a thousand"),
        pytest.param(Network(), replace(RIGHT, scale=0.001), "times x 1000", id="a thousandth"),
    ],
)
def test_a_wrong_declaration_is_named_with_its_numbers(network: nn.Module, convention: Flow, winner: str) -> None:
    wrongly = replace(teacher(RIGHT), velocity=(made := Converted(network, convention)), network=made)
    found = check_teacher(wrongly, data(), 0)
    assert found.wrong is not None and f": {winner} has a relative loss of" in found.wrong
    assert f"{found.losses[winner]:.3g}" in found.wrong and f"{found.losses['as declared']:.3g}" in found.wrong
    assert found.losses[winner] == pytest.approx(verdict().losses["as declared"], rel=1e-5)


class Rigid(Network):
    """Takes points of its weights' dtype alone, as every layer of torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        return super().forward(
            torch.nn.functional.conv1d(x[:, :, None], self.one[..., None], groups=2)[..., 0], t, cond
        )


@pytest.mark.parametrize("plain", [True, False])
def test_a_teacher_in_half_precision_is_compared_with_its_rivals(plain: bool) -> None:
    half = Rigid().bfloat16()
    network = half if plain else Converted(half, RIGHT)
    placed = replace(teacher(RIGHT), velocity=InDtype(network), network=network)
    found = check_teacher(placed, data(), 0)
    assert found.losses.keys() == verdict().losses.keys()
    assert plain or found.losses == pytest.approx(verdict().losses, rel=0.05)


def test_a_wrong_factor_of_latents_is_named() -> None:
    batch = data()
    for factor, winner in ((2.0, "latents x 0.5"), (1 / 1.4, "latents x 1.4")):
        found = verdict(batch=replace(batch, x_1=factor * batch.x_1), latent=True)
        assert found.wrong is not None and (winner in found.wrong or "standard deviation" in found.wrong)
    assert verdict(batch=replace(batch, x_1=0.7 * batch.x_1)).wrong is None  # of pixels the range says it


def test_latents_of_another_size_are_named() -> None:
    found = verdict(batch=Batch(5 * data().x_1, None, ("",) * 64), latent=True)
    assert found.wrong is not None and f"standard deviation of {found.std:.3g}" in found.wrong


def test_an_untrained_teacher_is_a_caution_not_a_stop() -> None:
    torch.manual_seed(0)
    wild = nn.Linear(2, 2)
    blind = Teacher(velocity=lambda x, t, cond: wild(x).detach(), space=DataSpace((2,)))
    found = check_teacher(blind, data(), 0)
    assert found.wrong is None and found.caution is not None and "no better than nothing" in found.caution
    assert "its path and prediction" in found.caution


@pytest.mark.parametrize(("from_time", "times"), [(0.0, "0.1, 0.3, 0.7, 0.9"), (0.8, "0.9")])
def test_a_velocity_that_is_not_finite_is_a_stop(from_time: float, times: str) -> None:
    def broken(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.where(t[:, None] > from_time, torch.nan, exact(x, t))

    found = check_teacher(Teacher(velocity=broken, space=DataSpace((2,))), data(), 0)
    assert found.wrong is not None and found.wrong.startswith(f"its velocity is not finite at t = {times} of this data")
    assert found.caution is None


def test_a_velocity_that_is_no_tensor_is_told_of_real_data_too() -> None:
    with pytest.raises(ValueError, match="its velocity is a tuple"):
        check_teacher(Teacher(velocity=lambda x, t, cond: (x,), space=DataSpace((2,))), data(), 0)  # type: ignore


def test_the_shipped_teacher_fits_its_data(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teachers", "check", "quickstart", f"data.path={built}"]) == 0
    said = capsys.readouterr().out
    assert "as declared" in said and "time and sign flipped" in said


class Wrong(nn.Module):
    """The shipped digits teacher with its sign lost."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Native(path="digits").load().network

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert self.network is not None
        return -self.network(x, t, cond)


def test_a_job_does_not_start_with_a_wrong_teacher(built: Path, cwd: Path) -> None:
    import distill
    from teachers.errors import InputError

    wrong = Teacher(velocity=Wrong(), space=Native(path="digits").load().space, info={"id": "mine"})
    with pytest.raises(InputError, match=r"teacher mine: .*: sign flipped has a relative loss of"):
        distill.run("quickstart", ["student.init=random", "student.network={name: mlp}", f"data.path={built}"],
                    teacher=wrong)  # fmt: skip
    assert not (cwd / "runs").exists()
