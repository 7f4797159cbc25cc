"""Range checks of configuration dataclasses, in one form that Python callers and the recipe checker both understand."""

from __future__ import annotations

from collections.abc import Mapping

from teachers.errors import InputError


class FieldError(InputError):
    """Some fields of a configuration dataclass are out of range.

    ``problems`` maps a field's name to what is allowed there, so that a recipe's checker can point at each line.
    """

    def __init__(self, owner: str, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        super().__init__("; ".join(f"{owner}.{name} {text}" for name, text in self.problems.items()))


def require(owner: object, **conditions: tuple[bool, str]) -> None:
    """Raise one :class:`FieldError` that names every field of ``owner`` whose condition is false.

    ``conditions`` maps a field name to (holds, what must hold), e.g. ``lr=(self.lr > 0, "must be above 0")``.
    """
    problems = {
        name: f"{text}, got {getattr(owner, name)!r}" for name, (holds, text) in conditions.items() if not holds
    }
    if problems:
        raise FieldError(type(owner).__name__, problems)
