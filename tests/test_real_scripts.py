"""What the comparison of real scripts calls a win."""

from benchmarks.scripts import compare


def test_ahead_is_who_is_better_with_every_seed():
    assert compare.ahead([1.0, 2.0], [0.9, 1.9]) == "hidlr"
    assert compare.ahead([1.0, 2.0], [1.1, 2.1]) == "usual"
    assert compare.ahead([1.0, 2.0], [0.9, 2.0]) == "even"
