"""`suggest`, the rates in one shot, and `metrics`, the state as flat scalars."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import bare

import hidlr_optax as hd

LABELS = {"x": "weight", "y": "bias", "z": "weight"}


def bowl(params, batch):
    """Separable: in each direction the best rate is known."""
    del batch
    return 0.5 * jnp.sum(params["x"] ** 2) + 50 * params["y"] ** 2 + 0.5 * params["z"] ** 2


def bowl_params():
    return {"x": jnp.asarray([3.0, -2.0]), "y": jnp.asarray(0.5), "z": jnp.asarray(-1.0)}


def descent(loss, params, batch=None):
    return jax.tree.map(jnp.negative, jax.grad(loss)(params, batch))


@pytest.mark.parametrize("off", [1e-6, 1e-4, 1e-2, 1.0, 1e2])
def test_suggest_is_exact_on_a_quadratic_from_a_rate_far_off(off):
    params = bowl_params()
    found = hd.suggest(
        bowl,
        params,
        LABELS,
        descent(bowl, params),
        init_learning_rate={"bias": 0.01 * off, "weight": 1.0 * off},
    )
    assert found.labels == ("bias", "weight")
    assert found.kept == {"bias": hd.Kept.UPDATED, "weight": hd.Kept.UPDATED}
    assert found.learning_rates["bias"] == pytest.approx(0.01, rel=1e-4)
    assert found.learning_rates["weight"] == pytest.approx(1.0, rel=1e-4)


def test_suggest_gives_slope_and_curvature_per_unit_rate_and_what_it_probed():
    params = bowl_params()
    found = hd.suggest(bowl, params, LABELS, descent(bowl, params), init_learning_rate=0.1)
    # b = |g|², a = gᵀHg
    np.testing.assert_allclose(found.quadratic.slope, [50.0**2, 14], rtol=1e-4)
    np.testing.assert_allclose(found.quadratic.curvature, [100 * 50.0**2, 14], rtol=1e-4)
    assert found.offsets.shape == (8, 2)
    assert found.changes.shape == (8,)
    start = bowl(params, None)
    for offset, change in zip(found.offsets, found.changes, strict=True):
        factor = {"bias": 1 - 100 * offset[0], "weight": 1 - offset[1]}
        moved = {name: params[name] * factor[LABELS[name]] for name in params}
        assert float(change) == pytest.approx(float(bowl(moved, None) - start), rel=1e-3, abs=1e-4)
    assert isinstance(found.learning_rates["bias"], float)


@pytest.mark.parametrize(
    "curvature",
    [
        hd.hessian(),
        hd.gauss_newton(
            lambda p, batch: p, lambda out, batch: bowl(out, batch) + 0.0 * jnp.sum(batch)
        ),
    ],
    ids=["hessian", "gauss_newton"],
)
def test_suggest_takes_estimators_without_probes(curvature):
    params = bowl_params()
    found = hd.suggest(
        bowl, params, LABELS, descent(bowl, params), jnp.ones(2), curvature=curvature, rounds=1
    )
    assert found.learning_rates["bias"] == pytest.approx(0.01, rel=1e-4)
    assert found.learning_rates["weight"] == pytest.approx(1.0, rel=1e-4)


def test_suggest_says_what_all_rates_together_do():
    params = bowl_params()
    apart = hd.suggest(bowl, params, LABELS, descent(bowl, params))
    assert apart.joint_change == pytest.approx(-float(bowl(params, None)), rel=1e-4)

    def same_way(params, batch):
        """Both groups move the same sum: each rate alone is right, together they overshoot."""
        del batch
        return (params["x"] + params["y"] + params["z"] - 1.0) ** 2

    origin = {name: jnp.asarray(0.0) for name in "xyz"}
    labels = {name: name for name in "xyz"}
    together = hd.suggest(same_way, origin, labels, descent(same_way, origin))
    assert together.joint_change == pytest.approx(4.0 - 1.0, rel=1e-3)


def test_suggest_refines_round_by_round_where_the_loss_is_no_quadratic():
    """A parabola through far probes misses the minimum; one at its scale is closer."""

    def loss(params, batch):
        del batch
        return params["x"] ** 2 + 0.1 * params["x"] ** 4

    params, direction = {"x": jnp.asarray(2.0)}, {"x": jnp.asarray(-1.0)}
    errors = [
        abs(
            hd.suggest(
                loss, params, "all", direction, init_learning_rate=10.0, rounds=rounds
            ).learning_rates["all"]
            - 2
        )
        for rounds in (1, 4)
    ]
    assert errors[1] < 0.2 < 1 < errors[0]


def test_suggest_hands_the_batch_to_the_loss_and_takes_other_probes():
    def loss(params, batch):
        return jnp.mean((params["x"] - batch) ** 2)

    params, batch = {"x": jnp.asarray(0.0)}, jnp.asarray([1.0, 3.0])
    found = hd.suggest(
        loss,
        params,
        lambda params: {"x": "only"},
        descent(loss, params, batch),
        batch,
        init_learning_rate=0.3,
        curvature=hd.probes("gaussian", per_group=3),
        rounds=2,
    )
    assert found.learning_rates == {"only": pytest.approx(0.5, rel=1e-4)}
    assert found.offsets.shape == (3, 1)


def saddle(params, batch):
    """x: convex. y: concave. z: not there at all."""
    del batch
    return 1 + params["x"] ** 2 - params["y"] ** 2


def test_suggest_reports_groups_without_a_minimum_and_solves_the_others():
    params = {name: jnp.asarray(0.5) for name in "xyz"}
    direction = {"x": jnp.asarray(-1.0), "y": jnp.asarray(1.0), "z": jnp.asarray(1.0)}
    found = hd.suggest(
        saddle, params, {name: name for name in "xyz"}, direction, init_learning_rate=0.2
    )
    assert found.kept["x"] == hd.Kept.UPDATED
    assert found.kept["y"] == hd.Kept.NOT_CONVEX
    assert found.kept["z"] in (hd.Kept.NO_SLOPE, hd.Kept.UNRESOLVED)
    assert all(isinstance(reason, hd.Kept) for reason in found.kept.values())
    assert found.learning_rates["x"] == pytest.approx(0.5, rel=1e-4)
    assert found.learning_rates["y"] == pytest.approx(0.2)  # where it was last probed


def test_suggest_is_negative_where_the_direction_ascends():
    params = bowl_params()
    uphill = jax.grad(bowl)(params, None)
    found = hd.suggest(bowl, params, "all", uphill, init_learning_rate=0.1, rounds=2)
    down = hd.suggest(bowl, params, "all", descent(bowl, params), init_learning_rate=0.1, rounds=2)
    assert found.learning_rates["all"] == pytest.approx(-down.learning_rates["all"], rel=1e-3)
    assert found.learning_rates["all"] < 0


def test_suggest_comes_back_from_a_rate_at_which_the_loss_is_not_finite():
    def loss(params, batch):
        del batch
        return jnp.exp(params["x"]) + jnp.exp(-params["x"])

    params, direction = {"x": jnp.asarray(0.1)}, {"x": jnp.asarray(-1.0)}
    found = hd.suggest(loss, params, "all", direction, init_learning_rate=1e3)
    assert found.kept == {"all": hd.Kept.UPDATED}
    assert found.learning_rates["all"] == pytest.approx(0.1, rel=0.05)


def _vector_loss(params, batch):
    del batch
    return params["x"] ** 2


def _aux_loss(params, batch):
    return bowl(params, batch), {"accuracy": 1.0}


def _needs_batch(params, batch):
    return bowl(params, batch) + jnp.mean(batch["image"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"direction": {"x": jnp.zeros(2)}}, "direction must have the structure of params"),
        ({"param_labels": {"x": "a", "y": "b"}}, "no label for the parameters 'z'"),
        ({"init_learning_rate": 0.0}, "init_learning_rate must be finite and > 0, got 0.0"),
        ({"init_learning_rate": {"bias": 1.0}}, r"missing are \['weight'\]"),
        (
            {"init_learning_rate": {"bias": 1.0, "weight": 1.0, "head": 1.0}},
            r"not among them are \['head'\]",
        ),
        ({"init_learning_rate": {"bias": -1.0, "weight": 1.0}}, r"init_learning_rate\['bias'\]"),
        ({"curvature": hd.probes(per_group=1)}, "needs per_group >= 2, got Probes"),
        ({"curvature": "probes"}, "must be an estimator such as probes"),
        ({"loss_fn": 3}, "loss_fn must be a callable"),
        ({"loss_fn": None}, "no loss to probe"),
        ({"loss_fn": _vector_loss}, "must return a real scalar"),
        ({"loss_fn": _aux_loss}, "must return a real scalar"),
        ({"loss_fn": _needs_batch}, "called without a batch"),
    ],
)
def test_suggest_refuses_bad_input(change, message):
    params = bowl_params()
    arguments = {
        "loss_fn": bowl,
        "params": params,
        "param_labels": LABELS,
        "direction": params,
    } | change
    with pytest.raises(ValueError, match=message):
        hd.suggest(**arguments)


# Metrics.

FIELDS = ("learning_rate", "slope", "curvature", "ppi", "influence", "kept")
KEYS = {f"{field}/{label}" for field in FIELDS for label in ("bias", "weight")} | {
    "refreshes",
    "cuts",
    "ascents",
    "value_mismatches",
    "gradient_mismatches",
    "step_mismatches",
    "loss_noise",
}


def hidlr(**kwargs):
    exact = {"solver": hd.diagonal(max_change=None), "ema_decay": 0.0}
    return bare(bowl, LABELS, **{"init_learning_rate": 0.1} | exact | kwargs)


WRAPPERS = {
    "bare": lambda: hidlr(),
    "chain": lambda: optax.chain(optax.clip(1e9), hidlr()),
    "nested chain": lambda: optax.chain(optax.chain(optax.chain(hidlr()), optax.identity())),
    "apply_if_finite": lambda: optax.apply_if_finite(hidlr(), 3),
    "multi_steps": lambda: hd.multi_steps(optax.chain(hidlr()), 1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda init: hidlr(init_learning_rate=init)
    )(init=0.1),
}


@functools.cache
def _reference():
    tx, params = hidlr(), bowl_params()
    return tx, params, jax.jit(tx.update)(descent(bowl, params), tx.init(params), params)[1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_metrics_finds_the_state_at_any_depth(wrapper):
    found = hd.metrics(WRAPPERS[wrapper]().init(bowl_params()))
    assert set(found) == KEYS
    assert float(found["learning_rate/bias"]) == pytest.approx(0.1)
    assert int(found["refreshes"]) == int(found["cuts"]) == float(found["ppi/bias"]) == 0


def test_metrics_finds_the_state_in_containers_of_any_kind():
    *_, state = _reference()
    for tree in ({"opt": state}, [1, (state,)], (optax.EmptyState(), {"deep": [state]})):
        assert hd.metrics(tree) == hd.metrics(state)


def test_metrics_are_flat_scalars_with_the_numbers_of_the_state():
    *_, state = _reference()
    found = hd.metrics(state)
    assert all(isinstance(value, jax.Array) and value.shape == () for value in found.values())
    assert float(found["slope/weight"]) == pytest.approx(14, rel=1e-4)
    assert float(found["curvature/bias"]) == pytest.approx(100 * 50.0**2, rel=1e-4)
    assert float(found["ppi/weight"]) == pytest.approx(14 / 3, rel=1e-3)
    assert float(found["ppi/bias"]) == pytest.approx(25, rel=1e-3)
    for label in ("bias", "weight"):  # the key of before
        assert found[f"influence/{label}"] == found[f"ppi/{label}"]
    assert (int(found["kept/bias"]), int(found["kept/weight"])) == (0, 0)
    assert int(found["refreshes"]) == 1


def test_metrics_inside_jit_is_metrics_outside():
    tx, params, state = _reference()

    @jax.jit
    def step(state, params):
        _, state = tx.update(descent(bowl, params), tx.init(params), params)
        return hd.metrics(state)

    inside, outside = step(state, params), hd.metrics(state)
    assert set(inside) == set(outside)
    for key, value in inside.items():
        assert float(value) == pytest.approx(float(outside[key]), rel=1e-4)


def test_metrics_says_why_a_rate_was_kept():
    tx, params = hidlr(solver=hd.diagonal(), ema_decay=0.9), bowl_params()
    direction = descent(bowl, params) | {"y": jnp.asarray(0.0)}
    _, state = jax.jit(tx.update)(direction, tx.init(params), params)
    found = hd.metrics(state)
    assert hd.Kept(int(found["kept/bias"])) == hd.Kept.NO_SLOPE
    assert hd.Kept(int(found["kept/weight"])) == hd.Kept.UPDATED


def test_metrics_shows_the_rate_that_was_applied_schedule_included():
    tx = hidlr(schedule=lambda step: 1 / (1 + step), update_interval=1)
    params = bowl_params()
    state, update, direction = tx.init(params), jax.jit(tx.update), descent(bowl, params)
    for step in range(3):
        updates, state = update(direction, state, params)
        applied = float(updates["y"] / direction["y"])
        assert applied == pytest.approx(0.01 / (1 + step), rel=1e-3)
        assert float(hd.metrics(state)["learning_rate/bias"]) == pytest.approx(applied, rel=1e-6)
        # The rate itself is free of the factor.
        assert float(state.group_learning_rates["bias"]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("inside_jit", [False, True])
def test_metrics_of_an_nnx_optimizer_are_plain_arrays(inside_jit):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, bare(None, hd.label_by_role, init_learning_rate=0.5), wrt=nnx.Param
    )
    if inside_jit:
        found = nnx.jit(lambda optimizer: hd.metrics(optimizer.opt_state))(optimizer)
    else:
        found = hd.metrics(optimizer.opt_state)
    assert float(found["learning_rate/rest"]) == 0.5
    for value in found.values():
        assert isinstance(value, jax.Array)
        assert value.shape == ()


@pytest.mark.parametrize("state", [(), optax.sgd(1.0).init({}), {"params": jnp.zeros(2)}])
def test_metrics_without_hidlr_is_an_error(state):
    with pytest.raises(ValueError, match=r"expected one HiDLRState .* found 0"):
        hd.metrics(state)


def test_metrics_of_several_hidlrs_is_an_error():
    state = optax.chain(hidlr(), hidlr()).init(bowl_params())
    with pytest.raises(ValueError, match=r"expected one HiDLRState .* found 2"):
        hd.metrics(state)
    assert set(hd.metrics(state[1])) == KEYS
