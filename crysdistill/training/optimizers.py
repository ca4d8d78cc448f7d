"""Optimizers and schedules, in the form that Lightning takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from crysdistill.encoders import Encoder
from crysdistill.training.settings import OptimizerSettings


def make_optimizer(
    groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]],
    settings: OptimizerSettings,
    steps: int,
    steps_per_epoch: int,
    undecayed: Collection[torch.nn.Parameter] = (),
) -> OptimizerLRSchedulerConfig:
    """Return the optimizer and schedule in the form that Lightning takes.

    Args:
        groups: parameters with their learning rates; frozen ones are left out.
        settings: of the optimizer and the schedule.
        steps: the number of steps of the whole run.
        steps_per_epoch: the number of steps of one epoch.
        undecayed: parameters without weight decay.
    """
    free = {id(p) for p in undecayed}
    trained: list[dict[str, Any]] = []
    for parameters, lr in groups:
        learned = [p for p in parameters if p.requires_grad]
        usual = [p for p in learned if id(p) not in free]
        others = [p for p in learned if id(p) in free]
        trained.append({"params": usual, "lr": lr})
        trained.append({"params": others, "lr": lr, "weight_decay": 0.0})
    trained = [group for group in trained if group["params"]]
    rates = [group["lr"] for group in trained]
    decay, lr = settings.weight_decay, settings.lr
    optimizer: torch.optim.Optimizer
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(trained, lr, settings.momentum, weight_decay=decay)
    elif settings.name == "adam":
        optimizer = torch.optim.Adam(trained, lr, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(trained, lr, weight_decay=decay)
    schedules = torch.optim.lr_scheduler
    schedule: torch.optim.lr_scheduler.LRScheduler
    if settings.schedule == "onecycle" and steps > 2:
        # The rate rises and falls for at least one step each; otherwise torch would
        # divide by zero in a run of ten steps.
        rise = min(1.0, max(0.1, 2 / steps))
        schedule = schedules.OneCycleLR(optimizer, rates, steps, pct_start=rise)
    elif settings.schedule == "cosine":
        schedule = schedules.CosineAnnealingLR(optimizer, steps)
    elif settings.schedule == "milestones":
        at = [epoch * steps_per_epoch for epoch in settings.milestones]
        schedule = schedules.MultiStepLR(optimizer, at)
    else:
        schedule = schedules.ConstantLR(optimizer, factor=1.0, total_iters=0)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }


def layer_rates(
    encoder: Encoder, top: float, decay: float
) -> list[tuple[list[torch.nn.Parameter], float]]:
    """Return the parameters of an encoder with learning rates that fall with depth.

    A block learns at `top` times `decay` for each convolution above it: the last
    convolution and the pooling at `top`, the embedding slowest.

    Source: J. Howard and S. Ruder, ACL 2018, doi:10.18653/v1/P18-1031, "discriminative
    fine-tuning", where the factor is 1 / 2.6.

    Args:
        encoder: its blocks hold each parameter once.
        top: rate of the last block.
        decay: factor from each convolution to the one below.
    """
    blocks = encoder.blocks()
    last = len(blocks.convolutions)
    rates: dict[float, list[torch.nn.Parameter]] = {}
    for depth, block in enumerate(blocks):
        rate = top * decay ** max(0, last - depth)
        rates.setdefault(rate, []).extend(block.parameters())
    return [(parameters, rate) for rate, parameters in rates.items()]
