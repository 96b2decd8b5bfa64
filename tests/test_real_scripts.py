"""What the comparison of real scripts counts and calls a win."""

import textwrap

import pytest

from benchmarks.scripts import compare as real_scripts

MODULE = textwrap.dedent('''
    """Two scripts."""

    import jax
    from flax.training import train_state

    import hidlr_optax.flax as hdf

    LIMIT = jax.numpy.inf


    def usual(rate):
        """As it is."""
        tx = make(rate)
        return train_state.TrainState(tx)


    def with_hidlr(labels):
        """Longer, which does
        not count."""
        tx = make(1.0)
        tx = chain(tx, labels)
        return hdf.TrainState(tx)
''')


def test_a_script_has_the_body_of_its_function_and_the_imports_in_use():
    assert real_scripts.program(MODULE, "usual", "with_hidlr") == [
        "import jax",
        "from flax.training import train_state",
        "    tx = make(rate)",
        "    return train_state.TrainState(tx)",
    ]
    assert real_scripts.program(MODULE, "with_hidlr", "usual") == [
        "import jax",
        "import hidlr_optax.flax as hdf",
        "    tx = make(1.0)",
        "    tx = chain(tx, labels)",
        "    return hdf.TrainState(tx)",
    ]


def test_lines_that_come_and_go_are_counted_and_those_that_stay_are_not():
    before, after = ["a", "b", "c"], ["a", "B", "c", "d"]
    assert real_scripts.difference(before, after) == (2, 1)
    assert real_scripts.difference(before, before) == (0, 0)


@pytest.mark.parametrize("name", real_scripts.SCRIPTS)
def test_hidlr_takes_a_few_lines(name):
    came, went = real_scripts.lines_of_difference(real_scripts.SCRIPTS[name]).split()
    assert 2 <= int(came) <= 8
    assert 2 <= int(went.replace("−", "")) <= 8


def test_ahead_is_who_is_better_with_every_seed():
    assert real_scripts.ahead([1.0, 2.0], [0.9, 1.9]) == "hidlr"
    assert real_scripts.ahead([1.0, 2.0], [1.1, 2.1]) == "usual"
    assert real_scripts.ahead([1.0, 2.0], [0.9, 2.0]) == "even"
