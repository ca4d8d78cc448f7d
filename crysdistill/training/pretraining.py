"""What learns without labels: an encoder and its objectives."""

from __future__ import annotations

from typing import Any

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


class PretrainModule(L.LightningModule):
    """An encoder and the weighted objectives that teach it.

    Args:
        encoder: what learns.
        objectives: by name.
        weights: of each objective's loss.
        optimizer: how weights move.
        seed: of the views.
    """

    def __init__(
        self,
        encoder: Encoder,
        objectives: dict[str, Objective],
        weights: dict[str, float],
        optimizer: OptimizerSettings,
        seed: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objectives = nn.ModuleDict(objectives)
        self.weights = weights
        self.optimizer_settings = optimizer
        self.seed = seed
        self.train_means, self.val_means = EpochMeans(), EpochMeans()

    def embed(self, batch: CrystalBatch, seed: int) -> dict[str, tuple[Embedded, ...]]:
        """Encode each distinct view once, and hand every objective its own.

        Returns:
            For each objective what it sees, in the order of its `views`.
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
        """Return the loss of each objective and, as `loss`, their weighted sum."""
        seen = self.embed(batch, seed)
        losses = {
            name: objective(seen[name], batch, seed)
            for name, objective in self.named().items()
        }
        total = torch.stack(
            [self.weights[name] * loss for name, loss in losses.items()]
        )
        return {**losses, "loss": total.sum()}

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> torch.Tensor:
        """Return the weighted loss of a batch, as `shared_loss` has it."""
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
        losses["loss"] = torch.stack(
            [self.weights[name] * losses[name] for name in self.named()]
        ).sum()
        self.val_means.add(losses, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the losses and numbers of all held-out batches."""
        means = self.val_means.compute()
        self.log_dict({f"val_{name}": mean for name, mean in means.items()})
        for objective in self.named().values():
            self.log_dict(objective.compute())
            objective.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what an epoch has found so far."""
        checkpoint["train_means"] = self.train_means.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
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
