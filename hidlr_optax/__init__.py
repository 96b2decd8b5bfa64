"""Hessian-informed differential learning rates for Optax (Hi-DLR, arXiv 2501.06954)."""

from hidlr_optax import averaging, curvature, influence, paper, peft, solvers
from hidlr_optax._explain import explain
from hidlr_optax._quadratic import Kept, Quadratic
from hidlr_optax._rule.aliases import hiulr, multi_steps, paper_hidlr
from hidlr_optax._rule.hold import hold
from hidlr_optax._rule.transform import hidlr
from hidlr_optax._state import HiDLRState, is_due
from hidlr_optax._suggest import Suggestion, suggest
from hidlr_optax._take_step import take_step
from hidlr_optax.curvature import gauss_newton, hessian, parabola, probes, secant
from hidlr_optax.influence import metrics
from hidlr_optax.influence._report import Influence
from hidlr_optax.labels import label_by_depth, label_by_path, label_by_role
from hidlr_optax.peft._plan import Plan
from hidlr_optax.solvers import coupled, diagonal

__version__ = "0.1.0"

__all__ = [
    "HiDLRState",
    "Influence",
    "Kept",
    "Plan",
    "Quadratic",
    "Suggestion",
    "averaging",
    "coupled",
    "curvature",
    "diagonal",
    "explain",
    "gauss_newton",
    "hessian",
    "hidlr",
    "hiulr",
    "hold",
    "influence",
    "is_due",
    "label_by_depth",
    "label_by_path",
    "label_by_role",
    "metrics",
    "multi_steps",
    "paper",
    "paper_hidlr",
    "parabola",
    "peft",
    "probes",
    "secant",
    "solvers",
    "suggest",
    "take_step",
]
