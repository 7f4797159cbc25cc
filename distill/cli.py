"""The command line. `--help` and `ls` import no torch, so that they answer at once.

Exit codes: 0 done, 2 bad input (nothing was started), 130, 138 and 143 stopped by a signal (SIGINT, SIGUSR1, SIGTERM)
after a checkpoint, 78 stopped because training diverged, 1 otherwise.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import __version__, cli_shards, cli_teachers
from distill.launch import BAD_INPUT, DIVERGED, FailedElsewhere, Lost, spread_here, take_place
from distill.slurm import slurm_script
from distill.training.stops import Diverged, Stopped
from teachers.errors import InputError

_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS, errno.EPERM)
_OF_THE_INPUT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. What a user can mend is told in words, the rest is a traceback."""
    try:
        parsed = _parse(arguments)
        take_place()
        code: int = parsed.command(parsed)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _say(error, 1 if error.started else BAD_INPUT)
    except Diverged as error:
        return _say(error, DIVERGED)
    except Stopped as error:  # which the processes of a launch agree on
        return _say(error, error.exit_code) if os.environ.get("RANK", "0") == "0" else error.exit_code
    except FailedElsewhere as error:
        return error.code
    except Lost as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("distill", "teachers"):
            raise
        error.add_note(
            "(this command needs more than loading an export does: install with the extra [train], see the README)"
        )
        return _say(error, 1)
    except BrokenPipeError as error:  # nobody reads on, as of `distill ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tells of it again at its end
        return _say(error, 1)
    except OSError as error:
        if error.errno in _OF_THE_MACHINE:
            return _say(error, 1)
        if error.errno in _OF_THE_INPUT and error.filename is not None:
            return _say(error, BAD_INPUT)
        raise


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest:  # argparse does not take overrides that follow an option
        if not hasattr(parsed, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parsed.overrides += rest
    return parsed


def _say(error: BaseException, code: int) -> int:
    lines = str(error).splitlines() + list(getattr(error, "__notes__", []))
    print("\n".join(lines) if len(lines) > 2 else f"distill: {'; '.join(lines)}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill", description="Distil a multi-step flow-matching teacher into a one-step student."
    )
    parser.add_argument("--version", action="version", version=f"distill {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for add in (_add_ls, _add_validate, _add_run, _add_slurm, _add_resume, _add_sample, _add_evaluate, _add_export,
                _add_report, cli_teachers.add, cli_shards.add):  # fmt: skip
        add(verbs)
    return parser


def _gpus(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--gpus", type=int, metavar="N", help="processes on this host, one a GPU (see docs/many.md)")


def _recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe (see ls)")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. trainer.steps=200")


def _add_ls(verbs: Any) -> None:
    verb = verbs.add_parser("ls", help="the shipped recipes, or the families of teachers")
    verb.add_argument("--teachers", action="store_true", help="families of teachers, their files and licences")
    verb.set_defaults(command=_ls)


def _ls(parsed: argparse.Namespace) -> int:
    if parsed.teachers:
        from teachers.families import FAMILIES, shipped

        for name, family in FAMILIES.items():
            print(f"{name:16} {family.file}\n{'':16} licence: {family.licence}")
        for name, config in shipped().items():
            print(f"\nshipped: {{name: native, path: {name}}}, licence of the weights: {config['licence']}")
        return 0
    from distill import recipe_files

    names = recipe_files.names()
    width = max(len(name) for name in names)
    for name in names:
        values = recipe_files.read(name).values
        about = values.get("about", {})
        print(f"{name:{width}} {about.get('summary', '')}")
        parts = [f"{key} {(values.get(key) or {}).get('name', '-')}" for key in ("objective", "teacher", "data")]
        parts += [f"{key}: {about[key]}" for key in ("cost", "result") if key in about]
        print(f"{'':{width}} {'; '.join(parts)}")
    print("\ndistill run NAME starts one; distill validate NAME checks it")
    return 0


def _add_validate(verbs: Any) -> None:
    verb = verbs.add_parser("validate", help="check a recipe and say everything that is wrong with it")
    _recipe(verb)
    verb.set_defaults(command=_validate)


def _validate(parsed: argparse.Namespace) -> int:
    from distill import recipe
    from distill.cautions import cautions

    loaded = recipe.load(parsed.recipe, parsed.overrides)
    for caution in cautions(loaded):
        print(f"caution: {caution}", file=sys.stderr)
    command = shlex.join(["distill", "run", parsed.recipe, *parsed.overrides])
    print(f"{parsed.recipe}: valid; {command} trains {loaded.trainer.steps:,} steps of {loaded.trainer.batch}")
    return 0


def _add_run(verbs: Any) -> None:
    verb = verbs.add_parser("run", help="the whole job: train, evaluate, export, report")
    _recipe(verb)
    _gpus(verb)
    verb.add_argument("--dry-run", action="store_true", help="print what it would take; nothing is written")
    verb.add_argument("--one-step", action="store_true", help="make a few steps here, and print what they took")
    verb.add_argument("--nodes", type=int, metavar="N", help="hosts that --dry-run and --one-step plan for (default 1)")
    verb.add_argument("--step-seconds", type=float, metavar="S", help="seconds of a step that --dry-run counts with")
    verb.set_defaults(command=_run)


def _run(parsed: argparse.Namespace) -> int:
    planned = {"nodes": parsed.nodes, "step_seconds": parsed.step_seconds}
    if parsed.dry_run or parsed.one_step:
        from distill import job

        job.plan(parsed.recipe, parsed.overrides, gpus=parsed.gpus, measure=parsed.one_step, **planned)
        return 0
    for name, value in planned.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with --dry-run; for several hosts see docs/many.md")
    if parsed.gpus is not None:
        return spread_here(parsed.gpus, ["run", parsed.recipe, *parsed.overrides])
    from distill import job

    job.run(parsed.recipe, parsed.overrides)
    return 0


def _add_slurm(verbs: Any) -> None:
    verb = verbs.add_parser("slurm", help="write a batch script that runs a recipe on several hosts under SLURM")
    _recipe(verb)
    verb.add_argument("--nodes", type=int, default=1, help="hosts (default 1)")
    verb.add_argument("--gpus", type=int, default=8, metavar="N", help="on each host (default 8)")
    verb.add_argument("--time", required=True, help="30m, 4h, 2d, or SLURM's own form")
    verb.add_argument("--partition")
    verb.add_argument("--account")
    verb.add_argument("--out", type=Path, metavar="FILE", help="a new file (default: to the terminal)")
    verb.set_defaults(command=_slurm)


def _slurm(parsed: argparse.Namespace) -> int:
    from distill import recipe

    recipe.load(parsed.recipe, parsed.overrides)
    options = {name: getattr(parsed, name) for name in ("nodes", "gpus", "time", "partition", "account")}
    script = slurm_script(parsed.recipe, parsed.overrides, **options)
    if parsed.out is None:
        print(script, end="")
        return 0
    if parsed.out.exists():
        raise InputError(f"{parsed.out}: exists; give another file with --out, or move it away")
    parsed.out.write_text(script, encoding="utf-8")
    print(f"{parsed.out}: start it with sbatch {shlex.quote(str(parsed.out))}")
    return 0


def _add_resume(verbs: Any) -> None:
    verb = verbs.add_parser("resume", help="continue a run exactly where it stopped")
    verb.add_argument("run", metavar="RUN", help="a run folder, e.g. runs/quickstart")
    _gpus(verb)
    verb.set_defaults(command=_resume)


def _resume(parsed: argparse.Namespace) -> int:
    if parsed.gpus is not None:
        return spread_here(parsed.gpus, ["resume", parsed.run])
    from distill import job

    job.resume(parsed.run)
    return 0


def _add_sample(verbs: Any) -> None:
    verb = verbs.add_parser("sample", help="draw samples from an exported student")
    verb.add_argument("source", metavar="RUN|EXPORT", help="a run folder or an export")
    verb.add_argument("-n", type=int, default=64, help="number of samples (default 64)")
    verb.add_argument(
        "--steps", type=int, help="network calls a sample (default: the first that the export recommends)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    verb.add_argument("--gamma", type=float, default=0.0,
                      help="noise between the steps of a flow map, from 0 (none, the default) to 1")  # fmt: skip
    verb.add_argument("--guidance", type=float, help="of a student trained on a range of scales")
    verb.add_argument("--cond", type=Path, metavar="FILE", help="of a student conditioned on embeddings: .safetensors")
    verb.add_argument("--class", dest="label", type=int, help="the class of all samples (default: all in turn)")
    verb.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE",
                      help="a picture (.png) or an array (.npy); default samples.png")  # fmt: skip
    verb.set_defaults(command=_sample)


def _sample(parsed: argparse.Namespace) -> int:
    from distill import job

    out: Path = parsed.out
    if out.suffix not in (".png", ".npy"):
        raise InputError(f"{out}: must end in .png (a picture) or .npy (an array)")
    if out.exists():
        raise InputError(f"{out}: exists; give another file with --out, or move it away")
    job.sample(
        parsed.source,
        out,
        n=parsed.n,
        steps=parsed.steps,
        seed=parsed.seed,
        label=parsed.label,
        embeddings=parsed.cond,
        gamma=parsed.gamma,
        guidance=parsed.guidance,
    )
    print(f"{parsed.n} samples: {out}")
    return 0


def _add_evaluate(verbs: Any) -> None:
    verb = verbs.add_parser("evaluate", help="measure teacher and student on the same noise")
    verb.add_argument("source", metavar="RUN|EXPORT", help="a run folder or an export")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. evaluation.samples=10000; needs --out")
    verb.add_argument("--out", type=Path, metavar="FILE",
                      help="a new JSON file (default RUN/evaluation.json, for an export evaluation.json)")  # fmt: skip
    verb.set_defaults(command=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> int:
    from distill import job

    print(job.evaluate(parsed.source, parsed.overrides, parsed.out))
    return 0


def _add_export(verbs: Any) -> None:
    verb = verbs.add_parser("export", help="write the student in a form that others can load")
    verb.add_argument("run", metavar="RUN", help="a run folder")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default RUN/export)")
    verb.set_defaults(command=_export)


def _export(parsed: argparse.Namespace) -> int:
    from distill import job

    print(job.export(parsed.run, parsed.out))
    return 0


def _add_report(verbs: Any) -> None:
    verb = verbs.add_parser("report", help="one HTML file about a run, or about several side by side")
    verb.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    verb.add_argument(
        "--out", type=Path, metavar="FILE", help="a new file (default RUN/report.html; needed for several)"
    )
    verb.set_defaults(command=_report)


def _report(parsed: argparse.Namespace) -> int:
    from distill import job

    print(job.report(parsed.runs, parsed.out))
    return 0
