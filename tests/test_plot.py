"""The figures show the numbers they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hidlr_optax as hd
from hidlr_optax import plot


def _loss(params, batch):
    del batch
    return 0.5 * params["x"] ** 2 + 50.0 * params["y"] ** 2 - 2.0 * params["z"] ** 2


def _suggestion():
    params = {name: jnp.asarray(1.0) for name in "xyz"}
    direction = jax.tree.map(jnp.negative, jax.grad(_loss)(params, None))
    return hd.paper.suggest(_loss, params, {name: name for name in "xyz"}, direction)


def test_learning_rates_draws_one_line_per_group_and_the_loss():
    history = [
        {"step": 10 * n, "loss": 3.0 - n, "learning_rate/a": 0.1 * 2**n, "learning_rate/b": 1.0}
        for n in range(3)
    ]
    loss_axes, rate_axes = plot.learning_rates(history).axes
    each, mean = loss_axes.lines
    np.testing.assert_allclose(each.get_xydata(), [[0, 3], [10, 2], [20, 1]])
    np.testing.assert_allclose(mean.get_ydata(), [3, 2.5, 2])  # of as many as there are
    lines = {line.get_label(): line for line in rate_axes.lines}
    assert set(lines) == {"a", "b"}
    np.testing.assert_allclose(lines["a"].get_ydata(), [0.1, 0.2, 0.4])
    assert rate_axes.get_yscale() == "log"


def test_learning_rates_takes_what_metrics_returns():
    tx = hd.hidlr(None, {"w": "head"}, init_learning_rate=0.25, warmup=0)
    params = {"w": jnp.ones(2)}
    _, state = tx.update(
        {"w": -params["w"]},
        tx.init(params),
        params,
        value_fn=lambda p: jnp.sum(p["w"] ** 2) + 1,
        grad={"w": 2 * params["w"]},
        value=jnp.float32(3.0),
    )
    (axes,) = plot.learning_rates([hd.metrics(state)] * 2).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.25, 0.25])


def test_learning_rates_without_the_schedule():
    tx = hd.hidlr(None, "all", init_learning_rate=0.25, warmup=0, schedule=lambda n: 1 / (1 + n))
    params = jnp.ones(2)
    state, history = tx.init(params), []
    for _ in range(2):
        known = {"value_fn": lambda p: jnp.sum(p**2) + 1, "grad": 2 * params}
        _, state = jax.jit(lambda state, known=known: tx.update(-params, state, params, **known))(
            state
        )
        history.append(hd.metrics(state))
    (applied,) = plot.learning_rates(history).axes
    (before,) = plot.learning_rates(history, "unscheduled_rate").axes
    assert before.get_ylabel() == "rate before the schedule"
    np.testing.assert_allclose(
        applied.lines[0].get_ydata(), before.lines[0].get_ydata() * [1, 0.5], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("history", "message"), [([], "empty"), ([{"loss": 1.0}], "learning_rate/")]
)
def test_learning_rates_without_rates_says_what_to_log(history, message):
    with pytest.raises(ValueError, match=message):
        plot.learning_rates(history)


def test_fit_draws_probes_parabola_and_minimiser_of_each_group():
    found = _suggestion()
    x, y, z = plot.fit(found).axes
    parabola, probes, minimiser = x.lines
    assert minimiser.get_xdata()[0] == pytest.approx(1.0, rel=1e-3)
    assert len(probes.get_xdata()) == 5
    grid = parabola.get_xdata()
    np.testing.assert_allclose(parabola.get_ydata(), -grid + grid**2 / 2, rtol=1e-3, atol=1e-5)
    assert y.get_title() == "y: η = 0.01"
    assert z.get_title() == "z: none (not convex)"


def test_influence_draws_a_row_per_group_the_most_influential_on_top():
    history = [
        {"step": 5 * n, "ppi/low": 1e-6, "ppi/high": 10.0**n, "ppi/none": 0.0} for n in range(3)
    ]
    axes, bar = plot.influence(history).axes
    assert bar.get_ylabel() == "influence per parameter (PPI)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "low", "high"]
    drawn = axes.collections[0].get_array()
    np.testing.assert_allclose(drawn[1:], [[1e-6] * 3, [1, 10, 100]])
    assert drawn.mask[0].all()
    assert axes.get_xlim() == (0.0, 15.0)
    assert bar.get_yscale() == "log"


def test_the_label_of_the_colours_is_inside_the_figure_however_few_groups_there_are():
    figure = plot.influence([{"ppi/a": 1.0}, {"ppi/a": 2.0}])
    figure.draw_without_rendering()
    label = figure.axes[1].yaxis.label.get_window_extent()
    assert 0 < label.y0 < label.y1 < figure.bbox.height


def test_influence_draws_what_summarise_returns_with_its_errors():
    group = hd.influence.GroupInfluence
    groups = {
        "head": group(10, 9, total=1.0, total_error=0.2),
        "rest": group(100, 9, total=0.5),
        "lora_A": group(10, 9, negative=9),
    }
    (axes,) = plot.influence(hd.Influence(groups, steps=90)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lora_A", "rest", "head"]
    assert [text.get_text() for text in axes.texts] == ["no number: negative"]
    dots = [bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers]
    np.testing.assert_allclose(dots, [[0.005, 1], [0.1, 2]])
    (error,) = axes.containers[1].lines[2]
    np.testing.assert_allclose(error.get_segments()[0], [[0.08, 2], [0.12, 2]])
    with pytest.raises(ValueError, match="no group has a positive influence"):
        plot.influence(hd.Influence({"lora_A": groups["lora_A"]}, steps=9))


def test_influence_says_what_is_missing():
    with pytest.raises(ValueError, match="no positive influence"):
        plot.influence([{"ppi/a": 0.0}])
    with pytest.raises(ValueError, match="history is empty"):
        plot.influence([])
    with pytest.raises(ValueError, match="starts with 'ppi/'"):
        plot.influence([{"loss": 1.0}])


def _found(**size_and_total):
    groups = {
        name: hd.influence.GroupInfluence(size, 9, total=total, marginal=total / 4)
        for name, (size, total) in size_and_total.items()
    }
    return hd.Influence(groups, steps=90)


@pytest.mark.parametrize(("value", "unit"), [("total", 1.0), ("marginal", 0.25)])
def test_pareto_draws_influence_over_parameters_and_names_what_each_plan_adds(value, unit):
    front = hd.peft.pareto(_found(a=(10, 1.0), b=(20, 4.0), c=(1000, 0.5)), value=value)
    (axes,) = plot.pareto(reversed(front), value).axes
    steps, points = axes.lines
    expected = [[10, 1.0], [20, 4.0], [30, 5.0], [1030, 5.5]]
    np.testing.assert_allclose(points.get_xydata(), np.array(expected) * [1, unit])
    np.testing.assert_allclose(steps.get_xydata(), points.get_xydata())
    assert steps.get_drawstyle() == "steps-post"
    assert [text.get_text() for text in axes.texts] == ["+ a", "+ b − a", "+ a", "+ c"]
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", f"{value} influence")


def test_names_of_plans_stay_inside_the_panel():
    found = _found(head=(10, 1.0), embedding=(10**7, 3.0), lora_A=(10**4, 0.5), rest=(10**8, 5.0))
    figure = plot.pareto(hd.peft.pareto(found))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert len(axes.texts) > 4
    for text in axes.texts:
        frame, extent = axes.get_window_extent(), text.get_window_extent()
        assert frame.x0 < extent.x0 < extent.x1 < frame.x1, text.get_text()


def test_pareto_marks_the_plan_that_was_chosen():
    front = hd.peft.pareto(_found(a=(10, 1.0), b=(20, 4.0), c=(1000, 0.5)))
    figure = plot.pareto(front, chosen=hd.peft.within(front, budget=50))
    np.testing.assert_allclose(figure.axes[0].lines[-1].get_xydata(), [[30, 5.0]])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["chosen: a, b"]


def test_the_legend_of_fit_covers_no_panel():
    figure = plot.fit(_suggestion())
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "fitted parabola",
        "probes",
        "minimiser",
    }
    assert all(legend.get_window_extent().y1 < axes.get_tightbbox().y0 + 1 for axes in figure.axes)


def test_pareto_of_many_plans_names_the_ends_and_of_no_plan_is_refused():
    found = _found(**{f"g{k}": (2**k, 2.0**k) for k in range(5)})
    (axes,) = plot.pareto(hd.peft.pareto(found)).axes
    names = [text.get_text() for text in axes.texts]
    assert names == ["g0", "g0, g1, g2, g3, g4"]
    assert len(axes.lines[0].get_xdata()) == 31
    with pytest.raises(ValueError, match="no plan to draw"):
        plot.pareto([])
    with pytest.raises(ValueError, match="rests on no influence"):
        plot.pareto([hd.Plan({"a"}, {"b"})])


def test_a_history_of_many_runs_is_told_to_take_one():
    row = {"loss": np.ones(3), "learning_rate/a": np.ones(3), "ppi/a": np.ones(3)}
    draws = [plot.learning_rates, plot.influence, lambda rows: plot.losses({"a": rows})]
    for draw in draws:
        with pytest.raises(ValueError, match=r"of \(3,\) runs, as vmap makes it"):
            draw([row, row])
        draw([{key: x[0] for key, x in row.items()}] * 2)
