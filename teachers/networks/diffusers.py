"""Networks of the diffusers package, called as ours are: whole samples in and out, conditioning by field name.

The module is diffusers' own, built from the class and the config that lie beside its weights. A second time is added
to what its embedding of the time says (`Form.embedder`), before anything that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from teachers.fields import FieldError, require
from teachers.networks.base import alone, muted
from teachers.networks.diffusers_calls import Call, Fields
from teachers.networks.diffusers_forms import FORMS, Form
from teachers.networks.embeddings import sinusoid
from teachers.networks.exact import exact, exactly, norms
from teachers.space import Cond, DataSpace


class DiffusersNetwork(nn.Module):
    """A module of diffusers; see `DiffusersConfig` for what is said of it and `Network` for the call."""

    def __init__(self, module: nn.Module, config: DiffusersConfig) -> None:
        super().__init__()
        self.module = module.eval()
        for name, part in list(module.named_modules()):
            if isinstance(part, nn.GroupNorm):
                part.register_forward_pre_hook(_contiguous)
            elif type(part).__name__ == "MOEFeedForwardSwiGLU":
                module.set_submodule(name, _Experts(part))
        self.config = config
        if self.form.prepare is not None:
            self.form.prepare(module)

    @property
    def form(self) -> Form:
        """How the module is called."""
        return self.config.form

    def train(self, mode: bool = True) -> DiffusersNetwork:
        """The module stays in eval mode: it drops nothing at random, neither activations nor labels."""
        super().train(mode)
        self.module.eval()
        return self

    def second_time(self) -> nn.Module:
        """See `teachers.networks.base.Network`."""
        own = None if self.form.sinusoid is None else self.module.get_submodule(self.form.sinusoid)
        embedder = self._embedders()[0]
        if self.form.last is None:
            assert isinstance(embedder, nn.Linear) and own is not None
            return _SecondTime(own, _behind(embedder, cast(int, own.num_channels)), "2")
        return _SecondTime(own, embedder, self.form.last)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, shift: Tensor | None = None) -> Tensor:
        """``x: [b, *shape]``, ``t: [b]`` its own time -> ``[b, *shape]``; see `Network.forward`.

        Raises ValueError for conditioning that is missing.
        """
        t = t.to(torch.promote_types(x.dtype, torch.float32))  # never rounded to half precision
        c = self.config
        call = Call(c.full, x, t, self._conditioning(cond), c.guidance, c.pixels, c.frame_rate)
        with alone(self.module), exactly(self._exact, x.device), self._told(t, shift):
            said = self.module(**self.form.inputs(call), return_dict=False)[0]
        found = self.form.output(call, said)
        return -found if c.negative else found

    def _conditioning(self, cond: Cond) -> Mapping[str, Tensor]:
        cond, asked = cond or {}, self.form.fields(self.config.full)
        if missing := [name for name in asked if name not in cond]:
            raise ValueError(
                f"{self.config.backbone} is conditioned on {', '.join(asked)}: pass cond with {', '.join(missing)}"
            )
        return cond

    @property
    def apart(self) -> list[nn.Module]:
        """Where each block embeds the time, the network calls the first one's embedding once more behind all."""
        name, star, rest = self.form.embedder.partition(".*.")
        return [self.module.get_submodule(f"{name}.0.{rest.rpartition('.')[0]}")] if star else []

    def _embedders(self) -> list[nn.Module]:
        path = self.form.embedder
        if "*" not in path:
            return [self.module.get_submodule(path)]
        blocks, rest = path.split(".*.")
        return [block.get_submodule(rest) for block in cast(nn.ModuleList, self.module.get_submodule(blocks))]

    def _exact(self) -> list[nn.Module]:
        """What stays float32 in mixed precision: all that embeds, enters and leaves, and norms. The network would cast
        times to the dtype of what has entered."""
        around = [
            part for part in self.module.children() if not any(isinstance(m, nn.ModuleList) for m in part.modules())
        ]
        further = [part for part in self.module.modules() if type(part).__name__ == "TimestepEmbedding"]
        return [*around, *self._embedders(), *further, *norms(self.module)]

    @contextmanager
    def _told(self, t: Tensor, shift: Tensor | None) -> Iterator[None]:
        """Inside, the embedding of the time has `shift` added and sees t as it is."""
        hooks = []
        if shift is not None:
            hooks += [
                e.register_forward_hook(lambda _, __, said: said + (shift if said.dim() == 2 else shift[:, None]))
                for e in self._embedders()
            ]
        if self.form.rounds is not None:
            assert self.form.sinusoid is not None
            exact = self.module.get_submodule(self.form.sinusoid)(t * self.form.rounds)
            hooks += [
                e.register_forward_pre_hook(lambda _, given: (exact.to(given[0].dtype),)) for e in self._embedders()
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _contiguous(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # the forward-mode derivative of a group norm fails on any other input
    return tuple(x.contiguous() for x in given)


class _Experts(nn.Module):
    """HiDream's mixture of experts, which in eval mode cannot be differentiated; of the same parts."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.shared_experts, self.experts, self.gate = (
            mixture.get_submodule(name) for name in ("shared_experts", "experts", "gate")
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[b, tokens, width]`` -> the same."""
        chosen, weights, _ = self.gate(x)
        flat = x.flatten(0, 1)
        mixed = torch.zeros_like(flat)
        for number, expert in enumerate(cast(nn.ModuleList, self.experts)):
            token, rank = torch.where(chosen == number)
            said = expert(flat[token]) * weights[token, rank, None]
            mixed = mixed.index_add(0, token, said.to(mixed.dtype))
        return mixed.view_as(x) + self.shared_experts(x)


class _SecondTime(nn.Module):
    """A number ``[b]`` in [0, 1] -> what is added to the embedding of the time: 0 at first.

    Its sinusoids are the network's at low frequencies, since flow maps are differentiated in time.
    """

    def __init__(self, sinusoid: nn.Module | None, embedder: nn.Module, last: str) -> None:
        super().__init__()
        self.sinusoid = deepcopy(sinusoid)
        if self.sinusoid is not None:
            self.sinusoid.scale = 1  # type: ignore[assignment]
        self.embedder = muted(embedder, last)

    @exact
    def forward(self, t: Tensor) -> Tensor:
        first = next(m for m in self.embedder.modules() if isinstance(m, nn.Linear))
        features = sinusoid(t, first.in_features) if self.sinusoid is None else self.sinusoid(t)
        return self.embedder(features.to(first.weight.dtype))


def _behind(linear: nn.Linear, features: int) -> nn.Sequential:
    """What `linear` makes of its first features, then SiLU and another linear layer."""
    weight = linear.weight
    first = nn.Linear(features, linear.out_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        first.weight.copy_(weight[:, :features])
        first.bias.zero_()
    last = nn.Linear(linear.out_features, linear.out_features, device=weight.device, dtype=weight.dtype)
    return nn.Sequential(first, nn.SiLU(), last)


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig:
    """backbone: a class of diffusers, settings: its config; guidance: the scale that it is told, of one which embeds
    it; pixels: height and width of the pictures, and frame_rate: of the films, of one that is told of them; negative:
    whether it predicts the opposite."""

    backbone: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    pixels: tuple[int, int] | None = None
    frame_rate: float | None = None
    negative: bool = False

    def __post_init__(self) -> None:
        known = ", ".join(FORMS)
        require(self, backbone=(self.backbone in FORMS, f"must be one of the classes of diffusers {known}"))
        unknown = ", ".join(self.full.keys() - signature(_class(self.backbone).__init__).parameters.keys())
        if unknown:
            raise FieldError(type(self).__name__, {"settings": (
                f"has {unknown}, which {self.backbone} of the installed diffusers does not know: update it"
            )})  # fmt: skip
        if refused := self.form.refused(self.full):
            raise FieldError(type(self).__name__, {"settings": f"has {refused}, which is not read here"})

    @property
    def form(self) -> Form:
        """How the class is called."""
        return FORMS[self.backbone]

    @property
    def null_class(self) -> bool:
        """Whether the network knows "no class"."""
        return self.form.null_class(self.full) is not None

    @property
    def highest(self) -> float:
        """Radians a unit time of the fastest sinusoid."""
        return self.form.highest

    def check(self, space: DataSpace) -> None:
        """Raises FieldError for samples of another kind than the network's."""
        need = self.form.fields(self.full)
        held = {e.name: e.shape for e in space.embeddings}
        if space.classes is not None:
            held["class"] = (space.classes,)
        channels, cut = self.form.channels(self.full), self.form.cut(self.full)
        fits = len(space.shape) == 1 + len(cut) and space.shape[0] == channels
        fits = (
            fits
            and not (self.form.square and len(set(space.shape[1:])) > 1)
            and all(size % by == 0 for size, by in zip(space.shape[1:], cut, strict=True))
        )
        require(
            self,
            settings=(fits, f"is of a network for samples [{channels}, {', '.join(f'n {by}' for by in cut)}], here "
                      f"{list(space.shape)}"),
            backbone=(_alike(need, held), f"is conditioned on {dict(need)} (None: tokens), here {held}"),
        )  # fmt: skip

    def build(self, space: DataSpace) -> DiffusersNetwork:
        """A freshly initialised network for `space`; draws from torch's global generator. Raises as `check` does."""
        self.check(space)
        with torch.device("cpu"):
            return self.wrap(self.bare())

    def bare(self) -> nn.Module:
        """The module of diffusers alone. Raises FieldError for settings that its class cannot be built from."""
        try:
            module: nn.Module = _class(self.backbone).from_config(dict(self.settings))
        except (TypeError, ValueError, ArithmeticError, RuntimeError, LookupError, AttributeError) as error:
            raise FieldError("network", {"settings": f"do not build a {self.backbone} ({error})"}) from None
        return module

    def wrap(self, module: nn.Module) -> DiffusersNetwork:
        """What `bare` gave, as a network."""
        return DiffusersNetwork(module, self)

    @cached_property
    def full(self) -> dict[str, Any]:
        """The settings with what they leave out."""
        given = signature(_class(self.backbone).__init__).parameters.items()
        return {name: argument.default for name, argument in given if name != "self"} | dict(self.settings)


def _alike(need: Fields, held: Fields) -> bool:
    return need.keys() == held.keys() and all(
        len(need[name]) == len(held[name]) and all(a in (None, b) for a, b in zip(need[name], held[name], strict=True))
        for name in need
    )


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config of any class of diffusers with what it leaves out, as diffusers reads it: configs of old versions lack
    later keys. As it is where the class is not known or diffusers not installed."""
    try:
        given = signature(_class(str(config.get("_class_name"))).__init__).parameters.items()
    except FieldError:
        return config
    return {name: a.default for name, a in given if a.default is not Parameter.empty} | dict(config)


def _class(name: str) -> Any:
    try:
        import diffusers
    except ModuleNotFoundError:
        raise FieldError("network", {"backbone": (
            f"is {name}, a network of the package diffusers, which is not installed: pip install 'flow-distill["
            "diffusers]'"
        )}) from None  # fmt: skip
    found = getattr(diffusers, name, None)
    if found is None:
        raise FieldError("network", {"backbone": (
            f"is {name}, unknown to diffusers {diffusers.__version__}: pip install -U 'flow-distill[diffusers]'"
        )})  # fmt: skip
    return found
