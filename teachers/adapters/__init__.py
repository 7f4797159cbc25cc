"""TEACHERS: what a recipe may name as ``teacher.name``, each a frozen dataclass with ``load() -> Teacher``.

Those read from large files have ``outline()`` too: the teacher without its weights, after all else was checked.
"""

from __future__ import annotations

from teachers.adapters.diffusers import Diffusers
from teachers.adapters.edm import EDM, EDM2
from teachers.adapters.flow_matching import FlowMatching
from teachers.adapters.imeanflow import IMeanFlow
from teachers.adapters.jit import JiT
from teachers.adapters.lightning_dit import LightningDiT
from teachers.adapters.meanflow import MeanFlow
from teachers.adapters.native import Native
from teachers.adapters.py_meanflow import PyMeanFlow
from teachers.adapters.shortcut_models import ShortcutModels
from teachers.adapters.sit import REPA, DiT, SiT
from teachers.adapters.tarflow import TarFlow
from teachers.adapters.torchcfm import TorchCFM
from teachers.analytic import Gaussian, Mixture
from teachers.gaussian_mixture import GaussianMixture

TeacherConfig = (
    Native
    | Gaussian
    | Mixture
    | GaussianMixture
    | SiT
    | REPA
    | DiT
    | LightningDiT
    | JiT
    | TorchCFM
    | FlowMatching
    | EDM
    | EDM2
    | Diffusers
    | MeanFlow
    | IMeanFlow
    | PyMeanFlow
    | ShortcutModels
    | TarFlow
)
TEACHERS: dict[str, type[TeacherConfig]] = {
    "native": Native,
    "gaussian": Gaussian,
    "mixture": Mixture,
    "gaussian_mixture": GaussianMixture,
    "sit": SiT,
    "repa": REPA,
    "dit": DiT,
    "lightningdit": LightningDiT,
    "jit": JiT,
    "torchcfm": TorchCFM,
    "flow_matching": FlowMatching,
    "edm": EDM,
    "edm2": EDM2,
    "diffusers": Diffusers,
    "meanflow": MeanFlow,
    "imeanflow": IMeanFlow,
    "py_meanflow": PyMeanFlow,
    "shortcut_models": ShortcutModels,
    "tarflow": TarFlow,
}
