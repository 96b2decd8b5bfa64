"""The bare rule: one parabola per group and nothing around it, which is easy to predict."""

import hidlr_optax as hd

_BARE = {
    "slope": None,
    "solver": hd.paper.diagonal(),
    "curvature": hd.paper.probes(per_group=4),
    "warmup": 0,
}


def bare(loss_fn, param_labels, **kwargs):
    """`one_step` with one parabola per group, unaveraged only if asked, and without a guard."""
    return hd.paper.one_step(loss_fn, param_labels, **_BARE | kwargs)


def rates_of(state):
    """The rates as floats, by label."""
    return {name: float(rate) for name, rate in state.group_learning_rates.items()}
