"""The classifier whose features a Frechet distance is taken of: trained the same twice, read strictly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import normal
from torch import Tensor

from distill.evaluation import features as room
from distill.evaluation.features import Classifier, Features, load_features, train_features
from distill.rows import Rows
from teachers.checkpoints import sha256
from teachers.errors import CheckpointError

Trained = tuple[Path, Features]


def stripes(n: int = 120) -> tuple[Tensor, Tensor]:
    """Three classes told apart by the bright third of a 6 x 6 image."""
    labels = torch.arange(n) * 7 % 3
    x = 0.3 * normal(n, 1, 6, 6).float()
    for i, label in enumerate(labels.tolist()):
        x[i, :, 2 * label : 2 * label + 2] += 1
    return x, labels


def train(folder: Path, seed: int = 0, labels: Tensor | None = None) -> Features:
    """Training as in a job, but short."""
    x, own = stripes()
    short = room._Training(steps=80, batch=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_Training", lambda: short)
        return train_features(x, own if labels is None else labels, 3, folder, seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder / "features")


def test_a_classifier_learns_and_is_written(trained: Trained) -> None:
    folder, features = trained
    assert features.accuracy > 0.9
    assert features.digest == sha256(folder / "features" / "model.safetensors")
    config = json.loads((folder / "features" / "config.json").read_text())
    assert config["sha256"] == features.digest
    assert config["accuracy"] == features.accuracy
    assert config["training"]["seed"] == 0
    x, labels = stripes()
    _, predicted = features(x)
    assert (predicted == labels).double().mean() > 0.9


def test_accuracy_is_of_images_held_out(trained: Trained, tmp_path: Path) -> None:
    """A fifth of them, never trained on: wrong labels there alone make the accuracy, not the classifier, bad."""
    _, labels = stripes()
    held_out = Rows(0, "held out", 0, 0, len(labels)).uniform().argsort() < len(labels) / 5
    labels[held_out] = (labels[held_out] + 1) % 3
    spoiled = train(tmp_path / "features", labels=labels)
    assert spoiled.accuracy < 0.1
    for mine, good in zip(spoiled.classifier.parameters(), trained[1].classifier.parameters(), strict=True):
        assert torch.equal(mine, good)


def test_training_is_a_function_of_data_and_seed(trained: Trained, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    assert train(tmp_path / "same").digest == trained[1].digest
    assert torch.equal(torch.random.get_rng_state(), before)
    assert train(tmp_path / "other", seed=1).digest != trained[1].digest


def test_what_was_written_reads_back_to_the_same_features(trained: Trained) -> None:
    folder, features = trained
    again = load_features(str(folder))
    assert (again.digest, again.accuracy) == (features.digest, features.accuracy)
    x, _ = stripes()
    for a, b in zip(again(x), features(x), strict=True):
        assert torch.equal(a, b)
    assert not again.classifier.training


@pytest.mark.parametrize(("side", "pixels"), [(6, 3), (8, 4), (14, 7), (28, 7), (32, 4), (64, 4)])
def test_features_see_whole_objects(side: int, pixels: int, tmp_path: Path) -> None:
    """Images of any size are halved to a few pixels, at least once; what is written says how often."""
    short = room._Training(steps=1, epochs=0, batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_Training", lambda: short)
        features = train_features(normal(10, 1, side, side).float(), torch.arange(10) % 2, 2, tmp_path / "features", 0)
    again = load_features(str(tmp_path))
    x = normal(3, 1, side, side, seed=1).float()
    assert again.classifier.layers(x).shape == (3, 32, pixels, pixels)
    assert torch.equal(again(x)[0], features(x)[0])


def test_more_data_are_trained_on_for_longer(tmp_path: Path) -> None:
    x, labels = stripes(100)
    for epochs, steps in ((3, 30), (1, 20)):
        short = room._Training(steps=20, epochs=epochs, batch=8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "_Training", lambda short=short: short)
            train_features(x, labels, 3, tmp_path / f"{epochs}", 0)
            assert json.loads((tmp_path / f"{epochs}" / "config.json").read_text())["training"]["steps"] == steps


def test_features_do_not_depend_on_chunks(trained: Trained) -> None:
    _, features = trained
    x = stripes()[0].repeat(10, 1, 1, 1)
    values, classes = features(x)
    assert values.shape == (1200, features.classifier.head.in_features)
    torch.testing.assert_close(values[1150:1160], features(x[1150:1160])[0])
    assert torch.equal(classes[:120], classes[1080:])
    assert not values.requires_grad


def test_logits_are_linear_in_the_features() -> None:
    classifier = Classifier(1, 3, width=8)
    x = stripes(5)[0]
    torch.testing.assert_close(classifier(x), classifier.head(classifier.features(x)))
    assert classifier.features(x).shape == (5, 8)
    assert classifier(x).shape == (5, 3)


def damaged(folder: Path, name: str) -> None:
    file = folder / "features" / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(bytes(content))


def test_damage_is_refused(trained: Trained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "run"))
    damaged(folder, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: sha256 is [0-9a-f]+, config.json states"):
        load_features(str(folder))


def test_a_folder_without_a_classifier_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"features: no classifier here; leave evaluation.features null"):
        load_features(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_features(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("damage", ["no weights", "no JSON", "no object", "missing key", "other size"])
def test_other_damage_is_a_checkpoint_error_too(damage: str, trained: Trained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "run"))
    config, weights = folder / "features" / "config.json", folder / "features" / "model.safetensors"
    values = json.loads(config.read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "no JSON":
        config.write_text("{")
    elif damage == "no object":
        config.write_text("[]")
    elif damage == "missing key":
        config.write_text(json.dumps({k: v for k, v in values.items() if k != "width"}))
    else:
        config.write_text(json.dumps(values | {"width": 32}))
    with pytest.raises(CheckpointError) as error:
        load_features(str(folder))
    assert str(folder) in str(error.value)
