"""Images -> features in which a Frechet distance means something: a small classifier trained on the job's own data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.atomic import atomic_directory
from distill.rows import Rows, derived_seed
from teachers.adapters.native import load_strict, locate
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError
from teachers.space import DataSpace

FOLDER = "features"
"""Where a classifier lies: beside the teacher it ships with, or in the run that trained it."""


class Classifier(nn.Module):
    """Convolutions, of which `halvings` halve the image, mean and max pooled to `width` features, and a linear layer to
    the classes."""

    def __init__(self, channels: int, classes: int, width: int = 64, halvings: int = 1) -> None:
        super().__init__()
        self.halvings = halvings
        layers: list[nn.Module] = [nn.Conv2d(channels, width // 2, 3, padding=1), nn.SiLU()]
        for n in range(halvings):
            layers += [nn.Conv2d(width if n else width // 2, width, 3, stride=2, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, width // 2, 3, padding=1), nn.SiLU())
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """``x: [b, c, h, w]`` in the data's range -> ``[b, width]``."""
        h = self.layers(x)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[b, classes]``."""
        logits: Tensor = self.head(self.features(x))
        return logits


@dataclass(frozen=True)
class Features:
    """`classifier` maps images to features and classes; `digest` says which it is, `accuracy` how good (held out)."""

    classifier: Classifier
    digest: str
    accuracy: float

    @property
    def channels(self) -> int:
        """Of the images it sees."""
        first = self.classifier.layers[0]
        assert isinstance(first, nn.Conv2d)
        return first.in_channels

    def misfit(self, space: DataSpace) -> str | None:
        """Why it cannot see samples of `space`, or tell their classes, and what to do."""
        classes = self.classifier.head.out_features
        if space.is_image and space.shape[0] == self.channels and space.classes in (None, classes):
            return None
        return f"sees images of {self.channels} channels in {classes} classes, here are {space}: set it to null"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [n, c, h, w]`` -> (features ``[n, d]``, predicted classes ``[n]``), in chunks of 1,000."""
        parts = [self.classifier.features(chunk) for chunk in x.split(1000)]
        features = torch.cat(parts)
        return features, self.classifier.head(features).argmax(1)


def load_features(path: str) -> Features:
    """The classifier in `path`/features, where path is a folder or the name of a shipped teacher.

    Raises CheckpointError.
    """
    folder = locate(path, FOLDER) / FOLDER
    file, weights = folder / "config.json", folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: no classifier here; leave evaluation.features null to train one from the data"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        sizes = [int(config[key]) for key in ("channels", "classes", "width")] + [int(config.get("halvings", 1))]
        stated, accuracy = str(config["sha256"]), float(config["accuracy"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged, or not a classifier of ours ({error!r}); copy it again") from None
    digest = sha256(weights) if weights.is_file() else "missing"
    if digest != stated:
        raise CheckpointError(f"{weights}: sha256 is {digest[:12]}, config.json states {stated[:12]}; copy it again")
    with torch.random.fork_rng(devices=[]):
        classifier = Classifier(*sizes)
    load_strict(classifier, load_file(weights), str(weights))
    return Features(classifier.eval(), digest, accuracy)


@dataclass(frozen=True, kw_only=True)
class _Training:
    steps: int = 600  # at least
    epochs: int = 8  # at least
    batch: int = 128
    lr: float = 2e-3
    held_out: float = 0.2  # the share of images that measure the accuracy


def train_features(x: Tensor, labels: Tensor, classes: int, folder: Path, seed: int) -> Features:
    """Train a classifier on real images ``x: [n, c, h, w]`` and write it to `folder`, whole or not at all.

    Images are halved down to about 7 pixels, so that features see the whole of an object. A fifth of them is held out
    for the accuracy. Deterministic in (data, seed).
    """
    how = _Training()
    held_out = Rows(seed, "held out", 0, 0, len(x)).uniform().argsort() < len(x) * how.held_out
    train_x, train_y = x[~held_out], labels[~held_out]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "classifier"))
        classifier = Classifier(x.shape[1], classes, halvings=max(1, math.ceil(math.log2(max(x.shape[2:]) / 7))))
    how = replace(how, steps=max(how.steps, how.epochs * len(train_x) // how.batch))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=how.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    for step in range(how.steps):
        pick = (Rows(seed, "classifier", step, 0, how.batch).uniform() * len(train_x)).long()
        loss = nn.functional.cross_entropy(classifier(train_x[pick]), train_y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        accuracy = float((classifier(x[held_out]).argmax(1) == labels[held_out]).double().mean())
    with atomic_directory(folder) as temporary:
        save_file(classifier.state_dict(), temporary / "model.safetensors")
        digest = sha256(temporary / "model.safetensors")
        config = {"channels": x.shape[1], "classes": classes, "width": classifier.head.in_features,
                  "halvings": classifier.halvings, "accuracy": accuracy, "sha256": digest,
                  "training": {**asdict(how), "seed": seed}}  # fmt: skip
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Features(classifier, digest, accuracy)
