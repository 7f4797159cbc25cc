"""OBJECTIVES: what a recipe may name as ``objective.name``. One family a file, its formula and paper on top."""

from distill.objectives.alpha_flow import AlphaFlow
from distill.objectives.base import Objective
from distill.objectives.consistency import Consistency, ConsistencyTrajectory, ContinuousConsistency
from distill.objectives.data_free import DataFree
from distill.objectives.endpoint import Endpoint, Reflow
from distill.objectives.eulerian import Eulerian
from distill.objectives.flow_matching import FlowMatching
from distill.objectives.lagrangian import Lagrangian
from distill.objectives.mean_flow import MeanFlow
from distill.objectives.progressive import Progressive
from distill.objectives.semigroup import Semigroup
from distill.objectives.shortcut import Shortcut

OBJECTIVES: dict[str, type[Objective]] = {
    "flow_matching": FlowMatching,
    "lagrangian": Lagrangian,
    "eulerian": Eulerian,
    "mean_flow": MeanFlow,
    "alpha_flow": AlphaFlow,
    "semigroup": Semigroup,
    "shortcut": Shortcut,
    "consistency": Consistency,
    "continuous_consistency": ContinuousConsistency,
    "consistency_trajectory": ConsistencyTrajectory,
    "data_free": DataFree,
    "endpoint": Endpoint,
    "reflow": Reflow,
    "progressive": Progressive,
}


def name_of(objective: Objective) -> str:
    """Its name in a recipe; of one in no table that of its class."""
    return next((name for name, cls in OBJECTIVES.items() if cls is type(objective)), type(objective).__name__)
