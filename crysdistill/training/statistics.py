"""Computes the statistics of batch norms for given weights and crystals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from crysdistill.graphs.batch import CrystalBatch


@torch.no_grad()
def find_statistics(
    model: nn.Module,
    batches: Iterable[CrystalBatch],
    see: Callable[[CrystalBatch], Any],
) -> None:
    """Compute the statistics of unfrozen batch norms anew; put all in eval mode.

    All batches have the same weight, as in `torch.optim.swa_utils.update_bn`. Unlike
    there, dropout is off, and frozen batch norms keep their statistics.

    Args:
        model: changed in place.
        batches: of the crystals; those of this rank if there are several ranks.
        see: runs the model on a batch.
    """
    model.train()  # frozen blocks stay as they are
    norms = [
        part
        for part in model.modules()
        if isinstance(part, _BatchNorm) and part.training
    ]
    model.eval()
    if not norms:
        return
    with ExitStack() as after:
        for norm in norms:
            after.callback(setattr, norm, "momentum", norm.momentum)
            after.callback(norm.eval)
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        for batch in batches:
            see(batch)
