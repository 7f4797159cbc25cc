"""The commands of `distill shards`. Like those of `distill.cli` they import what they need when they are called."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.launch import BAD_INPUT
from teachers.errors import InputError

if TYPE_CHECKING:
    from distill.data.manifest import Manifest
    from distill.data.store import Folder


def add(verbs: Any) -> None:
    """The commands and their arguments, to argparse's commands."""
    shards = verbs.add_parser("shards", help="build, describe and verify training data")
    inner = shards.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add_verb in (_add_build, _add_pairs, _add_latents, _add_embeddings, _add_info, _add_verify):
        add_verb(inner)


def _in(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="FOLDER", help="of shards; also a URL")
    verb.add_argument("--pipe", action="store_true", help="allow FOLDER to be a command, as 'pipe:cat data/{file}'")


def _out(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder, e.g. data/digits")
    verb.add_argument("--shard-size", type=int, metavar="N",
                      help="samples a shard (default: 100 to 1000, so that there are 64 shards)")  # fmt: skip


def _add_build(verbs: Any) -> None:
    verb = verbs.add_parser("build", help="write a data set as webdataset tars with a manifest")
    verb.add_argument("source", metavar="SOURCE",
                      help="digits; a folder of images (by class), idx files or tars; .npy, .npz or .tar")  # fmt: skip
    _out(verb)
    verb.add_argument("--name", help="of the data set (default: the source's)")
    verb.add_argument("--split", default="train", help="train or test, of idx files; elsewhere a word for the manifest")
    verb.add_argument("--size", type=int, metavar="N", help="scale the shorter side to N pixels, cut out the centre")
    verb.add_argument("--seed", type=int, help="shuffle once (default: folders with classes by 0, others not at all)")
    verb.add_argument("--labels", type=Path, metavar="FILE", help="an .npy file of integers, beside an .npy source")
    verb.add_argument("--classes", type=int, metavar="N", help="how many there are, if the last ones do not occur here")
    verb.add_argument("--unpickle", action="store_true",
                      help="turn .pth, .pt, .pyd, .pkl into safetensors and JSON, without running them")  # fmt: skip
    verb.set_defaults(command=_build)


def _build(parsed: argparse.Namespace) -> int:
    from distill.data.build import build
    from distill.data.sources.base import Options

    options = Options(parsed.size, parsed.split, parsed.seed, parsed.labels, parsed.unpickle, parsed.classes)
    return _built(
        parsed.folder, build(parsed.source, parsed.folder, parsed.shard_size, name=parsed.name, options=options)
    )


def _add_pairs(verbs: Any) -> None:
    verb = verbs.add_parser("pairs", help="noise and what a recipe's teacher makes of it; also spread by torchrun")
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe (see ls)")
    _out(verb)
    verb.add_argument("--samples", type=int, required=True, metavar="N")
    verb.add_argument("--solver", default="midpoint", help="euler, heun, midpoint, rk4, or own (default midpoint)")
    verb.add_argument("--steps", type=int, default=100, help="of the solver (default 100)")
    verb.add_argument("--points", type=int, default=0, help="points between that are kept (default 0)")
    verb.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    verb.add_argument("--batch", type=int, default=256, metavar="N", help="made at once (default 256)")
    verb.set_defaults(command=_pairs)


def _pairs(parsed: argparse.Namespace) -> int:
    from distill import job
    from distill.data.pairs import PairsPlan

    try:
        plan = PairsPlan(samples=parsed.samples, solver=parsed.solver, steps=parsed.steps, points=parsed.points,
                         seed=parsed.seed, batch=parsed.batch)  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from None
    return _built(parsed.folder, job.pairs(parsed.recipe, parsed.folder, plan, parsed.shard_size))


def _add_latents(verbs: Any) -> None:
    verb = verbs.add_parser("latents", help="the images' latents, by a diffusers autoencoder; also spread by torchrun")
    _in(verb)
    verb.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    verb.add_argument("--autoencoder", type=Path, required=True, metavar="FOLDER", help="a local folder of diffusers")
    verb.add_argument("--sample", action="store_true", help="keep one sample instead of mean and standard deviation")
    verb.add_argument("--flips", action="store_true", help="keep the mirrored images' latents too")
    verb.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    verb.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    verb.add_argument("--batch", type=int, default=32, metavar="N", help="encoded at once (default 32)")
    verb.set_defaults(command=_latents)


def _latents(parsed: argparse.Namespace) -> int:
    from distill.data.encode import build_latents

    options = {name: getattr(parsed, name) for name in ("sample", "flips", "seed", "dtype", "batch")}
    return _built(parsed.out, build_latents(_opened(parsed), parsed.out, parsed.autoencoder, **options))


def _add_embeddings(verbs: Any) -> None:
    verb = verbs.add_parser("embeddings", help="the captions' embeddings, by a text encoder; also spread by torchrun")
    _in(verb)
    verb.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    verb.add_argument("--encoder", type=Path, required=True, metavar="FOLDER",
                      help="a local folder of transformers, with its tokenizer")  # fmt: skip
    verb.add_argument("--length", type=int, default=77, help="tokens of a caption (default 77)")
    verb.add_argument("--batch", type=int, default=32, metavar="N", help="encoded at once (default 32)")
    verb.set_defaults(command=_embeddings)


def _embeddings(parsed: argparse.Namespace) -> int:
    from distill.data.encode import build_embeddings

    source, options = _opened(parsed), {"length": parsed.length, "batch": parsed.batch}
    return _built(parsed.out, build_embeddings(source, parsed.out, parsed.encoder, **options))


def _built(folder: Path, manifest: Manifest) -> int:
    from distill.parallel import is_main

    if not is_main():
        return 0
    classes = next((f"{field.classes} classes" for field in manifest.fields.values() if field.classes), "no classes")
    print(f"{folder}: {manifest.samples:,} samples in {len(manifest.shards)} shards, {classes}")
    if passed_over := manifest.source.get("passed over"):
        files = ", ".join(f"{count} {ending}" for ending, count in passed_over.items())
        print(f"  files that are no images were passed over: {files}", file=sys.stderr)
    return 0


def _opened(parsed: argparse.Namespace) -> Folder:
    from distill.data.fetch import Remote
    from distill.data.store import open_folder

    return open_folder(parsed.folder, Remote(pipe=parsed.pipe))


def _add_info(verbs: Any) -> None:
    verb = verbs.add_parser("info", help="what a folder of shards holds, and how well it is mixed in training")
    _in(verb)
    verb.add_argument("--batch", type=int, default=256, metavar="N", help="that the mixing is measured for")
    verb.set_defaults(command=_info)


def _info(parsed: argparse.Namespace) -> int:
    from distill.data.order import default_streams, neighbours_met, shards_together

    if parsed.batch < 1:
        raise InputError(f"--batch must be at least 1, got {parsed.batch}")
    manifest = _opened(parsed).manifest()
    size = sum(shard.bytes for shard in manifest.shards)
    counts = [shard.samples for shard in manifest.shards]
    streams = default_streams(len(counts))
    print(
        f"{manifest.name}, split {manifest.split}: {manifest.samples:,} samples in {len(counts)} shards, {size:,} bytes"
    )
    print(f"  digest {manifest.digest}; {streams} streams by default")
    for name, field in manifest.fields.items():
        classes = f", {field.classes} classes" if field.classes else ""
        print(f"  {name}: member .{field.member}, {field.dtype} {list(field.shape)}{classes}")
    if manifest.autoencoder is not None:
        print("  autoencoder: " + ", ".join(f"{key} {value}" for key, value in manifest.autoencoder.items()))
    together = shards_together(counts, streams, 1000)
    met, ideal = neighbours_met(counts, streams, together, parsed.batch)
    print(f"  mixing: {met:.2%} of neighbours in a shard meet in a batch of {parsed.batch} ({ideal:.2%} if all samples "
          f"were shuffled), {streams} streams of {together} shard{'s' * (together > 1)}")  # fmt: skip
    for key, value in manifest.source.items():
        if key != "plan":
            print(f"  {key}: {value}")
    return 0


def _add_verify(verbs: Any) -> None:
    verb = verbs.add_parser("verify", help="read every shard and say all that is wrong")
    _in(verb)
    verb.set_defaults(command=_verify)


def _verify(parsed: argparse.Namespace) -> int:
    from distill.data.manifest import DataError
    from distill.data.samples import verify

    folder = _opened(parsed)
    try:
        manifest = folder.manifest()
        problems = verify(folder, manifest)
    except DataError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return BAD_INPUT
    print(f"{folder}: {len(manifest.shards)} shards, {manifest.samples:,} samples, all as the manifest says")
    return 0
