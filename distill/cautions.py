"""What is allowed in a recipe and known to go wrong: said before a job begins, and tamed where the recipe is silent."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from distill.objectives import name_of
from distill.objectives.alpha_flow import AlphaFlow
from distill.objectives.base import Objective
from distill.objectives.consistency import ContinuousConsistency
from distill.objectives.eulerian import Eulerian
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.pieces import Tangent
from distill.objectives.shortcut import Shortcut
from teachers.fields import FieldError
from teachers.velocity import Teacher

if TYPE_CHECKING:
    from distill.recipe import Recipe

_HIGH = 100.0  # radians a unit time: sinusoids of 1000 t, as many teachers have them
_FINE = 32  # steps whose size lies near enough to none


def tamed(recipe: Recipe, given: Teacher | None) -> Recipe:
    """The recipe, its tangent normalised and warmed up where it differentiates a network of high frequencies along the
    trajectory, since such a student diverges otherwise. For recipes that say nothing of the tangent."""
    if not _differentiates_fast(recipe, given) or not hasattr(recipe.objective, "tangent"):
        return recipe
    safe = Tangent(normalise=True, warmup=1000)
    try:
        return replace(recipe, objective=cast(Objective, replace(cast(Any, recipe.objective), tangent=safe)))
    except FieldError:  # a gradient through the tangent has nothing to tame
        return recipe


def cautions(recipe: Recipe, given: Teacher | None = None) -> list[str]:
    """What is allowed, and known to go wrong. given: the teacher, where it is loaded already."""
    objective, steps = recipe.objective, recipe.trainer.steps
    short = (
        f"trainer.steps: the last stage of {name_of(objective)} begins at step {objective.last_stage}, so after "
        f"{steps} steps this student is not yet trained on its longest jumps"
    )
    late = (
        f"trainer.warmup: of {recipe.trainer.warmup} steps, but the run has {steps}: the learning rate never reaches "
        "trainer.lr"
    )
    return [
        *_of_tangent(recipe, given),
        *[short] * (steps <= objective.last_stage > 0),
        *[late] * (steps <= recipe.trainer.warmup),
        *_of_steps(objective),
    ]


def _of_steps(objective: Objective) -> list[str]:
    """Of a student of step sizes whose smallest, which no row trains, is far from those that are."""
    if not isinstance(objective, Shortcut) or objective.anchor == "smallest" or objective.finest >= _FINE:
        return []
    return [
        f"objective.times.finest: no row trains the step 1/{objective.finest}, on which all others rest: it is what "
        f"the network puts between none and 2/{objective.finest}; set finest to {_FINE} or more, or anchor to smallest"
    ]


def _of_tangent(recipe: Recipe, given: Teacher | None) -> list[str]:
    highest = _differentiates_fast(recipe, given)
    tangent = getattr(recipe.objective, "tangent", None)
    if not highest:
        return []
    if tangent is not None and tangent.normalise:
        return [f"the network's time embedding turns up to {highest:g} radians a unit time, so the tangent of this "
                f"objective is normalised and warmed up over {tangent.warmup} steps"]  # fmt: skip
    tame = "" if tangent is None else "objective.tangent: {normalise: true, warmup: 1000}, or "
    return [
        f"the network's time embedding turns up to {highest:g} radians a unit time, and this objective differentiates "
        f"along the trajectory, where such a student diverges: use {tame}the objective lagrangian or semigroup, or a "
        "network of lower frequencies"
    ]


def _differentiates_fast(recipe: Recipe, given: Teacher | None) -> float:
    """The highest frequency of the network, where it is high and the objective differentiates along the trajectory;
    else 0."""
    objective, student = recipe.objective, recipe.student
    if not isinstance(objective, (Eulerian, MeanFlow, AlphaFlow, ContinuousConsistency)):
        return 0.0
    network: Any = student.network
    if network is None:
        teacher = given or (unread(recipe.teacher) if recipe.teacher else None)
        network = student.network_config(teacher) if teacher and teacher.network_config else None
    highest = getattr(network, "highest", 0.0)
    return highest if highest > _HIGH else 0.0


def unread(config: Any) -> Teacher:
    """A recipe's teacher, without its weights where it can be had so."""
    found: Teacher = getattr(config, "outline", config.load)()
    return found
