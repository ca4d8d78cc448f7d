"""Averages of the weights along a run, which often predict better than the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from crysdistill.training.loader import BatchLoader
from crysdistill.training.statistics import find_statistics


class AveragedWeights(Callback):
    """Lets validation see averaged weights, and so whoever keeps the best ones.

    Weights are averaged, and statistics of batch norms are not: before each validation
    a pass over the training crystals finds those that belong to the averaged weights,
    all batches alike. Batch norms that are frozen keep theirs. Learning goes on from
    the weights of the last step.

    To stand behind `BestWeights`, which copies what validation has seen.

    Sources: P. Izmailov et al., UAI 2018, arXiv:1803.05407 (`swa`); A. Tarvainen and
    H. Valpola, NeurIPS 2017, arXiv:1703.01780 (`ema`).

    Differs from the papers: `ema` forgets faster in the first steps, by
    (1 + n) / (10 + n) after n of them, so that it does not remember the random start.

    Args:
        train: the training batches.
        kind: `ema` or `swa`.
        span: of the run's steps, the share that `swa` averages, and in which what `ema`
            remembers falls to 1 / e.
    """

    def __init__(
        self, train: BatchLoader, kind: Literal["ema", "swa"], span: float
    ) -> None:
        self.train = train
        self.kind = kind
        self.span = span
        self.average: AveragedModel
        self._learned: nn.ParameterList
        self._loaded: dict[str, Any] | None = None
        self._current: dict[str, Tensor] | None = None  # while validation looks
        self._last_step = 0
        self._steps = 1

    # ------------------------------------------------------------------ learning

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, or go on from a checkpoint; the weights are on their device by now."""
        # Not of the whole module, which may hold a teacher's answers.
        self._learned = nn.ParameterList(pl_module.parameters())
        self.average = AveragedModel(self._learned, multi_avg_fn=self._follow)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See how long the run will be."""
        self._last_step = trainer.global_step
        self._steps = max(1, int(trainer.estimated_stepping_batches))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in the weights, if they have moved."""
        step = trainer.global_step
        moved, self._last_step = step != self._last_step, step
        if moved and (self.kind == "ema" or step > (1 - self.span) * self._steps):
            self.average.update_parameters(self._learned)

    def _follow(
        self, average: Sequence[Tensor], current: Sequence[Tensor], count: Any
    ) -> None:
        n = int(self.average.n_averaged)  # on the CPU: `count` would wait for a GPU
        if self.kind == "swa":
            weight = 1 / (n + 1)
        else:
            decay = 1 - 1 / max(1.0, self.span * self._steps)
            weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(average), list(current), weight)

    # ---------------------------------------------------------------- validation

    @torch.no_grad()
    def on_validation_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Put the average in the place of the weights."""
        if trainer.sanity_checking or not int(self.average.n_averaged):
            return
        self._current = {
            name: tensor.detach().clone()
            for name, tensor in pl_module.state_dict().items()
        }
        averaged = self.average.module.parameters()
        for parameter, mean in zip(self._learned, averaged, strict=True):
            parameter.copy_(mean)
        self._find_statistics(trainer, pl_module)

    def on_validation_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Put the weights back."""
        if self._current is not None:
            pl_module.load_state_dict(self._current)
            self._current = None

    def _find_statistics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Let batch norms see the training crystals with the averaged weights."""
        epoch = trainer.current_epoch
        self.train.go_to(epoch, 0)
        with trainer.precision_plugin.forward_context():
            find_statistics(
                pl_module,
                self.train,
                lambda batch: pl_module.losses(batch, 0),  # type: ignore[operator]
            )
        self.train.go_to(epoch + 1, 0)

    # --------------------------------------------------------------- checkpoints

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Save the weights of the last step, also if validation is interrupted."""
        if self._current is not None:
            checkpoint["state_dict"] = self._current

    def state_dict(self) -> dict[str, Any]:
        """Return what belongs into a checkpoint."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, when it is known where the weights are."""
        self._loaded = state_dict
