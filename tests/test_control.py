"""What a user may fix while the rest is found: ratios of parts, ceilings, held rates, LLRD."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import promoting

import hidlr_optax as hd

_LABELS = {"a": "first", "b": "second", "c": "third"}
_START = {"a": jnp.full(3, 4.0), "b": jnp.full(2, -3.0), "c": jnp.array(5.0)}


def _loss(params, batch):
    """Parabolas of curvature 1, 10 and 100."""
    del batch
    return sum(
        curvature * jnp.sum(leaf**2) / 2
        for curvature, leaf in zip((1.0, 10.0, 100.0), params.values(), strict=True)
    )


def _run(tx, steps=40):
    """Updates, rates in the state and rates of the last step, at each of some steps."""

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(_loss)(params, 0)
        updates, state = tx.update(grads, state, params, batch=0, value=loss)
        return optax.apply_updates(params, updates), state, updates

    params, found = _START, []
    state = tx.init(params)
    for _ in range(steps):
        params, state, updates = step(params, state)
        now = hd.report.find_state(state)
        rates = {name: float(rate) for name, rate in now.group_learning_rates.items()}
        applied = dict(zip(sorted(rates), map(float, now.applied), strict=True))
        found.append((updates, rates, applied))
    return params, state, found


def _adam():
    return promoting("standard", optax.adam(1.0))


# Ratios.


def test_parts_of_a_group_keep_the_ratio_that_they_are_given():
    """Signs of the gradient are steps of one size: so the updates have the ratio itself."""
    factors = {"first": 0.25, "third": 8.0}
    base = optax.chain(optax.scale_by_sign(), optax.scale(-1.0))
    tx = hd.hessian_informed(
        optax.chain(base, hd.scale_by_label(_LABELS, factors)), _loss, "together"
    )
    params, state, found = _run(tx)
    assert float(_loss(params, 0)) < 0.5 * float(_loss(_START, 0))
    assert int(hd.metrics(state)["slips"]) == 0
    rates = {float(rates["together"]) for _, rates, _ in found}
    assert len(rates) > 5  # it is found
    for updates, *_ in found:
        sizes = [np.abs(np.asarray(leaf)).ravel()[0] for leaf in updates.values()]
        np.testing.assert_allclose(sizes, np.array([0.25, 1.0, 8.0]) * sizes[1], rtol=1e-5)


def test_a_factor_is_a_change_of_units():
    """At a rate r, a group with factor f moves as one of rate r f does."""
    scale = hd.scale_by_label(_LABELS, {"second": 3.0})
    updates, _ = scale.update(_START, scale.init(_START))
    expected = dict(_START) | {"b": 3.0 * _START["b"]}
    jax.tree.map(np.testing.assert_allclose, updates, expected)


def test_scale_by_label_takes_what_labels_hidlr_takes_and_keeps_types():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    for labels in ({"a": "x", "b": "y"}, lambda params: {"a": "x", "b": "y"}):
        scale = hd.scale_by_label(labels, {"x": 2.0})
        updates, _ = scale.update(params, scale.init(params), params)
        assert updates["a"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(updates["a"].astype(jnp.float32), 2.0)
        np.testing.assert_array_equal(updates["b"], 1.0)
    tx = optax.chain(optax.trace(0.9), hd.scale_by_label("all", {"all": 2.0}))
    moved = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    np.testing.assert_array_equal(moved[0].trace["b"], 1.0)


@pytest.mark.parametrize("factor", [0.0, -1.0, np.nan, np.inf, "2", optax.constant_schedule(1.0)])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(ValueError, match=r"factors\['first'\] must be finite and > 0"):
        hd.scale_by_label(_LABELS, {"first": factor})


def test_a_factor_for_no_group_is_refused():
    with pytest.raises(ValueError, match=r"factors for \['forth'\], but the labels are \['first'"):
        hd.scale_by_label(_LABELS, {"forth": 2.0}).init(_START)


# Layer-wise decay.


def _layers(count):
    return {
        "embed": jnp.ones(2),
        "layers": [{"w": jnp.ones(2)} for _ in range(count)],
        "final_norm": jnp.ones(2),
        "head": jnp.ones(2),
    }


def test_layer_decay_is_that_of_beit():
    """get_num_layer_for_vit: embed is layer 0, block i is i + 1, all else the last, N + 1."""
    decay, count = 0.65, 12
    found = hd.layer_decay(hd.label_by_depth(_layers(count)), decay)
    expected = {f"depth_{i:02}": decay ** (count + 1 - (i + 1)) for i in range(count)}
    expected |= {"embed": decay ** (count + 1), "rest": 1.0, "head": 1.0}
    assert found == pytest.approx(expected)
    assert list(found) == sorted(found)


def test_merged_layers_decay_as_one():
    found = hd.layer_decay(hd.label_by_depth(_layers(12), num_groups=3), 0.5)
    assert found == {
        "depth_00-03": 0.125,
        "depth_04-07": 0.25,
        "depth_08-11": 0.5,
        "embed": 0.0625,
        "head": 1.0,
        "rest": 1.0,
    }


@pytest.mark.parametrize("decay", [0.0, 1.5, -0.5, np.nan])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\]"):
        hd.layer_decay(hd.label_by_depth(_layers(2)), decay)


def test_labels_without_layers_are_refused():
    with pytest.raises(ValueError, match=r"takes the labels of label_by_depth.*'head'"):
        hd.layer_decay({"head": "head"}, 0.5)


def test_layers_train_with_decayed_rates():
    params = _layers(3)

    def loss(params, batch):
        return sum(jnp.sum((leaf - batch) ** 2) for leaf in jax.tree.leaves(params))

    labels = hd.label_by_depth(params)
    scale = hd.scale_by_label(labels, hd.layer_decay(labels, 0.5))
    tx = hd.hessian_informed(optax.chain(optax.sgd(1.0), scale), loss, "all")
    grads = jax.grad(loss)(params, 3.0)
    update = jax.jit(functools.partial(tx.update, batch=3.0))
    updates, _ = update(grads, tx.init(params), params)
    steps = [float(layer["w"][0]) for layer in updates["layers"]]
    np.testing.assert_allclose(np.divide(steps, steps[-1]), [0.25, 0.5, 1.0], rtol=1e-5)


# Bounds.


@pytest.mark.parametrize("base", [optax.sgd(1.0), None], ids=["sgd", "adam"])
def test_a_ceiling_is_never_passed(base):
    base = _adam() if base is None else base
    free = hd.hessian_informed(base, _loss, _LABELS)
    _, _, unbounded = _run(free)
    highest = max(applied["first"] for *_, applied in unbounded)
    ceiling = highest / 20
    tx = hd.hessian_informed(base, _loss, _LABELS, bounds={"first": (None, ceiling)})
    params, state, found = _run(tx)
    for _, rates, applied in found:
        assert rates["first"] <= ceiling * (1 + 1e-6)
        assert applied["first"] <= ceiling * (1 + 1e-6)
    assert found[-1][1]["first"] == pytest.approx(ceiling)  # it is wanted, and reached
    assert int(hd.metrics(state)["slips"]) == 0
    assert float(jnp.sum(params["c"] ** 2)) < 0.5 * 25.0  # the others are found all the same


def test_a_rate_is_held_while_the_others_are_found():
    tx = hd.hessian_informed(optax.sgd(1.0), _loss, _LABELS, bounds={"second": (0.01, 0.01)})
    params, state, found = _run(tx)
    guards = [rates["second"] for _, rates, _ in found]
    np.testing.assert_allclose(guards, 0.01, rtol=1e-6)
    expected = -0.01 * 10.0 * np.asarray(_START["b"])  # one step of gradient descent
    assert np.all(np.abs(found[0][0]["b"]) <= np.abs(expected) * (1 + 1e-5))
    assert found[-1][1]["third"] != pytest.approx(found[2][1]["third"], rel=1e-3)
    assert float(_loss(params, 0)) < 0.1 * float(_loss(_START, 0))
    assert int(hd.metrics(state)["slips"]) == 0


def test_a_held_rate_follows_the_schedule():
    schedule = optax.linear_schedule(1.0, 0.0, 40)
    tx = hd.hessian_informed(
        optax.sgd(1.0), _loss, _LABELS, schedule=schedule, bounds={"second": (1e-4, 1e-4)}
    )
    _, _, found = _run(tx, 30)
    for n, (_, rates, applied) in enumerate(found):
        assert rates["second"] == pytest.approx(1e-4)
        assert applied["second"] <= 1e-4 * float(schedule(n)) * (1 + 1e-5)


def test_bounds_that_are_far_away_change_nothing():
    tx, far = (
        hd.hessian_informed(_adam(), _loss, _LABELS, bounds=bounds)
        for bounds in (None, {"first": (1e-30, 1e30), "third": (None, None)})
    )
    jax.tree.map(np.testing.assert_array_equal, _run(tx)[:2], _run(far)[:2])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"first": 1e-3}, r"must be a pair .*\(None, 1e-3\) is a ceiling"),
        ({"first": (1e-3,)}, "must be a pair"),
        ({"first": (1.0, 0.1)}, r"must be \(lowest, highest\), got \(1.0, 0.1\)"),
        ({"first": (0.0, 0.1)}, r"bounds\['first'\] must be finite and > 0, got 0.0"),
        ({"first": (None, np.nan)}, "must be finite and > 0, got nan"),
        (1e-3, r"bounds must be \{label: \(lowest, highest\)\}, got 0.001"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        hd.hidlr(_loss, _LABELS, bounds=bounds)


def test_bounds_of_no_group_are_refused():
    with pytest.raises(ValueError, match=r"bounds for \['forth'\], but the groups are \['first'"):
        hd.hidlr(_loss, _LABELS, bounds={"forth": (None, 1.0)}).init(_START)
