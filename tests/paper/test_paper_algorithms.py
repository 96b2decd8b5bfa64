"""The paper's rules: Algorithm 1 replicated in NumPy from the same draws, the ellipse, and GeN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import enable_x64

import hidlr_optax as hd

INTERVAL = 2
SHAPES = {"a": (3,), "b": (2, 2), "c": (2,)}
LABELS = {name: name for name in SHAPES}
SLICES = {"a": slice(0, 3), "b": slice(3, 7), "c": slice(7, 9)}
CENTRE = np.linspace(-1, 1, 9)


def hessian(coupling):
    """Eigenvalues from 1 to 9 within groups; `coupling` between them."""
    mixing = np.random.default_rng(3).normal(size=(9, 9))
    across = coupling * (mixing + mixing.T) / 2
    for part in SLICES.values():
        across[part, part] = 0
    return np.diag(np.arange(1.0, 10.0)) + across


def flat(tree):
    return np.concatenate([np.ravel(tree[name]) for name in sorted(tree)]).astype(float)


def loss_numpy(w, matrix):
    centred = w - CENTRE
    return 0.5 * centred @ matrix @ centred + 2 + 0.02 * np.sum(centred**4)


def loss_jax(params, batch):
    centred = jnp.concatenate([jnp.ravel(params[name]) for name in "abc"]) - jnp.asarray(
        CENTRE, jnp.float32
    )
    return 0.5 * centred @ batch @ centred + 2 + 0.02 * jnp.sum(centred**4)


def algorithm_1(w, u, rates, draws, units, matrix):
    """One refresh of the paper, lines 4 to 9, in loops: new rates, PPI, slopes, curvatures.

    Offsets are draws times units, their standard deviations.
    """
    start = loss_numpy(w, matrix)
    rows, targets = [], []
    for draw in draws:
        moved = w.copy()
        for k, part in enumerate(SLICES.values()):
            moved[part] += draw[k] * units[k] * u[part]
        rows.append([*(-x for x in draw), *(x * x / 2 for x in draw)])
        targets.append(loss_numpy(moved, matrix) - start)
    solution = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    b, a = solution[:3] / units, solution[3:] / units**2
    sizes = np.array([3, 4, 2])
    if np.all(a > 0):
        return b / a, b**2 / (a * sizes), b, a
    return rates, None, b, a


def by_name(group):
    return np.array([float(group[name]) for name in "abc"])


@pytest.mark.parametrize(("scale", "power"), [("rate", 1.0), ("root", 0.5)])
@pytest.mark.parametrize(
    ("coupling", "outcomes"), [(0.0, {True}), (2.5, {True, False})], ids=["diagonal", "coupled"]
)
def test_paper_hidlr_is_algorithm_1(coupling, outcomes, scale, power):
    """Each refresh from the state before it; with coupled groups, some fits fail and some do not.

    Groups that are not coupled always fit. Where one curvature is not positive, all rates stay.
    Draws are N(0, η²) or N(0, |η|): standard normal ones times a power of |η|.
    """
    matrix = hessian(coupling)
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
    initial = {"a": 0.2, "b": 0.1, "c": 0.05}
    tx = hd.paper.paper_hidlr(
        loss_jax, LABELS, init_learning_rate=initial, update_interval=INTERVAL, seed=11, scale=scale
    )
    state, seen = tx.init(params), set()
    batch = jnp.asarray(matrix, jnp.float32)
    update = jax.jit(tx.update)
    grad_fn = jax.jit(jax.value_and_grad(loss_jax))
    rates, ppi = by_name(initial), np.zeros(3)
    for step in range(12):
        value, grads = grad_fn(params, batch)
        direction = jax.tree.map(jnp.negative, grads)
        if step % INTERVAL == 0:
            draws = np.asarray(
                hd.paper.probes("gaussian", per_group=4, seed=11).points(3, step), float
            )
            assert draws.shape == (4 * 3, 3)
            new, influence, b, a = algorithm_1(
                flat(params), flat(direction), rates, draws, np.abs(rates) ** power, matrix
            )
            seen.add(influence is not None)
            ppi = ppi if influence is None else influence
        updates, state = update(direction, state, params, batch=batch, value=value, grad=grads)
        np.testing.assert_allclose(by_name(state.group_learning_rates), new, rtol=2e-3)
        np.testing.assert_allclose(by_name(state.diagnostics.influence), ppi, rtol=5e-3)
        if step % INTERVAL == 0:
            scale = np.max(np.abs([b * rates, a * rates**2]))
            np.testing.assert_allclose(
                by_name(state.diagnostics.slope) * rates, b * rates, atol=1e-4 * scale
            )
            np.testing.assert_allclose(
                by_name(state.diagnostics.curvature) * rates**2, a * rates**2, atol=1e-4 * scale
            )
            if influence is None:
                np.testing.assert_array_equal(by_name(state.group_learning_rates), rates)
        rates = by_name(state.group_learning_rates)
        for k, name in enumerate("abc"):
            np.testing.assert_allclose(updates[name], rates[k] * direction[name], rtol=1e-6)
        # A fixed small step, so that failed and odd rates do not end the comparison.
        params = jax.tree.map(lambda p, u: p + 0.03 * u, params, direction)
    assert int(state.diagnostics.refreshes) == 6
    assert seen == outcomes


def ellipse(params, batch):
    del batch
    return 0.5 * (params["x"] ** 2 + 100 * params["y"] ** 2)


def _fitted(design, slope):
    return hd.paper.one_step(
        ellipse,
        {"x": "x", "y": "y"},
        init_learning_rate=0.1,
        curvature=hd.paper.probes(design, per_group=4),
        slope=slope,
        solver=hd.paper.diagonal(max_change=None),
        ema_decay=0.0,
        warmup=0,
    )


ELLIPSE_RULES = {
    "paper": lambda: hd.paper.paper_hidlr(ellipse, {"x": "x", "y": "y"}, init_learning_rate=0.1),
    "axis-gradient": lambda: _fitted("axis", "gradient"),
    "axis-probes": lambda: _fitted("axis", "probes"),
    "gaussian-gradient": lambda: _fitted("gaussian", "gradient"),
}


# Where the slope is known and nothing else, the first probes lie where the slope changes the loss
# by a hundredth and bend it by 5e-5 of itself, in which float32 leaves half a percent. The other
# rules probe at the initial rate.
@pytest.mark.parametrize(
    ("rule", "dtype", "rel"),
    [(rule, "float32", 5e-3 if rule == "axis-gradient" else 1e-4) for rule in ELLIPSE_RULES]
    + [(rule, "float64", 1e-5) for rule in ELLIPSE_RULES],
)
def test_the_ellipse_is_solved_in_one_step(rule, dtype, rel):
    """½(x² + 100y²) from (50, 1) with gradient descent: the rates are 1 and 1/100, the loss 0."""
    with enable_x64(dtype == "float64"):
        tx = optax.chain(optax.sgd(1.0), ELLIPSE_RULES[rule]())
        params = {"x": jnp.asarray(50.0, dtype), "y": jnp.asarray(1.0, dtype)}
        value, grad = jax.value_and_grad(ellipse)(params, None)
        updates, state = jax.jit(tx.update)(grad, tx.init(params), params, value=value, grad=grad)
        rates = optax.tree.get(state, "group_learning_rates")
        assert float(rates["x"]) == pytest.approx(1, rel=rel)
        assert float(rates["y"]) == pytest.approx(0.01, rel=rel)
        # What is left of the loss is the square of what the rates are off by.
        left = float(ellipse(optax.apply_updates(params, updates), None)) / float(value)
        assert left < max(1e-7, rel**2)


def test_one_rate_does_not_solve_the_ellipse():
    """The best single rate is Σb/ΣA, and leaves half of the way in x."""
    tx = hd.paper.one_step(
        ellipse,
        "all",
        init_learning_rate=0.1,
        slope="gradient",
        solver=hd.paper.diagonal(max_change=None),
        ema_decay=0.0,
        warmup=0,
    )
    params = {"x": jnp.asarray(50.0), "y": jnp.asarray(1.0)}
    value, grad = jax.value_and_grad(ellipse)(params, None)
    direction = jax.tree.map(jnp.negative, grad)
    _, state = jax.jit(tx.update)(direction, tx.init(params), params, value=value, grad=grad)
    assert float(state.group_learning_rates["all"]) == pytest.approx(
        (50**2 + 100**2) / (50**2 + 100 * 100**2), rel=1e-4
    )


def curved(params, batch):
    """Not a quadratic, and not even."""
    w = jnp.concatenate([params["a"], jnp.ravel(params["b"])])
    return jnp.mean(jnp.cosh(w - batch)) + 0.1 * jnp.sum(w**3)


def curved_numpy(w, batch):
    return np.mean(np.cosh(w - batch)) + 0.1 * np.sum(w**3)


@pytest.mark.parametrize("with_value", [True, False])
@pytest.mark.parametrize(("dtype", "rel"), [("float64", 1e-5), ("float32", 3e-3)])
def test_paper_hiulr_is_the_closed_form_of_gen(dtype, rel, with_value):
    """η* = (h/2)·(L₋ − L₊)/(L₊ − 2L₀ + L₋) with L± = L(w ± hu), at every refresh.

    h is the present rate.
    """
    with enable_x64(dtype == "float64"):
        _paper_hiulr_follows_gen(dtype, rel, with_value)


def _paper_hiulr_follows_gen(dtype, rel, with_value):
    tx = hd.paper.paper_hiulr(curved, init_learning_rate=0.4, update_interval=1)
    params = {"a": jnp.asarray([1.0, 2.0, -0.5], dtype), "b": jnp.asarray([[0.3, 1.5]], dtype)}
    state, update = tx.init(params), jax.jit(tx.update)
    eta, rates = 0.4, []
    for batch in (0.0, 0.3, -0.2):
        value, grads = jax.value_and_grad(curved)(params, jnp.asarray(batch, dtype))
        direction = jax.tree.map(jnp.negative, grads)
        w, u = (
            np.concatenate([t["a"], np.ravel(t["b"])]).astype(float) for t in (params, direction)
        )
        centre, h = curved_numpy(w, batch), eta
        plus, minus = (curved_numpy(w + s * h * u, batch) for s in (1, -1))
        gen = h / 2 * (minus - plus) / (plus - 2 * centre + minus)
        updates, state = update(
            direction,
            state,
            params,
            batch=jnp.asarray(batch, dtype),
            value=value if with_value else None,
            grad=grads,
        )
        eta = float(state.group_learning_rates["all"])
        rates.append(eta)
        assert eta == pytest.approx(gen, rel=rel)
        params = optax.apply_updates(params, updates)
    assert len({round(rate, 2) for rate in rates}) == 3  # or the test would follow nothing
