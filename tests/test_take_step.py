"""One call for each kind of loop: the step of the long form, and nothing to feed inconsistently."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from support import promoting, shard_map

import hidlr_optax as hd
import hidlr_optax.flax as hdf

LABELS = {"body": "body", "head": "head"}


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] - y) ** 2)


def with_aux(params, batch):
    loss = loss_fn(params, batch)
    return loss, {"twice": 2 * loss}


def _params():
    keys = jax.random.split(jax.random.key(0))
    body, head = jax.random.normal(keys[0], (8, 16)) / 3, jax.random.normal(keys[1], (16,)) / 4
    return {"body": body, "head": head}


def _batches(steps, size=32):
    x = jax.random.normal(jax.random.key(1), (steps, size, 9))
    return list(zip(x[..., :8], x[..., 0] + x[..., 8] / 2, strict=True))


def _tx(rule=None):
    rule = hd.hidlr(None, LABELS) if rule is None else rule
    return optax.chain(promoting("standard", optax.adamw(1.0)), rule)


def _run(step, tx, steps=14):
    params, outs = _params(), []
    state, step = tx.init(params), jax.jit(step)
    for batch in _batches(steps):
        params, state, out = step(params, state, batch)
        outs.append(out)
    return params, state, outs


def _long_form(edit=None):
    tx = _tx(hd.hidlr(loss_fn, LABELS))

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        edited = grads if edit is None else edit(grads)
        updates, state = tx.update(edited, state, params, batch=batch, value=loss, grad=grads)
        return optax.apply_updates(params, updates), state, loss

    return _run(step, tx)


def _assert_close(one, other):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), one, other)


def _assert_nothing_amiss(state):
    assert hd.Slip(int(hd.metrics(state)["slips"])) == hd.Slip(0)


def test_it_is_the_step_of_the_long_form():
    tx = _tx()
    params, state, losses = _run(functools.partial(hd.take_step, tx, loss_fn), tx)
    expected, _, expected_losses = _long_form()
    _assert_close((params, losses), (expected, expected_losses))
    _assert_nothing_amiss(state)


def _move_at_every_third(rates):
    assert all((rates[n] == rates[n - 1]) == (n % 3 > 0) for n in range(1, len(rates)))


def test_a_static_refresh_leaves_the_rates_between_alone():
    tx, rates = _tx(hd.hiulr(None)), []
    params = _params()
    state = tx.init(params)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params, state, batch, refresh):
        return hd.take_step(tx, loss_fn, params, state, batch, refresh=refresh)

    for n, batch in enumerate(_batches(9)):
        params, state, _ = step(params, state, batch, refresh=n % 3 == 0)
        rates.append(float(optax.tree.get(state, "group_learning_rates")["all"]))
    _move_at_every_third(rates)


def test_auxiliary_outputs_come_back():
    tx = _tx()
    step = functools.partial(hd.take_step, tx, with_aux, has_aux=True)
    params, _, outs = _run(step, tx)
    expected, *_, losses = _long_form()
    _assert_close(params, expected)
    _assert_close(outs, [(loss, {"twice": 2 * loss}) for loss in losses])


def test_an_edited_gradient_is_for_the_optimizer_alone():
    clip = optax.clip_by_global_norm(0.1)

    def edit(grads):
        return clip.update(grads, clip.init(grads))[0]

    tx = _tx()
    params, state, _ = _run(functools.partial(hd.take_step, tx, loss_fn, edit=edit), tx)
    _assert_close(params, _long_form(edit)[0])
    _assert_nothing_amiss(state)


def test_an_accumulated_gradient_is_probed_on_all_mini_batches():
    def mean_loss(params, batch):
        halves = jax.tree.map(lambda part: part.reshape(4, -1, *part.shape[1:]), batch)
        return jnp.mean(jax.lax.map(lambda half: loss_fn(params, half), halves))

    def accumulated(params, batch):
        halves = jax.tree.map(lambda part: part.reshape(4, -1, *part.shape[1:]), batch)

        def add(total, half):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, half)), None

        zero = jnp.zeros(()), optax.tree.zeros_like(params)
        return jax.tree.map(lambda x: x / 4, jax.lax.scan(add, zero, halves)[0])

    tx = _tx()
    step = functools.partial(hd.take_step, tx, mean_loss, value_and_grad=accumulated)
    params, state, _ = _run(step, tx)
    _assert_close(params, _long_form()[0])
    _assert_nothing_amiss(state)


def test_a_gradient_averaged_over_devices():
    def mean_loss(params, batch):
        return jax.lax.pmean(loss_fn(params, batch), "x")

    tx = _tx()
    everywhere, split = PartitionSpec(), PartitionSpec("x")
    step = shard_map(
        functools.partial(hd.take_step, tx, mean_loss),
        mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=(everywhere, everywhere, split),
        out_specs=everywhere,
    )
    params, state, _ = _run(step, tx)
    _assert_close(params, _long_form()[0])
    _assert_nothing_amiss(state)


def test_a_chain_without_hidlr_takes_the_same_call():
    tx = promoting("standard", optax.adam(1e-2))
    params, _, losses = _run(functools.partial(hd.take_step, tx, loss_fn), tx)
    assert losses[-1] < losses[0]
    assert not np.array_equal(params["head"], _params()["head"])


@pytest.mark.parametrize("linen", [False, True])
def test_complex_parameters_need_no_thought(linen):
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(2, 64, 9)).astype(np.float32)
    data = jnp.asarray(parts[0] + 1j * parts[1])

    def loss(params, data):
        return jnp.mean(jnp.abs(data[:, :8] @ params["z"] - data[:, 8]) ** 2)

    params = {"z": jnp.zeros(8, jnp.complex64)}
    tx = optax.chain(promoting("standard", optax.adam(1.0)), hd.hiulr(None))
    if linen:
        start = hdf.TrainState.create(apply_fn=None, params=params, tx=tx)
        step = jax.jit(lambda state: state.take_step(loss, data))
    else:
        start = params, tx.init(params)

        @jax.jit
        def step(carry):
            *carry, loss_here = hd.take_step(tx, loss, *carry, data)
            return carry, loss_here

    state, losses = start, []
    for _ in range(150):
        state, value = step(state)
        losses.append(float(value))
    best = np.linalg.lstsq(data[:, :8], data[:, 8])[1][0] / 64
    assert losses[-1] < best + 0.05 * (losses[0] - best)
    _assert_nothing_amiss(state.opt_state if linen else state[1])


# linen


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.2, deterministic=False)(jnp.tanh(nn.Dense(16)(x)))
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(x))[:, 0]


class _State(hdf.TrainState):
    batch_stats: dict


def test_linen_with_dropout_and_batch_statistics():
    net, batches = _Net(), _batches(14)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with jax.numpy_dtype_promotion("standard"):
        variables = net.init(keys, batches[0][0])
    tx = optax.chain(promoting("standard", optax.adamw(1.0)), hd.hiulr(None))
    state = _State.create(apply_fn=net.apply, tx=tx, **variables)

    @jax.jit
    def step(state, batch, key):
        def loss_of(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            with jax.numpy_dtype_promotion("standard"):
                out, new = net.apply(
                    variables, batch[0], rngs={"dropout": key}, mutable=["batch_stats"]
                )
            return jnp.mean((out - batch[1]) ** 2), new["batch_stats"]

        state, (loss, stats) = state.take_step(loss_of, has_aux=True)
        return state.replace(batch_stats=stats), loss

    losses = []
    for key, batch in zip(jax.random.split(jax.random.key(2), 14), batches, strict=True):
        state, loss = step(state, batch, key)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert int(state.step) == 14
    _assert_nothing_amiss(state.opt_state)


def test_linen_with_a_static_refresh():
    tx, rates = _tx(hd.hiulr(None)), []
    state = hdf.TrainState.create(apply_fn=None, params=_params(), tx=tx)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(state, batch, refresh):
        return state.take_step(loss_fn, batch, refresh=refresh)[0]

    for n, batch in enumerate(_batches(9)):
        state = step(state, batch, refresh=n % 3 == 0)
        rates.append(float(optax.tree.get(state, "group_learning_rates")["all"]))
    _move_at_every_third(rates)


# nnx


class _Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.norm(self.first(x)))))[:, 0]


def _nnx_loss(model, batch):
    with jax.numpy_dtype_promotion("standard"):
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)


def _nnx_with_aux(model, batch):
    loss = _nnx_loss(model, batch)
    return loss, -loss


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("wrt", [nnx.Param, nnx.All(nnx.Param, nnx.PathContains("head"))])
def test_nnx_with_dropout_batch_statistics_and_a_part_that_trains(wrt, has_aux):
    model = _Module(nnx.Rngs(0))
    before = jnp.copy(model.first.kernel[...])
    tx = optax.chain(promoting("standard", optax.adamw(1.0)), hd.hiulr(None))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    loss = _nnx_with_aux if has_aux else _nnx_loss

    @nnx.jit
    def step(model, optimizer, batch):
        return hdf.take_step(model, optimizer, loss, batch, has_aux=has_aux)

    outs = [step(model, optimizer, batch) for batch in _batches(14)]
    if has_aux:
        assert float(outs[-1][1]) == -float(outs[-1][0])
        outs = [out[0] for out in outs]
    assert outs[-1] < outs[0]
    assert np.array_equal(before, model.first.kernel[...]) == (wrt is not nnx.Param)
    _assert_nothing_amiss(optimizer.opt_state)


def test_nnx_with_an_own_gradient_that_is_edited():
    model = _Module(nnx.Rngs(0))
    tx = optax.chain(promoting("standard", optax.adamw(1.0)), hd.hiulr(None))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        return hdf.take_step(
            model,
            optimizer,
            _nnx_loss,
            batch,
            value_and_grad=nnx.value_and_grad(_nnx_loss),
            edit=lambda grads: jax.tree.map(lambda grad: jnp.clip(grad, -0.01, 0.01), grads),
        )

    losses = [float(step(model, optimizer, batch)) for batch in _batches(14)]
    assert losses[-1] < losses[0]
    _assert_nothing_amiss(optimizer.opt_state)


def test_nnx_with_a_static_refresh():
    model, rates = _Module(nnx.Rngs(0)), []
    tx = optax.chain(promoting("standard", optax.adamw(1.0)), hd.hiulr(None))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @functools.partial(nnx.jit, static_argnames="refresh")
    def step(model, optimizer, batch, refresh):
        return hdf.take_step(model, optimizer, _nnx_loss, batch, refresh=refresh)

    for n, batch in enumerate(_batches(9)):
        step(model, optimizer, batch, refresh=n % 3 == 0)
        rates.append(float(optax.tree.get(optimizer.opt_state, "group_learning_rates")["all"]))
    _move_at_every_third(rates)
