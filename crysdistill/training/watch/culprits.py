"""Finds the crystals that alone give a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import alone
from crysdistill.training.loader import BatchLoader
from crysdistill.training.watch.divergence import mend_statistics

MOST_CULPRITS = 8

Loss = Callable[[CrystalBatch], float]


def find_culprits(
    rows: Sequence[int], is_bad: Callable[[Sequence[int]], bool]
) -> list[int]:
    """Return the crystals that are bad alone, by repeatedly halving the batch.

    Args:
        rows: the crystals of the batch.
        is_bad: returns whether a batch of some of them is bad.

    Returns:
        The first few of them. It is empty if no crystal is bad alone, or if all that
        were tried are: then the crystals are not the cause.
    """
    found: list[int] = []
    tried = 0

    def look(part: Sequence[int]) -> None:
        nonlocal tried
        if not part or len(found) >= MOST_CULPRITS:
            return
        bad = is_bad(part)
        if len(part) == 1:
            tried += 1
            if bad:
                found.append(part[0])
        elif bad:
            middle = len(part) // 2
            look(part[:middle])
            look(part[middle:])
        else:
            tried += len(part)

    look(list(rows))
    return found if len(found) < tried or len(rows) == 1 else []


class Judge:
    """Looks for this rank's crystals that broke a run, without changing the run.

    Args:
        trainer: the trainer of the run.
        module: the trained module; it has `losses` and `validation_step`.
        train: the training batches.
        val: the validation batches.
    """

    def __init__(
        self, trainer: L.Trainer, module: Any, train: BatchLoader, val: BatchLoader
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.train = train
        self.val = val

    def culprits(
        self, loader: BatchLoader, rows: list[int], control: list[int]
    ) -> list[int]:
        """Return the rows that alone give a loss that is not finite.

        If training crystals that were fine a step ago (`control`) give one too, the
        weights are the cause and not the crystals.

        Args:
            loader: the training or the validation batches, to which `rows` belong.
            rows: the crystals of a bad batch.
            control: training crystals that should not be bad; may be empty.
        """
        loss = self._validation_loss if loader is self.val else self._training_loss

        def look() -> list[int]:
            if control and self._is_bad(self.train, self._training_loss)(control):
                return []
            return find_culprits(rows, self._is_bad(loader, loss))

        return self._judging(look)

    def bad_validation_batch(self) -> list[int] | None:
        """Return the rows of the first batch whose loss is not finite."""

        def look() -> list[int] | None:
            for batch in self.val:
                if batch.num_graphs and not math.isfinite(self._validation_loss(batch)):
                    return batch.rows.tolist()
            return None

        return self._judging(look)

    def _training_loss(self, batch: CrystalBatch) -> float:
        return float(self.module.losses(batch, 0)["loss"])

    def _validation_loss(self, batch: CrystalBatch) -> float:
        """Return the validation loss of a batch; this discards the run's own sums."""
        means = self.module.val_means
        means.compute()
        self.module.validation_step(batch, 0)
        return float(means.compute().get("loss", 0.0))

    def _is_bad(
        self, loader: BatchLoader, loss: Loss
    ) -> Callable[[Sequence[int]], bool]:
        def is_bad(rows: Sequence[int]) -> bool:
            batch = loader.store.batch(rows, loader.targets).to(self.module.device)
            try:
                return not math.isfinite(loss(batch))
            except (RuntimeError, ValueError):  # the module needs more crystals
                return False

        return is_bad

    def _judging(self, look: Callable[[], Any]) -> Any:
        """Call `look` with the module in eval mode, on this rank only."""
        module, precision = self.module, self.trainer.precision_plugin
        buffers = [buffer.clone() for buffer in module.buffers()]
        training = [part for part in module.modules() if part.training]
        module.eval()
        mend_statistics(module)
        try:
            with alone(), torch.no_grad(), precision.forward_context():
                return look()
        finally:
            for part in training:
                part.training = True
            for buffer, was in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(was)
