"""Hessian-informed differential learning rates for Optax (Hi-DLR, arXiv 2501.06954)."""

from hidlr_optax import averaging, influence, paper, peft, report
from hidlr_optax._devices import pmean_loss
from hidlr_optax._diagnostics import Kept, Slip
from hidlr_optax._hessian_informed import hessian_informed
from hidlr_optax._hidlr import hidlr, hiulr, multi_steps
from hidlr_optax._quadratic import Quadratic
from hidlr_optax._ratios import layer_decay, scale_by_label
from hidlr_optax._remember import remember_batch
from hidlr_optax._state import HiDLRState, is_due
from hidlr_optax._take_step import take_step
from hidlr_optax.influence._report import Influence
from hidlr_optax.labels import label_by_depth, label_by_path, label_by_role
from hidlr_optax.paper import paper_hidlr
from hidlr_optax.peft._plan import Plan
from hidlr_optax.report import History, explain, metrics

__version__ = "0.1.0"

__all__ = [
    "HiDLRState",
    "History",
    "Influence",
    "Kept",
    "Plan",
    "Quadratic",
    "Slip",
    "averaging",
    "explain",
    "hessian_informed",
    "hidlr",
    "hiulr",
    "influence",
    "is_due",
    "label_by_depth",
    "label_by_path",
    "label_by_role",
    "layer_decay",
    "metrics",
    "multi_steps",
    "paper",
    "paper_hidlr",
    "peft",
    "pmean_loss",
    "remember_batch",
    "report",
    "scale_by_label",
    "take_step",
]
