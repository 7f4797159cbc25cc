"""The commands of `distill teachers`. Like those of `distill.cli` they import what they need when they are called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from distill.launch import BAD_INPUT
from teachers.errors import InputError


def add(verbs: Any) -> None:
    """The commands and their arguments, to argparse's commands."""
    teachers = verbs.add_parser("teachers", help="describe, check and convert pretrained teachers")
    inner = teachers.add_subparsers(title="commands", required=True, metavar="COMMAND")
    verb = inner.add_parser("info", help="all that is known of a teacher")
    verb.add_argument("recipe", metavar="RECIPE|FAMILY", help="a recipe, or a family (see ls --teachers)")
    verb.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of a family its own keys: path=SiT-XL-2-256.pt"
    )
    verb.set_defaults(command=_info)
    verb = inner.add_parser("check", help="whether a recipe's teacher is the velocity of its data, with the numbers")
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe (see ls)")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. teacher.path=digits")
    verb.set_defaults(command=_check)
    verb = inner.add_parser("convert", help="a pickle into safetensors, or a finished student into an export")
    verb.add_argument("source", metavar="FILE|FAMILY", help=".pkl, .pt, .pth (nothing in it is run), or meanflow, ...")
    verb.add_argument("out", metavar="OUT", type=Path, help="a new .safetensors file, of a finished student a folder")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a family's own keys: path=0400000.pt")
    verb.set_defaults(command=_convert)


def _info(parsed: argparse.Namespace) -> int:
    from distill.recipe import load_teacher
    from distill.teacher_check import describe

    print(describe(load_teacher(parsed.recipe, parsed.overrides).load()))
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from distill import job

    verdict = job.check_teacher(parsed.recipe, parsed.overrides)
    print(verdict)
    return BAD_INPUT if verdict.wrong else 0


def _convert(parsed: argparse.Namespace) -> int:
    from distill import finished

    if parsed.source not in finished.FINISHED:
        from teachers.convert import convert

        if parsed.overrides:
            raise InputError(f"{parsed.source}: takes no keys; families that do: {', '.join(finished.FINISHED)}")
        print(convert(Path(parsed.source), parsed.out))
        return 0
    from distill.recipe import load_teacher

    finished.export(cast(Any, load_teacher(parsed.source, parsed.overrides)), parsed.out)
    print(f"{parsed.out}: a student, for distill.load and distill sample")
    return 0
