"""Checkpoints of single runs, so that one that was cut short goes on where it was."""

import shutil
from pathlib import Path
from typing import Any

import jax
from flax import nnx

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as error:
    error.add_note("The comparisons need the extra `models`: pip install -e '.[models]'")
    raise


class Checkpoints:
    """What a run is resumed from: the trained parameters and the state of the optimizer."""

    def __init__(self, folder: Path, wrt: Any):
        self._folder, self._wrt = folder.absolute(), wrt
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def _arrays(self, model: nnx.Module, optimizer: nnx.Optimizer) -> Any:
        parts = nnx.state(model, self._wrt), nnx.state(optimizer)
        return [jax.tree.leaves(part) for part in parts]

    def save(self, step: int, model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        """After `step` steps."""
        self._manager.save(step, args=ocp.args.StandardSave(self._arrays(model, optimizer)))
        self._manager.wait_until_finished()

    def restore(self, model: nnx.Module, optimizer: nnx.Optimizer) -> int:
        """Sets both to the last checkpoint. Returns its step, or 0 where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return 0
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._arrays(model, optimizer))
        arrays = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        wholes = (model, self._wrt), (optimizer, ...)
        for (module, part), leaves in zip(wholes, arrays, strict=True):
            structure = jax.tree.structure(nnx.state(module, part))
            nnx.update(module, jax.tree.unflatten(structure, leaves))
        return step

    def close(self) -> None:
        """Deletes them: the run is over."""
        self._manager.close()
        shutil.rmtree(self._folder)
