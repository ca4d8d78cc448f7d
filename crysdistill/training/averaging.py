"""Averages of the weights over a run; they often predict better than the last ones."""

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
    """Validates averaged weights, so that the best of these are kept.

    The weights are averaged, but not the statistics of batch norms. Before each
    validation, a pass over the training crystals computes the statistics for the
    averaged weights, with equal weight for each batch. Frozen batch norms keep theirs.
    Training continues from the weights of the last step.

    Put this callback after `BestWeights`, which copies the validated weights.

    Sources: P. Izmailov et al., UAI 2018, arXiv:1803.05407 (`swa`); A. Tarvainen and
    H. Valpola, NeurIPS 2017, arXiv:1703.01780 (`ema`).

    Differs from the papers: the decay of `ema` after n steps is at most
    (1 + n) / (10 + n), so that the average soon forgets the random start.

    Args:
        train: the training batches.
        kind: `ema` or `swa`.
        span: a share of the run's steps: `swa` averages over that last share, and the
            memory of `ema` falls to 1 / e within it.
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
        """Start, or continue from a checkpoint; weights are now on their device."""
        # Only the parameters: the module may hold a teacher's answers.
        self._learned = nn.ParameterList(pl_module.parameters())
        self.average = AveragedModel(self._learned, multi_avg_fn=self._follow)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note how many steps the run will have."""
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
        """Add the weights to the average, if the step changed them."""
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
        """Replace the weights by their average."""
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
        """Compute the batch-norm statistics of the averaged weights."""
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
        """Save the weights of the last step, even if validation is interrupted."""
        if self._current is not None:
            checkpoint["state_dict"] = self._current

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store a checkpoint's state until the device of the weights is known."""
        self._loaded = state_dict
