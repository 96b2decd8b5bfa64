"""`suggest`, the rates in one shot, on losses whose best rates are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    found = hd.paper.suggest(
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
    found = hd.paper.suggest(bowl, params, LABELS, descent(bowl, params), init_learning_rate=0.1)
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
        hd.paper.hessian(),
        hd.paper.gauss_newton(
            lambda p, batch: p, lambda out, batch: bowl(out, batch) + 0.0 * jnp.sum(batch)
        ),
    ],
    ids=["hessian", "gauss_newton"],
)
def test_suggest_takes_estimators_without_probes(curvature):
    params = bowl_params()
    found = hd.paper.suggest(
        bowl, params, LABELS, descent(bowl, params), jnp.ones(2), curvature=curvature, rounds=1
    )
    assert found.learning_rates["bias"] == pytest.approx(0.01, rel=1e-4)
    assert found.learning_rates["weight"] == pytest.approx(1.0, rel=1e-4)


def test_suggest_says_what_all_rates_together_do():
    params = bowl_params()
    apart = hd.paper.suggest(bowl, params, LABELS, descent(bowl, params))
    assert apart.joint_change == pytest.approx(-float(bowl(params, None)), rel=1e-4)

    def same_way(params, batch):
        """Both groups move the same sum: each rate alone is right, together they overshoot."""
        del batch
        return (params["x"] + params["y"] + params["z"] - 1.0) ** 2

    origin = {name: jnp.asarray(0.0) for name in "xyz"}
    labels = {name: name for name in "xyz"}
    together = hd.paper.suggest(same_way, origin, labels, descent(same_way, origin))
    assert together.joint_change == pytest.approx(4.0 - 1.0, rel=1e-3)


def test_suggest_refines_round_by_round_where_the_loss_is_no_quadratic():
    """A parabola through far probes misses the minimum; one at its scale is closer."""

    def loss(params, batch):
        del batch
        return params["x"] ** 2 + 0.1 * params["x"] ** 4

    params, direction = {"x": jnp.asarray(2.0)}, {"x": jnp.asarray(-1.0)}
    errors = [
        abs(
            hd.paper.suggest(
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
    found = hd.paper.suggest(
        loss,
        params,
        lambda params: {"x": "only"},
        descent(loss, params, batch),
        batch,
        init_learning_rate=0.3,
        curvature=hd.paper.probes("gaussian", per_group=3),
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
    found = hd.paper.suggest(
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
    found = hd.paper.suggest(bowl, params, "all", uphill, init_learning_rate=0.1, rounds=2)
    down = hd.paper.suggest(
        bowl, params, "all", descent(bowl, params), init_learning_rate=0.1, rounds=2
    )
    assert found.learning_rates["all"] == pytest.approx(-down.learning_rates["all"], rel=1e-3)
    assert found.learning_rates["all"] < 0


def test_suggest_comes_back_from_a_rate_at_which_the_loss_is_not_finite():
    def loss(params, batch):
        del batch
        return jnp.exp(params["x"]) + jnp.exp(-params["x"])

    params, direction = {"x": jnp.asarray(0.1)}, {"x": jnp.asarray(-1.0)}
    found = hd.paper.suggest(loss, params, "all", direction, init_learning_rate=1e3)
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
        ({"rounds": 0}, "rounds must be a whole number >= 1, got 0"),
        ({"direction": {"x": jnp.zeros(2)}}, "direction must have the structure of params"),
        ({"param_labels": {"x": "a", "y": "b"}}, "no label for the parameters 'z'"),
        ({"init_learning_rate": 0.0}, "init_learning_rate must be finite and > 0, got 0.0"),
        ({"init_learning_rate": {"bias": 1.0}}, r"missing are \['weight'\]"),
        (
            {"init_learning_rate": {"bias": 1.0, "weight": 1.0, "head": 1.0}},
            r"not among them are \['head'\]",
        ),
        ({"init_learning_rate": {"bias": -1.0, "weight": 1.0}}, r"init_learning_rate\['bias'\]"),
        ({"curvature": hd.paper.probes(per_group=1)}, "needs per_group >= 2, got Probes"),
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
        hd.paper.suggest(**arguments)
