"""OBJECTIVES: what a recipe may name as ``objective.name``. One objective a file, its formula and paper on top."""

from distill.objectives.base import Objective
from distill.objectives.eulerian import Eulerian
from distill.objectives.flow_matching import FlowMatching
from distill.objectives.lagrangian import Lagrangian

OBJECTIVES: dict[str, type[Objective]] = {
    "flow_matching": FlowMatching,
    "lagrangian": Lagrangian,
    "eulerian": Eulerian,
}
