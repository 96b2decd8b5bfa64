"""Labels and groups on every kind of parameter tree, and what is said where they do not fit."""

import functools
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import hidlr_optax as hd
from hidlr_optax._groups import Groups
from hidlr_optax._paths import leaf_paths

# Flax 0.11 had another name for the one, and no need of the other.
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure
nnx_list = nnx.List if hasattr(nnx, "List") else list


class Pair(NamedTuple):
    kernel: Any
    bias: Any


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


def leaf(*shape):
    return jnp.zeros(shape)


def paths_of(tree):
    return ["/".join(path) for path, _ in leaf_paths(tree)]


def labelled(labels):
    """{path: label}, whatever the containers."""
    return {"/".join(path): label for path, label in leaf_paths(labels)}


CONTAINERS = {
    "dict": {"body": {"kernel": leaf(2, 3), "bias": leaf(3)}, "head": {"kernel": leaf(3)}},
    "list": [[leaf(2, 3), leaf(3)], [leaf(3)]],
    "tuple": ((leaf(2, 3), leaf(3)), (leaf(3),)),
    "namedtuple": {"body": Pair(leaf(2, 3), leaf(3)), "head": Pair(leaf(3), None)},
    "frozendict": freeze(
        {"body": {"kernel": leaf(2, 3), "bias": leaf(3)}, "head": {"kernel": leaf(3)}}
    ),
}
RULES = {
    "named": [(r"head/.*", "head"), (r".*/bias", "bias")],
    "numbered": [(r"1/.*", "head"), (r"0/1", "bias")],
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_label_by_path_on_plain_containers(kind):
    params = CONTAINERS[kind]
    rules = RULES["numbered" if kind in ("list", "tuple") else "named"]
    labels = hd.label_by_path(params, rules, default="rest")
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    groups = Groups.of(labels, params)
    assert groups.names == ("bias", "head", "rest")
    assert groups.sizes == (3, 3, 6)


def test_the_first_rule_that_matches_decides_and_has_to_match_the_whole_path():
    params = {"head": {"bias": leaf(1), "bias2": leaf(1)}, "body": {"bias": leaf(1)}}
    labels = hd.label_by_path(params, [(r".*/bias", "bias"), (r"head/.*", "head")], "rest")
    assert labels == {"head": {"bias": "bias", "bias2": "head"}, "body": {"bias": "bias"}}
    labels = hd.label_by_path(params, [(r"head/.*", "head"), (r".*/bias", "bias")], "rest")
    assert labels == {"head": {"bias": "head", "bias2": "head"}, "body": {"bias": "bias"}}


def test_label_by_path_without_default_needs_no_default_where_all_is_covered():
    params = {"a": leaf(1), "b": leaf(2)}
    assert hd.label_by_path(params, [("a", "x"), (".", "y")]) == {"a": "x", "b": "y"}


def test_labels_never_look_at_values():
    params = jax.eval_shape(lambda: {"head": {"kernel": jnp.ones((2, 2))}, "b": jnp.ones(3)})
    labels = hd.label_by_path(params, [("head/.*", "head")], default="rest")
    assert (
        labels
        == hd.label_by_role(params) | {"b": "rest"}
        == {"head": {"kernel": "head"}, "b": "rest"}
    )
    assert Groups.of(labels, params).sizes == (4, 3)


def test_uncovered_leaves_are_listed_and_counted():
    params = {f"layer_{n}": {"kernel": leaf(1)} for n in range(7)} | {"head": leaf(1)}
    with pytest.raises(ValueError, match="no rule covers") as error:
        hd.label_by_path(params, [("head", "head")])
    message = str(error.value)
    assert "'layer_0/kernel', 'layer_1/kernel'" in message
    assert "layer_6" not in message
    assert "(7 in all)" in message
    assert "default='rest'" in message
    assert "head'" not in message


def test_a_rule_that_matches_nothing_is_warned_about_by_name():
    params = {"body": {"kernel": leaf(1)}, "head": {"kernel": leaf(1)}}
    with pytest.warns(UserWarning, match=r"the rule \('haed/\.\*', 'head'\) matches no") as caught:
        labels = hd.label_by_path(params, [("haed/.*", "head")], default="rest")
    assert labelled(labels) == {"body/kernel": "rest", "head/kernel": "rest"}
    assert len(caught) == 1
    assert "'body/kernel', 'head/kernel' (2 in all)" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_rule_whose_leaves_were_taken_before_is_not_warned_about():
    params = {"head": {"bias": leaf(1)}, "body": leaf(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hd.label_by_path(params, [("head/.*", "head"), (".*/bias", "bias")], default="rest")


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(5, 4, name="token_embed")(x)
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(num_heads=2)(x))
        return nn.Dense(3, name="head")(nn.Dense(4)(x))


LINEN_ROLES = {
    "Dense_0/bias": "bias",
    "Dense_0/kernel": "rest",
    "LayerNorm_0/bias": "norm",
    "LayerNorm_0/scale": "norm",
    **{
        f"MultiHeadDotProductAttention_0/{part}/{name}": role
        for part in ("key", "out", "query", "value")
        for name, role in (("bias", "bias"), ("kernel", "rest"))
    },
    "head/bias": "head",
    "head/kernel": "head",
    "token_embed/embedding": "embed",
}


@pytest.mark.parametrize("container", [dict, freeze], ids=["dict", "FrozenDict"])
def test_label_by_role_on_flax_linen(container):
    variables = jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    params = container(variables["params"])
    labels = hd.label_by_role(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert labelled(labels) == LINEN_ROLES
    groups = Groups.of(hd.label_by_role, params)
    assert dict(zip(groups.names, groups.sizes, strict=True)) == {
        "bias": 4 + 4 * 4,
        "embed": 20,
        "head": 15,
        "norm": 8,
        "rest": 16 + 4 * 16,
    }


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx_list([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.head = nnx.LoRALinear(2, 1, lora_rank=1, rngs=rngs)
        self.value = nnx.Param(jnp.zeros(5))


NNX_ROLES = {
    "layers/0/bias": "bias",
    "layers/0/kernel": "rest",
    "layers/1/bias": "bias",
    "layers/1/kernel": "rest",
    "norm/bias": "norm",
    "norm/scale": "norm",
    "head/bias": "head",
    "head/kernel": "head",
    "value": "rest",
}


def test_label_by_role_on_nnx_state_and_its_pure_arrays_alike():
    """nnx.Optimizer hands Variables to init and bare arrays to update."""
    state = nnx.state(NnxNet(), nnx.Param)
    pure = as_pure(state)
    for params in (state, pure):
        roles = labelled(hd.label_by_role(params))
        lora = {path: roles.pop(path) for path in list(roles) if "lora" in path}
        assert roles == NNX_ROLES
        assert sorted(lora.values()) == ["lora_A", "lora_B"]
    sizes = {"bias": 4, "head": 3, "lora_A": 2, "lora_B": 1, "norm": 4, "rest": 13}
    for labels in (hd.label_by_role(state), hd.label_by_role(pure), hd.label_by_role):
        for params in (state, pure):
            groups = Groups.of(labels, params)
            assert dict(zip(groups.names, groups.sizes, strict=True)) == sizes


def test_nnx_labels_stay_with_their_leaves_when_the_tree_is_made_pure():
    state = nnx.state(NnxNet(), nnx.Param)
    labels = hd.label_by_path(state, [("layers/0/.*", "first"), ("head/.*", "head")], "rest")
    by_path = dict(zip(paths_of(state), map(str, jax.tree.leaves(labels)), strict=True))
    pure = as_pure(state)
    groups = Groups.of(labels, pure)
    assert {
        p: groups.names[k] for p, k in zip(paths_of(pure), groups.index, strict=True)
    } == by_path
    assert by_path["layers/0/kernel"] == "first"


def equinox_params():
    return eqx.filter(eqx.nn.MLP(2, 1, 3, 2, key=jax.random.key(0)), eqx.is_inexact_array)


EQUINOX_SIZES = {"bias": 3 + 3 + 1, "rest": 6 + 9 + 3}


def test_labels_on_equinox_modules_through_a_callable():
    params = equinox_params()
    labels = hd.label_by_role(params)
    assert labelled(labels) == {
        f"layers/{n}/{name}": role
        for n in range(3)
        for name, role in (("weight", "rest"), ("bias", "bias"))
    }
    groups = Groups.of(hd.label_by_role, params)
    assert dict(zip(groups.names, groups.sizes, strict=True)) == EQUINOX_SIZES
    assert set(labelled(hd.label_by_depth(params)).values()) == {"depth_0", "depth_1", "depth_2"}


def test_a_label_tree_that_is_an_equinox_module_with_a_call_is_a_tree():
    """Most Equinox modules are callable; their label trees are trees all the same."""
    params = equinox_params()
    groups = Groups.of(hd.label_by_role(params), params)
    assert dict(zip(groups.names, groups.sizes, strict=True)) == EQUINOX_SIZES


BERT = {
    "bert/embeddings/word_embeddings/embedding": "embed",
    "bert/embeddings/LayerNorm/scale": "norm",
    "bert/embeddings/LayerNorm/bias": "norm",
    "bert/encoder/layer/0/attention/self/query/kernel": "rest",
    "bert/encoder/layer/0/attention/self/query/bias": "bias",
    "bert/encoder/layer/0/attention/self/query/lora_A": "lora_A",
    "bert/encoder/layer/0/attention/self/query/lora_B": "lora_B",
    "bert/encoder/layer/0/output/LayerNorm/weight": "norm",
    "bert/encoder/layer/10/output/dense/kernel": "rest",
    "bert/encoder/layer/10/output/dense/bias": "bias",
    "bert/pooler/dense/kernel": "rest",
    "classifier/kernel": "head",
    "classifier/bias": "head",
}
GPT2 = {
    "transformer/wte/embedding": "embed",
    "transformer/wpe/embedding": "embed",
    "transformer/h/0/ln_1/scale": "norm",
    "transformer/h/0/attn/c_attn/kernel": "rest",
    "transformer/h/0/attn/c_attn/bias": "bias",
    "transformer/h/1/mlp/c_fc/kernel": "rest",
    "transformer/ln_f/bias": "norm",
    "lm_head/kernel": "head",
}
LLAMA = {
    "model/embed_tokens/weight": "embed",
    "model/layers/0/self_attn/q_proj/weight": "rest",
    "model/layers/0/self_attn/q_proj/lora_A/default/weight": "lora_A",
    "model/layers/0/input_layernorm/weight": "norm",
    "model/layers/1/post_attention_layernorm/weight": "norm",
    "model/norm/weight": "norm",
    "lm_head/weight": "head",
}
VIT = {
    "vit/embeddings/cls_token": "embed",
    "vit/embeddings/position_embeddings": "embed",
    "vit/embeddings/patch_embeddings/projection/kernel": "embed",
    "vit/encoder/layer/0/layernorm_before/scale": "norm",
    "vit/encoder/layer/0/intermediate/dense/bias": "bias",
    "score/kernel": "head",
    "qa_outputs/bias": "head",
    "logits/kernel": "head",
}


def nested(paths):
    tree = {}
    for path in paths:
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf(2)
    return tree


@pytest.mark.parametrize("names", [BERT, GPT2, LLAMA, VIT], ids=["bert", "gpt2", "llama", "vit"])
def test_label_by_role_on_the_names_of_hugging_face(names):
    assert labelled(hd.label_by_role(nested(names))) == names


def test_label_by_depth_takes_the_first_number_and_the_role_where_there_is_none():
    labels = labelled(hd.label_by_depth(nested(BERT)))
    assert set(labels.values()) == {"embed", "depth_00", "depth_10", "rest", "head"}
    assert labels["bert/encoder/layer/0/attention/self/query/lora_A"] == "depth_00"
    assert labels["bert/encoder/layer/10/output/dense/bias"] == "depth_10"
    assert labels["bert/embeddings/LayerNorm/scale"] == "rest"
    assert labels["bert/pooler/dense/kernel"] == "rest"
    assert labels["classifier/bias"] == "head"


def test_label_by_depth_reads_names_with_numbers_at_their_end():
    params = {f"EncoderBlock_{n}": {"Dense_0": {"kernel": leaf(1)}} for n in (0, 1, 2)}
    assert labelled(hd.label_by_depth(params)) == {
        f"EncoderBlock_{n}/Dense_0/kernel": f"depth_{n}" for n in (0, 1, 2)
    }


@pytest.mark.parametrize(
    ("num_groups", "expected"),
    [
        (1, ["depth_0-4"] * 5),
        (2, ["depth_0-1"] * 2 + ["depth_2-4"] * 3),
        (3, ["depth_0", "depth_1-2", "depth_1-2", "depth_3-4", "depth_3-4"]),
        (5, [f"depth_{n}" for n in range(5)]),
        (None, [f"depth_{n}" for n in range(5)]),
    ],
)
def test_label_by_depth_merges_neighbours_into_groups_equal_within_one(num_groups, expected):
    params = {"layers": [{"kernel": leaf(1)} for _ in range(5)]}
    assert jax.tree.leaves(hd.label_by_depth(params, num_groups)) == expected


def test_names_of_many_layers_sort_like_the_layers():
    params = [leaf(1) for _ in range(12)]
    labels = hd.label_by_depth(params)
    assert labels == sorted(labels)
    assert (labels[2], labels[11]) == ("depth_02", "depth_11")


@pytest.mark.parametrize("num_groups", [0, 4, -1])
def test_label_by_depth_refuses_more_groups_than_layers(num_groups):
    with pytest.raises(ValueError, match=rf"lie in \[1, 3\], .*, got {num_groups}; .*\[0, 1, 2\]"):
        hd.label_by_depth([leaf(1)] * 3, num_groups)


def test_label_by_depth_without_layer_numbers_shows_the_paths():
    with pytest.raises(ValueError, match=r"names 'w' in 'w' \(1 in all\)"):
        hd.label_by_depth({"w": leaf(1)})


def test_groups_are_sorted_by_name_and_index_follows_the_leaves():
    params = {"a": leaf(2, 3), "b": [leaf(), leaf(4)], "c": leaf(0)}
    groups = Groups.of({"a": "z", "b": ["y", "z"], "c": "x"}, params)
    assert groups == Groups(("x", "y", "z"), (2, 1, 2, 0), (0, 1, 10))
    assert len(groups) == 3


def test_a_prefix_of_the_tree_labels_all_below_it():
    params = {"body": [{"kernel": leaf(2, 2), "bias": leaf(2)}, leaf(3)], "head": leaf(5)}
    assert Groups.of("all", params).sizes == (14,)
    assert Groups.of({"body": "body", "head": "head"}, params).sizes == (9, 5)
    assert Groups.of({"body": ["first", "second"], "head": "second"}, params).sizes == (6, 8)


@pytest.mark.parametrize(
    "labels",
    [
        hd.label_by_role,
        functools.partial(hd.label_by_path, rules=[("head/.*", "head")], default="rest"),
        lambda params: "all",
    ],
    ids=["label_by_role", "partial", "lambda"],
)
def test_callables_are_given_the_parameters(labels):
    params = {"head": {"kernel": leaf(2)}, "body": leaf(3)}
    assert Groups.of(labels, params) == Groups.of(labels(params), params)


def test_label_trees_may_use_other_containers_than_the_parameters():
    """Labels are matched by path, so a plain dict serves for a FrozenDict and back."""
    plain = {"a": {"w": leaf(2)}, "b": leaf(3)}
    assert Groups.of({"a": {"w": "x"}, "b": "y"}, freeze(plain)).sizes == (2, 3)
    assert Groups.of(freeze({"a": {"w": "x"}, "b": "y"}), plain).sizes == (2, 3)


def test_a_field_called_value_is_a_parameter_like_any_other():
    """Only the `.value` of a Flax Variable is no name of its own."""
    params = {"attention": Attention(leaf(1), leaf(2), leaf(4))}
    labels = hd.label_by_path(params, [("attention/value", "value")], default="rest")
    assert labels == {"attention": Attention("rest", "rest", "value")}
    groups = Groups.of(labels, params)
    assert dict(zip(groups.names, groups.sizes, strict=True)) == {"rest": 3, "value": 4}


@pytest.mark.parametrize(
    ("labels", "messages"),
    [
        ({"a": "x"}, ["no label for the parameters 'b/w' (1 in all)"]),
        (
            {"a": "x", "b": {"w": "x"}, "c": {"v": "y"}},
            ["no parameters for the labels at 'c/v' (1 in all)"],
        ),
        (
            {"a": {"deeper": "x"}, "b": {"w": "x"}},
            ["no label for the parameters 'a' (1", "no parameters for the labels at 'a/deeper' (1"],
        ),
        ({"A": "x", "b": {"w": "x"}}, ["parameters 'a' (1", "labels at 'A' (1"]),
        (["x", "y"], ["parameters 'a', 'b/w' (2 in all)", "labels at '0', '1' (2 in all)"]),
    ],
)
def test_labels_that_do_not_match_say_where(labels, messages):
    with pytest.raises(ValueError, match="param_labels does not match params") as error:
        Groups.of(labels, {"a": leaf(1), "b": {"w": leaf(1)}})
    for message in messages:
        assert message in str(error.value)
    assert "callable params -> such a tree" in str(error.value)


@pytest.mark.parametrize("bad", [3, 2.5, b"x", True], ids=repr)
def test_a_label_that_is_no_str_is_named_with_its_place(bad):
    with pytest.raises(ValueError, match="a label has to be a str") as error:
        Groups.of({"a": "x", "b": {"w": bad}}, {"a": leaf(1), "b": {"w": leaf(1)}})
    assert f"got {bad!r} ({type(bad).__name__}) at 'b/w'" in str(error.value)


@pytest.mark.parametrize("labels", [{}, None, [], {"a": None}, lambda params: {}])
def test_no_label_at_all_is_refused(labels):
    with pytest.raises(ValueError, match="holds no label"):
        Groups.of(labels, {"a": leaf(1)})


def test_masked_parameters_are_told_to_put_hidlr_outside():
    with pytest.raises(ValueError, match=r"MaskedNode.*outermost"):
        Groups.of("all", {"a": leaf(1), "b": optax.MaskedNode()})


def test_init_and_update_report_labels_that_do_not_match():
    params = {"a": leaf(1), "b": leaf(1)}
    tx = hd.hidlr(lambda p, batch: jnp.sum(p["a"]), {"a": "x"})
    with pytest.raises(ValueError, match="no label for the parameters 'b'"):
        tx.init(params)
    good = hd.hidlr(lambda p, batch: jnp.sum(p["a"]), {"a": "x", "b": "y"})
    state = good.init(params)
    more = params | {"c": leaf(1)}
    with pytest.raises(ValueError, match="no label for the parameters 'c'"):
        good.update(more, state, more, batch=0)


def test_pack_and_unpack_are_inverse_whatever_the_order_of_the_dict():
    groups = Groups.of({"a": "z", "b": "x"}, {"a": leaf(1), "b": leaf(1)})
    packed = groups.pack({"z": jnp.float32(1), "x": jnp.float32(2)})
    np.testing.assert_array_equal(packed, [2, 1])
    assert {name: float(x) for name, x in groups.unpack(packed).items()} == {"x": 2, "z": 1}


def test_scale_step_and_inner_go_group_by_group():
    params = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(3.0), "c": jnp.asarray([[4.0]])}
    groups = Groups.of({"a": "y", "b": "x", "c": "y"}, params)
    rates = jnp.asarray([10.0, 0.5])  # x, y
    scaled = groups.scale(params, rates)
    assert jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, scaled)) == {
        "a": [0.5, 1.0],
        "b": 30.0,
        "c": [[2.0]],
    }
    moved = groups.step(params, params, rates)
    np.testing.assert_allclose(moved["b"], 33)
    np.testing.assert_allclose(moved["c"], [[6.0]])
    np.testing.assert_allclose(groups.inner(params, scaled), [90, 0.5 + 2 + 8])


def test_label_by_path_takes_a_dict_of_rules_in_its_order():
    params = {"body": {"kernel": leaf(1), "bias": leaf(1)}, "head": {"bias": leaf(1)}}
    rules = {r"head/.*": "head", r".*/bias": "bias"}
    labels = hd.label_by_path(params, rules, default="rest")
    assert labels == hd.label_by_path(params, list(rules.items()), default="rest")
    assert labels["head"] == {"bias": "head"}


@pytest.mark.parametrize(
    "rules", [["head"], ["ab"], [("head", 1)], [("a", "b", "c")], {"head": None}]
)
def test_rules_that_are_no_pairs_are_an_error_that_shows_what_they_look_like(rules):
    with pytest.raises(ValueError, match=r"pairs of str, or a dict \{regular expression: label\}"):
        hd.label_by_path({"head": leaf(1)}, rules, default="rest")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"layer1": {"w": 0.0}, "layer2": {"w": 0.0}}, ["depth_1", "depth_2"]),
        (
            {"h0": 0.0, "h1": 0.0, "h10": 0.0, "head": 0.0},
            ["depth_00", "depth_01", "depth_10", "head"],
        ),
        ({"block_2": 0.0, "block_3": 0.0}, ["depth_2", "depth_3"]),
        ({"Dense_3": {"bias": 0.0}, "Dense_4": {"bias": 0.0}}, ["depth_3", "depth_4"]),
        ({"b1": 0.0, "w1": 0.0, "w2": 0.0}, ["depth_1", "depth_1", "depth_2"]),
        ({"layer1": {"bias": 0.0, "kernel": 0.0}}, ["depth_1", "depth_1"]),
        # A number within a block, in the name of the whole model, or in the middle is no layer.
        ({"block_0": {"fc1": 0.0, "fc2": 0.0}, "conv1": 0.0}, ["depth_0", "depth_0", "rest"]),
        (
            {"gpt2": {"h": [{"ln_1": 0.0}, {"ln_1": 0.0}], "wte": 0.0}},
            ["depth_0", "depth_1", "embed"],
        ),
        ({"resnet50": {"conv2d": 0.0, "l1": 0.0, "l2": 0.0}}, ["rest", "depth_1", "depth_2"]),
    ],
)
def test_label_by_depth_knows_the_names_that_layers_have(params, expected):
    assert jax.tree.leaves(hd.label_by_depth(params)) == expected


def test_label_by_depth_says_which_names_it_looked_at():
    with pytest.raises(ValueError, match="'bias', 'body', 'head', 'kernel'"):
        hd.label_by_depth({"body": {"bias": 0.0, "kernel": 0.0}, "head": 0.0})


def test_layers_that_flax_has_numbered_have_no_head_and_a_warning_says_so():
    params = {"Dense_0": {"kernel": 0.0}, "Dense_1": {"kernel": 0.0}}
    with pytest.warns(UserWarning, match="no head: the last of Dense_0, Dense_1") as caught:
        hd.label_by_role(params)
    assert caught[0].filename == __file__
    hd.label_by_role(params | {"head": {"kernel": 0.0}})  # warnings are errors
    hd.label_by_role({"Dense_0": {"kernel": 0.0}})
    hd.label_by_role({"Block_0": {"Dense_0": 0.0}, "Block_1": {"Dense_1": 0.0}})
