"""A job: a recipe and what it names, loaded, and what can be told from these alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

from distill.data.base import Reader
from distill.data.empty import NoData
from distill.data.mixture import Mixture
from distill.data.reader import ShardReader, differ
from distill.data.shards import Shards
from distill.evaluation.features import FOLDER, Features, load_features, train_features
from distill.flow_map import Kind
from distill.memory import FULL, replica_bytes
from distill.objectives.base import Objective
from distill.parallel import device, on_main, world
from distill.recipe import Recipe, changed
from distill.student import Student
from distill.teacher_check import ROWS, Verdict, check_teacher
from distill.training.checkpoint import CHECKPOINTS, load_weights, newest
from distill.training.config import StrategyName
from teachers.adapters.native import Native
from teachers.errors import CheckpointError, InputError
from teachers.path_change import on_path
from teachers.space import DataSpace
from teachers.velocity import Teacher

Objectives = Mapping[str, type[Objective]]


class RunError(InputError):
    """A job, run folder or export that cannot be used as asked: the message says which and what to do."""


@dataclass
class Job:
    folder: Path
    recipe: Recipe
    teacher: Teacher | None
    console: Console
    objectives: Objectives = field(default_factory=dict)

    @cached_property
    def reader(self) -> Reader:
        """The data, built first where it is missing, so that all processes come to it the first time; a job without
        data has batches of conditioning alone."""
        if self.recipe.data is not None:
            return self.recipe.data.open(self.teacher)
        assert self.teacher is not None
        return NoData(self.teacher.space)

    @property
    def space(self) -> DataSpace:
        """What a sample looks like."""
        return self.reader.space

    def to_yaml(self) -> str:
        """The resolved recipe."""
        return self.recipe.to_yaml(self.objectives)

    @property
    def network(self) -> dict[str, Any]:
        """The student's network as an entry of NETWORKS."""
        if self.recipe.student.network is None:
            assert self.teacher is not None and self.teacher.network_config is not None
            return dict(self.teacher.network_config)
        found = yaml.safe_load(self.to_yaml())["student"]["network"]
        assert isinstance(found, dict)
        return found

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must share with this run: digests of the recipe's part in training, teacher and data."""
        recipe, digest = self.recipe, _digest(self.teacher) if self.teacher else "none"
        guidance = self.reference.info.get("guidance") if self.reference else None
        weak = f" weak {guidance['weak']}" if guidance and guidance["weak"] else ""
        # where files lie and how training is run do not count; nor does what has its default, so that a key which a
        # later version adds changes nothing
        teacher = recipe.teacher if not isinstance(recipe.teacher, Native) else "native"
        data = changed(recipe.data.training if isinstance(recipe.data, Shards | Mixture) else recipe.data)
        parts = [
            recipe.seed,
            changed(teacher),
            changed(recipe.student),
            changed(recipe.objective),
            changed(recipe.guidance),
            data,
            changed(recipe.trainer.training),
        ]
        return {
            "recipe": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16],
            "teacher": f"{digest}{weak}",
            "data": self.reader.digest,
        }

    @cached_property
    def reference(self) -> Teacher | None:
        """The teacher as it is distilled and measured: on the student's path, guided."""
        if self.teacher is None:
            return None
        teacher = on_path(self.teacher, self.recipe.student.path_of(self.teacher))
        return teacher if self.recipe.guidance is None else self.recipe.guidance.guide(teacher)

    def load_teacher(self) -> None:
        """The recipe's teacher, once more from its file."""
        assert self.recipe.teacher is not None
        self.teacher = self.recipe.teacher.load()
        self.teacher.freeze()
        del self.reference

    def strategy(self) -> StrategyName:
        """How the processes of this launch share the training. Raises RunError if they cannot."""
        gpu = world() > 1 and device().type == "cuda"
        return shared(self.recipe, world(), self._replica, torch.cuda.get_device_properties(device()).total_memory
                      if gpu else math.inf)  # fmt: skip

    def _replica(self) -> int:
        teacher = self.reference.modules() if self.reference else []
        target = self.recipe.objective.target_decay(0) is not None
        return replica_bytes(
            self.new_student(), [*self.new_networks().values()], teacher, target=target,
            optimizer=self.recipe.trainer.optimizer,
        )  # fmt: skip

    def new_student(self) -> Student:
        """The student before its first step."""
        return self._build(self.recipe.objective.kind, self.recipe.objective.finest)

    def new_networks(self) -> dict[str, Student]:
        """The further velocities that the objective trains along, before their first step."""
        return {name: self._build("velocity", 1) for name in self.recipe.objective.networks}

    def _build(self, kind: Kind, finest: int) -> Student:
        recipe = self.recipe
        guidance = recipe.guidance.student_input if recipe.guidance else None
        config = recipe.student if kind != "velocity" else replace(recipe.student, split=None)
        return config.build(self.teacher, self.space, recipe.seed, kind, finest, guidance)

    def newest(self) -> Path | None:
        """The newest good checkpoint, if there is one. Raises CheckpointError where there are others alone."""
        path, refused = newest(self.folder / CHECKPOINTS, self.identity)
        for reason in refused:
            self.console.print(f"passed over a checkpoint: {reason}", style="yellow", markup=False, highlight=False)
        return path

    def trained(self) -> Path:
        """The newest good checkpoint. Raises CheckpointError if there is none."""
        path = self.newest()
        if path is None:
            raise CheckpointError(
                f"{self.folder / CHECKPOINTS}: no checkpoint yet; train first: distill resume {self.folder}"
            )
        return path

    def trained_student(self, path: Path) -> tuple[Student, int]:
        """The student with the weights to export of a checkpoint, on this process's device, and the step it is from."""
        student = self.new_student()
        student.load_state_dict(load_weights(path, self.recipe.export.weights))
        student = student.merged()
        if self.reference is not None:
            self.reference.to(device())
        return student.eval().requires_grad_(False).to(device()), int(path.name.removeprefix("step-"))

    def warn(self, text: str) -> None:
        """Say what is allowed, and may be wrong."""
        self.console.print(f"caution: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def check_teacher(self) -> Verdict:
        """Whether the teacher is the velocity of the data; see `distill.teacher_check`."""
        assert self.teacher is not None
        return check_teacher(self.teacher, next(self.reader.batches(self.recipe.seed, ROWS, 0)), self.recipe.seed)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Inside, torch has the recipe's number of CPU threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.recipe.trainer.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def features(self, home: Path) -> Features | None:
        """The classifier of the recipe, or one trained on the job's labelled images and kept in `home`."""
        if self.recipe.evaluation.features is not None:
            features = load_features(self.recipe.evaluation.features)
            if text := features.misfit(self.space):
                raise RunError(f"evaluation.features: {text}")
            return features
        if self.recipe.data is None or not self.space.is_image or self.space.classes is None:
            return None
        on_main(lambda: self._train_features(home / FOLDER))
        return load_features(str(home))

    @cached_property
    def held_out(self) -> ShardReader | None:
        """The data that samples are compared with, if it is other data than what is trained on."""
        if self.recipe.evaluation.data is None:
            return None
        reader = self.recipe.evaluation.data.open(self.teacher)
        if reader.space != self.space:
            raise RunError(
                f"evaluation.data: {reader.space}; the job makes {self.space}: set it to data of that shape, those "
                "classes and that range, or to null for the data that is trained on"
            )
        if text := differ(getattr(self.reader, "class_names", None), reader.class_names):
            raise RunError(f"evaluation.data: {text}")
        return reader

    def compared_with(self) -> tuple[tuple[Tensor, Tensor | None] | None, str, Tensor | None]:
        """What samples are compared with, and what names it; the training data if that is other data."""
        trained_on = self.real_samples(self.reader) if self.recipe.data is not None else None
        if self.held_out is not None:
            return self.real_samples(self.held_out), self.held_out.digest, None if trained_on is None else trained_on[0]
        return trained_on, self.reader.digest if trained_on else f"samples of teacher {self.identity['teacher']}", None

    def kept_samples(self) -> Path | None:
        """Where the reference teacher's samples stay for other runs with the same ones."""
        config = self.recipe.evaluation
        if config.cache is None or self.teacher is None or self.teacher.info.get("digest") is None:
            return None
        like = self.held_out if self.held_out and not self.space.embeddings else self.reader  # what they are asked for
        assert self.reference is not None
        guidance = self.reference.info.get("guidance")
        parts = [self.identity["teacher"], changed(self.recipe.teacher), guidance, like.digest,
                 self.recipe.student.path, config.samples, config.batch, config.seed, config.reference_steps,
                 self.recipe.trainer.threads, str(device())]  # fmt: skip
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return Path(config.cache).expanduser() / f"teacher-{digest}.safetensors"

    def real_samples(self, reader: Reader) -> tuple[Tensor, Tensor | None]:
        """The samples of data, but those that are not finite; of large data some."""
        x, labels = reader.everything()
        for source in getattr(reader, "readers", [reader]):
            if isinstance(source, ShardReader) and source.measured < source.samples - len(source.skipped):
                count = f"{source.measured:,} of {source.samples:,} samples"
                self.warn(f"{source.folder}: {count} are measured with, drawn from everywhere")
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            text = f"{int((~finite).sum())} of {len(x)} real samples are not finite: nothing is measured against them"
            self.warn(text)
            x, labels = x[finite], None if labels is None else labels[finite]
        return x, labels

    def _train_features(self, folder: Path) -> None:
        if not folder.exists():
            x, labels = self.real_samples(self.reader)
            assert labels is not None and self.space.classes is not None
            train_features(x, labels, self.space.classes, folder, self.recipe.seed)


def _digest(teacher: Teacher) -> str:
    """What tells one teacher from another: its digest, or of a function, which has none, what is known of it."""
    if digest := teacher.info.get("digest"):
        return str(digest)
    path = changed(teacher.path) if is_dataclass(teacher.path) else type(teacher.path).__name__
    return f"{teacher.info.get('id', 'own')}, {teacher.space}, path {path}"


def shared(recipe: Recipe, processes: int, replica: Callable[[], int], memory: float) -> StrategyName:
    """How so many processes share the training. replica: the bytes that each holds if it holds all; memory: of each.

    Raises RunError for a batch that they cannot share.
    """
    trainer = recipe.trainer
    if trainer.batch % (processes * trainer.accumulate):
        raise RunError(
            f"trainer.batch: {trainer.batch} cannot be shared by {processes} processes in {trainer.accumulate} parts "
            "each: make it a multiple, or change trainer.accumulate"
        )
    if processes == 1:
        return "single"
    if trainer.strategy == "single":
        raise RunError(f"trainer.strategy is single, but there are {processes} processes: set it to auto")
    if trainer.strategy != "auto":
        return trainer.strategy
    whole = recipe.student.lora is not None or replica() <= FULL * memory
    return "ddp" if whole else "fsdp2"
