"""Sums by group: every inner product against NumPy in float64, whatever the leaves are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import enable_x64

from hidlr_optax._groups import _LONGEST_ROW, Groups

_PAIRS = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)]
_DTYPES = ("float32", "bfloat16", "float16", "complex64", "int32")
_SHAPES = [(), (0,), (5,), (3, 4), (0, 3), (2, 0), (2, 3, 4), (4, 1), (_LONGEST_ROW + 1,)]
_SHAPES += [(2, _LONGEST_ROW + 1), (_LONGEST_ROW, 2)]


def _leaf(rng, shape, dtype):
    x = 3 * rng.normal(size=shape)
    if dtype.startswith("complex"):
        x = x + 1j * rng.normal(size=shape)
    return jnp.asarray(x, dtype)


def _wide(leaf):
    return np.asarray(leaf).astype(np.complex128)


def _oracle(trees, labels, names, left, right):
    """Leaf by leaf, and number by number of NumPy's widest."""
    sums = dict.fromkeys(names, 0.0)
    for n, label in enumerate(labels):
        leaves = [tree[n] for tree in trees]
        if all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves):
            x, y = _wide(leaves[left]), _wide(leaves[right])
            sums[label] += float(np.real(np.sum(np.conj(x) * y)))
    return [sums[name] for name in names]


def _assert_products(trees, labels):
    groups = Groups.of(labels, trees[0])
    found = jax.jit(lambda *trees: groups.products(trees, _PAIRS))(*trees)
    assert len(found) == len(_PAIRS)
    for (i, j), product in zip(_PAIRS, found, strict=True):
        expected = _oracle(trees, labels, groups.names, i, j)
        largest = sum(float(np.sum(np.abs(_wide(leaf)) ** 2)) for tree in trees for leaf in tree)
        np.testing.assert_allclose(product, expected, rtol=3e-6, atol=3e-6 * largest)
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(_SHAPES), st.sampled_from(_DTYPES), st.sampled_from("abc")),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 9),
)
def test_inner_products_are_those_of_numpy(leaves, seed):
    rng = np.random.default_rng(seed)
    trees = [[_leaf(rng, shape, dtype) for shape, dtype, _ in leaves] for _ in range(3)]
    found = _assert_products(trees, [label for *_, label in leaves])
    assert all(product.dtype == jnp.float32 for product in found)


def test_trees_of_several_types():
    rng = np.random.default_rng(0)
    trees = [[_leaf(rng, (3, 4), dtype)] for dtype in ("complex64", "float32", "bfloat16")]
    _assert_products(trees, ["a"])


def test_doubles_are_summed_as_doubles():
    with enable_x64():
        rng = np.random.default_rng(0)
        trees = [[_leaf(rng, (3, 4), "float64"), _leaf(rng, (4,), "float32")] for _ in range(3)]
        groups = Groups.of(["a", "a"], trees[0])
        for (i, j), product in zip(_PAIRS, groups.products(trees, _PAIRS), strict=True):
            assert product.dtype == jnp.float64
            expected = _oracle(trees, ["a", "a"], ["a"], i, j)
            np.testing.assert_allclose(product, expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(4_000_000,), (2000, 2000), (2, 2_000_000)])
def test_small_terms_are_not_lost_in_a_long_sum(shape):
    # One after the other, float32 would stop at 2**24, or lose a part in 10,000 before.
    ones = [jnp.full(shape, 1.1), jnp.full(shape, 0.9)]
    groups = Groups.of(["a"], ones[:1])
    square, inner = groups.products([[x] for x in ones], [(0, 0), (0, 1)])
    np.testing.assert_allclose(square, [1.21 * 4e6], rtol=3e-5)
    np.testing.assert_allclose(inner, [0.99 * 4e6], rtol=3e-5)


def test_an_inner_product_of_gradients_conjugates_nothing():
    left, right = [jnp.asarray([1 + 2j, 3j])], [jnp.asarray([2 - 1j, 1 + 1j])]
    groups = Groups.of(["a"], left)
    expected = np.real(np.sum(np.asarray(left[0]) * np.asarray(right[0])))
    assert float(groups.inner(left, right)[0]) == expected
