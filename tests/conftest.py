"""What tests run in: warnings are errors, the global generator is seeded; and the folders they share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FAST, TINY
from PIL import Image


def pytest_configure(config: pytest.Config) -> None:
    # torch 2.13 scripts its own decompositions on the first forward-mode derivative
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards; to be read only."""
    from distill.data.build import build

    folder = tmp_path_factory.mktemp("data") / "digits"
    build("digits", folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 colour images of 16x16 in two classes, with captions."""
    from distill.data.build import build

    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(40):
        file = root / "images" / ("cat" if number % 2 else "dog") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"a {file.parent.name} number {number}")
    build(str(root / "images"), root / "shards", 10)
    return root / "shards"


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny diffusers autoencoder of random weights, in its own format."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("autoencoder") / "tiny-vae"
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP text encoder of random weights with a tokenizer of whole words, in their own formats."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "cat", "dog", "number", *map(str, range(40))]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    network = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                       num_attention_heads=2, max_position_embeddings=16, eos_token_id=len(words) - 1)
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder") / "tiny-clip"
    network.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "digits"))


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test runs in an empty folder, where recipes would put data and runs, and nothing may be written to it.

    Yields the folder beside it, which is free to use.
    """
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield tmp_path
    assert list(empty.iterdir()) == []


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in this empty folder, where recipes put data and runs."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _job(folder: Path, recipe: str, *overrides: str) -> Path:
    from distill.job import run

    with chdir(folder):
        return folder / run(recipe, overrides)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of toy/lagrangian with `TINY`; to be read only."""
    return _job(tmp_path_factory.mktemp("toy"), "toy/lagrangian", *TINY)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:
    """A finished run of the quickstart with `FAST` and pictures; to be read only."""
    overrides = (*FAST, "tracking.samples_every=8", f"data.path={built}")
    return _job(tmp_path_factory.mktemp("digits-run"), "quickstart", *overrides)


@pytest.fixture(scope="session")
def velocity_run(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:
    """A finished run of teachers/digits, a small network trained from data alone; to be read only."""
    network = "student.network={name: mlp, width: 16, depth: 1}"
    overrides = (*FAST, network, f"data.path={built}", "evaluation.features=digits")
    return _job(tmp_path_factory.mktemp("velocity"), "teachers/digits", *overrides)


@pytest.fixture
def toy(toy_run: Path, cwd: Path) -> Path:
    """A copy of the finished toy run, as runs/toy-lagrangian in the test's own folder, that may be changed."""
    return Path(shutil.copytree(toy_run, Path("runs") / toy_run.name))
