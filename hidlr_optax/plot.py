"""The figures, by the name under which users import them. Needs matplotlib, in the extra `plot`."""

from hidlr_optax.report.plot import fit, influence, learning_rates, losses, pareto

__all__ = ["fit", "influence", "learning_rates", "losses", "pareto"]
