"""TEACHERS: what a recipe may name as ``teacher.name``, each a frozen dataclass with ``load() -> Teacher``."""

from __future__ import annotations

from teachers.adapters.native import Native
from teachers.analytic import Gaussian, Mixture
from teachers.gaussian_mixture import GaussianMixture

TeacherConfig = Native | Gaussian | Mixture | GaussianMixture
TEACHERS: dict[str, type[TeacherConfig]] = {
    "native": Native,
    "gaussian": Gaussian,
    "mixture": Mixture,
    "gaussian_mixture": GaussianMixture,
}
