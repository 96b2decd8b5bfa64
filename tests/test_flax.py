"""Both of Flax's loops, with dropout and batch norm: one function per refresh, and no leaks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import promoting

import hidlr_optax as hd
import hidlr_optax.flax as hdf

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (64, 6))
Y = (X[:, :1] * 2 - X[:, 1:2] > 0).astype(jnp.float32)
BATCH = (X, Y)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(16)(x)))
        return nn.Dense(1, name="head")(nn.Dropout(0.3, deterministic=not train)(x))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))


def nnx_loss(model, batch):
    return optax.sigmoid_binary_cross_entropy(model(batch[0]), batch[1]).mean()


def everything_but_params(model):
    arrays = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in arrays
    ]


def linen_setup(tx):
    model = LinenModel()
    variables = model.init({"params": KEY, "dropout": KEY}, X, train=True)

    class State(hdf.TrainState):
        batch_stats: object = None

    return model, State.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
    )


def linen_step(state, batch, key):
    def loss_fn(params):
        logits, new = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch[0],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return optax.sigmoid_binary_cross_entropy(logits, batch[1]).mean(), new["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    value_fn = lambda params: loss_fn(params)[0]  # noqa: E731
    return state.apply_gradients(
        grads=grads, value=loss, value_fn=value_fn, batch_stats=stats
    ), loss


def test_linen_trains_with_dropout_and_batch_norm():
    tx = optax.chain(
        promoting("standard", optax.adamw(1.0)), hd.hidlr(None, hd.label_by_role, update_interval=5)
    )
    _, state = linen_setup(tx)
    before = jax.tree.map(np.asarray, state.batch_stats)
    step = jax.jit(linen_step)
    losses = []
    for n in range(60):
        state, loss = step(state, BATCH, jax.random.fold_in(KEY, n))
        losses.append(float(loss))
    assert step._cache_size() == 2  # Flax's own step count begins as an int
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert int(state.step) == 60
    assert set(hd.metrics(state.opt_state)) >= {"learning_rate/norm", "learning_rate/head"}
    # The statistics moved, by the forward pass of the gradient alone.
    moved = optax.tree.sub(state.batch_stats, before)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(moved))


def test_linen_statistics_do_not_depend_on_the_probes():
    _, state = linen_setup(optax.chain(optax.sgd(1.0), hd.hidlr(None, hd.label_by_role)))
    _, plain = linen_setup(optax.sgd(0.1))
    state, _ = jax.jit(linen_step)(state, BATCH, KEY)
    plain, _ = jax.jit(linen_step)(plain, BATCH, KEY)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, plain.batch_stats)


def test_train_state_hands_on_every_argument():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = hdf.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    grads = {"w": jnp.ones(2)}
    value_fn = lambda params: jnp.sum(params["w"])  # noqa: E731
    state.apply_gradients(grads=grads, batch="batch", value=2.0, value_fn=value_fn)
    assert seen == {"batch": "batch", "value": 2.0, "value_fn": value_fn, "grad": grads}
    raw = {"w": jnp.zeros(2)}
    state.apply_gradients(grads=grads, grad=raw)
    assert seen["grad"] is raw
    assert "refresh" not in seen
    state.apply_gradients(grads=grads, refresh=False)
    assert seen["refresh"] is False


@pytest.mark.parametrize(
    "tx", [promoting("standard", optax.adamw(1e-2)), optax.chain(optax.clip(1.0), optax.sgd(0.1))]
)
def test_train_state_is_flax_own_for_other_optimizers(tx):
    from flax.training.train_state import TrainState

    params, grads = {"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}
    own = TrainState.create(apply_fn=None, params=params, tx=tx).apply_gradients(grads=grads)
    ours = hdf.TrainState.create(apply_fn=None, params=params, tx=tx).apply_gradients(grads=grads)
    jax.tree.map(np.testing.assert_array_equal, ours.params, own.params)
    assert ours.tx is tx
    assert jax.tree.structure(ours.opt_state) == jax.tree.structure(own.opt_state)
    assert int(ours.step) == 1


def test_train_state_with_parameters_that_flax_overwrites():
    # fp8's scales: the gradient takes the place of the parameter.
    params = {"params": {"w": jnp.ones(3)}, "_overwrite_with_gradient": {"scale": jnp.zeros(())}}
    grads = {"params": {"w": jnp.ones(3)}, "_overwrite_with_gradient": {"scale": jnp.ones(())}}
    tx = hd.hidlr(None, "all", init_learning_rate=0.01, warmup=0)
    state = hdf.TrainState.create(apply_fn=None, params=params, tx=optax.chain(optax.sgd(1.0), tx))
    loss = lambda p: jnp.sum(p["w"] ** 2) / 2  # noqa: E731
    state = jax.jit(
        lambda s, g: s.apply_gradients(grads=g, value=loss(s.params["params"]), value_fn=loss)
    )(state, grads)
    assert float(state.params["_overwrite_with_gradient"]["scale"]) == 1.0
    np.testing.assert_allclose(state.params["params"]["w"], 0.99, rtol=1e-5)


def test_value_fn_is_the_loss_that_the_gradient_saw():
    model = NNXModel(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    value_fn = hdf.value_fn_for(model, nnx_loss, BATCH)
    loss, _ = nnx.value_and_grad(nnx_loss)(model, BATCH)
    np.testing.assert_allclose(value_fn(params), loss, rtol=1e-6)
    # Made afterwards, it has the next dropout mask.
    assert abs(float(hdf.value_fn_for(model, nnx_loss, BATCH)(params) - loss)) > 1e-4


def test_value_fn_changes_nothing_and_is_the_same_at_each_call():
    model = NNXModel(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    before = jax.tree.map(np.asarray, everything_but_params(model))
    value_fn = hdf.value_fn_for(model, nnx_loss, BATCH)
    first, second = value_fn(params), value_fn(params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    mapped = jax.jit(jax.vmap(value_fn))(stacked)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(mapped, jnp.stack([first, first]), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, everything_but_params(model), before)


def test_value_fn_takes_the_first_of_several_outputs_and_keywords():
    model = NNXModel(nnx.Rngs(0))
    value_fn = hdf.value_fn_for(
        model, lambda m, b, scale: (scale * nnx_loss(m, b), m), BATCH, scale=2.0
    )
    plain = hdf.value_fn_for(model, nnx_loss, BATCH)
    params = nnx.state(model, nnx.Param)
    np.testing.assert_allclose(value_fn(params), 2 * plain(params), rtol=1e-6)


@nnx.jit
def nnx_step(model, optimizer, batch):
    value_fn = hdf.value_fn_for(model, nnx_loss, batch)
    loss, grads = nnx.value_and_grad(nnx_loss)(model, batch)
    optimizer.update(model, grads, value_fn=value_fn, value=loss, grad=grads)
    return loss


def test_nnx_trains_with_dropout_and_batch_norm():
    model = NNXModel(nnx.Rngs(0))
    tx = hd.hidlr(None, hd.label_by_role, update_interval=5)
    optimizer = nnx.Optimizer(
        model, optax.chain(promoting("standard", optax.adamw(1.0)), tx), wrt=nnx.Param
    )
    losses = [float(nnx_step(model, optimizer, BATCH)) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert {key for key in hd.metrics(optimizer.opt_state) if key.startswith("learning_rate/")} == {
        f"learning_rate/{label}" for label in ("norm", "head", "bias", "rest")
    }


def test_nnx_probes_leave_keys_and_statistics_to_the_gradient():
    probed, plain = NNXModel(nnx.Rngs(0)), NNXModel(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(None, hd.label_by_role))
    nnx_step(probed, nnx.Optimizer(probed, tx, wrt=nnx.Param), BATCH)
    nnx.value_and_grad(nnx_loss)(plain, BATCH)
    # As in linen: one batch went through the running statistics, one key was drawn.
    for ours, expected in zip(
        everything_but_params(probed), everything_but_params(plain), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def step_of(wrt):
    @nnx.jit
    def step(model, optimizer, batch):
        value_fn = hdf.value_fn_for(model, nnx_loss, batch, wrt=wrt)
        loss, grads = nnx.value_and_grad(nnx_loss, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, grads, value_fn=value_fn, value=loss, grad=grads)
        return loss

    return step


class Adapted(nnx.Module):
    def __init__(self, rngs):
        linear = nnx.Linear(6, 16, rngs=rngs)
        self.body = nnx.LoRA(6, 2, 16, base_module=linear, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.body(x))))


@pytest.mark.parametrize(
    ("wrt", "trained"),
    [
        (nnx.LoRAParam, {"lora_A", "lora_B"}),
        (nnx.Any(nnx.LoRAParam, nnx.PathContains("head")), {"lora_A", "lora_B", "head"}),
    ],
)
def test_nnx_optimizer_with_respect_to_lora(wrt, trained):
    model = Adapted(nnx.Rngs(0))
    frozen = jax.tree.map(np.asarray, nnx.state(model, nnx.All(nnx.Param, nnx.Not(wrt))))
    tx = optax.chain(
        promoting("standard", optax.adamw(1.0)), hd.hidlr(None, hd.label_by_role, update_interval=5)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    step = step_of(wrt)
    losses = [float(step(model, optimizer, BATCH)) for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    rates = hd.metrics(optimizer.opt_state)
    assert {key.split("/")[1] for key in rates if key.startswith("learning_rate/")} == trained
    after = nnx.state(model, nnx.All(nnx.Param, nnx.Not(wrt)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), frozen)


def test_labels_from_filters_are_labels_by_path():
    model = Adapted(nnx.Rngs(0))
    rules = [(nnx.LoRAParam, "lora"), (nnx.PathContains("head"), "head")]
    labels = hdf.label_by_filter(model, rules, default="rest")
    expected = {
        "body": {
            "lora_a": "lora",
            "lora_b": "lora",
            "base_module": {"kernel": "rest", "bias": "rest"},
        },
        "head": {"kernel": "head", "bias": "head"},
    }
    assert labels == expected
    tx = hd.hidlr(None, labels)
    assert set(tx.init(nnx.state(model, nnx.Param)).group_learning_rates) == {
        "lora",
        "head",
        "rest",
    }


def test_labels_from_filters_serve_models_with_lists():
    model = nnx.Sequential(
        nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 1, rngs=nnx.Rngs(1))
    )
    labels = hdf.label_by_filter(model, [(nnx.PathContains(2), "last")], default="rest")
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(None, labels))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx_step(model, optimizer, BATCH)
    assert set(hd.metrics(optimizer.opt_state)) >= {"learning_rate/last", "learning_rate/rest"}


def test_labels_of_a_part_of_the_model():
    labels = hdf.label_by_filter(
        Adapted(nnx.Rngs(0)), [(nnx.PathContains("lora_a"), "A")], default="B", wrt=nnx.LoRAParam
    )
    assert labels == {"body": {"lora_a": "A", "lora_b": "B"}}


def test_filters_that_select_nothing_are_refused():
    model = NNXModel(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"lora.*selects no parameter"):
        hdf.label_by_filter(model, [(nnx.LoRAParam, "lora")], default="rest")
    with pytest.raises(ValueError, match="no rule selects 'body/bias'"):
        hdf.label_by_filter(model, [(nnx.PathContains("head"), "head")])
    with pytest.raises(ValueError, match="selects no parameter of NNXModel"):
        hdf.label_by_filter(model, [], default="rest", wrt=nnx.LoRAParam)
    with pytest.raises(ValueError, match="selects no parameter of NNXModel"):
        hdf.value_fn_for(model, nnx_loss, BATCH, wrt=nnx.LoRAParam)


def test_a_plan_as_an_nnx_filter_trains_its_groups_alone():
    model = Adapted(nnx.Rngs(0))
    plan = hd.Plan(trainable={"lora_B", "head"}, frozen={"lora_A", "bias", "rest"})
    wrt = hdf.trainable_filter(model, hd.label_by_role, plan)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tx = optax.chain(
        promoting("standard", optax.adamw(1.0)), hd.hidlr(None, hd.label_by_role, update_interval=5)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    step = step_of(wrt)
    losses = [float(step(model, optimizer, BATCH)) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before["body"], after["body"])
    assert moved == {
        "lora_a": False,
        "lora_b": True,
        "base_module": {"bias": False, "kernel": False},
    }
    assert set(hd.report.find_state(optimizer.opt_state).group_learning_rates) == {
        "lora_B",
        "head",
    }
    # Adam's moments and the last direction: three copies of what trains, and scalars.
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(model, wrt)))
    state = hd.report.find_state(optimizer.opt_state)
    stored = sum(x.size for x in jax.tree.leaves(optimizer.opt_state) if x.ndim)
    per_group = sum(x.size for x in jax.tree.leaves((state.applied, state.memory)) if x.ndim)
    assert stored == 3 * trained + per_group
    assert per_group <= 6 * 2  # a few numbers for each of the two groups
    with pytest.raises(ValueError, match=r"plan does not know \['lora_A', 'rest'\]"):
        hdf.trainable_filter(model, hd.label_by_role, hd.Plan({"head"}, {"bias", "lora_B"}))


def test_a_module_where_parameters_belong_is_refused():
    model = NNXModel(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"got the nnx module NNXModel: pass nnx\.state"):
        hd.influence.start(hd.label_by_role, model)
    with pytest.raises(ValueError, match="got the nnx module"):
        hd.Plan({"head"}, {"rest"}, rules="role").label(model)


def test_a_value_fn_of_other_parameters_than_the_optimizer_has_is_refused():
    model = Adapted(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(None, hd.label_by_role))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    gradient = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
    grads = gradient(model, BATCH)
    value_fn = hdf.value_fn_for(model, nnx_loss, BATCH)
    with pytest.raises(ValueError, match=r"selects 6 parameters .* hands over 2"):
        optimizer.update(model, grads, value_fn=value_fn, grad=grads)


# Trainers that hand nothing but gradients to the optimizer.


class _Noisy(nnx.Module):
    def __init__(self, rngs):
        self.body, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.norm(self.body(x)))))


def _noisy_loss(model, x, y):
    return jnp.mean((model(x)[:, 0] - y) ** 2), {"aux": y}


@pytest.mark.parametrize("accumulates", [False, True])
def test_an_nnx_trainer_that_passes_nothing_trains(accumulates):
    """The loss is remembered with dropout keys and statistics as they were at the gradient."""
    loss_fn = hdf.remember_batch(_noisy_loss)
    base = promoting("standard", optax.adam(1.0))
    tx = hd.hessian_informed(base, loss_fn, hd.label_by_role)
    if accumulates:
        tx = promoting("standard", optax.MultiSteps(promoting("strict", tx), 2))
    model = _Noisy(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (64, 4))

    @nnx.jit
    def step(model, optimizer, x, y):
        (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, x, x.sum(1))) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert int(hd.metrics(optimizer.opt_state)["slips"]) == 0
    assert model.norm.mean[...].any()


def test_the_loss_that_an_nnx_trainer_remembers_is_that_of_the_gradient():
    """Compared with `value`, at the same dropout key."""
    loss_fn = hdf.remember_batch(_noisy_loss)
    model = _Noisy(nnx.Rngs(0))
    tx = hd.hessian_informed(optax.sgd(1.0), loss_fn, "all")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
        optimizer.update(model, grads, value=loss)

    step(model, optimizer, jnp.ones((8, 4)), jnp.arange(8.0))
    assert int(hd.metrics(optimizer.opt_state)["slips"]) == 0
