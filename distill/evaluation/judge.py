"""Samples judged: their distances to the real data, in features, and to what the same noise gives elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.evaluation.features import Features
from distill.evaluation.metrics import (
    agreement,
    frechet_distance,
    frechet_errors,
    frechet_floor,
    kernel_distance,
    kernel_within,
    neighbour_distances,
    precision_recall,
    rmse,
    sliced_wasserstein,
)
from distill.rows import chosen
from distill.sampling import Conditions, Samples
from teachers.errors import InputError
from teachers.space import DataSpace


@dataclass(frozen=True)
class Judged:
    """Samples, their features, the classes that the classifier sees in them, and their distances to the real data."""

    samples: Samples
    features: Tensor
    classes: Tensor | None
    metrics: dict[str, float]

    def entry(self, nfe: int, reference: Judged | None, exact: Tensor | None) -> dict[str, Any]:
        """An entry of evaluation.json; `paired` are comparisons with what the same noise gives elsewhere."""
        paired = {}
        if reference is not None:
            paired["endpoint_rmse"] = rmse(self.samples.x, reference.samples.x)
            if self.classes is not None and reference.classes is not None:
                paired["class_agreement"] = agreement(self.classes, reference.classes)
        if exact is not None:
            paired["exact_rmse"] = rmse(self.samples.x, exact)
        seconds = self.samples.seconds_per_sample
        return {"nfe": nfe, "metrics": self.metrics, "paired": paired, "seconds_per_sample": seconds}


class Judge:
    """Compares samples with the real data, in features where there are any."""

    def __init__(self, real: tuple[Tensor, Tensor | None], features: Features | None, conditions: Conditions) -> None:
        self._real, self._labels = real
        if len(self._real) < 4:
            raise InputError(f"evaluation: compares with {len(self._real)} real samples: at least 4 are needed")
        self._features, self.conditions = features, conditions
        self._real_features, self._real_classes = self._of(self._real)
        self._some = _some(self._real_features, _MOST)
        self._reach, self._within = neighbour_distances(self._some), kernel_within(self._some)

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (x.flatten(1), None) if self._features is None else self._features(x)

    def __call__(self, samples: Samples) -> Judged:
        finite = samples.x.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(f"evaluation: {int((~finite).sum())} of {len(finite)} samples are not finite")
        features, classes = self._of(samples.x)
        metrics = self._distances(samples.x, features)
        asked = self._asked(len(samples.x))
        if classes is not None and asked is not None:
            metrics["label_accuracy"] = agreement(classes, asked)
        return Judged(samples, features, classes, metrics)

    def _distances(self, x: Tensor, features: Tensor) -> dict[str, float]:
        precision, recall = precision_recall(features, self._some, reach=self._reach)
        return {
            "fd": frechet_distance(features, self._real_features),
            "kid": kernel_distance(features, self._some, self._within),
            "precision": precision,
            "recall": recall,
            "sw2": sliced_wasserstein(x, self._real),
        }

    def _asked(self, n: int) -> Tensor | None:
        """The classes of samples 0 .. n - 1."""
        cond = self.conditions(0, n)
        return None if cond is None else cond.get("class")

    def errors(self, samples: list[Tensor], count: int) -> Tensor:
        """See `frechet_errors`. Of classes with few samples these are drawn from all: a class of one would not vary."""
        asked = self._asked(len(samples[0]))
        classes = None if asked is None or self._labels is None else (asked, self._labels)
        if classes is not None and min(int(of.unique(return_counts=True)[1].min()) for of in classes) < _FEW:
            classes = None
        return frechet_errors(samples, self._real_features, count, classes)

    def floor(self, samples: int, trained_on: Tensor | None) -> dict[str, Any]:
        """Real against real: scaled to the sizes in use, and as measured on its halves, and whether these are too few
        for it; of the real samples, how many have the class that is seen in them, beside what the classifier claims;
        the training data as if they were samples."""
        by_class = self._labels if self._asked(1) is not None else None
        halves, scaled = frechet_floor(self._real_features, samples, by_class)
        few = min(samples, len(self._real) // 2) <= self._real_features.shape[1]
        found: dict[str, Any] = {"fd": scaled, "fd_halves": halves, "few": few}
        if self._labels is not None and self._real_classes is not None:
            assert self._features is not None
            found["label_accuracy"] = agreement(self._real_classes, self._labels)
            found["classifier_accuracy"] = self._features.accuracy
        if trained_on is not None:
            x = _some(trained_on, samples)
            found["trained_on"] = self._distances(x, self._of(x)[0])
        return found


_FEW = 10  # samples of a class below which drawing them again varies too little
_MOST = 10_000  # real samples that are compared one by one with others, in time that grows as their square


def _some(x: Tensor, count: int) -> Tensor:
    """At most `count` rows, from everywhere: of all classes, also where these are sorted or come in turn."""
    return x[chosen(count, len(x))]


def like(real: tuple[Tensor, Tensor | None] | None, space: DataSpace) -> Conditions:
    """Conditions that give samples the classes of the real ones in their shares, each in its turn; without labels all
    classes alike."""
    if real is None or real[1] is None or space.classes is None or space.embeddings:
        return space.cond_for
    shares = torch.bincount(real[1])
    places = torch.cat([(torch.arange(n).double() + 0.5) / n for n in shares.tolist()])
    turns = torch.arange(len(shares)).repeat_interleave(shares)[places.argsort(stable=True)]
    return lambda first, count: {"class": turns[torch.arange(first, first + count) % len(turns)]}
