"""Experiment trackers, all optional: anything shaped like wandb, and TensorBoard."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from manyform.errors import ManyformError


class Tracker:
    """Sends metrics to a tracker.

    target: "tensorboard"; the name of a module with wandb's `init(project, name, config)`,
      `log(values, step)` and `finish()` ("wandb", "trackio", your own); or such an object.
    Raises ManyformError where the module is not installed or has another shape.
    """

    def __init__(self, target: Any, *, folder: Path, config: dict[str, Any]) -> None:
        if target == "tensorboard":
            target = _TensorBoard(folder)
        elif isinstance(target, str):
            try:
                target = importlib.import_module(target)
            except ImportError as error:
                raise ManyformError(f"the tracker {target!r} cannot be imported ({error}); "
                                    f"install it with: pip install {target}") from error
        for name in ("init", "log", "finish"):
            if not callable(getattr(target, name, None)):
                raise ManyformError(f"the tracker {target!r} has no {name}(); one shaped like "
                                    "wandb has init, log and finish")
        self._target = target
        target.init(project="manyform", name=folder.name, config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send numbers that belong to a step."""
        self._target.log(values, step=step)

    def finish(self) -> None:
        """Close the tracker."""
        self._target.finish()


class _TensorBoard:
    """TensorBoard in wandb's shape, with its event files in the run's folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ManyformError("TensorBoard is not installed; install it with: "
                                "pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def init(self, *, project: str, name: str, config: dict[str, Any]) -> None:
        self._writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))

    def log(self, values: dict[str, float], *, step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self._writer.close()
