"""The metrics of a run, row by row, on the host."""

from typing import Any

import jax

from hidlr_optax.report._find import array, find_state
from hidlr_optax.report._metrics import metrics


class History(list[dict[str, float]]):
    """What `metrics` says at each step, as Python numbers: for figures and for loggers.

    A list of dicts, one for each call of `add`. `hidlr_optax.plot` draws it, and each row is what
    `wandb.log`, `trackio.log` and `mlflow.log_metrics` take.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hidlr_optax as hd
      >>> def loss_fn(params):
      ...     return jnp.sum((params["w"] - 1.0) ** 2)
      >>> tx = hd.hessian_informed(optax.sgd(1.0), None, "all")
      >>> step = jax.jit(lambda *now: hd.take_step(tx, loss_fn, *now))
      >>> params, history = {"w": jnp.zeros(2)}, hd.History()
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     params, state, loss = step(params, state)
      ...     row = history.add(state, loss=loss)
      >>> len(history), row["step"], row["loss"] < history[0]["loss"]
      (3, 2.0, True)
    """

    def add(self, opt_state: Any, **more: Any) -> dict[str, float]:
        """Appends a row. It waits for the step, so call it outside of jit.

        Args:
          opt_state: the state after the step, of `hidlr` or of anything that contains it.
          **more: other scalars of the step, such as its loss.

        Returns:
          The row: `step`, counted from 0, what `metrics` returns, and the other scalars.

        Raises:
          ValueError: there is no `HiDLRState` in the state, or more than one.
        """
        count = array(find_state(opt_state).count)
        numbers = jax.device_get({"step": count - 1, **metrics(opt_state), **more})
        row = {name: float(number) for name, number in numbers.items()}
        self.append(row)
        return row
