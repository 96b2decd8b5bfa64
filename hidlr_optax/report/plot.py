"""The figures. Needs matplotlib, in the extra `plot`.

Figures are made without pyplot, so none has to be closed: `figure.savefig(path)`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
except ModuleNotFoundError as error:
    raise ImportError(
        "hidlr_optax.plot needs matplotlib: pip install 'hidlr-optax[plot]', or '.[plot]' from a "
        "checkout"
    ) from error

from hidlr_optax._diagnostics import Kept
from hidlr_optax.influence._report import Influence
from hidlr_optax.paper import Suggestion
from hidlr_optax.peft._plan import Plan, Value


def _series(history: Iterable[Mapping[str, Any]], field: str) -> tuple[np.ndarray, dict[str, Any]]:
    """(n,) steps, and for each group the (n,) values of one field of `metrics`."""
    rows = list(history)
    if not rows:
        raise ValueError("the history is empty: append metrics(opt_state) at each step")
    labels = [key.removeprefix(field) for key in rows[0] if key.startswith(field)]
    if not labels:
        raise ValueError(
            f"no key of the history starts with {field!r}: log metrics(opt_state) at each step; "
            f"got {sorted(rows[0])}"
        )
    steps = np.array([row.get("step", n) for n, row in enumerate(rows)], float)
    return steps, {label: _numbers(rows, field + label) for label in labels}


def _numbers(rows: list[Mapping[str, Any]], key: str) -> np.ndarray:
    """(n,) numbers of a history of one run."""
    many = next((np.shape(row[key]) for row in rows if np.ndim(row[key])), None)
    if many is not None:
        raise ValueError(
            f"this history is of {many} runs, as vmap makes it; pass that of one: "
            "[jax.tree.map(lambda leaf: leaf[0], row) for row in history]"
        )
    return np.array([float(row[key]) for row in rows])


def _draw_rates(axes: Axes, steps: np.ndarray, rates: Mapping[str, np.ndarray]) -> None:
    if len(rates) > 10:  # more than the usual colours
        axes.set_prop_cycle(color=colormaps["turbo"](np.linspace(0.05, 0.95, len(rates))))
    for label, values in rates.items():
        axes.step(steps, values, where="post", label=label)
    axes.set(xlabel="step", ylabel="learning rate", yscale="log")
    beside: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # covers no line
    axes.legend(title="group", ncols=-(-len(rates) // 15), frameon=False, **beside)


def _means(values: np.ndarray, window: int) -> np.ndarray:
    """(n,) means of the last `window` values, or of as many as there are."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def learning_rates(
    history: Iterable[Mapping[str, Any]],
    rate: Literal["learning_rate", "unscheduled_rate"] = "learning_rate",
    window: int = 20,
) -> Figure:
    """Learning rate of each group over steps, and the loss beside it if it was logged.

    Args:
      history: one mapping per step, as `metrics(opt_state)` returns it, with `loss` and `step`
        added if there are any. Without `step`, rows are numbered from 0.
      rate: the rates to draw: "learning_rate", as applied, or "unscheduled_rate", without schedule
        and guard.
      window: the number of steps of the running mean of the loss. The loss of each step is grey.

    Returns:
      A figure with one panel, or two with the loss.

    Raises:
      ValueError: the history is empty or holds no such rates.

    Example:
      >>> import hidlr_optax.plot
      >>> row = {"loss": 2.0, "learning_rate/head": 1e-3}
      >>> figure = hidlr_optax.plot.learning_rates([row, row])
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['loss, mean of 20 steps', 'learning rate']
    """
    rows = list(history)
    steps, rates = _series(rows, f"{rate}/")
    with_loss = "loss" in rows[0]
    panels = 1 + with_loss
    figure = Figure(figsize=(5.5, 2.6 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)
    _draw_rates(axes[-1, 0], steps, rates)
    if rate == "unscheduled_rate":
        axes[-1, 0].set_ylabel("rate before the schedule")
    if with_loss:
        losses = _numbers(rows, "loss")
        axes[0, 0].plot(steps, losses, color="0.75", linewidth=1)
        axes[0, 0].plot(steps, _means(losses, window), color="black", linewidth=1.5)
        scale = "log" if min(losses) > 0 else "linear"
        axes[0, 0].set(xlabel="step", ylabel=f"loss, mean of {window} steps", yscale=scale)
    return figure


def losses(histories: Mapping[str, Iterable[Mapping[str, Any]]], window: int = 20) -> Figure:
    """The losses of several runs over steps, each a mean over the last `window` steps.

    Args:
      histories: for each name, one mapping per step with `loss`, and `step` if there is any.
      window: steps; near the beginning, as many as there are.

    Returns:
      A figure with one panel.

    Raises:
      ValueError: there is no history, or one is empty or holds no losses.

    Example:
      >>> import hidlr_optax.plot
      >>> figure = hidlr_optax.plot.losses({"AdamW": [{"loss": 2.0}, {"loss": 1.0}]})
      >>> figure.axes[0].lines[0].get_ydata()
      array([2. , 1.5])
    """
    if not histories:
        raise ValueError("there are no histories to draw")
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, history in histories.items():
        steps, found = _series(history, "loss")
        axes.plot(steps, _means(found[""], window), label=name, linewidth=1.5)
    positive = all(min(line.get_ydata()) > 0 for line in axes.lines)  # pyright: ignore
    axes.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
    axes.set_yscale("log" if positive else "linear")
    axes.legend(frameon=False)
    return figure


_PPI = "influence per parameter (PPI)"


def influence(found: Influence | Iterable[Mapping[str, Any]]) -> Figure:
    """Influence per parameter (PPI) of the groups, on a log scale, the highest on top.

    Args:
      found: what `influence.summarise` returns: a dot for each group, with its standard error. Or a
        history, one mapping per step as `metrics(opt_state)` returns it, with `step` added if there
        is any: groups × steps in colours, the paper's Figures 6 and 7. Steps at which a group has
        no PPI yet are white.

    Returns:
      A figure.

    Raises:
      ValueError: the history is empty, or there is no positive PPI.

    Example:
      >>> import hidlr_optax.plot
      >>> row = {"ppi/head": 1e-3, "ppi/rest": 1e-6}
      >>> axes, bar = hidlr_optax.plot.influence([row, row]).axes
      >>> [label.get_text() for label in axes.get_yticklabels()]
      ['rest', 'head']
    """
    return _dots(found) if isinstance(found, Influence) else _heatmap(list(found))


def _dots(found: Influence) -> Figure:
    """PPI with standard errors; groups without a number are named below those that have one."""
    order = found.ranking()[::-1]
    figure = Figure(figsize=(5, 1.6 + 0.35 * len(order)), layout="constrained")
    axes = figure.subplots()
    for row, label in enumerate(order):
        group = found.groups[label]
        if group.per_parameter is None or group.per_parameter <= 0:
            place: Any = {"xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(f"no number: {group.status}", (0.02, row), color="0.4", **place)
            continue
        error = group.per_parameter_error or 0.0
        # On a log scale an error bar must not reach zero.
        below = min(error, 0.9 * group.per_parameter)
        size: Any = {"fmt": "o", "color": "tab:blue", "capsize": 3}
        axes.errorbar(group.per_parameter, row, xerr=[[below], [error]], **size)
    if not axes.containers:
        raise ValueError("no group has a positive influence: measure over more steps")
    axes.set(xscale="log", xlabel=_PPI, ylim=(-0.6, len(order) - 0.4))
    axes.set_yticks(range(len(order)), order)
    axes.grid(axis="x", color="0.9")
    return figure


def _heatmap(rows: list[Mapping[str, Any]]) -> Figure:
    """PPI in colours, groups × steps; groups are ordered by the geometric mean."""
    steps, found = _series(rows, "ppi/")
    positive = {
        label: np.ma.masked_less_equal(np.ma.masked_invalid(x), 0) for label, x in found.items()
    }
    if not any(values.count() for values in positive.values()):
        raise ValueError("the history holds no positive influence: no curvature was positive yet")
    order = sorted(
        positive, key=lambda label: float(np.ma.filled(np.ma.log(positive[label]).mean(), -np.inf))
    )
    # High enough for the label of the colours.
    figure = Figure(figsize=(5.5, max(3.0, 1.2 + 0.35 * len(order))), layout="constrained")
    axes = figure.subplots()
    ends = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    values = np.ma.stack([positive[label] for label in order])
    mesh = axes.pcolormesh(ends, np.arange(len(order) + 1), values, norm=LogNorm(), rasterized=True)
    axes.set(xlabel="step", yticks=np.arange(len(order)) + 0.5, yticklabels=order)
    figure.colorbar(mesh, label=_PPI)
    return figure


def _draw_parabola(axes: Axes, suggestion: Suggestion, k: int) -> None:
    label = suggestion.labels[k]
    offsets, changes = np.asarray(suggestion.offsets), np.asarray(suggestion.changes)
    own = (offsets[:, k] != 0) & (np.count_nonzero(offsets, axis=1) == 1)
    slope = float(suggestion.quadratic.slope[k])
    curvature = float(suggestion.quadratic.curvature[k])
    rate, kept = suggestion.learning_rates[label], suggestion.kept[label]
    ends = [0.0, *offsets[own, k], *([rate] if kept == Kept.UPDATED else [])]
    grid = np.linspace(min(ends), max(ends), 200)
    axes.plot(grid, -slope * grid + curvature * grid**2 / 2, label="fitted parabola")
    axes.plot([0.0, *offsets[own, k]], [0.0, *changes[own]], "ko", markersize=4, label="probes")
    title = label
    if kept == Kept.UPDATED:
        axes.axvline(rate, color="tab:red", linestyle=":", label="minimiser")
        title += f": η = {rate:.3g}"
    else:
        title += f": none ({kept.name.lower().replace('_', ' ')})"
    axes.set(title=title, xlabel="learning rate")
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))


def fit(suggestion: Suggestion) -> Figure:
    """The paper's Figure 1: probed losses of each group, fitted parabola, its minimiser.

    Args:
      suggestion: from `suggest`, with its default axis probes. Where probes were drawn jointly,
        only the parabolas are shown: no probe belongs to one group.

    Returns:
      A figure with one panel per group.

    Example:
      >>> import jax.numpy as jnp, hidlr_optax as hd, hidlr_optax.plot
      >>> params, direction = {"x": jnp.asarray(3.0)}, {"x": jnp.asarray(-3.0)}
      >>> found = hd.paper.suggest(lambda p, batch: p["x"] ** 2 / 2, params, "all", direction)
      >>> [axes.get_title() for axes in hidlr_optax.plot.fit(found).axes]
      ['all: η = 1']
    """
    count = len(suggestion.labels)
    columns = min(count, 2)  # legible on a phone
    rows = -(-count // columns)
    figure = Figure(figsize=(2.8 * columns, 2.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for k, panel in enumerate(axes.flat[:count]):
        _draw_parabola(panel, suggestion, k)
    for unused in axes.flat[count:]:
        unused.remove()
    for row in axes:
        row[0].set_ylabel("change of the loss")
    handles = {text: line for panel in axes.flat for line, text in _entries(panel)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _entries(axes: Axes) -> list[tuple[Any, str]]:
    return list(zip(*axes.get_legend_handles_labels(), strict=True))


_MOST_NAMED = 12  # plans whose groups are written beside them


def pareto(plans: Iterable[Plan], value: Value = "total", *, chosen: Plan | None = None) -> Figure:
    """Influence that trains against the number of parameters it takes: the front of AdaPEFT.

    Args:
      plans: from `hidlr_optax.peft.pareto`, or any plans that rest on an influence.
      value: the one the front was made for, "total" or "marginal".
      chosen: a plan to mark, with the groups that it trains.

    Returns:
      A figure with one panel. Of a dozen plans or fewer, each is named by the groups that it trains
      and the plan before it does not; of more, the first and the last by the groups that train.

    Raises:
      ValueError: there are no plans, or one rests on no influence.

    Example:
      >>> import hidlr_optax as hd, hidlr_optax.plot
      >>> from hidlr_optax.influence import GroupInfluence
      >>> groups = {
      ...     "head": GroupInfluence(size=10, refreshes=9, total=0.5),
      ...     "rest": GroupInfluence(size=900, refreshes=9, total=0.7),
      ... }
      >>> figure = hidlr_optax.plot.pareto(hd.peft.pareto(hd.Influence(groups, steps=90)))
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['+ head', '+ rest − head', '+ head']
    """
    front = sorted(plans, key=lambda plan: plan.parameters or 0)
    if not front:
        raise ValueError("there is no plan to draw: pass peft.pareto(influence)")
    sizes = [plan.parameters or 0 for plan in front]
    worth = [plan.worth(value) for plan in front]
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.step(sizes, worth, where="post", color="tab:blue", linewidth=1)
    axes.plot(sizes, worth, "o", color="tab:blue", markersize=4)
    # Both sides of a rising staircase are free: names run towards the middle of the panel.
    middle = math.sqrt(sizes[0] * sizes[-1])
    for text, x, y in zip(_names(front), sizes, worth, strict=True):
        side, offset = ("right", (-4, 3)) if x > middle else ("left", (4, -10))
        if text:
            label = axes.annotate(text, (x, y), offset, textcoords="offset points")
            label.set(fontsize="small", ha=side)
    if chosen is not None:
        mark: Any = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.5}
        name = f"chosen: {', '.join(sorted(chosen.trainable))}"
        place = [chosen.parameters or 0], [chosen.worth(value)]
        axes.plot(*place, "o", color="tab:red", label=name, **mark)
        figure.legend(loc="outside upper center", frameon=False)
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=f"{value} influence")
    axes.margins(x=0.15, y=0.1)
    if sizes[-1] < 100 * sizes[0]:  # too few powers of ten to read the scale by
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _names(front: list[Plan]) -> list[str]:
    """What is written beside each plan, "" for nothing."""
    if len(front) <= _MOST_NAMED:
        return [
            _difference(plan, before)
            for plan, before in zip(front, [None, *front[:-1]], strict=True)
        ]
    first, last = (", ".join(sorted(plan.trainable)) for plan in (front[0], front[-1]))
    return [first, *[""] * (len(front) - 2), last]


def _difference(plan: Plan, before: Plan | None) -> str:
    """Names the groups that train and did not, and those that no longer do."""
    old = frozenset() if before is None else before.trainable
    changes = {"+": plan.trainable - old, "−": old - plan.trainable}
    return " ".join(f"{sign} {', '.join(sorted(x))}" for sign, x in changes.items() if x)
