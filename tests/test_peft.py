"""Choosing groups, plans as JSON, and parameters in two trees."""

import dataclasses
import itertools
import json
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import promoting

import hidlr_optax as hd
from hidlr_optax.influence import GroupInfluence, Influence
from hidlr_optax.peft._knapsack import best_subsets

_POSITIVE = st.floats(1e-12, 1e12)
_ERROR = st.none() | st.floats(0, 1e6)


def _group(size, total, error=None, marginal=None):
    return GroupInfluence(size, 9, total=total, total_error=error, marginal=marginal)


_RESOLVED = st.builds(_group, st.integers(1, 10**9), _POSITIVE, _ERROR, st.none() | _POSITIVE)
_LOST = st.builds(
    lambda size, lost, kind: GroupInfluence(size, 9, **{kind: lost}),
    st.integers(1, 10**9),
    st.integers(5, 9),
    st.sampled_from(["negative", "unresolved"]),
)
_LABEL = st.text(st.characters(codec="utf-8"), max_size=4)


def _influences(group=_RESOLVED | _LOST, max_size=6):
    groups = st.dictionaries(_LABEL, group, min_size=1, max_size=max_size)
    return st.builds(Influence, groups, steps=st.integers(0, 10**6))


def _of(**groups):
    return Influence({name: _group(*group) for name, group in groups.items()}, steps=90)


# --- select -------------------------------------------------------------------------------------


@given(_influences())
@settings(deadline=None)
def test_psi_of_one_trains_everything(influence):
    assume(any(group.total for group in influence.groups.values()))
    plan = hd.peft.select(influence, 1.0)
    assert plan.trainable == set(influence.groups)
    assert plan.frozen == frozenset()


@given(_influences(), st.floats(1, 1e9), st.floats(1, 1e9))
@settings(deadline=None)
def test_a_larger_psi_trains_a_part_of_what_a_smaller_one_does(influence, one, other):
    assume(any(group.total for group in influence.groups.values()))
    trained = []
    for psi in sorted([one, other]):
        try:
            trained.append(hd.peft.select(influence, psi).trainable)
        except ValueError:  # that it would freeze every group
            trained.append(frozenset())
    assert trained[0] >= trained[1]


@given(_influences(), st.floats(1, 1e9))
@settings(deadline=None)
def test_select_is_the_rule_of_the_paper(influence, psi):
    ppis = {name: g.total / g.size for name, g in influence.groups.items() if g.total is not None}
    assume(ppis)
    expected = set()
    for name, group in influence.groups.items():
        if name in ppis:
            trains = not ppis[name] < psi * min(ppis.values())
        else:
            trains = group.negative > 0 or psi == 1
        expected |= {name} if trains else set()
    assume(expected)
    plan = hd.peft.select(influence, psi)
    assert (plan.trainable, plan.psi, plan.steps) == (expected, psi, influence.steps)
    assert plan.influence == influence
    assert plan.parameters == sum(influence.groups[name].size for name in expected)


@given(_influences(_RESOLVED))
@settings(deadline=None)
def test_the_largest_psi_that_the_error_names_leaves_one_group_and_no_larger_does(influence):
    ppis = {name: group.total / group.size for name, group in influence.groups.items()}
    with pytest.raises(ValueError, match="would freeze every group") as error:
        hd.peft.select(influence, 1e300)
    largest = float(str(error.value).rsplit(" ", 1)[1])
    plan = hd.peft.select(influence, largest)
    assert plan.trainable == {name for name in ppis if ppis[name] == max(ppis.values())}
    with pytest.raises(ValueError, match="would freeze every group"):
        hd.peft.select(influence, largest * (1 + 1e-12))


@pytest.mark.parametrize("psi", [0.99, -1.0, math.nan, math.inf])
def test_psi_outside_its_range_is_refused(psi):
    with pytest.raises(ValueError, match="psi must be finite and >= 1"):
        hd.peft.select(_of(a=(1, 1.0)), psi)


def test_nothing_can_be_chosen_without_a_number():
    lost = Influence({"a": GroupInfluence(1, 9, unresolved=9)}, 90)
    for choose in (lambda found: hd.peft.select(found, 2.0), hd.peft.pareto):
        with pytest.raises(ValueError, match=r"(?s)no group .*no number: a \(unresolved\)"):
            choose(lost)
    with pytest.raises(ValueError, match="no group"):
        hd.peft.within(lost, 10)


# --- pareto and within --------------------------------------------------------------------------


def _all_subsets(influence, value="total"):
    """(parameters, value, labels) of every subset of groups that are worth something."""
    names = [name for name, g in sorted(influence.groups.items()) if getattr(g, value)]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            groups = [influence.groups[name] for name in chosen]
            size = sum(group.size for group in groups)
            yield size, math.fsum(getattr(group, value) for group in groups), set(chosen)


_SMALL = st.builds(
    _group,
    st.integers(1, 40),
    st.integers(0, 30).map(float),
    marginal=st.integers(0, 30).map(float),
)


@given(_influences(_SMALL | _LOST, 8), st.sampled_from(["total", "marginal"]))
@settings(deadline=None, max_examples=200)
def test_pareto_is_what_is_left_of_all_subsets(influence, value):
    # Whole numbers: sums are exact, and ties are frequent.
    subsets = list(_all_subsets(influence, value))
    assume(subsets)
    expected, best = [], -1.0
    for size, worth, _ in sorted(subsets, key=lambda subset: (subset[0], -subset[1])):
        if worth > best:
            best = worth
            expected.append((size, worth))
    front = hd.peft.pareto(influence, value=value)
    assert [(plan.parameters, plan.worth(value)) for plan in front] == expected
    assert all((plan.parameters, plan.worth(value), plan.trainable) in subsets for plan in front)
    assert all(plan.labels == set(influence.groups) for plan in front)


@given(_influences(_RESOLVED, 7), st.integers(1, 10**10))
@settings(deadline=None)
def test_within_is_the_best_of_all_subsets_that_the_budget_allows(influence, budget):
    affordable = [worth for size, worth, _ in _all_subsets(influence) if size <= budget]
    front = hd.peft.pareto(influence)
    if not affordable:
        size = min(group.size for group in influence.groups.values())
        smallest = [name for name, group in influence.groups.items() if group.size == size]
        for of in (influence, front):
            with pytest.raises(ValueError, match=f"the smallest group is .* with {size}$") as error:
                hd.peft.within(of, budget)
            assert any(repr(name) in str(error.value) for name in smallest)
        return
    for of in (influence, front):
        plan = hd.peft.within(of, budget)
        assert plan.budget == budget >= plan.parameters
        assert plan.worth() == pytest.approx(max(affordable), rel=1e-12)


def test_a_group_worth_nothing_is_in_no_plan():
    found = _of(idle=(1, 0.0), head=(10, 1.0))
    (plan,) = hd.peft.pareto(found)
    assert plan.frozen == {"idle"}
    with pytest.raises(ValueError, match="smallest group is 'head' with 10"):
        hd.peft.within(found, 5)
    with pytest.raises(ValueError, match="no group has a total influence above zero"):
        hd.peft.pareto(_of(idle=(1, 0.0)))


def test_sizes_of_a_larger_model_are_what_the_budget_is_measured_in():
    found = _of(head=(10, 1.0), rest=(20, 3.0))
    sizes = {"head": 100, "rest": 50}
    front = hd.peft.pareto(found, sizes)
    assert [(sorted(plan.trainable), plan.parameters) for plan in front] == [
        (["rest"], 50),
        (["head", "rest"], 150),
    ]
    assert hd.peft.within(front, 149).trainable == {"rest"}
    assert front[0].influence == found
    with pytest.raises(ValueError, match=r"sizes must have the labels \['head', 'rest'\]"):
        hd.peft.pareto(found, {"head": 1})
    with pytest.raises(ValueError, match="'total' or 'marginal', got 'ppi'"):
        hd.peft.pareto(found, value="ppi")
    with pytest.raises(ValueError, match="'total' or 'marginal', got 'size'"):
        front[0].worth("size")
    with pytest.raises(ValueError, match="no plan to choose from"):
        hd.peft.within([], 3)


def test_forty_groups_of_a_transformer_are_no_trouble():
    rng = np.random.default_rng(0)
    sizes = rng.choice([384, 1536, 3072, 147456, 589824], 40)
    totals = sizes * np.exp(rng.normal(size=40))
    found = _of(**{f"g{k}": (int(sizes[k]), float(totals[k])) for k in range(40)})
    front = hd.peft.pareto(found)
    assert 40 < len(front) < 20_000
    numbers = [(plan.parameters, plan.worth()) for plan in front]
    assert numbers == sorted(numbers)
    assert front[-1].trainable == set(found.groups)
    plan = hd.peft.within(found, 10**6)
    assert plan.worth() == pytest.approx(hd.peft.within(front, 10**6).worth())


def test_a_front_without_end_is_refused_and_a_single_plan_still_found():
    # Powers of two at equal influence per parameter: every subset is the best of its size.
    found = _of(**{f"g{k:02}": (2**k, float(2**k)) for k in range(18)})
    with pytest.raises(ValueError, match=r"262143 plans .* within\(influence, budget\)"):
        hd.peft.pareto(found)
    assert hd.peft.within(found, 12345).parameters == 12345
    with pytest.raises(ValueError, match="use fewer groups"):
        best_subsets([(2**k, float(2**k)) for k in range(22)], math.inf)


# --- plans --------------------------------------------------------------------------------------


@st.composite
def _plans(draw):
    labels = draw(st.sets(_LABEL, min_size=1, max_size=6))
    influence = draw(
        st.none()
        | st.builds(
            Influence,
            st.fixed_dictionaries(dict.fromkeys(labels, _RESOLVED | _LOST)),
            st.integers(0, 10**6),
        )
    )
    frozen = draw(st.sets(st.sampled_from(sorted(labels)), max_size=len(labels) - 1))
    rules = draw(st.none() | st.just("role") | st.lists(st.tuples(st.text(), st.text())))
    return hd.Plan(
        labels - frozen,
        frozen,
        psi=draw(st.none() | st.floats(1, 1e300)),
        budget=draw(st.none() | st.integers(0, 2**70)),
        influence=influence,
        sizes=draw(st.none() | st.fixed_dictionaries(dict.fromkeys(labels, st.integers(0, 2**40)))),
        steps=draw(st.none() | st.integers(0, 10**6)),
        rules=rules,
        default=draw(st.none() | _LABEL) if isinstance(rules, list) else None,
    )


@given(_plans())
@settings(deadline=None)
def test_a_plan_survives_json_exactly(plan):
    text = plan.to_json()
    again = hd.Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert isinstance(again.trainable, frozenset)
    assert str(again) == str(plan)


def test_json_takes_numpy_scalars_and_refuses_what_is_not_finite():
    plan = hd.Plan({"a"}, {"b"}, psi=np.float32(0.1), sizes={"a": np.int64(3), "b": 4})
    assert hd.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="not JSON compliant"):
        hd.Plan({"a"}, set(), psi=math.nan).to_json()


def _changed(**fields):
    plan = hd.Plan({"head"}, {"rest"}, influence=_of(head=(1, 1.0), rest=(2, 1.0)))
    return json.dumps(json.loads(plan.to_json()) | fields)


def _without(name):
    fields = json.loads(_changed())
    del fields[name]
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has to be JSON"),
        ("{", "has to be JSON"),
        ("[1]", "has to be a JSON object"),
        ("null", "has to be a JSON object"),
        (None, "has to be JSON"),
        (_changed(version=2), "of version 1, got 2"),
        (_without("version"), "of version 1, got None"),
        (_without("psi"), "has to have the fields"),
        (_changed(more=1), "has to have the fields"),
        (_changed(psi="10"), "'psi' of a plan cannot be '10'"),
        (_changed(psi=True), "'psi' of a plan cannot be True"),
        (_changed(psi=0).replace('"psi": 0', '"psi": NaN'), "NaN is not a finite number"),
        (_changed(budget=1.5), "'budget' of a plan cannot be 1.5"),
        (_changed(budget=-1), "'budget' of a plan cannot be -1"),
        (_changed(trainable="head"), "'trainable' of a plan cannot be 'head'"),
        (_changed(trainable=[], frozen=["head", "rest"]), "leave one group trainable"),
        (_changed(frozen=["head", "rest"]), r"\['head'\] twice"),
        (_changed(frozen=["other"]), "must have the plan's labels"),
        (_changed(sizes={"head": 1}), "must have the plan's labels"),
        (_changed(sizes={"head": 1, "rest": "2"}), "'sizes' of a plan cannot be"),
        (_changed(rules=[["a", "b", "c"]]), "'rules' of a plan cannot be"),
        (_changed(rules="depth"), "'rules' of a plan cannot be 'depth'"),
        (_changed(rules="role", default="rest"), "default='rest' belongs to rules"),
        (_changed(psi=0).replace('"psi": 0', '"psi": 1e400'), "'psi' of a plan cannot be inf"),
        (_changed(steps=0).replace('"steps": 0', '"steps": 1e400', 1), "cannot be inf"),
        (_changed().replace('"total": 1.0', '"total": -1e400', 1), "'total' of the group 'head'"),
        (
            _changed().replace('"size": 1,', '"size": 0,'),
            "'size' of the group 'head' cannot be 0",
        ),
        (_changed(influence={}), "an influence has to have the fields"),
        (_changed(influence={"groups": {"a": 1}, "steps": 1}), "the group 'a' has to be a JSON"),
    ],
)
def test_junk_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        hd.Plan.from_json(text)


def test_a_plan_says_what_it_trains_and_why():
    groups = {
        "head": _group(10, 0.5, 0.01),
        "rest": _group(985, 0.7, 0.02),
        "norm": GroupInfluence(5, 9, unresolved=8, negative=1),
    }
    plan = hd.peft.select(Influence(groups, 90), 10.0)
    lines = str(plan).splitlines()
    assert lines[0] == "ψ = 10, steps = 90: 1 of 3 groups trains, 10 of 1000 parameters (1 %)"
    assert re.split(r"\s{2,}", lines[2]) == ["head", "10", "0.05 ± 0.001", "trains"]
    assert [line.split()[0] for line in lines[2:]] == ["head", "rest", "norm"]
    assert re.split(r"\s{2,}", lines[4]) == ["norm", "5", "unresolved", "frozen"]
    assert str(hd.peft.within(hd.Influence(groups, 90), 500)).startswith("budget = 500, steps = 90")
    bare = hd.Plan({"a", "b"}, {"c"})
    assert str(bare).splitlines()[0] == "2 of 3 groups train"
    assert bare.parameters is None
    with pytest.raises(ValueError, match="rests on no influence"):
        bare.worth()
    with pytest.raises(dataclasses.FrozenInstanceError):
        bare.psi = 1.0


_RULES = [(r"head/.*", "head"), (r".*/b", "bias")]


def _model(layers):
    def dense():
        return {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}

    return {"head": dense(), **{f"layer_{k}": dense() for k in range(layers)}}


def test_the_rules_of_a_plan_label_a_larger_model():
    plan = hd.Plan({"head"}, {"bias", "rest"}, rules=_RULES, default="rest")
    again = hd.Plan.from_json(plan.to_json())
    expected = hd.label_by_path(_model(5), _RULES, "rest")
    assert again.label(_model(5)) == expected
    roles = hd.Plan({"head"}, {"bias", "rest"}, rules="role")
    assert roles.label(_model(2)) == hd.label_by_role(_model(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no rules"),
        (
            {"rules": [*_RULES, ("none", "rest")], "default": "rest"},
            "'none'.* matches no parameter",
        ),
        ({"rules": _RULES}, "no rule covers"),
        ({"rules": _RULES, "default": "other"}, r"without .* \['rest'\].* know \['other'\]"),
        ({"rules": [(".*", "rest")]}, r"without parameters are \['bias', 'head'\]"),
        ({"rules": [("head/w", "lora_A"), *_RULES], "default": "rest"}, r"not know \['lora_A'\]"),
    ],
)
def test_a_model_that_the_rules_do_not_fit_is_refused(fields, message):
    plan = hd.Plan({"head"}, {"bias", "rest"}, **fields)
    with pytest.raises(ValueError, match=message):
        plan.label(_model(2))


# --- split and merge ----------------------------------------------------------------------------


class _Module(eqx.Module):
    linear: eqx.nn.Linear
    norm: jax.Array
    act: object = jax.nn.relu


class _NnxModule(nnx.Module):
    def __init__(self):
        self.body = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(1))


def _equinox():
    module = _Module(eqx.nn.Linear(3, 4, use_bias=False, key=jax.random.key(0)), jnp.ones(4))
    return eqx.filter(module, eqx.is_inexact_array)


_TREES = {
    "dict": lambda: {"a": jnp.arange(3.0), "b": [jnp.ones(2, jnp.bfloat16), jnp.array(3)]},
    "array": lambda: jnp.arange(4.0),
    "holes": lambda: {"a": None, "b": (jnp.ones(2), None), "c": jnp.zeros((0, 3))},
    "nnx": lambda: nnx.state(_NnxModule()),
    "nnx.Param": lambda: nnx.state(_NnxModule(), nnx.Param),
    "equinox": _equinox,
}


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("tree", _TREES.values(), ids=_TREES.keys())
@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_merge_puts_together_bit_by_bit_what_split_took_apart(tree, data):
    params = tree()
    count = len(jax.tree.leaves(params))
    names = data.draw(st.lists(st.sampled_from("xyz"), min_size=count, max_size=count))
    labels = jax.tree.unflatten(jax.tree.structure(params), names)
    present = sorted(set(names))
    frozen = data.draw(st.sets(st.sampled_from(present), max_size=len(present) - 1))
    plan = hd.Plan(set(present) - frozen, frozen)
    trainable, rest = hd.peft.split(params, labels, plan)
    assert len(jax.tree.leaves(trainable)) == sum(name not in frozen for name in names)
    assert len(jax.tree.leaves(rest)) == sum(name in frozen for name in names)
    _assert_same(hd.peft.merge(trainable, rest), params)
    _assert_same(hd.peft.merge(rest, trainable), params)
    _assert_same(jax.jit(hd.peft.merge)(trainable, rest), params)
    kept = hd.peft.trainable_labels(params, labels, plan)
    assert jax.tree.structure(kept) == jax.tree.structure(trainable)
    assert jax.tree.leaves(kept) == [name for name in names if name not in frozen]


def test_labels_may_be_a_prefix_or_a_callable():
    params = {"head": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}, "body": [jnp.zeros(3)]}
    prefix = {"head": "head", "body": "rest"}
    plan = hd.Plan({"head"}, {"rest"})
    for labels in (prefix, lambda params: prefix):
        trainable, frozen = hd.peft.split(params, labels, plan)
        assert trainable == {"head": params["head"], "body": [None]}
        assert frozen == {"head": {"kernel": None, "bias": None}, "body": params["body"]}
        assert hd.peft.trainable_labels(params, labels, plan) == {
            "head": {"kernel": "head", "bias": "head"},
            "body": [None],
        }


def test_what_does_not_fit_together_is_refused():
    params = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
    labels = {name: name for name in params}
    a, ab = hd.Plan({"a"}, {"b", "c"}), hd.Plan({"a", "b"}, {"c"})
    parts = {name: hd.peft.split(params, labels, plan) for name, plan in [("a", a), ("ab", ab)]}
    with pytest.raises(ValueError, match=r"both have \[\"\['b'\]\"\]"):
        hd.peft.merge(parts["ab"][0], parts["a"][1])
    with pytest.raises(ValueError, match=r"neither has \[\"\['b'\]\"\]"):
        hd.peft.merge(parts["a"][0], parts["ab"][1])
    with pytest.raises(ValueError, match="structures differ"):
        hd.peft.merge(parts["a"][0], {"a": None, "b": params["b"]})
    for take_apart in (hd.peft.split, hd.peft.trainable_labels):
        with pytest.raises(ValueError, match=r"without parameters are \['d'\]"):
            take_apart(params, labels, hd.Plan({"a", "d"}, {"b", "c"}))
        with pytest.raises(ValueError, match=r"does not know \['c'\]"):
            take_apart(params, labels, hd.Plan({"a"}, {"b"}))
        with pytest.raises(ValueError, match="param_labels does not match params"):
            take_apart(params, {"a": "a"}, a)


# --- training a part ----------------------------------------------------------------------------

_WIDTH = 64
_LABELS = {"body": "rest", "head": "head"}
_HEAD_ONLY = hd.Plan({"head"}, {"rest"})
_HEAD_LABELS = {"body": [None] * 4, "head": "head"}


def _deep_params():
    rng = np.random.default_rng(0)
    body = [jnp.asarray(rng.normal(size=(_WIDTH, _WIDTH)) / 8, jnp.float32) for _ in range(4)]
    return {"body": body, "head": jnp.asarray(rng.normal(size=(_WIDTH, 1)) / 8, jnp.float32)}


def _features(body, inputs):
    for weight in body:
        inputs = jnp.tanh(inputs @ weight)
    return inputs


def _error(features, head, targets):
    return jnp.mean((features @ head - targets) ** 2)


def _deep_loss(params, batch):
    return _error(_features(params["body"], batch["x"]), params["head"], batch["y"])


def _batch():
    rng = np.random.default_rng(1)
    return {
        "x": jnp.asarray(rng.normal(size=(32, _WIDTH)), jnp.float32),
        "y": jnp.ones((32, 1), jnp.float32),
    }


def _adamw():
    return promoting("standard", optax.adamw(1.0))


def _part_step(tx):
    def step(trainable, frozen, state, batch):
        def loss_of(trainable):
            return _deep_loss(hd.peft.merge(trainable, frozen), batch)

        value, grad = jax.value_and_grad(loss_of)(trainable)
        extra = {"value_fn": loss_of, "value": value, "grad": grad}
        updates, state = tx.update(grad, state, trainable, **extra)
        return optax.apply_updates(trainable, updates), state, value

    return step


@pytest.mark.parametrize("trained", ["head", "rest"])
def test_a_plan_trains_its_part_and_no_other(trained):
    plan = hd.Plan({trained}, {"head", "rest"} - {trained})
    params, batch = _deep_params(), _batch()
    trainable, frozen = hd.peft.split(params, _LABELS, plan)
    labels = hd.peft.trainable_labels(params, _LABELS, plan)
    tx = optax.chain(_adamw(), hd.hidlr(None, labels))
    state = tx.init(trainable)
    running = hd.influence.start(labels, trainable)
    for leaves in (state[0][0].mu, hd.report.find_state(state).direction):
        assert jax.tree.structure(leaves) == jax.tree.structure(trainable)
    step, losses = jax.jit(_part_step(tx)), []
    for _ in range(25):
        trainable, state, value = step(trainable, frozen, state, batch)
        running = hd.influence.accumulate(running, state)
        losses.append(float(value))
    assert step._cache_size() == 1
    assert losses[-1] < losses[0] / 2
    assert list(optax.tree.get(state, "group_learning_rates")) == [trained]
    found = hd.influence.summarise(running)
    assert list(found.groups) == [trained]
    measured = hd.peft.select(found, 1.0)
    assert hd.Plan.from_json(measured.to_json()) == measured
    after = hd.peft.merge(trainable, frozen)
    part, other = ("head", "body") if trained == "head" else ("body", "head")
    _assert_same(after[other], params[other])
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after[part], params[part])
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_a_part_of_an_nnx_or_equinox_model_trains(kind):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    if kind == "nnx":
        graph, params, rest = nnx.split(_NnxModule(), nnx.Param, ...)

        def loss_of_all(params):
            model = nnx.merge(graph, params, rest)
            model.eval()
            return jnp.mean((model.head(model.norm(model.body(inputs))) - 1.0) ** 2)

        labels, plan = hd.label_by_role, hd.Plan({"head"}, {"bias", "norm", "rest"})
    else:
        module = _Module(eqx.nn.Linear(3, 4, use_bias=False, key=jax.random.key(0)), jnp.ones(4))
        params, static = eqx.partition(module, eqx.is_inexact_array)

        def loss_of_all(params):
            model = eqx.combine(params, static)
            hidden = model.act(jax.vmap(model.linear)(inputs))
            return jnp.mean((hidden * model.norm - 1.0) ** 2)

        labels, plan = hd.label_by_role, hd.Plan({"norm"}, {"rest"})
    trainable, frozen = hd.peft.split(params, labels, plan)
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(None, hd.peft.trainable_labels(params, labels, plan)))
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, frozen, state):
        def loss_of(trainable):
            return loss_of_all(hd.peft.merge(trainable, frozen))

        value, grad = jax.value_and_grad(loss_of)(trainable)
        updates, state = tx.update(grad, state, trainable, value_fn=loss_of, value=value, grad=grad)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for _ in range(15):
        trainable, state, value = step(trainable, frozen, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert set(optax.tree.get(state, "group_learning_rates")) == plan.trainable
    untouched = hd.peft.split(hd.peft.merge(trainable, frozen), labels, plan)[1]
    _assert_same(untouched, hd.peft.split(params, labels, plan)[1])


# --- what it costs ------------------------------------------------------------------------------


def _cost(step, *args):
    compiled = jax.jit(step).lower(*args).compile()
    memory = compiled.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return compiled.cost_analysis()["flops"], held


def _cost_by_hand():
    """A step on the head alone, the features an ordinary function of constants."""
    params, batch, tx = _deep_params(), _batch(), _adamw()

    def step(head, body, state, batch):
        def loss_of(head):
            return _error(_features(body, batch["x"]), head, batch["y"])

        value, grad = jax.value_and_grad(loss_of)(head)
        updates, state = tx.update(grad, state, head)
        return optax.apply_updates(head, updates), state, value

    return _cost(step, params["head"], params["body"], tx.init(params["head"]), batch)


def _cost_of_plan(tx):
    params = _deep_params()
    trainable, frozen = hd.peft.split(params, _LABELS, _HEAD_ONLY)
    return _cost(_part_step(tx), trainable, frozen, tx.init(trainable), _batch())


def _cost_of_masking(tx):
    params = _deep_params()

    def step(params, state, batch):
        value, grad = jax.value_and_grad(_deep_loss)(params, batch)
        updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
        return optax.apply_updates(params, updates), state, value

    return _cost(step, params, tx.init(params), _batch())


def test_a_frozen_group_costs_what_a_constant_does():
    flops, held = _cost_of_plan(_adamw())
    flops_by_hand, held_by_hand = _cost_by_hand()
    assert flops <= 1.05 * flops_by_hand
    assert held <= 1.05 * held_by_hand


_FROZEN = {"body": True, "head": False}


def _masked_adamw():
    return optax.chain(_adamw(), optax.masked(optax.set_to_zero(), _FROZEN))


def _partitioned_adamw():
    parts = {"head": optax.adamw(1.0), "rest": optax.set_to_zero()}
    return promoting("standard", optax.partition(parts, _LABELS))


def test_updates_set_to_zero_cost_a_backward_pass_and_an_optimizer_all_the_same():
    flops, held = _cost_of_plan(_adamw())
    flops_masked, held_masked = _cost_of_masking(_masked_adamw())
    assert flops_masked > 2 * flops
    assert held_masked > 2 * held


def test_hidlr_over_frozen_groups_keeps_their_backward_pass_alive_and_over_a_part_does_not():
    flops, held = _cost_of_plan(optax.chain(_adamw(), hd.hidlr(None, _HEAD_LABELS)))
    # Without hidlr, XLA would drop the unused gradients of this chain, though not the copies.
    over_all = optax.chain(_partitioned_adamw(), hd.hidlr(_deep_loss, "all"))
    flops_over_all, held_over_all = _cost_of_masking(over_all)
    # Gradient, look back and look ahead: 3 forward passes, or 5 with a backward pass of all.
    assert flops_over_all > 1.6 * flops
    assert held_over_all > 2 * held


# Scores from elsewhere.

_SCORES, _SIZES = {"head": 0.5, "norm": 0.1, "rest": 0.7}, {"head": 10, "norm": 20, "rest": 900}


def test_other_scores_choose_as_influences_of_the_same_numbers_do():
    groups = {
        name: GroupInfluence(_SIZES[name], refreshes=9, total=total)
        for name, total in _SCORES.items()
    }
    influence = Influence(groups, steps=90)
    one = hd.peft.select(_SCORES, 10.0, sizes=_SIZES)
    assert one.trainable == hd.peft.select(influence, 10.0).trainable
    assert (one.parameters, one.steps) == (10, 0)
    assert hd.Plan.from_json(one.to_json()) == one
    assert "steps" not in str(one)
    front = [plan.trainable for plan in hd.peft.pareto(_SCORES, _SIZES)]
    assert front == [plan.trainable for plan in hd.peft.pareto(influence)]
    assert hd.peft.pareto(_SCORES, _SIZES, value="marginal")
    chosen = hd.peft.within(_SCORES, 500, sizes=_SIZES)
    assert chosen.trainable == hd.peft.within(influence, 500).trainable == {"head", "norm"}


@pytest.mark.parametrize(
    ("choose", "match"),
    [
        (
            lambda: hd.peft.select(_SCORES, 2.0),
            r"pass sizes with the labels \['head', 'norm', 'rest'\]",
        ),
        (lambda: hd.peft.pareto(_SCORES), "pass sizes"),
        (lambda: hd.peft.within(_SCORES, 100), "pass sizes"),
        (lambda: hd.peft.within(_SCORES, 100, sizes={"head": 1}), r"got \['head'\]"),
        (lambda: hd.peft.select(_SCORES | {"head": math.nan}, 2.0, sizes=_SIZES), "finite.*'head'"),
        (lambda: hd.peft.select(_SCORES, 2.0, sizes=_SIZES | {"head": 0}), "at least 1"),
        (lambda: hd.peft.select({"a": -1.0, "b": 2.0}, 2.0, sizes={"a": 3, "b": 4}), r"\['a'\]"),
        (lambda: hd.peft.select({"a": 0.0, "b": 2.0}, 2.0, sizes={"a": 3, "b": 4}), "positive"),
        (lambda: hd.peft.within([], 2, sizes=_SIZES), "sizes go with scores"),
        (lambda: hd.peft.select([1.0], 2.0), "expected an Influence"),
    ],
)
def test_other_scores_that_cannot_be_used_are_an_error_that_says_why(choose, match):
    with pytest.raises(ValueError, match=match):
        choose()
