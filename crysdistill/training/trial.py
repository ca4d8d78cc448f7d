"""Tries the heaviest batch first: a run that does not fit fails at its start."""

from __future__ import annotations

from typing import Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import alone, sum_over_ranks
from crysdistill.training.loader import BatchLoader
from crysdistill.training.watch.memory import available_memory


class Learner(Protocol):
    """The method that a module needs in addition to Lightning's."""

    def losses(self, batch: CrystalBatch, seed: int) -> dict[str, Tensor]:
        """Return this rank's share of each loss; `loss` is the one to minimise."""
        ...


class HeaviestFirst(Callback):
    """Computes the gradients of the heaviest batch once, without any effect.

    Args:
        loader: of the training batches.
        epochs: the epochs that are searched for it.
    """

    def __init__(self, loader: BatchLoader, epochs: int) -> None:
        self.loader = loader
        self.epochs = epochs

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Try the heaviest batch before the first step.

        Raises:
            InputError: there is not enough memory for it.
        """
        buffers = [buffer.clone() for buffer in pl_module.buffers()]
        device = pl_module.device
        crystals = edges = 0
        failed = False
        try:
            # Compile now: if memory is short later, the compiler would end the process.
            _try(trainer, pl_module, self.loader.few())
            batch, crystals, edges = self.loader.heaviest(self.epochs)
            if _needs(pl_module, batch) > available_memory(device):
                raise MemoryError
            _try(trainer, pl_module, batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            failed = True
        finally:
            for buffer, before in zip(pl_module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if sum_over_ranks(torch.tensor(int(failed))).item():
            raise InputError(_advice(device, crystals, edges))


def _needs(module: L.LightningModule, batch: CrystalBatch) -> int:
    """Return the bytes that a batch needs, as encoders estimate them."""
    encoders = [part for part in module.modules() if isinstance(part, Encoder)]
    return sum(encoder.memory(batch) or 0 for encoder in encoders)


def _try(trainer: L.Trainer, module: L.LightningModule, batch: CrystalBatch) -> None:
    """Compute gradients and discard them."""
    # Without the other ranks: if one runs out of memory, none waits for it.
    with alone(), trainer.precision_plugin.forward_context():
        loss = module.losses(batch, 0)["loss"]  # type: ignore[operator]
        learned = [p for p in module.parameters() if p.requires_grad]
        torch.autograd.grad(loss, learned, allow_unused=True)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; on the CPU only torch's message says so."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _advice(device: torch.device, crystals: int, edges: int) -> str:
    half = max(1, crystals // 2), max(1, edges // 2)
    return (
        f"the heaviest batch ({crystals:,} crystals, {edges:,} edges) does not fit "
        f"into the memory of {device}; set `trainer.edge_budget` to {half[1]:,}, or "
        f"`trainer.batch_size` to {half[0]:,}, and `trainer.accumulate` to 2 for the "
        "same steps"
    )
