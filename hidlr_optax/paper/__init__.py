"""The family of rules that go to the minimum of the next loss: Algorithm 1 of the paper and kin.

A guest in the house: it stands on the rooms below, and nothing else in the package needs it.
`one_step` puts an estimator of slope and curvature, averages, a solver and a guard together.
`paper_hidlr` and `paper_hiulr` are the paper's own choices of them, `suggest` is one shot of them
outside training.
"""

from hidlr_optax._step_loss import StepLoss
from hidlr_optax.paper._algorithms import paper_hidlr, paper_hiulr
from hidlr_optax.paper._derivatives import (
    GaussNewton,
    Hessian,
    Secant,
    gauss_newton,
    hessian,
    secant,
)
from hidlr_optax.paper._measurement import Estimator, Measurement
from hidlr_optax.paper._one_step import one_step
from hidlr_optax.paper._probes import Probes, probes
from hidlr_optax.paper._solvers import Coupled, Diagonal, Solver, coupled, diagonal
from hidlr_optax.paper._state import OneStepState
from hidlr_optax.paper._suggest import Suggestion, suggest

__all__ = [
    "Coupled",
    "Diagonal",
    "Estimator",
    "GaussNewton",
    "Hessian",
    "Measurement",
    "OneStepState",
    "Probes",
    "Secant",
    "Solver",
    "StepLoss",
    "Suggestion",
    "coupled",
    "diagonal",
    "gauss_newton",
    "hessian",
    "one_step",
    "paper_hidlr",
    "paper_hiulr",
    "probes",
    "secant",
    "suggest",
]
