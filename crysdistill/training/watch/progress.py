"""Shows the progress of a run: a bar in a terminal, or a line for each epoch."""

from __future__ import annotations

from typing import Any

import lightning as L
import rich
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from crysdistill.training.watch.guard import Guard
from crysdistill.training.watch.throughput import Throughput

STALL = 0.02
"""The bar shows the share of time spent waiting for batches if it is above this."""


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the speed, and without the logger's version number."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the numbers at the end of the bar."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {**_now(trainer), **shown}


class EpochLines(Callback):
    """Prints a line after each epoch, for logs that a bar would clutter."""

    def on_train_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Print the numbers that the bar would show."""
        numbers: dict[str, Any] = dict(trainer.progress_bar_metrics)
        if "val_loss" in trainer.callback_metrics:
            numbers = {"val_loss": trainer.callback_metrics["val_loss"], **numbers}
        chosen = {name: f"{float(value):.4g}" for name, value in numbers.items()}
        shown = {**_now(trainer), **chosen}
        text = ", ".join(f"{name} {value}" for name, value in shown.items())
        line = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {text}"
        rich.get_console().print(line, soft_wrap=True, markup=False)


def _now(trainer: L.Trainer) -> dict[str, int | str | float | dict[str, float]]:
    """Return the last loss, the speed, and the share of waiting if above `STALL`."""
    shown: dict[str, int | str | float | dict[str, float]] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Guard) and callback.last_loss is not None:
            shown["loss"] = f"{callback.last_loss:.4g}"
        if isinstance(callback, Throughput):
            speed, stall = callback.recent
            if speed:
                shown["crystals/s"] = f"{speed:,.0f}"
            if stall > STALL:
                shown["stall"] = f"{stall:.0%}"
    return shown
