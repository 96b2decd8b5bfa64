"""`hold`: its arithmetic against plain Python and NumPy, and what it makes of runs."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import counted, enable_x64, promoting

import hidlr_optax as hd
from hidlr_optax._quadratic import Kept
from hidlr_optax._rule import hold as _hold

NAN, INF = math.nan, math.inf
_f32 = jnp.float32
_close = functools.partial(np.testing.assert_allclose, rtol=2e-5)
_any_float = st.floats(width=32) | st.sampled_from([0.0, NAN, INF, -INF, 1e-38, 1e38, -1e38, 1.0])


def _rates(state):
    rates = optax.tree.get(state, "group_learning_rates")
    return {name: float(rate) for name, rate in rates.items()}


def _kept(state):
    return {name: Kept(int(kept)) for name, kept in optax.tree.get(state, "kept").items()}


def _averages(same=0.0, slope=0.0, curvature=0.0):
    return _hold.Averages(_f32(same), _f32(slope), _f32(curvature))


def _progress(**known):
    values = {name: jax.tree.map(_f32, value) for name, value in known.items()}
    return _hold.begin()._replace(**values)


def _mean(old, new, count, decay):
    """Of all so far, and exponential once there are many."""
    weight = max(1 / (count + 1), 1 - decay)
    return (1 - weight) * old + weight * new


def _clamp(x, low, high):
    return min(max(x, low), high)


# The parts, one by one.


@pytest.mark.parametrize("rates", [[0.1], [0.1, 10.0], [1e-3, 2e-3, 5.0]])
def test_the_joint_rate_is_the_geometric_mean(rates):
    _close(_hold.joint(_f32(rates)), math.prod(rates) ** (1 / len(rates)))


def _first_rates_in_python(rates, shape, value, slope, squares, length):
    steep = shape @ np.abs(slope)
    if not 0 < steep < INF:
        return [shape[0], rates[1]]
    times = 0.03 * abs(value) / steep
    if 0 < length < INF and times < INF:
        longest = length / math.sqrt(shape**2 @ squares)
        times = _clamp(times, 1e-3 * longest, longest)
    return shape * times if 0 < times < INF else [shape[0], rates[1]]


@pytest.mark.parametrize("length", [0.0, 0.02, 1e5, NAN])
@pytest.mark.parametrize("value", [2.0, -2.0, 0.0, NAN, INF, -INF])
def test_the_first_step_changes_the_loss_by_three_hundredths_within_a_part_of_the_parameters(
    value, length
):
    first_rates = jax.jit(_hold.first_rates)
    rates, squares = np.array([0.0, 0.2]), np.array([4.0, 9.0])
    slopes = [[1.0, 2.0], [1.0, -2.0], [0.0, 2.0], [0.0, 0.0], [1.0, NAN], [INF, 1.0]]
    for slope, scale in itertools.product(slopes, [1e-7, 1.0, 3e5]):
        known = rates, np.array([1.0, 3.0]) * scale, value, slope, squares, length
        found = first_rates(*map(_f32, known))
        assert found.dtype == jnp.float32
        _close(found, _first_rates_in_python(*known))


def test_the_first_rates_do_not_depend_on_the_scale_of_the_shape_to_the_last_bit():
    for shape in ([1.0], [1.0, 1.0, 1.0]):
        slope = _f32(np.linspace(0.3, 0.7, len(shape)))
        found = [
            _hold.first_rates(
                *(_f32(shape), _f32(shape) * _f32(scale), _f32(2.3), slope),
                *(_f32(np.ones(len(shape))), _f32(1.0)),
            )
            for scale in (1e-7, 1e-3, 1.0, 17.0)
        ]
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])


def _preconditioned_in_numpy(u, before, g):
    """By the residual of least squares, a ten-thousandth of a ridge on what g leaves over."""
    u, before, g = (x / np.linalg.norm(x) if np.any(x) else x * 0.0 for x in (u, before, g))
    left = before - (before @ g) * g  # of u′, orthogonal to g
    carried = _clamp((u @ left) / (1 - (before @ g) ** 2 + 1e-4), 0.0, 1.0)
    residual = u - carried * before
    return _clamp(10 * (1 + residual @ g / math.sqrt(residual @ residual + 1e-6)), 0.0, 1.0)


def _preconditioned(u, before, g):
    inner = {
        "direction": u @ u,
        "previous": before @ before,
        "gradient": g @ g,
        "ahead": u @ before,
        "down": u @ g,
        "across": before @ g,
    }
    return float(_hold.preconditioned(**{name: _f32(value) for name, value in inner.items()}))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("turn", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, -0.5])
def test_what_is_preconditioned_is_told_by_the_residual_of_least_squares(seed, turn, memory):
    rng = np.random.default_rng(seed)
    before, g = rng.normal(size=(2, 50))
    new = -g + turn * rng.normal(size=50)
    sizes = 10.0 ** rng.uniform(-8, 8, size=3)
    u, before, g = (memory * before + new) * sizes[0], before * sizes[1], g * sizes[2]
    found = _preconditioned(u, before, g)
    np.testing.assert_allclose(found, _preconditioned_in_numpy(u, before, g), atol=1e-3)
    if turn == 3.0:
        assert found == 1.0
    if turn == 0.0 and memory >= 0:
        assert found < 0.01


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        (lambda: optax.sgd(1.0), 0.0),
        (lambda: optax.sgd(1.0, momentum=0.9), 0.0),
        (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.95)), 0.0),
        (lambda: optax.adamw(1.0), 1.0),
        (lambda: optax.lion(1.0), 1.0),
        (lambda: optax.rmsprop(1.0), 1.0),
        (lambda: optax.sign_sgd(1.0), 1.0),
    ],
)
def test_sgd_and_momentum_are_sums_of_gradients_and_others_are_preconditioned(direction, expected):
    rng = np.random.default_rng(0)
    tx = promoting("standard", direction())
    params = jnp.zeros(2000)
    scales = np.exp(2 * rng.normal(size=2000))
    mean = scales * rng.normal(size=2000)
    state, before, found = tx.init(params), np.zeros(2000), []
    for _ in range(20):
        g = _f32(mean + 3 * scales * rng.normal(size=2000))
        updates, state = tx.update(g, state, params)
        found.append(_preconditioned(np.asarray(updates), before, np.asarray(g)))
        before = np.asarray(updates)
    np.testing.assert_allclose(found[2:], expected, atol=0.05)


@pytest.mark.parametrize("nothing", ["direction", "previous", "gradient"])
def test_what_is_preconditioned_is_a_number_where_one_of_the_three_is_zero(nothing):
    sizes = {"direction": 1.0, "previous": 1.0, "gradient": 1.0} | {nothing: 0.0}
    inner = dict.fromkeys(("ahead", "down", "across"), 0.0)
    found = _hold.preconditioned(**{name: _f32(x) for name, x in (sizes | inner).items()})
    assert float(found) == 1.0  # nothing points along the gradient


def _watched_in_python(losses):
    """Of those whose squares are: running mean, variance, both at the least mean, and number."""
    mean, spread, least, least_spread, count = 0.0, 0.0, INF, 0.0, 0
    last = None
    for loss in losses:
        if not math.isfinite(loss) or (last is not None and abs(loss - last) > 1e19):
            continue
        mean = _mean(mean, loss, count, 0.95)
        if last is not None:
            spread = _mean(spread, (loss - last) ** 2 / 2, count - 1, 0.95)
        last = loss
        if count >= 20 and mean < least:
            least, least_spread = mean, spread
        count += 1
    return mean, spread, least, least_spread, count


@pytest.mark.parametrize("steps", [1, 5, 19, 20, 21, 22, 60])
@pytest.mark.parametrize("bad", [None, NAN, INF, -INF, 1e25])
def test_the_running_loss_is_that_of_a_loop_over_those_whose_squares_are_finite(steps, bad):
    losses = 3.0 - 0.02 * np.arange(steps) + np.random.default_rng(steps).normal(size=steps)
    losses = [_clamp(loss, 0.1, 10) for loss in losses]
    if bad is not None and steps > 1:
        losses[steps // 2] = bad
    progress = _hold.begin()
    watch = jax.jit(_hold.watch)
    for loss in losses:
        progress = watch(progress, _f32(loss))
    fields = ("loss", "spread", "least", "least_spread", "losses")
    found = [float(getattr(progress, field)) for field in fields]
    _close(found, _watched_in_python(losses), rtol=1e-4, atol=1e-6)


def test_a_loss_that_falls_steadily_has_hardly_a_spread():
    noise = np.random.default_rng(0).normal(size=200)
    falling, level = _hold.begin(), _hold.begin()
    watch = jax.jit(_hold.watch)
    for n, wiggle in enumerate(noise):
        falling = watch(falling, _f32(20 - 0.1 * n + 0.1 * wiggle))
        level = watch(level, _f32(0.1 * wiggle))
    assert 0.5 < float(falling.spread) / float(level.spread) < 2
    assert 0.3 < float(level.spread) / 0.01 < 3


def test_the_running_loss_begins_anew_once_the_rates_are_found():
    progress = _hold.begin()
    for n in range(40):
        progress = _hold.watch(progress, _f32(20.0 - n / 4))
    fresh = _hold.forget_losses(progress, jnp.asarray(True))
    same = _hold.forget_losses(progress, jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, same, progress)
    watched = _hold.watch(_hold.watch(fresh, _f32(2.0)), _f32(1.0))
    found = [float(x) for x in (watched.loss, watched.spread, watched.least, watched.losses)]
    _close(found, [1.5, 0.5, INF, 2])


def _looked_in_python(known, seen, turned, finding):
    """The averages after one look; `known` has those and their number."""
    by = max(abs(seen["loss"]), 1e-3 * abs(known["loss"]), 1e-3 * abs(seen["same"]), 1e-30)
    same, slope = seen["same"] / seen["rate"] / by, seen["slope"] / seen["rate"] / by
    curvature = seen["curvature"] / seen["rate"] ** 2 / by
    size = max(same if known["looks"] == 0 else known["same"], 1e-30)

    def mean(name, new, decay):
        return _mean(known[name], new, known["looks"], decay if finding else 0.95)

    return {
        "same": mean("same", _clamp(same, -size, 3 * size), 0.9),
        "slope": mean("slope", _clamp(slope, -3 * size, 3 * size), 0.9),
        "curvature": mean(
            "curvature", _clamp(curvature, -2 * size / seen["rate"], 4 * size / seen["rate"]), 0.7
        ),
        "size": by,
        "loss": known["loss"],
        "looks": known["looks"] + 1,
        "preconditioned": _mean(known["preconditioned"], turned, known["looks"], 0.9),
    }


@pytest.mark.parametrize("finding", [True, False])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_looks_are_averaged_as_in_a_loop(finding, scale):
    rng = np.random.default_rng(3)
    known = dict.fromkeys(("same", "slope", "curvature", "looks", "preconditioned"), 0.0)
    absolute, known = known | {"loss": 0.0}, known | {"loss": 5.0}
    progress = _progress(loss=5.0)
    look = jax.jit(_hold.look)
    for _ in range(30):
        seen = {
            "rate": scale * rng.uniform(0.5, 2),
            "slope": rng.normal(1, 3),
            "curvature": rng.normal(1, 4),
            "same": rng.normal(2, 2),
            "loss": rng.choice([-3.0, 0.0, 0.02, 4.0]),
        }
        turned = rng.uniform()
        known = _looked_in_python(known, seen, turned, finding)
        absolute = _looked_in_python(absolute, seen | {"loss": 1.0}, turned, finding)
        loss = _f32(seen.pop("loss"))
        arguments = _hold.Look(**{name: _f32(x) for name, x in seen.items()})
        progress = look(progress, arguments, _f32(turned), jnp.asarray(finding), loss)
        for expected, found in ((known, progress.relative), (absolute, progress.absolute)):
            size = max(abs(expected["same"]), abs(expected["slope"]))
            units = {"same": size, "slope": size, "curvature": size / scale}
            for (name, unit), mean in zip(units.items(), found, strict=True):
                np.testing.assert_allclose(mean, expected[name], rtol=1e-4, atol=1e-5 * unit)
        for name in ("size", "looks", "preconditioned"):
            _close(getattr(progress, name), known[name], rtol=1e-4)


@pytest.mark.parametrize("finding", [True, False])
def test_absolute_looks_count_while_the_rates_are_found_and_relative_ones_after_that(finding):
    progress = _progress(
        absolute=_averages(2.0, 2.0, 1.0), relative=_averages(4.0, 4.0, 40.0), size=0.5, peak=1.0
    )
    look = _hold.Look(*map(_f32, (0.1, 0.2, 0.01, 0.2)))
    _, after = _hold.hold().change(progress, look, _f32(1.0), jnp.asarray(finding))
    _close(after.ratio, 0.1 * (1 / 2 if finding else 40 / 4))
    _close(after.relative, (4.0, 4.0, 40.0))  # the averages themselves stay apart
    _close(after.absolute, (2.0, 2.0, 1.0))


def _ratios_in_python(same, slope, curvature, peak, rate, seen, size):
    share = max(slope, 0.1 * max(same, 1e-30))
    scale = peak if peak > 0 else 1.0
    return curvature * rate / share / scale, seen / rate / size / share / scale


@pytest.mark.parametrize("peak", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize(
    ("same", "slope", "curvature"),
    [(2.0, 1.5, 3.0), (2.0, -1.5, 3.0), (2.0, 0.0, -3.0), (0.0, 1.0, 1.0), (2.0, 1.0, 0.0)],
)
def test_the_ratios_are_curvature_over_slope(same, slope, curvature, peak):
    averages = _averages(same, slope, curvature)
    for rate, seen, size in ((0.3, 0.7, 1.0), (1e-4, -0.2, 5.0)):
        look = _hold.Look(*map(_f32, (rate, 9.0, seen, 9.0)))
        found = _hold.ratios(averages, look, _f32(size), _f32(peak))
        _close(found, _ratios_in_python(same, slope, curvature, peak, rate, seen, size))


@pytest.mark.parametrize("preconditioned", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("fresh", [-1.0, 0.0, 0.5, 2.0, 3.0])
def test_the_goal_is_lower_for_preconditioned_directions_and_falls_with_noise(
    fresh, preconditioned
):
    noise = _clamp(1 - fresh / 2.0, 0, 1)
    expected = (1 - preconditioned) * 1.5 + preconditioned * 1.3 * (1 - 0.8 * noise)
    averages = _averages(same=2.0, slope=fresh)
    _close(_hold.goal_for(1.5, 1.3, averages, _f32(preconditioned)), expected)


def _wanted_in_python(ratio, goal):
    return math.log(goal / max(ratio, 1e-6)) if ratio > 0 else 2.0


def _found_in_python(average, present, goal):
    ratio = max(average, min(present, 1.5 * goal))
    return _clamp(_wanted_in_python(ratio, goal), math.log(0.5), math.log(1.2))


def _kept_in_python(average, present, goal, factor, refreshes, preconditioned):
    ratio = max(average, min(present, goal)) if average < goal else average
    wanted = _wanted_in_python(ratio, goal)
    slow = _clamp(wanted, math.log(0.5), math.log(1.3)) / (1 + refreshes / 4)
    fast = _clamp(wanted - 0.7, 0.0, math.log(1.3))
    change = factor**4 * max(slow, fast)
    return change * (1 - preconditioned) if change > 0 else change


_RATIOS = [-3.0, 0.0, 1e-9, 0.01, 0.6, 1.0, 1.3, 1.6, 2.5, 40.0]


@pytest.mark.parametrize("average", _RATIOS)
@pytest.mark.parametrize("goal", [1.3, 1.5])
def test_the_rates_are_moved_as_in_plain_python(average, goal):
    for present in _RATIOS:
        ratio = _hold.Ratios(_f32(average), _f32(present))
        expected = _found_in_python(average, present, goal)
        np.testing.assert_allclose(_hold.find(ratio, _f32(goal)), expected, rtol=1e-4, atol=1e-6)
        for factor, refreshes in ((1.0, 0.0), (1.0, 12.0), (0.3, 4.0), (-0.5, 4.0), (1.2, 1.0)):
            for preconditioned in (0.0, 0.4, 1.0):
                numbers = goal, factor, refreshes, preconditioned
                found = _hold.keep(ratio, *map(_f32, numbers))
                expected = _kept_in_python(average, present, *numbers)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def _shortened_in_python(mean, ahead, descent, loss):
    if not math.isfinite(ahead):
        return 0.1
    size = max(abs(loss), abs(mean))
    if not (ahead > 0.3 * size or (ahead > 0 and descent > size)):
        return 1.0
    curve = 2 * (ahead + descent)  # of −descent·t + curve·t²/2, `ahead` at t = 1
    return _clamp(descent / curve if curve > 0 else descent, 0.1, 0.5)


@pytest.mark.parametrize("ahead", [-1.0, 0.0, 0.1, 0.59, 0.61, 3.0, 1e30, NAN, INF, -INF])
def test_a_step_that_does_harm_is_shortened_as_in_plain_python(ahead):
    mean, loss = 2.0, 1.0
    for descent in (0.0, 0.2, 1.9, 2.1, -1.0, -5.0):
        found = _hold.shortened(_progress(loss=mean), *map(_f32, (ahead, descent, loss)))
        expected = _shortened_in_python(mean, ahead, descent, loss)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def _guarded_in_python(mean, least, spread, ceiling, behind, part, loss, rate, usual):
    """The factor, the ceiling, the least loss and whether that is forgotten.

    Of losses averaged with 0.95ⁿ, n back, 90 refreshes after the rates were found.
    """
    squares = sum((0.05 * 0.95**n) ** 2 for n in range(2000))
    strays = mean - least > (2.5 + math.log(1 + 1.5**2)) * math.sqrt(spread * squares)
    if strays or behind > 0.3 * max(abs(loss), abs(mean), usual):
        part = min(part, 0.5)
    if strays:
        ceiling, least = min(ceiling, rate / 2), INF
    return part, ceiling, least, strays


@pytest.mark.parametrize("behind", [-1.0, 0.59, 0.61, 1.21, NAN, INF])
@pytest.mark.parametrize("ceiling", [INF, 0.05, 10.0])
@pytest.mark.parametrize("least", [INF, 1.0, 1.70, 1.71])
def test_the_guard_is_that_of_plain_python(behind, ceiling, least):
    mean, spread, loss, rate = 2.0, 0.25, 1.0, 0.2
    known = {"spread": 99.0, "least_spread": spread, "ceiling": ceiling}
    known |= {"losses": 30.0, "held": 90.0}
    guard = jax.jit(_hold.guard)
    # The first is what such a step wins by its slope.
    for usual, part in itertools.product([-9.0, 1.9, 4.0], [1.0, 0.5, 1e-5]):
        slopes = _averages(same=usual / 0.5 / rate)
        progress = _progress(loss=mean, least=least, relative=slopes, size=0.5, **known)
        found = guard(progress, *map(_f32, (behind, part, loss, rate)))
        expected = _guarded_in_python(mean, least, spread, ceiling, behind, part, loss, rate, usual)
        factor, top, lowest, forgotten = expected
        np.testing.assert_allclose(found.cut, math.log(factor), rtol=1e-4)
        _close([found.progress.ceiling, found.progress.least], [top, lowest])
        assert float(found.progress.losses) == (0 if forgotten else 30)


def _tried_in_python(level, before, on_trial, losses, spread, strays):
    """By what the rates rise again, and the trial that is left."""
    raised = 1.0
    if before < INF and losses >= 70:
        if abs(level - before) < 2 * math.sqrt(spread / 70 + spread / 70) and not strays:
            raised = 2.0**on_trial
        before, on_trial = INF, 0
    if strays:
        before = level if before == INF and losses >= 70 else before
        on_trial += before < INF
    return raised, before, on_trial


@pytest.mark.parametrize("level", [1.82, 1.84, 2.16, 2.18])
@pytest.mark.parametrize("losses", [69, 70])
@pytest.mark.parametrize("strays", [False, True])
def test_cuts_are_tried_as_in_plain_python(level, losses, strays):
    spread, rate = 0.25, 0.2
    for before, on_trial in ((INF, 0), (2.0, 1), (2.0, 3)):
        trial = {"level": level, "before": before, "on_trial": on_trial, "losses": losses}
        known = {"loss": 2.0, "least": 1.0 if strays else INF, "ceiling": 0.25}
        progress = _progress(spread=spread, least_spread=spread, **trial, **known)
        found = jax.jit(_hold.guard)(progress, *map(_f32, (-1.0, 1.0, 2.0, rate)))
        raised, left, number = _tried_in_python(level, before, on_trial, losses, spread, strays)
        factor, ceiling = (raised / 2, 0.1) if strays else (raised, 0.25 * raised)
        _close(jnp.exp(found.cut), factor)
        _close([found.progress.ceiling, found.progress.before], [ceiling, left])
        assert float(found.progress.on_trial) == number


def _rates_beside(losses):
    """The joint rate at each of these losses, a refresh at every tenth, the guard alone at work."""

    def step(carry, now):
        (progress, rate), (n, loss) = carry, now
        progress = _hold.watch(progress, loss)._replace(held=n / 10)
        verdict = _hold.guard(progress, _f32(0.0), _f32(1.0), loss, rate)
        due = n % 10 == 0
        moved = jnp.minimum(rate * jnp.exp(verdict.cut), verdict.progress.ceiling)
        new = jax.tree.map(functools.partial(jnp.where, due), verdict.progress, progress)
        return (new, jnp.where(due, moved, rate)), jnp.where(due, moved, rate)

    steps = jnp.arange(len(losses), dtype=jnp.float32)
    return jax.lax.scan(step, (_hold.begin(), _f32(1.0)), (steps, losses))[1]


@pytest.mark.parametrize("start", [0.0, 20.0])
def test_a_long_run_at_rest_keeps_its_rates(start):
    """Losses of batches that scatter about one value, after a fall or without."""
    noise = jax.random.normal(jax.random.key(0), (8, 20_000))
    losses = 2.0 + start * jnp.exp(-jnp.arange(20_000) / 100) + 0.3 * noise
    rates = np.asarray(jax.jit(jax.vmap(_rates_beside))(losses))
    assert rates.max() == 1.0  # taken back, and no more than that
    # If no cut was taken back, from 1/16 down to 1/512.
    assert rates[:, -1].min() >= 1 / 8, rates[:, -1]
    assert rates[:, -1].mean() >= 0.4, rates[:, -1]


@pytest.mark.parametrize("after", [0.5, 3.0])
def test_a_cut_that_a_lasting_rise_has_called_for_is_kept(after):
    noise = jax.random.normal(jax.random.key(0), (8, 2000))
    losses = jnp.where(jnp.arange(2000) < 1000, 2.0, 2.0 + after) + 0.3 * noise
    rates = np.asarray(jax.jit(jax.vmap(_rates_beside))(losses))
    assert (rates[:, -1] <= 0.5).all()


@pytest.mark.parametrize("looks", [0.0, 1.0])
@pytest.mark.parametrize(
    ("descent", "expected"), [(2.9, False), (3.1, True), (-9.0, False), (NAN, False), (INF, True)]
)
def test_a_step_far_longer_than_those_before_calls_for_a_look(descent, expected, looks):
    known = {"relative": _averages(same=3.0), "size": 2.0, "looks": looks}
    usual = _progress(loss=1.0, **known)  # 0.3 at this rate, and ten times that 3
    assert bool(_hold.leaps(usual, _f32(descent), _f32(0.05))) == (expected and looks > 0)
    large = _progress(loss=-5.0, **known)
    found = _hold.leaps(large, _f32(descent), _f32(0.05))
    assert bool(found) == (descent > 5 and looks > 0)


@pytest.mark.parametrize("losses", [0.0, 4.0, 5.0, 50.0])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("loss", [-5.0, 2.0, 2.59, 2.61, 6.9, 7.1, NAN, INF])
def test_a_loss_far_above_the_running_one_raises_the_alarm(loss, spread, losses):
    progress = _progress(loss=2.0, spread=spread, losses=losses)
    expected = losses >= 4 and loss - 2 > max(0.3 * 2, 4 * math.sqrt(spread))
    assert bool(_hold.alarmed(progress, _f32(loss))) == expected


def _split_in_python(rates, slope, curvature, usable, initial, max_split):
    gain = [rate * b for rate, b in zip(rates, slope, strict=True)]
    cost = [rate**2 * a for rate, a in zip(rates, curvature, strict=True)]
    good = [k for k in range(len(rates)) if usable[k] and gain[k] > 0 and cost[k] > 0]
    if len(good) < 2:
        return rates
    whole = sum(cost[k] for k in good) / sum(gain[k] for k in good)
    logs = [math.log(rate / at) for rate, at in zip(rates, initial, strict=True)]
    for k in good:
        logs[k] += 0.15 * _clamp(math.log(whole / (cost[k] / gain[k])), -1, 1)
    middle, bound = sum(logs) / len(logs), math.log(max_split)
    logs = [x - middle for x in logs]
    widest = max(map(abs, logs))
    if widest > bound:
        logs = [x * bound / widest for x in logs]
    shape = [at * math.exp(x) for at, x in zip(initial, logs, strict=True)]
    same = math.prod(rate / x for rate, x in zip(rates, shape, strict=True)) ** (1 / len(rates))
    return [x * same for x in shape]


@pytest.mark.parametrize("max_split", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("seed", range(8))
def test_the_split_is_that_of_plain_python_and_leaves_the_joint_rate(seed, max_split):
    rng = np.random.default_rng(seed)
    size = 2 + seed % 3
    rates, initial, slope, curvature = np.exp(rng.normal(size=(4, size)))
    slope *= np.where(rng.uniform(size=size) < 0.2, -1, 1)
    curvature *= np.where(rng.uniform(size=size) < 0.2, -1, 1)
    usable = rng.uniform(size=size) < 0.9
    found = jax.jit(_hold.split, static_argnums=5)(
        *map(_f32, (rates, slope, curvature)), jnp.asarray(usable), _f32(initial), max_split
    )
    expected = _split_in_python(rates, slope, curvature, usable, initial, max_split)
    _close(found, expected, rtol=1e-4)
    _close(_hold.joint(found), _hold.joint(_f32(rates)), rtol=1e-4)
    if np.any(np.asarray(found) != _f32(rates)):
        apart = np.log(np.asarray(found) / initial)
        assert np.max(np.abs(apart - apart.mean())) <= math.log(max_split) + 1e-4


def test_a_split_moves_the_steeper_curved_group_down_and_never_beyond_its_bound():
    rates = np.array([0.1, 0.1])
    split = jax.jit(_hold.split, static_argnums=5)
    for _ in range(200):
        rates = split(
            _f32(rates), _f32([1, 1]), _f32([1, 1e6]), jnp.ones(2, bool), _f32([0.1, 0.1]), 3.0
        )
        assert 0.1 / 3.001 <= float(rates[1]) <= 0.1 <= float(rates[0]) <= 0.1 * 3.001
    _close(rates, [0.3, 0.1 / 3], rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"goal": 0.0}, "goal must be finite and > 0, got 0.0"),
        ({"goal": NAN}, "goal must be finite and > 0, got nan"),
        ({"preconditioned_goal": INF}, "preconditioned_goal must be finite and > 0, got inf"),
        ({"split_interval": 0}, "split_interval must be a whole number >= 1, got 0"),
        ({"split_interval": 2.5}, "split_interval must be a whole number >= 1, got 2.5"),
        ({"max_split": 0.5}, "max_split must be finite and >= 1, got 0.5"),
        ({"max_split": INF}, "max_split must be finite and >= 1, got inf"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hd.hold(**kwargs)


# Whatever it is fed.


def _fed(params, batch):
    """A loss that is what the batch says: at the parameters, and wherever else it is evaluated."""
    total = params["x"] + params["y"][0] + params["y"][1]
    return batch["offset"] + batch["linear"] * total + batch["square"] * total**2


_STEEP = [0, 0, 0, 0.5, 0, 2857627, 0, 5, 0]  # and hardly curved


@functools.cache
def _fed_rule(warmup, slope):
    tx = hd.hidlr(
        _fed,
        {"x": "x", "y": "y"},
        warmup=warmup,
        update_interval=1,
        slope=slope,
        solver=hd.hold(split_interval=1),
        schedule=lambda step: jnp.float32([1.0, -0.5, 0.0, 2.0])[step % 4],
    )
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize(("warmup", "slope"), [(0, "lagged"), (2, "lagged"), (1, "gradient")])
@given(calls=st.lists(st.lists(_any_float, min_size=9, max_size=9), min_size=1, max_size=5))
@example(calls=[[0] * 9, [0] * 9, [0] * 4 + [1e38] + [0] * 4, [0, 0, 0, 1, 4, 0, 0, 0, 0]])
@example(calls=[[0] * 9, [0] * 5 + [1e-30, 0, 0, 0], _STEEP, [0, 0, 0, 1, 0, 0, 0, 1, 0]])
@example(calls=[[0, 0, 0, 1, 0, 1, -68068160, 0, 0], [0, 0, 0, 0, 0, -1, -68068176, 0, 0]])
@example(calls=[[0, 0, 0, 2.716856e16, 0, 0.00390625, -1e38, 0, 0]])
@settings(max_examples=60, deadline=None)
def test_rates_and_state_stay_finite_and_rates_positive_whatever_is_fed(warmup, slope, calls):
    tx, update = _fed_rule(warmup, slope)
    params = {"x": jnp.ones(()), "y": jnp.ones(2)}
    state = tx.init(params)
    for value, offset, linear, square, *rest in calls:
        u, v, g, h, _ = map(_f32, rest)
        batch = {"offset": _f32(offset), "linear": _f32(linear), "square": _f32(square)}
        _, state = update(
            {"x": u, "y": jnp.stack([v, v])},
            state,
            params,
            batch=batch,
            value=_f32(value),
            grad={"x": g, "y": jnp.stack([h, g])},
        )
        assert all(0 < rate < INF for rate in _rates(state).values())
        assert all(Kept(int(kept)) in Kept for kept in state.kept.values())
        rates = np.float32(list(_rates(state).values())) * float(state.schedule_factor)
        assert np.isfinite(rates).all()
        for field in ("slope", "curvature", "influence", "measured_slope", "measured_curvature"):
            assert all(np.isfinite(x) for x in getattr(state, field).values()), field
        progress = state.progress._replace(least=0, ceiling=0, before=0)  # infinite: none yet
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(progress)), progress


# What a refresh costs.


@pytest.mark.parametrize(
    ("known", "dtype", "slope", "extra"),
    [
        ({"value", "grad"}, "float32", "lagged", 0),  # where the last step began
        ({"grad"}, "float32", "lagged", 1),  # and the loss here
        ({"value", "grad"}, "bfloat16", "lagged", 1),
        ({"value", "grad"}, "float32", "gradient", 0),  # where the coming one leads
        ({"value"}, "float32", None, 1),  # and to the other side
        (set(), "float32", None, 2),
    ],
)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_refresh_costs_one_evaluation_and_one_more_while_rates_are_found(
    groups, known, dtype, slope, extra
):
    def loss_fn(params, batch):
        return batch + sum(jnp.sum((leaf.astype(jnp.float32) - 1) ** 2) for leaf in params.values())

    counting, calls = counted(loss_fn)
    params = {f"p{n}": jnp.zeros(2, dtype) for n in range(3)}
    labels = "all" if groups == 1 else {name: name for name in params}
    tx = hd.hidlr(counting, labels, slope=slope, warmup=10, solver=hd.hold(split_interval=4))
    value, grad = jax.value_and_grad(loss_fn)(params, 0.0)
    free = {name: x for name, x in {"value": value, "grad": grad}.items() if name in known}
    direction = jax.tree.map(jnp.negative, grad)
    update = jax.jit(tx.update)
    state, counts = tx.init(params), []
    for _ in range(32):
        before = len(calls)
        _, state = update(direction, state, params, batch=0.0, **free)
        jax.effects_barrier()
        counts.append(len(calls) - before)

    expected, refreshes = [], 0
    for step in range(32):
        if step >= 10 and step % 10:
            expected.append(0)
            continue
        # Of several groups, at every fourth refresh: a gradient, or two where no slope is known.
        alone = (1 if "grad" in known else 2) if groups > 1 and refreshes % 4 == 0 else 0
        # Three times, value and gradient are compared with what is probed, and that is followed.
        has_value = "value" in known and dtype == "float32"
        compared = (2 if "grad" in known else has_value) if refreshes < 3 else 0
        expected.append(1 + extra + (step < 10) + alone + compared)
        refreshes += 1
    assert counts == expected
    assert int(state.refreshes) == refreshes == 13


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("value_kind", ["float32", "float64"])
@pytest.mark.parametrize("slope", ["lagged", None])
def test_a_loss_of_any_precision_beside_a_value_of_another_keeps_the_types_of_the_state(
    kind, value_kind, slope
):
    with enable_x64(True):

        def loss_fn(params, batch):
            return jnp.sum((params["w"] - 1) ** 2).astype(kind)

        params = {"w": jnp.zeros(3, jnp.float32)}
        tx = hd.hidlr(loss_fn, "all", slope=slope)
        update = jax.jit(tx.update)
        state = tx.init(params)
        types = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
        for _ in range(2):
            _, state = update(
                {"w": jnp.ones(3, jnp.float32)},
                state,
                params,
                batch=0,
                value=jnp.asarray(3, value_kind),
                grad=None if slope is None else {"w": jnp.full(3, -2, jnp.float32)},
            )
            now = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
            assert now == types


@pytest.mark.parametrize(
    ("kind", "kept"), [("float32", Kept.UPDATED), ("bfloat16", Kept.UNRESOLVED)]
)
def test_a_change_below_the_rounding_of_the_loss_as_it_comes_is_not_resolved(kind, kept):
    def loss_fn(params, batch):
        return (1 + 0.002 * params["x"]).astype(kind) + (0 * batch).astype(kind)

    params = {"x": jnp.ones(())}
    tx = hd.hidlr(loss_fn, "all", slope="gradient", init_learning_rate=0.5, warmup=0)
    _, state = tx.update(
        {"x": _f32(-1)},
        tx.init(params),
        params,
        batch=_f32(0),
        value=_f32(1.002),
        grad={"x": _f32(0.002)},
    )
    assert _kept(state) == {"all": kept}


# Runs.


def _regression(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] + params["b"] - y) ** 2)


_LABELS = {"w": "body", "v": "head", "b": "bias"}


def _adamw(rate=1.0):
    return promoting("standard", optax.adamw(rate))


def _case(steps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, 64, 5))
    y = np.sin(x.sum(axis=2)) + 0.1 * rng.normal(size=(steps, 64))
    params = {"w": rng.normal(size=(5, 6)) / 2, "v": rng.normal(size=6) / 2, "b": np.zeros(())}
    return jax.tree.map(_f32, params), (_f32(x), _f32(y))


def _trained(tx, params, batches, loss_fn=_regression):
    """Parameters, the last state, all states without their direction, and losses."""

    @jax.jit
    def run(params, state):
        def body(carry, batch):
            params, state = carry
            value, grad = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = tx.update(grad, state, params, batch=batch, value=value, grad=grad)
            seen = hd.influence.find_state(state)._replace(direction=())
            return (optax.apply_updates(params, updates), state), (seen, value)

        return jax.lax.scan(body, (params, state), batches)

    (params, state), (states, losses) = run(params, tx.init(params))
    return params, hd.influence.find_state(state), states, np.asarray(losses)


def _assert_alive(params, state):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert all(0 < rate < INF for rate in _rates(state).values())
    progress = state.progress._replace(least=0.0, ceiling=0.0, before=0.0)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(progress))


@pytest.mark.parametrize("labels", ["all", _LABELS], ids=["one", "three"])
def test_the_scale_of_the_rates_asked_for_does_not_matter(labels):
    params, batches = _case(50)
    found = []
    for rate in (1e-3, 1e-7, 10.0, None):
        tx = optax.chain(_adamw(), hd.hidlr(_regression, labels, init_learning_rate=rate))
        trained, state, _, losses = _trained(tx, params, batches)
        _assert_alive(trained, state)
        assert losses[-5:].mean() < losses[0]
        found.append((trained, _rates(state), losses))
    exact = labels == "all"
    for other in found[1:]:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0 if exact else 0.05, atol=0),
            other,
            found[0],
        )


def test_the_proportions_of_the_rates_asked_for_are_those_of_the_first_step():
    params, batches = _case(1)
    asked = {"body": 1e-5, "head": 3e-5, "bias": 2e-5}
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(_regression, _LABELS, init_learning_rate=asked))
    moved, state, _, losses = _trained(tx, params, batches)
    rates = _rates(state)
    assert rates["head"] == pytest.approx(3 * rates["body"], rel=1e-5)
    assert rates["bias"] == pytest.approx(2 * rates["body"], rel=1e-5)
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    drop = losses[0] - float(_regression(moved, batch))
    assert drop == pytest.approx(0.03 * losses[0], rel=0.1)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda step: jnp.where(step < 5, 0.0, 1.0),
        lambda step: jnp.minimum(step / 30, 1.0),
        lambda step: jnp.where(step % 7 == 3, -0.3, 1.0),
        lambda step: jnp.where(step > 25, 5.0, 1.0),
        lambda step: 1.0 - step / 60,
        lambda step: 0.0,
    ],
    ids=["zero at first", "warm-up", "negative at times", "above one", "decay", "zero"],
)
@pytest.mark.parametrize("labels", ["all", _LABELS], ids=["one", "three"])
def test_any_schedule_leaves_a_run_alive_and_is_applied(labels, schedule):
    params, batches = _case(60)
    rule = hd.hidlr(_regression, labels, schedule=schedule)
    trained, state, states, _ = _trained(optax.chain(_adamw(), rule), params, batches)
    _assert_alive(trained, state)
    _close(states.schedule_factor, [float(schedule(jnp.int32(step))) for step in range(60)])


def test_a_run_at_a_schedule_of_zero_stays_where_it_is_and_says_that_nothing_is_resolved():
    params, batches = _case(30)
    tx = optax.chain(optax.sgd(1.0), hd.hidlr(_regression, "all", schedule=lambda step: 0.0))
    trained, state, _, _ = _trained(tx, params, batches)
    jax.tree.map(np.testing.assert_array_equal, trained, params)
    assert _kept(state) == {"all": Kept.UNRESOLVED}


@pytest.mark.parametrize("slope", ["lagged", "gradient"])
def test_a_direction_uphill_is_no_reason_to_move_and_says_so(slope):
    params, batches = _case(30)
    tx = optax.chain(optax.sgd(-1.0), hd.hidlr(_regression, "all", slope=slope))
    trained, state, states, losses = _trained(tx, params, batches)
    _assert_alive(trained, state)
    assert losses[-1] < 1e3
    assert _kept(state) == {"all": Kept.ASCENDS}
    rates = np.asarray(states.group_learning_rates["all"])
    assert (np.diff(rates[2:]) <= 0).all()  # only the guard moves them


def test_a_loss_that_rises_every_way_lets_the_rates_fall():
    def cusp(params, batch):
        return 1 + jnp.abs(params["x"]) * 1e3 + 0 * batch

    params = {"x": jnp.zeros(())}
    tx = hd.hidlr(cusp, "all")
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(40):
        updates, state = update(
            {"x": _f32(1)}, state, params, batch=_f32(0), value=_f32(1), grad={"x": _f32(-1)}
        )
    assert int(state.cuts) > 0
    assert 0 < abs(float(updates["x"])) < 1e-3


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("when", [1, 7, 30])
@pytest.mark.parametrize("labels", ["all", _LABELS], ids=["one", "three"])
def test_a_bad_batch_keeps_the_rates_says_why_and_is_recovered_from(labels, when, poison):
    params, (x, y) = _case(50)
    zero_nans = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), updates)
    )
    tx = optax.chain(zero_nans, optax.sgd(1.0), hd.hidlr(_regression, labels))
    trained, state, states, _ = _trained(tx, params, (x, y.at[when].set(poison)))
    assert all(int(kept[when]) == Kept.NON_FINITE for kept in states.kept.values())
    for rate in states.group_learning_rates.values():
        assert rate[when] == rate[when - 1]
    _assert_alive(trained, state)
    assert set(_kept(state).values()) == {Kept.UPDATED}
    assert int(state.refreshes) == 23  # the first twenty, and 20, 30 and 40


def test_a_base_optimizer_with_a_rate_of_its_own_trains():
    params, batches = _case(60)
    tx = optax.chain(_adamw(1e-3), hd.hidlr(_regression, _LABELS))
    trained, state, _, losses = _trained(tx, params, batches)
    _assert_alive(trained, state)
    assert losses[-5:].mean() < losses[0]
    assert set(_kept(state).values()) == {Kept.UPDATED}


def _ratio_of_groups(rates, curvatures):
    """q_k of a quadratic along the gradient: half the curvature times the rate, but for noise."""
    return {name: rates[name] * curvatures[name] for name in rates}


@pytest.mark.parametrize("max_split", [1.0, 1.5, 3.0])
def test_groups_of_different_curvature_end_with_ratios_nearer_to_each_other(max_split):
    curvatures = {"flat": 0.1, "steep": 10.0}

    def bowl(params, batch):
        return sum(
            c * jnp.mean((params[name] - batch[name]) ** 2) for name, c in curvatures.items()
        )

    rng = np.random.default_rng(0)
    batches = {name: _f32(rng.normal(size=(400, 8, 20))) for name in curvatures}
    params = {name: jnp.full(20, 3.0) for name in curvatures}
    tx = optax.chain(
        optax.sgd(1.0),
        hd.hidlr(
            bowl,
            {name: name for name in curvatures},
            update_interval=2,
            solver=hd.hold(max_split=max_split),
        ),
    )
    trained, state, states, _ = _trained(tx, params, batches, bowl)
    _assert_alive(trained, state)
    rates = _rates(state)
    begun = {name: float(rate[0]) for name, rate in states.group_learning_rates.items()}
    assert begun["flat"] == pytest.approx(begun["steep"], rel=1e-5)
    joint = math.sqrt(rates["flat"] * rates["steep"])
    for rate in rates.values():
        assert 1 / max_split * 0.999 <= rate / joint <= max_split * 1.001
    before, after = (
        abs(math.log(q["steep"] / q["flat"]))
        for q in (_ratio_of_groups(begun, curvatures), _ratio_of_groups(rates, curvatures))
    )
    if max_split == 1.0:
        assert after == pytest.approx(before, rel=1e-5)
    else:
        assert after < before - math.log(max_split)


# When it happens.


def _refreshed_at(steps, **settings):
    """The updates that refresh, one by one."""
    params = {"w": jnp.ones(2)}
    tx = hd.hidlr(lambda p, b: jnp.sum(p["w"] ** 2), "all", **settings)
    direction = jax.tree.map(jnp.negative, params)

    @jax.jit
    def run():
        def step(state, _):
            state = tx.update(direction, state, params, batch=0, grad=params)[1]
            return state, state.refreshes

        return jax.lax.scan(step, tx.init(params), None, steps)[1]

    counts = np.diff(np.asarray(run()), prepend=0)
    return np.flatnonzero(counts).tolist()


def test_the_interval_doubles_whenever_the_run_has_become_twice_as_long():
    settings = {"update_interval": 5, "warmup": 3, "solver": hd.hold(widen_after=4)}
    late = range(3 + 2 * 4 * 5, 200)
    expected = [0, 1, 2, *range(5, 43, 5)]
    for step in late:
        intervals = (step - 3) // 5
        factor = 2 ** int(np.log2(intervals // 4))
        expected += [step] if step % (5 * factor) == 0 else []
    assert _refreshed_at(200, **settings) == expected
    due = functools.partial(hd.is_due, update_interval=5, warmup=3, widen_after=4)
    assert [step for step in range(200) if due(step)] == expected
    gaps = np.diff(expected)
    assert set(gaps[3:]) == {5, 10, 20}


@pytest.mark.parametrize(
    "settings",
    [
        {"update_interval": 5, "solver": hd.hold(widen_after=math.inf)},
        {"update_interval": 5, "solver": hd.coupled()},
        {"update_interval": 1, "solver": hd.hold(widen_after=2)},
    ],
    ids=["never", "another solver", "every step"],
)
def test_an_interval_that_stays_as_it_was_given(settings):
    interval = settings["update_interval"]
    refreshed = _refreshed_at(150, warmup=0, **settings)
    assert refreshed == list(range(0, 150, interval))
    widen_after = getattr(settings["solver"], "widen_after", math.inf)
    due = functools.partial(hd.is_due, warmup=0, widen_after=widen_after)
    assert [step for step in range(150) if due(step, interval)] == refreshed


def test_by_default_the_first_hundred_intervals_are_as_given():
    refreshed = _refreshed_at(400, update_interval=2)
    assert refreshed == [step for step in range(400) if hd.is_due(step, 2)]
    late = [step for step in refreshed if step > 20]
    assert late[:99] == list(range(22, 220, 2))
    assert set(np.diff(late)) == {2, 4}


@pytest.mark.parametrize("widen_after", [0, 0.5, -1, 2.5, math.nan])
def test_an_odd_widening_is_refused(widen_after):
    with pytest.raises(ValueError, match="widen_after must be a whole number"):
        hd.hold(widen_after=widen_after)
