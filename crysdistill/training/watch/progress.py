"""The progress bar: loss, validation, speed, and waiting where there is some."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from crysdistill.training.watch.throughput import Throughput

STALL = 0.02
"""The share of time spent waiting for batches from which on the bar shows it."""


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the speed, and without the logger's version number."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands at the end of the bar."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                speed, stall = callback.recent
                if speed:
                    shown["crystals/s"] = f"{speed:,.0f}"
                if stall > STALL:
                    shown["stall"] = f"{stall:.0%}"
        return shown
