"""What a run says of itself: `metrics` and `History` for a log, `explain` for a person."""

from hidlr_optax.report._explain import explain
from hidlr_optax.report._find import find_state
from hidlr_optax.report._history import History
from hidlr_optax.report._metrics import metrics

__all__ = ["History", "explain", "find_state", "metrics"]
