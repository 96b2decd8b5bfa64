"""Errors that name the cause and its remedy, and inputs that used to be refused for no reason."""

import functools
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import promoting

import hidlr_optax as hd
import hidlr_optax.flax as hdf


def _adamw():
    return promoting("standard", optax.adamw(1.0))


# 5. Losses of a model instead of its parameters; extras that are missing.


def test_a_loss_of_an_nnx_model_is_told_what_to_use():
    def loss_fn(model, batch):
        return jnp.mean((model(batch) - 1) ** 2)

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(_adamw(), hd.hiulr(loss_fn))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batch = jnp.ones((4, 3))
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    with pytest.raises(ValueError, match=r"hidlr\(None, labels\).*value_fn_for") as error:
        optimizer.update(model, grads, batch=batch, value=loss, grad=grads)
    assert isinstance(error.value.__cause__, TypeError)


def test_a_loss_of_an_equinox_model_is_told_to_combine():
    model = eqx.nn.MLP(1, 1, 8, 1, key=jax.random.key(0))
    x = jnp.linspace(0, 1, 16)[:, None]

    def loss(model, x):
        return jnp.mean((jax.vmap(model)(x) - jnp.sin(4 * x)) ** 2)

    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optax.chain(_adamw(), hd.hiulr(None))
    value, grad = eqx.filter_value_and_grad(loss)(model, x)
    with pytest.raises(ValueError, match=r"eqx\.combine\(params, static\)"):
        tx.update(grad, tx.init(params), params, value=value, grad=grad, value_fn=loss, x=x)

    def value_fn(params):
        return loss(eqx.combine(params, static), x)

    tx.update(grad, tx.init(params), params, value=value, grad=grad, value_fn=value_fn)


def test_labels_of_a_whole_equinox_model_are_told_to_filter():
    model = eqx.nn.MLP(2, 2, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    with pytest.raises(ValueError, match=r"eqx\.filter\(model, eqx\.is_inexact_array\)"):
        hd.hidlr(None, jax.tree.map(lambda _: "w", model)).init(params)
    hd.hidlr(None, jax.tree.map(lambda _: "w", params)).init(params)


@pytest.mark.parametrize(("module", "needs"), [("flax", "flax"), ("plot", "matplotlib")])
def test_a_missing_extra_is_named(module, needs):
    code = f"import sys; sys.modules[{needs!r}] = None; import hidlr_optax.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"needs {needs}: pip install 'hidlr-optax[{module}]'" in done.stderr


def test_a_parameter_that_is_no_float_is_named():
    tx = hd.hidlr(lambda params, batch: params["count"] ** 2, "all")
    params = {"count": 100}
    with pytest.raises(ValueError, match=r"without a gradient, are the parameters 'count'"):
        tx.update({"count": 1}, tx.init(params), params, batch=0, grad={"count": 200})


def test_a_wrapper_that_drops_keywords_is_named():
    params = jnp.ones(2)
    tx = optax.with_extra_args_support(
        optax.lookahead(hd.hiulr(lambda p, b: jnp.sum(p**2)), 5, 0.5)
    )
    state = tx.init(optax.LookaheadParams.init_synced(params))
    both = optax.LookaheadParams.init_synced(params)
    with pytest.raises(ValueError, match=r"optax\.lookahead is one\) drops keywords"):
        tx.update(params, state, both, batch=0, grad=params)


def test_complex_gradients_that_may_be_conjugated_are_asked_for_both():
    params = {"z": jnp.ones(2, jnp.complex64)}
    tx = optax.chain(optax.sgd(1.0), hd.hiulr(lambda p, b: jnp.sum(jnp.abs(p["z"]) ** 2)))
    state = hdf.TrainState.create(apply_fn=None, params=params, tx=tx)
    loss, grad = jax.value_and_grad(lambda p: jnp.sum(jnp.abs(p["z"]) ** 2))(params)
    down = jax.tree.map(jnp.conj, grad)
    with pytest.raises(ValueError, match="complex parameters, pass both"):
        state.apply_gradients(grads=down, batch=0, value=loss)
    state.apply_gradients(grads=down, grad=grad, batch=0, value=loss)


def test_multi_steps_without_hidlr_in_it_is_an_error():
    tx = hd.multi_steps(optax.sgd(1.0), 4)
    with pytest.raises(ValueError, match=r"holds no hidlr.*optax\.MultiSteps"):
        tx.init(jnp.ones(2))


# 12. Parameters of bfloat16 where float32 does not fit; keys as arguments.


def _scan_loss(params, batch):
    def layer(carry, kernel):
        return carry + jnp.tanh(carry @ kernel), None

    hidden, _ = jax.lax.scan(layer, batch, params["layers"])
    return jnp.mean((hidden @ params["head"] - batch.sum(1)).astype(jnp.float32) ** 2)


def _convolution_loss(params, batch):
    out = jax.lax.conv(batch[:, None], params["kernel"], (1,), "SAME")
    return jnp.mean((out - batch[:, None]).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize(
    ("loss_fn", "shapes"),
    [
        (_scan_loss, {"layers": (3, 4, 4), "head": (4,)}),
        (_convolution_loss, {"kernel": (1, 1, 3)}),
    ],
)
def test_bfloat16_parameters_train_where_wider_ones_do_not_fit(loss_fn, shapes, rematerialise):
    loss_fn = jax.checkpoint(loss_fn) if rematerialise else loss_fn
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        name: jax.random.normal(key, shape, jnp.bfloat16) / 2
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    batch = jax.random.normal(keys[2], (16, 4), jnp.bfloat16)
    tx = optax.chain(_adamw(), hd.hidlr(loss_fn, {name: name for name in shapes}))

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(40):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(hd.metrics(state)["slips"]) == 0


class _Dropped(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.dropout(self.linear(x), rngs=rngs)


def _dropped_loss(model, x, rngs):
    return jnp.mean((model(x, rngs) - 1) ** 2)


def test_keys_beside_the_batch_are_held_for_all_probes_and_left_alone():
    rngs, model, x = nnx.Rngs(1), _Dropped(nnx.Rngs(0)), jnp.ones((16, 3))
    value_fn = hdf.value_fn_for(model, _dropped_loss, x, rngs)
    params = nnx.state(model, nnx.Param)
    first = jax.jit(value_fn)(params)
    assert float(value_fn(params)) == pytest.approx(float(first))
    np.testing.assert_array_equal(rngs.default.count[...], 0)
    assert float(_dropped_loss(model, x, rngs)) == pytest.approx(float(first))
    assert float(_dropped_loss(model, x, rngs)) != pytest.approx(float(first))
    assert float(value_fn(params)) == pytest.approx(float(first))


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_model_with_keys_beside_the_batch_trains(as_keyword):
    model, rngs = _Dropped(nnx.Rngs(0)), nnx.Rngs(1)
    optimizer = nnx.Optimizer(model, optax.chain(_adamw(), hd.hiulr(None)), wrt=nnx.Param)
    x = jnp.ones((16, 3))

    @nnx.jit
    def step(model, optimizer, rngs):
        keywords = {"rngs": rngs} if as_keyword else {}
        args = (x,) if as_keyword else (x, rngs)
        return hdf.take_step(model, optimizer, _dropped_loss, *args, **keywords)

    losses = [float(step(model, optimizer, rngs)) for _ in range(40)]
    assert np.mean(losses[-10:]) < 0.9 * losses[0]
    assert int(rngs.default.count[...]) == 40
    assert int(hd.metrics(optimizer.opt_state)["slips"]) == 0


# Arguments in the wrong place.


@pytest.mark.parametrize("name", ["learning_rate", "lr"])
def test_a_learning_rate_is_told_what_takes_its_place(name):
    given = {name: 1e-3}
    makers = [
        functools.partial(hd.hidlr, None, "all"),
        functools.partial(hd.hiulr, None),
        functools.partial(hd.hessian_informed, optax.sgd(1.0), None, "all"),
    ]
    for make in makers:
        with pytest.raises(TypeError, match=f"takes no '{name}': it finds the learning rates"):
            make(**given)
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            make(other=1)


@pytest.mark.parametrize(
    "rules", [[("head/.*", "head"), (".*", "rest")], {"head/.*": "head", ".*": "rest"}]
)
def test_rules_in_the_place_of_labels_are_called_rules(rules):
    with pytest.raises(ValueError, match=r"look like rules.*label_by_path"):
        hd.hidlr(None, rules).init({"head": {"w": jnp.ones(2)}, "body": jnp.ones(2)})


def test_labels_that_do_not_match_are_not_called_rules():
    for labels in ({"layers.0": "a"}, {"head": "a"}, [("a", "b"), ("a", "c")]):
        params = [(jnp.ones(2),)] if isinstance(labels, list) else {"other": jnp.ones(2)}
        with pytest.raises(ValueError, match="param_labels does not match"):
            hd.hidlr(None, labels).init(params)


def test_swapped_arguments_of_take_step_are_named():
    def loss_fn(params):
        return jnp.sum(params["w"] ** 2)

    params, tx = {"w": jnp.ones(2)}, hd.hessian_informed(optax.sgd(1.0), None, "all")
    state = tx.init(params)
    with pytest.raises(TypeError, match="the transformation and then the loss, got function and"):
        hd.take_step(loss_fn, tx, params, state)
    with pytest.raises(TypeError, match="the parameters and then the state"):
        hd.take_step(tx, loss_fn, state, params)


def test_swapped_arguments_of_an_nnx_step_are_named():
    def loss_fn(model):
        return jnp.sum(model.kernel[...] ** 2)

    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, hd.hessian_informed(optax.sgd(1.0), None, "all"), wrt=nnx.Param
    )
    with pytest.raises(TypeError, match="got Optimizer, Linear, function"):
        hdf.take_step(optimizer, model, loss_fn)
    with pytest.raises(TypeError, match="got Linear, function, "):
        hdf.take_step(model, loss_fn, optimizer)


def test_filters_may_be_a_dict_and_have_to_be_pairs():
    base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = nnx.LoRA(4, 2, 3, base_module=base, rngs=nnx.Rngs(0))
    pairs = hdf.label_by_filter(model, [(nnx.LoRAParam, "lora")], "rest")
    assert hdf.label_by_filter(model, {nnx.LoRAParam: "lora"}, "rest") == pairs
    for rules in ([nnx.LoRAParam], "lora", [("lora", nnx.LoRAParam)]):
        with pytest.raises(ValueError, match=r"filter, label.*among them"):
            hdf.label_by_filter(model, rules, "rest")
