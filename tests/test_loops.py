"""Loops that are not ours: what they call things, and those that tell the optimizer nothing."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import counted, enable_x64, promoting, shard_map

import hidlr_optax as hd

_LABELS = {"w": "weight", "b": "bias"}


def _loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]).sum(1) - y) ** 2)


def _params():
    return {"w": jax.random.normal(jax.random.key(0), (3, 4)) / 2, "b": jnp.zeros(4)}


def _batch(seed=1, examples=32):
    x = jax.random.normal(jax.random.key(seed), (examples, 3))
    return x, jnp.sin(x.sum(1))


def _wrapped(loss_fn, labels=_LABELS, **rule):
    base = promoting("standard", optax.adam(1.0))
    return hd.hessian_informed(base, loss_fn, labels, **({"update_interval": 2} | rule))


def _silent_step(tx, loss_fn):
    """A step as most libraries have it: the optimizer is told of nothing but gradients."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def _told_step(tx, **jit):
    """The same with the batch handed over, to compare with."""

    @functools.partial(jax.jit, **jit)
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    return step


def _run(step, tx, steps=6):
    params = _params()
    state = tx.init(params)
    for seed in range(steps):
        params, state, _ = step(params, state, _batch(seed))
    return params, state


def _assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def _assert_close(one, other, rtol=1e-4):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5), one, other)


# Names that other loops have.


@pytest.mark.parametrize(
    ("closure", "value"),
    [("obj_fn", "loss"), ("loss_fn", "loss"), ("value_fn", "value"), ("obj_fn", "value")],
)
def test_the_loss_is_understood_by_the_names_that_others_have_for_it(closure, value):
    """levanter passes obj_fn and loss, Optax and Optimistix value_fn and value."""
    loss_fn, calls = counted(_loss)
    tx, batch, params = _wrapped(None), _batch(), _params()

    def update(params, state, batch):
        loss, grads = jax.value_and_grad(_loss)(params, batch)
        told = {closure: lambda params: loss_fn(params, batch), value: loss}
        return tx.update(grads, state, params, unknown=3, **told)

    found = jax.jit(update)(params, tx.init(params), batch)
    jax.effects_barrier()
    assert len(calls) == 2  # both ends of the look: the loss at the parameters is known
    named = _wrapped(_loss)
    loss, grads = jax.value_and_grad(_loss)(params, batch)
    expected = jax.jit(named.update)(grads, named.init(params), params, batch=batch, value=loss)
    _assert_close(found, expected)


def test_own_names_win_over_those_of_others():
    def never(params):
        raise AssertionError("value_fn was given")

    params, batch = _params(), _batch()
    loss, grads = jax.value_and_grad(_loss)(params, batch)
    tx = _wrapped(None)
    told = {"value_fn": lambda params: _loss(params, batch), "value": loss}
    update = jax.jit(functools.partial(tx.update, obj_fn=never, loss_fn=never, loss=9 * loss))
    _, state = jax.jit(lambda *now: update.__wrapped__(*now, **told))(
        grads, tx.init(params), params
    )
    assert int(hd.metrics(state)["slips"]) == 0


def test_a_wrong_loss_by_another_name_is_found_out():
    params, batch = _params(), _batch()
    loss, grads = jax.value_and_grad(_loss)(params, batch)
    tx = _wrapped(_loss)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch, loss=2 * loss)
    assert hd.Slip(int(hd.metrics(state)["slips"])) == hd.Slip.VALUE
    with pytest.raises(ValueError, match="loss is another name for it"):
        tx.update(grads, tx.init(params), params, batch=batch, loss=jnp.ones(3))


def test_the_one_step_family_understands_them_too():
    params, batch = _params(), _batch()
    loss, grads = jax.value_and_grad(_loss)(params, batch)
    down = jax.tree.map(jnp.negative, grads)
    tx = hd.paper.one_step(None, _LABELS, slope="gradient")
    update = functools.partial(tx.update, obj_fn=lambda params: _loss(params, batch), loss=loss)
    _, state = jax.jit(update)(down, tx.init(params), params, grad=grads)
    assert int(hd.metrics(state)["refreshes"]) == 1


def _rosenbrock(y, args):
    del args
    return jnp.sum((1 - y["x"]) ** 2 + 100 * (y["y"] - y["x"] ** 2) ** 2)


@pytest.mark.parametrize("form", ["lbfgs", "chain", "wrapper"])
def test_hidlr_runs_unchanged_where_lbfgs_runs(form):
    """Optimistix's loop was written for Optax's line searches."""
    optx = pytest.importorskip("optimistix")
    labels = {"x": "x", "y": "y"}
    forms = {
        "lbfgs": lambda: optax.lbfgs(),
        "chain": lambda: optax.chain(optax.adam(1.0), hd.hidlr(None, labels)),
        "wrapper": lambda: hd.hessian_informed(optax.adam(1.0), None, labels),
    }
    with jax.numpy_dtype_promotion("standard"):
        solver = optx.OptaxMinimiser(forms[form](), rtol=1e-6, atol=1e-6)
        start = {"x": jnp.zeros(2), "y": jnp.zeros(2)}
        found = optx.minimise(_rosenbrock, solver, start, max_steps=3000, throw=False).value
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 1.0, atol=3e-2), found)


# Loops that pass nothing: a loss that remembers its batch.


def test_a_remembering_loss_trains_as_one_that_is_handed_the_batch():
    loss_fn = hd.remember_batch(_loss)
    tx = _wrapped(loss_fn)
    silent = _run(jax.jit(_silent_step(tx, loss_fn)), tx)
    told = _wrapped(_loss)
    _assert_same(silent, _run(_told_step(told), told))


def test_it_has_the_signature_and_the_results_of_the_loss():
    @hd.remember_batch
    def loss_fn(params, batch, *, weight):
        """Words."""
        return weight * _loss(params, batch), "aux"

    assert loss_fn.__name__ == "loss_fn"
    assert loss_fn.__doc__ == "Words."
    loss, aux = loss_fn(_params(), _batch(), weight=2.0)
    assert (float(loss), aux) == (pytest.approx(2 * float(_loss(_params(), _batch()))), "aux")


def test_keywords_keys_and_auxiliary_outputs_are_remembered():
    @hd.remember_batch
    def loss_fn(params, batch, *, key, weight):
        x, y = batch
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return weight * _loss(params, (jnp.where(kept, x, 0), y)), y

    tx = _wrapped(loss_fn)

    @jax.jit
    def step(params, state, batch, key):
        keywords = {"key": key, "weight": jnp.float32(2.0)}
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, **keywords)
        told = tx.update(grads, state, params)
        checked = tx.update(grads, state, params, value=loss)  # compared with the remembered one
        return told, checked

    params = _params()
    told, checked = step(params, tx.init(params), _batch(), jax.random.key(3))
    assert int(hd.metrics(checked[1])["slips"]) == 0
    _assert_close(told, checked)


def test_it_works_in_a_scan():
    loss_fn = hd.remember_batch(_loss)
    tx = _wrapped(loss_fn)
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_batch, range(6)))

    @jax.jit
    def train(params, state, batches):
        def body(carry, batch):
            params, state, loss = _silent_step(tx, loss_fn)(*carry, batch)
            return (params, state), loss

        return jax.lax.scan(body, (params, state), batches)[0]

    told = _wrapped(_loss)
    params = _params()
    _assert_close(train(params, tx.init(params), batches), _run(_told_step(told), told), rtol=1e-3)


def test_it_works_outside_of_jit():
    loss_fn = hd.remember_batch(_loss)
    tx, told = _wrapped(loss_fn), _wrapped(_loss)
    step = _silent_step(tx, loss_fn)
    _assert_close(_run(step, tx, 1), _run(_told_step(told), told, 1), rtol=1e-3)


def test_it_works_where_each_of_several_seeds_has_a_batch_of_its_own():
    loss_fn = hd.remember_batch(_loss)
    tx, told = _wrapped(loss_fn), _wrapped(_loss)
    params = jax.vmap(lambda scale: jax.tree.map(lambda leaf: scale * leaf, _params()))(
        jnp.array([0.5, 1.0])
    )
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), _batch(1), _batch(2))
    state = jax.vmap(tx.init)(params)
    found = jax.jit(jax.vmap(_silent_step(tx, loss_fn)))(params, state, batches)
    expected = jax.jit(jax.vmap(_told_step(told)))(params, state, batches)
    _assert_close(found, expected)


def test_it_works_on_a_mesh():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("x")
    loss_fn = hd.remember_batch(lambda p, batch: jax.lax.pmean(_loss(p, batch), "x"))
    tx, told = _wrapped(loss_fn), _wrapped(_loss)
    step = jax.jit(
        shard_map(
            _silent_step(tx, loss_fn),
            mesh=mesh,
            in_specs=(everywhere, everywhere, split),
            out_specs=everywhere,
        )
    )
    _assert_close(_run(step, tx, 3), _run(_told_step(told), told, 3), rtol=1e-2)


@pytest.mark.parametrize(
    "accumulate", [hd.multi_steps, optax.MultiSteps], ids=["multi_steps", "MultiSteps"]
)
def test_it_works_under_accumulation(accumulate):
    loss_fn = hd.remember_batch(_loss)
    tx, told = (
        promoting("standard", accumulate(promoting("strict", _wrapped(loss)), 2))
        for loss in (loss_fn, _loss)
    )
    found = _run(jax.jit(_silent_step(tx, loss_fn)), tx, 8)
    _assert_same(found, _run(_told_step(told), told, 8))
    assert hd.report.find_state(found[1]).count == 4


def test_accumulation_hands_the_gradient_of_the_last_batch_on():
    """As the chain gets it, where grad is passed."""
    tx = hd.multi_steps(promoting("strict", _wrapped(_loss)), 2)
    chain = optax.chain(
        promoting("standard", optax.adam(1.0)), hd.hidlr(_loss, _LABELS, update_interval=2)
    )
    chained = hd.multi_steps(promoting("strict", chain), 2)

    def step(tx, told, params, state, batch):
        grads = jax.grad(_loss)(params, batch)
        more = {"grad": grads} if told else {}
        updates, state = tx.update(grads, state, params, batch=batch, **more)
        return optax.apply_updates(params, updates), state, None

    runs = []
    for maker, told in ((tx, False), (chained, True)):
        maker = promoting("standard", maker)
        runs.append(_run(jax.jit(functools.partial(step, maker, told)), maker, 8))
    _assert_same(*runs)


def test_it_works_around_checkpoint():
    loss_fn = hd.remember_batch(jax.checkpoint(_loss))
    tx, told = _wrapped(loss_fn), _wrapped(_loss)
    silent = _run(jax.jit(_silent_step(tx, loss_fn)), tx)
    _assert_close(silent, _run(_told_step(told), told), rtol=1e-3)


def test_an_evaluation_in_the_same_step_is_not_remembered():
    loss_fn = hd.remember_batch(_loss)
    tx, told = _wrapped(loss_fn), _wrapped(_loss)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        other = loss_fn(params, jax.tree.map(lambda leaf: 100 * leaf, batch))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, other

    _assert_same(_run(step, tx), _run(_told_step(told), told))


def test_what_is_passed_wins_over_what_is_remembered():
    loss_fn = hd.remember_batch(_loss)
    tx, told = _wrapped(loss_fn), _wrapped(_loss)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(_loss)(params, batch)
        jax.grad(loss_fn)(params, jax.tree.map(lambda leaf: 100 * leaf, batch))
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    _assert_same(_run(step, tx), _run(_told_step(told), told))


def test_a_filtered_model_is_put_together_again():
    model = eqx.nn.MLP(3, "scalar", 8, 1, key=jax.random.key(0))

    @hd.remember_batch
    def loss_fn(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    tx = _wrapped(loss_fn, "all")
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x, y):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(20):
        model, state, loss = step(model, state, *_batch())
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(hd.metrics(state)["slips"]) == 0


def _inside_of(around):
    """A silent step whose loss is inside of something else."""
    loss_fn = hd.remember_batch(_loss)
    tx = _wrapped(loss_fn)

    def step(params, state, batch):
        grads = around(loss_fn)(params, batch)
        return tx.update(grads, state, params)

    return step, tx


def _by_examples(loss_fn):
    def mean(params, batch):
        x, y = batch
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, (x[:, None], y[:, None]))
        return jax.tree.map(lambda leaf: leaf.mean(0), grads)

    return mean


def _by_scan(loss_fn):
    def mean(params, batch):
        def body(total, batch):
            return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, batch)), None

        parts = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
        return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), parts)[0]

    return mean


_INSIDE = {
    "checkpoint": lambda loss_fn: jax.grad(jax.checkpoint(loss_fn)),
    "scan": _by_scan,
    "vmap": _by_examples,
    "inner jit": lambda loss_fn: jax.jit(jax.grad(loss_fn)),
    "jit of the loss": lambda loss_fn: jax.grad(jax.jit(loss_fn)),
    "another loss": lambda loss_fn: jax.grad(_loss),
}


@pytest.mark.parametrize("around", _INSIDE.values(), ids=_INSIDE.keys())
def test_where_it_cannot_work_it_fails_and_names_the_ways_out(around):
    step, tx = _inside_of(around)
    params = _params()
    with pytest.raises(ValueError, match=r"Put remember_batch around jax\.checkpoint") as error:
        jax.jit(step)(params, tx.init(params), _batch())
    for way in ("batch=", "value_fn=", r"functools.partial(loss_fn, batch=sample)"):
        assert way in str(error.value)


@pytest.mark.parametrize("jitted", [(True, False), (False, True), (True, True)])
def test_gradient_and_update_in_two_programs_are_refused(jitted):
    """Otherwise the batch of the first step would be built into the update for ever."""
    loss_fn = hd.remember_batch(_loss)
    tx, params = _wrapped(loss_fn), _params()
    gradient, update = (
        jax.jit(function) if jits else function
        for function, jits in zip((jax.grad(loss_fn), tx.update), jitted, strict=True)
    )
    with pytest.raises(ValueError, match="remember_batch holds the batch of another trace"):
        update(gradient(params, _batch()), tx.init(params), params)


# Loops that pass nothing: a sample that is bound when the optimizer is made.


@pytest.mark.parametrize(
    "bind",
    [
        lambda sample: functools.partial(_loss, batch=sample),
        lambda sample: lambda params: _loss(params, sample),
        lambda sample: jax.jit(functools.partial(_loss, batch=sample)),
    ],
    ids=["partial", "lambda", "jit"],
)
def test_a_bound_sample_needs_no_batch(bind):
    sample = _batch()
    tx, told = _wrapped(bind(sample)), _wrapped(_loss)
    params = _params()
    grads = jax.grad(_loss)(params, sample)
    found = jax.jit(tx.update)(grads, tx.init(params), params)
    expected = jax.jit(told.update)(grads, told.init(params), params, batch=sample)
    _assert_close(found, expected)


def test_a_bound_sample_trains_on_other_batches():
    tx = _wrapped(functools.partial(_loss, batch=_batch(7, examples=256)))
    params, state = _run(jax.jit(_silent_step(tx, _loss)), tx, 100)
    assert float(_loss(params, _batch(8, 256))) < 0.3 * float(_loss(_params(), _batch(8, 256)))
    rates = hd.metrics(state)
    assert all(math.isfinite(rates[f"learning_rate/{name}"]) for name in ("weight", "bias"))


# What a loop that passes nothing is told.


def test_a_missing_gradient_names_the_wrapper():
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(_loss, _LABELS))
    params = _params()
    with pytest.raises(ValueError, match=r"hidlr_optax\.hessian_informed\(optax\.adamw"):
        tx.update(params, tx.init(params), params, batch=_batch())


@pytest.mark.parametrize("loss_fn", [None, _loss])
def test_a_missing_loss_names_the_remembering_one_and_the_sample(loss_fn):
    tx, params = _wrapped(loss_fn), _params()
    with pytest.raises(ValueError, match=r"hidlr_optax\.remember_batch\(loss_fn\)") as error:
        tx.update(params, tx.init(params), params)
    assert "functools.partial(loss_fn, batch=sample)" in str(error.value)


def test_double_precision_is_remembered_as_it_is():
    with enable_x64(True):
        loss_fn = hd.remember_batch(lambda params, batch: jnp.sum((params - batch) ** 2))
        tx = hd.hessian_informed(optax.sgd(1.0), loss_fn, "all")
        params, batch = jnp.zeros(2, "float64"), jnp.ones(2, "float64")
        _, state, _ = jax.jit(_silent_step(tx, loss_fn))(params, tx.init(params), batch)
        assert state[-1].direction.dtype == jnp.float64
