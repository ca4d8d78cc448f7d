"""The module that learns without labels: an encoder and its objectives."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.table import Table
from torch import nn

from crysdistill.encoders import Encoder
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives import Embedded, Objective, View
from crysdistill.training.engine import batches_before, shared_loss, step_seed
from crysdistill.training.loader import BatchLoader
from crysdistill.training.means import EpochMeans
from crysdistill.training.optimizers import make_optimizer
from crysdistill.training.settings import OptimizerSettings
from crysdistill.transfer.balance import geometric_mean

Weighting = Literal["fixed", "balanced"]
"""How the losses of several objectives are combined."""


class PretrainModule(L.LightningModule):
    """An encoder and the weighted objectives that teach it.

    Args:
        encoder: the encoder to train.
        objectives: by name.
        weights: of each objective's loss.
        optimizer: the settings of the optimizer.
        seed: of the views.
        weighting: `fixed`, the weighted sum of the losses; or `balanced`, their
            weighted geometric mean.
    """

    def __init__(
        self,
        encoder: Encoder,
        objectives: dict[str, Objective],
        weights: dict[str, float],
        optimizer: OptimizerSettings,
        seed: int,
        weighting: Weighting = "fixed",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objectives = nn.ModuleDict(objectives)
        self.weights = weights
        self.optimizer_settings = optimizer
        self.seed = seed
        self.weighting = weighting
        self.train_means, self.val_means = EpochMeans(), EpochMeans()

    def embed(self, batch: CrystalBatch, seed: int) -> dict[str, tuple[Embedded, ...]]:
        """Encode each distinct view once, and give every objective its views.

        Returns:
            For each objective its embedded views, in the order of its `views`.
        """
        known: dict[View, Embedded] = {}
        for objective in self.named().values():
            for view in objective.views:
                if view not in known:
                    shown = view(batch, seed)
                    known[view] = Embedded(shown, self.encoder(shown))
        return {
            name: tuple(known[view] for view in objective.views)
            for name, objective in self.named().items()
        }

    def named(self) -> dict[str, Objective]:
        """Return the objectives by name."""
        return dict(self.objectives.items())  # type: ignore[arg-type]

    def losses(self, batch: CrystalBatch, seed: int) -> dict[str, torch.Tensor]:
        """Return the loss of each objective and, as `loss`, their combination."""
        seen = self.embed(batch, seed)
        losses = {
            name: objective(seen[name], batch, seed)
            for name, objective in self.named().items()
        }
        return {**losses, "loss": self._total(losses)}

    def _total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return one loss; with several ranks this rank's share of it."""
        shares = torch.stack(list(losses.values()))
        weights = shares.new_tensor([self.weights[name] for name in losses])
        if self.weighting == "balanced":
            return geometric_mean(shares, weights)
        return (weights * shares).sum()

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> torch.Tensor:
        """Return the weighted loss of a batch, as `shared_loss` returns it."""
        seed = step_seed(self.seed, batches_before(self.trainer, batch_idx))
        losses = self.losses(batch, seed)
        self.train_means.add(losses, batch)
        return shared_loss(losses["loss"])

    def on_train_epoch_end(self) -> None:
        """Log the losses of the epoch."""
        means = self.train_means.compute()
        self.log_dict({f"train_{name}": mean for name, mean in means.items()})

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Add a held-out batch to the numbers; its masks are the same every epoch."""
        seen = self.embed(batch, self.seed)
        losses = {}
        for name, objective in self.named().items():
            losses[name] = objective(seen[name], batch, self.seed)
            objective.update(seen[name], batch, self.seed)
        losses["loss"] = self._total(losses)
        self.val_means.add(losses, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the losses and numbers of all held-out batches."""
        means = self.val_means.compute()
        self.log_dict({f"val_{name}": mean for name, mean in means.items()})
        for objective in self.named().values():
            self.log_dict(objective.compute())
            objective.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums of the current epoch."""
        checkpoint["train_means"] = self.train_means.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore these sums."""
        self.train_means.restore(checkpoint["train_means"], self.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return optimizer and schedule."""
        steps = int(self.trainer.estimated_stepping_batches)
        per_epoch = max(1, steps // (self.trainer.max_epochs or 1))
        groups = [(list(self.parameters()), self.optimizer_settings.lr)]
        return make_optimizer(groups, self.optimizer_settings, steps, per_epoch)


@torch.no_grad()
def evaluate(module: PretrainModule, loader: BatchLoader) -> dict[str, float]:
    """Return the numbers of all objectives on a loader's crystals."""
    module.eval()
    for batch in loader:
        shown = batch.to(module.device)
        seen = module.embed(shown, module.seed)
        for name, objective in module.named().items():
            objective.update(seen[name], shown, module.seed)
    numbers: dict[str, float] = {}
    for objective in module.named().values():
        numbers |= objective.compute()
        objective.reset()
    return numbers


def numbers_table(numbers: dict[str, float]) -> Table:
    """Return the numbers as a table, each beside its chance level."""
    table = Table("held-out number", "value", "by chance", title="Pretraining")
    for name, value in numbers.items():
        if not name.endswith("_chance"):
            chance = numbers.get(f"{name}_chance")
            shown = "" if chance is None else f"{chance:.3f}"
            table.add_row(name.replace("_", " "), f"{value:.3f}", shown)
    return table
