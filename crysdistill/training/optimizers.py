"""Optimizers and schedules, in the form that Lightning takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from crysdistill.training.settings import OptimizerSettings


def make_optimizer(
    groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]],
    settings: OptimizerSettings,
    steps: int,
    steps_per_epoch: int,
) -> OptimizerLRSchedulerConfig:
    """Return the optimizer and schedule in the form that Lightning takes.

    Args:
        groups: parameters with their learning rates; frozen ones are left out.
        settings: which optimizer and schedule.
        steps: of the whole run.
        steps_per_epoch: of one epoch.
    """
    trained: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.requires_grad], "lr": lr}
        for parameters, lr in groups
    ]
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
        # It rises for a step at least, and falls for one: torch would divide by zero
        # in a run of ten.
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
