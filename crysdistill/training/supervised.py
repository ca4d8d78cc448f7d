"""The module that learns from labels, and from a teacher if there is one."""

from __future__ import annotations

from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from crysdistill.encoders import Embeddings
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.views import View
from crysdistill.training.anchor import Anchor
from crysdistill.training.engine import batches_before, shared_loss, step_seed
from crysdistill.training.means import EpochMeans
from crysdistill.training.optimizers import layer_rates, make_optimizer
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.thawing import Thawing
from crysdistill.transfer.outputs import Balance
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.scores import Scores


class Companion(Protocol):
    """A second loss on a predictor's embeddings, such as that of a teacher."""

    def place(self, device: torch.device) -> None:
        """Move the loss's data to a device, if it fits there."""
        ...

    def losses(
        self, embeddings: Embeddings, batch: CrystalBatch, property_loss: Tensor
    ) -> dict[str, Tensor]:
        """Return this rank's share of each part, and of the total as `loss`."""
        ...


class SupervisedModule(L.LightningModule):
    """A predictor that learns from labels.

    Args:
        predictor: the predictor to train.
        optimizer: the settings of the optimizer.
        companion: a second loss, an `nn.Module` with the methods of `Companion`.
        encoder_lr: learning rate of the encoder, as a share of the head's.
        layer_decay: factor of that rate from each convolution to the one below.
        anchor: a penalty on the distance from the pretrained weights.

    Attributes:
        augment: how training crystals are changed in a step; None changes nothing.
        seed: of the augmentation.
    """

    def __init__(
        self,
        predictor: Predictor,
        optimizer: OptimizerSettings,
        companion: nn.Module | None = None,
        encoder_lr: float = 1.0,
        layer_decay: float = 1.0,
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__()
        self.predictor = predictor
        self.companion = companion
        self.encoder_lr, self.layer_decay = encoder_lr, layer_decay
        self.anchor = anchor
        self.augment: View | None = None
        self.seed = 0
        self.optimizer_settings = optimizer
        self.balance = Balance(predictor.outputs.targets)
        self.scores = Scores(predictor.outputs)
        self.train_means, self.val_means = EpochMeans(), EpochMeans()

    def on_fit_start(self) -> None:
        """Move the companion's data to the device of the batches, if it fits."""
        if self.companion is not None:
            cast(Companion, self.companion).place(self.device)

    def on_train_start(self) -> None:
        """Release blocks that already learn when a run is resumed."""
        self._thaw()

    def on_train_epoch_start(self) -> None:
        """Release one more block if its epoch has come."""
        self._thaw()

    def _thaw(self) -> None:
        if isinstance(self.predictor.frozen, Thawing):
            self.predictor.frozen.go_to(self.trainer.current_epoch)
            self.predictor.train()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave blocks that do not learn yet out of the step."""
        if isinstance(self.predictor.frozen, Thawing):
            self.predictor.frozen.hold()

    def losses(self, batch: CrystalBatch, seed: int) -> dict[str, Tensor]:
        """Return this rank's share of the total loss, as `loss`, and of its parts.

        The parts are `property`; with several targets, the loss of each by its name;
        those of a companion; and `l2_sp` with an anchor.
        """
        shown = batch
        if self.augment is not None and self.training:
            shown = self.augment(batch, seed)
        embeddings = self.predictor.embed(shown)
        output = self.predictor.head(embeddings.crystals, batch.rows)
        found = self._property_losses(output, batch.targets)
        found["loss"] = found["property"]
        if self.companion is not None:
            companion = cast(Companion, self.companion)
            found |= companion.losses(embeddings, batch, found["property"])
        if self.anchor is not None:
            found["l2_sp"] = self.anchor()
            found["loss"] = found["loss"] + found["l2_sp"]
        return found

    def _property_losses(self, output: Tensor, labels: Tensor) -> dict[str, Tensor]:
        each, counts = self.predictor.outputs.losses(output, labels)  # (T,) both
        total = self.balance(each, counts)
        if len(each) == 1:
            return {"property": total}
        names = self.predictor.outputs.names
        return {**dict(zip(names, each, strict=True)), "property": total}

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, as `shared_loss` returns it."""
        step = batches_before(self.trainer, batch_idx)
        losses = self.losses(batch, step_seed(self.seed, step))
        self.train_means.add(losses, batch)
        return shared_loss(losses["loss"])

    def on_train_epoch_end(self) -> None:
        """Log the losses of the epoch."""
        means = self.train_means.compute()
        self.log_dict({f"train_{name}": mean for name, mean in means.items()})

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Add a validation batch to the number that chooses the epoch."""
        output = self.predictor(batch)
        losses = self._property_losses(output, batch.targets)
        self.val_means.add({"loss": losses["property"]}, batch)
        self.scores.update(output, batch.targets)

    def on_validation_epoch_end(self) -> None:
        """Log the validation numbers."""
        found = self.scores.compute()
        names = self.predictor.outputs.names
        if len(names) == 1:
            self.log(f"val_{self.scores.chooses}", found[names[0]], prog_bar=True)
        else:
            self.log("val_score", found["score"], prog_bar=True)
            for name, kind in zip(names, self.scores.kinds, strict=True):
                self.log(f"val_{name}_{kind}", found[name])
        self.log("val_loss", self.val_means.compute().get("loss", float("nan")))
        self.scores.reset()

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
        settings = self.optimizer_settings
        encoder = self.predictor.encoder
        inside = {id(p) for p in encoder.parameters()}
        rest = [p for p in self.parameters() if id(p) not in inside]
        rates = layer_rates(encoder, settings.lr * self.encoder_lr, self.layer_decay)
        held = self.anchor.held if self.anchor is not None else ()
        groups = [(rest, settings.lr), *rates]
        return make_optimizer(groups, settings, steps, per_epoch, undecayed=held)
