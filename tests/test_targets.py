"""Steps and work to a target, and what a rule's looks at the loss are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import promoting

import hidlr_optax as hd
from benchmarks.kit import costs
from benchmarks.rule import targets
from benchmarks.rule.methods import RULES


def _row(method, curve, **fields):
    row = {"method": method, "workload": "w", "curve": curve, "seed": 0}
    return row | fields


def _tuned(schedule, rate, curve):
    return _row("grid", curve, optimizer="AdamW", schedule=schedule, rate=rate)


ROWS = [
    _tuned("cosine", 0.1, [4.0, 3.0, 2.0, 1.0]),
    _tuned("cosine", 1.0, [4.0, 3.0, 2.0, np.inf]),
    _tuned("constant", 0.1, [4.0, 2.0, 2.5, 2.0]),  # the worst of the schedules: the target is 2
    _row("rule", [9.0, 2.0, 1.0, 1.0], **{"forwards a step": 4.5}),
    _row("rule", [9.0, 9.0, 9.0, 1.0], **{"forwards a step": 4.5}),
    _row("rule", [2.0, 9.0, 9.0, 9.0], **{"forwards a step": 4.5}),
    _row("misses", [9.0, 9.0, 9.0, 2.1]),
    _row("not asked for", [0.0, 0.0, 0.0, 0.0]),
    _row("rule", [0.0, 0.0, 0.0, 0.0], optimizer="SGD"),
]


def test_a_target_is_the_worst_of_the_tuned_schedules_and_a_miss_is_infinite():
    found, wanted = targets.runs(ROWS, ["rule", "misses"])
    assert wanted == {"w": 2.0}
    parts = targets.parts(found, wanted)
    assert {method: float(x[0]) for method, x in parts.items()} == {
        "AdamW, cosine, tuned": 0.75,
        "AdamW, constant, tuned": 0.5,
        "rule": 0.5,  # the median of 0.5, 1 and 0.25
        "misses": np.inf,
    }
    by_work = targets.parts(found, wanted, targets.forward_passes)
    assert by_work["rule"] == 0.5 * 4.5
    assert by_work["AdamW, cosine, tuned"] == 0.75 * 3


def test_a_score_is_the_mean_share_up_to_four_times_the_fastest():
    parts = {"a": np.array([0.2, np.inf, np.inf]), "b": np.array([0.5, 0.1, np.inf])}
    shares = targets.profile(parts)
    # By hand: a is the fastest of the first; b needs 2.5 times as long there, and has the second.
    naive = [(1 + (factor >= 2.5)) / 3 for factor in np.linspace(1, 4, 301)]
    assert shares["a"].mean() == pytest.approx(1 / 3)
    assert shares["b"].mean() == pytest.approx(np.mean(naive))
    lines = targets.table(*targets.runs(ROWS, ["rule", "misses"])).splitlines()
    assert lines[0] == "| method | score | by forward passes | met | w |"
    # 1.5 times the work from τ = 1 on is 1.5 times the fastest.
    late = np.mean(np.linspace(1, 4, 301) >= 1.5)
    assert f"| rule | 1.00 | {late:.2f} | 1 of 1 | 50 |" in lines
    assert "| misses | 0.00 | 0.00 | 0 of 1 | – |" in lines


def test_looks_are_counted_as_a_loop_would():
    # 21 steps that find the rates, two looks at the first, then one in ten: at 30, 40, …, 90.
    assert costs.looks(1, 10, 100) == costs.Looks(22 + 7, 0)
    assert costs.looks(5, 10, 100) == costs.Looks(0, 22 + 7)
    assert costs.looks(5, 10, 100).forward_passes == 3 * 29
    # Twice as rare from 500 on, at 500, 520, …, 980, and again from 1,000 on.
    assert costs.looks(1, 10, 1000).forwards == 22 + 47 + 25
    assert costs.looks(1, 10, 2000).forwards == 22 + 47 + 25 + 25
    assert RULES["Algorithm 1"].looks(5, 10, 100) == costs.Looks(4 * 5 * 10)
    assert RULES["first version"].looks(5, 10, 100) == costs.Looks(2 * 5 * 28)


@pytest.mark.parametrize(("interval", "steps"), [(1, 50), (4, 900), (10, 5000)])
def test_refreshes_are_those_that_the_package_says(interval, steps):
    due = sum(step <= 20 or hd.is_due(step, interval, warmup=0) for step in range(steps))
    assert costs.looks(1, interval, steps) == costs.Looks(due + 1)
    assert costs.looks(2, interval, steps) == costs.Looks(0, due + 1)


@pytest.mark.parametrize("groups", [1, 3])
def test_looks_are_those_that_the_rule_takes(groups):
    steps, seen = 60, []

    def loss_fn(params, batch):
        jax.debug.callback(lambda: seen.append(1))
        return sum(jnp.sum((k + 1) * (w - batch) ** 2) for k, w in enumerate(params)) + 1.0

    params = [jnp.full(3, float(k)) for k in range(3)]
    labels = [f"{k % groups}" for k in range(3)]
    tx = promoting("standard", optax.chain(optax.adamw(1.0), hd.hidlr(loss_fn, labels)))

    @jax.jit
    def step(params, state, batch):
        value, grad = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for n in range(steps):
        params, state = step(params, state, 0.1 * jax.random.normal(jax.random.key(n), (3,)))
    jax.effects_barrier()
    looked = costs.looks(groups, 10, steps)
    more = len(seen) - steps - looked.forwards - looked.gradients
    assert 0 <= more <= 2  # looks that a jump of the loss calls for
