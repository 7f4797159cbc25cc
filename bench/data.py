"""How fast training data comes: this project's reader beside the same tars read raw and by plain webdataset.

    python bench/data.py             a table; every row decodes the same samples with the same decoder

"raw" opens each tar with Python's tarfile, in order, and decodes every member: no checks, no shuffling. "bytes" only
reads the files. Rows of a table are of one run; times of several runs cannot be compared.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.torch
import torch

from distill.data import kept
from distill.data.build import Plan, build, write_shards
from distill.data.decode import decode
from distill.data.loader import Loader
from distill.data.manifest import Field, read_manifest
from distill.data.reader import ShardReader
from distill.data.shards import Shards

BATCH = 128


def latents(folder: Path, samples: int) -> Shards:
    """Latents of 4x32x32 in float32, 16 kB each."""
    tensor = torch.randn(4, 32, 32)
    fields = {"latent": Field("latent.safetensors", "float32", (4, 32, 32)), "class": Field("cls", "int64", (), 10)}
    plan = Plan("latents", "train", samples, 1000, fields, {}, {}, {"id": "random", "scale": 1.0, "shift": 0.0})

    def make(rows: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        for n in rows:
            content = safetensors.torch.save({"latent": tensor + n})
            yield f"{n:09d}", {"latent.safetensors": content, "cls": str(n % 10).encode()}

    write_shards(folder, plan, make)
    return Shards(path=str(folder), field="latent", autoencoder="random", shape=(4, 32, 32))


def images(folder: Path, samples: int) -> Shards:
    """Random colour PNGs of 64x64, 12 kB each."""
    file = folder.parent / "images.npz"
    np.savez(file, images=np.random.default_rng(0).integers(0, 256, (samples, 3, 64, 64), dtype=np.uint8),
             labels=np.arange(samples) % 10)  # fmt: skip
    build(str(file), folder)
    return Shards(path=str(folder))


def files(config: Shards) -> list[Path]:
    return sorted(Path(config.path).glob("*.tar"))


def bytes_alone(config: Shards) -> Iterator[int]:
    for file in files(config):
        file.read_bytes()
        yield sum(shard.samples for shard in read_manifest(Path(config.path)).shards if shard.file == file.name)


def raw(config: Shards) -> Iterator[int]:
    fields = {field.member: (name, field) for name, field in read_manifest(Path(config.path)).fields.items()}
    for file in files(config):
        with tarfile.open(file) as tar:
            for number, member in enumerate(tar):
                content = tar.extractfile(member)
                assert content is not None
                name, field = fields[member.name.partition(".")[2]]
                decode(name, field, content.read())
                if number % len(fields) == 0:
                    yield 1


def webdataset(config: Shards) -> Iterator[int]:
    import webdataset as wds

    fields = {field.member: (name, field) for name, field in read_manifest(Path(config.path)).fields.items()}
    data = wds.WebDataset([str(file) for file in files(config)], shardshuffle=100, seed=0).shuffle(1000)
    for sample in data:
        for member, (name, field) in fields.items():
            decode(name, field, sample[member])
        yield 1


def ours(config: Shards, workers: int) -> Iterator[int]:
    reader = ShardReader(config)
    for batch in Loader(reader, 0, BATCH, workers=workers):
        yield len(batch.keys)


def rate(samples: Iterator[int], total: int, warm: int) -> float:
    """Samples a second over `total` of them, after the first `warm`."""
    start, count = time.perf_counter(), -warm
    for got in samples:
        if count < 0 <= count + got:
            start = time.perf_counter()
        count += got
        if count >= total:
            break
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--folder", type=Path, help="where to build the shards (default: a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept._KEPT = 0  # nothing stays in memory: every sample is read and decoded
    kinds: dict[str, Callable[[Path, int], Shards]] = {"latents 4x32x32": latents, "PNG 3x64x64": images}
    with TemporaryDirectory(dir=arguments.folder) as home:
        print(f"{os.cpu_count()} cores, batches of {BATCH}, {arguments.samples} samples; samples a second")
        for kind, make in kinds.items():
            config = make(Path(home) / kind.split()[0], arguments.samples)
            total, warm = arguments.samples - 2 * BATCH, BATCH
            rows = {
                "bytes": lambda config=config: bytes_alone(config),
                "raw": lambda config=config: raw(config),
                "webdataset": lambda config=config: webdataset(config),
                "this, in the process": lambda config=config: ours(config, 0),
                "this, 1 worker": lambda config=config: ours(config, 1),
                "this, 2 workers": lambda config=config: ours(config, 2),
            }
            best = dict.fromkeys(rows, 0.0)
            for _ in range(3):  # interleaved, the best of three: other work on the machine only slows
                for name, samples in rows.items():
                    best[name] = max(best[name], rate(samples(), total, warm))
            for name, found in best.items():
                print(f"{kind:16} {name:22} {found:10,.0f}   {found / best['raw']:5.2f}x raw")


if __name__ == "__main__":
    main()
