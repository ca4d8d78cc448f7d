"""Stops a run whose loss has diverged; names the crystals and gives advice."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import (
    ask_all,
    on_first_rank,
    rank,
    sum_over_ranks,
    world_size,
)
from crysdistill.training.loader import BatchLoader
from crysdistill.training.runs import RunDirectory
from crysdistill.training.watch.culprits import Judge
from crysdistill.training.watch.divergence import WINDOW, LossWatch, all_finite

FILE = "diverged.json"

_NAMED = 3  # crystals in the line of an error


@dataclass
class _Step:
    """One training batch of this rank; `weights` are a copy from before it."""

    epoch: int
    batch: int
    rows: Tensor | None
    lr: float | None
    loss: float | None = None
    gradient_norm: float | None = None
    weights: list[Tensor] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return its entry for the file."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "loss": _plain(self.loss),
            "lr": self.lr,
            "gradient_norm": _plain(self.gradient_norm),
        }


class Guard(Callback):
    """Stops a run when its loss or its gradient is not finite, or its loss explodes.

    `LossWatch` defines an exploding loss. On the CPU, the loss is checked before the
    gradient is computed, and the gradient before the step, so the weights do not
    change. A GPU need not wait: the loss of a step is transferred while the GPU
    computes the next one, and the weights before the bad step are restored from a copy
    on the GPU. Gradients on a GPU are not checked: with `16-mixed` some are infinite by
    design, and Lightning skips their steps. A checkpoint is written only after the last
    loss was checked and if all weights are finite.

    With several ranks, each sees the loss of the whole batch: the ranks add up one
    number in each step, and all stop in the same step. A module returns its rank's
    share of the loss times the number of ranks (`engine.shared_loss`).

    Args:
        run: the run directory, for `diverged.json`.
        train: the training batches.
        val: the validation batches.
    """

    def __init__(self, run: RunDirectory, train: BatchLoader, val: BatchLoader) -> None:
        self.run = run
        self.train = train
        self.val = val
        self._watch = LossWatch()
        self._steps: deque[_Step] = deque(maxlen=WINDOW)
        self._copies: deque[list[Tensor]] = deque(maxlen=2)
        self._on_way: tuple[_Step, Callable[[], float]] | None = None

    @property
    def last_loss(self) -> float | None:
        """The last checked loss, of the batch of all ranks."""
        known = (step.loss for step in reversed(self._steps))
        return next((loss for loss in known if loss is not None), None)

    # --------------------------------------------------------------------- each step

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the file of an earlier attempt at this run."""
        if rank() == 0:
            (self.run.path / FILE).unlink(missing_ok=True)

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: CrystalBatch,
        batch_idx: int,
    ) -> None:
        """Remember the crystals of the batch."""
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        lr = max((float(group["lr"]) for group in groups), default=None)
        rows = getattr(batch, "rows", None)
        step = _Step(trainer.current_epoch, batch_idx, rows, lr)
        self._steps.append(step)
        if len(self._steps) > 3:
            self._steps[-4].rows = None  # do not keep batches on a device for long
        if _runs_ahead(pl_module):
            self._keep_weights(step, pl_module)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Check the loss at once, unless a GPU would have to wait.

        Raises:
            InputError: the run has diverged; so do the methods below.
        """
        if not _runs_ahead(pl_module):
            value = float(_whole(loss, trainer))
            self._look(trainer, pl_module, self._steps[-1], value)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Check the gradient before the step; all ranks have the same one."""
        if _runs_ahead(pl_module):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        step = self._steps[-1]
        step.gradient_norm = norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self._stop(trainer, pl_module, step, f"gradient's norm is {norm}")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: CrystalBatch,
        batch_idx: int,
    ) -> None:
        """On a GPU: check the last step's loss, and request that of this step."""
        if _runs_ahead(pl_module):
            self._look_at_sent(trainer, pl_module)
            loss = _whole(outputs["loss"], trainer)
            self._on_way = self._steps[-1], _send_for(loss)

    @torch.no_grad()
    def _keep_weights(self, step: _Step, module: L.LightningModule) -> None:
        """Copy the weights on the device, over the copy from two steps ago."""
        learned: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        if len(self._copies) < 2:
            self._copies.appendleft([torch.empty_like(p) for p in learned])
        step.weights = self._copies[0]
        self._copies.rotate(1)
        torch._foreach_copy_(step.weights, learned)  # one launch for all

    @torch.no_grad()
    def _restore_weights(self, step: _Step, module: L.LightningModule) -> None:
        """Restore the weights from before the bad step."""
        learned = [p for p in module.parameters() if p.requires_grad]
        for weights, before in zip(learned, step.weights or [], strict=False):
            weights.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses, so a resumed run stops at the same step."""
        return self._watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._watch.load_state_dict(state_dict)

    # ------------------------------------------------------------------ now and then

    def on_validation_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Check the last loss, so that a diverged run is not validated."""
        self._look_at_sent(trainer, pl_module)

    def on_train_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Check the weights."""
        self._look_at_weights(trainer, pl_module)

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Check the weights, so that a diverged run is not saved."""
        self._look_at_weights(trainer, pl_module)

    def on_validation_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Check the validation loss; search for the batch only if it is not finite."""
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.sanity_checking or loss is None or math.isfinite(float(loss)):
            return
        judge = Judge(trainer, pl_module, self.train, self.val)
        guilty = judge.bad_validation_batch()
        found = torch.tensor([float(guilty is not None)], device=pl_module.device)
        if not float(sum_over_ranks(found)):
            return  # there was no crystal to validate on
        what = f"validation loss is {float(loss)}"
        # A resumed run may begin with validation.
        last = [*self._steps, _Step(trainer.current_epoch, 0, None, None)]
        step = last[max(0, len(self._steps) - 1)]
        self._stop(trainer, pl_module, step, what, validation=guilty or [])

    # ----------------------------------------------------------------------- looking

    def _look(
        self, trainer: L.Trainer, module: L.LightningModule, step: _Step, loss: float
    ) -> None:
        step.loss = loss
        wrong = self._watch.add(loss)
        if wrong:
            self._stop(trainer, module, step, f"loss {wrong}")

    def _look_at_sent(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Check the requested loss, if there is one."""
        if self._on_way is None:
            return
        (step, read), self._on_way = self._on_way, None
        self._look(trainer, module, step, read())

    def _look_at_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look_at_sent(trainer, module)
        if self._steps and not all_finite(module):
            self._stop(trainer, module, self._steps[-1], "weights are not finite")

    # ---------------------------------------------------------------------- stopping

    def _stop(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        step: _Step,
        what: str,
        validation: list[int] | None = None,
    ) -> None:
        """Write a record of the failure and end the run, on all ranks."""
        if validation is None:
            self._restore_weights(step, module)
        finite = all(bool(p.isfinite().all()) for p in module.parameters())
        before = self._before(step)
        loader, rows = self.train, _rows(step)
        if validation is not None:
            loader, rows = self.val, validation
        culprits = []
        if finite:
            control = _rows(before if validation is None else step)
            judge = Judge(trainer, module, self.train, self.val)
            culprits = judge.culprits(loader, rows, control)
        ids = loader.store.material_ids
        mine = {
            "material_ids": [str(ids[row]) for row in rows],
            "culprits": [str(ids[row]) for row in culprits],
            "before": [str(self.train.store.material_ids[r]) for r in _rows(before)],
        }
        everyone = ask_all(mine)
        alone_bad = [name for one in everyone for name in one["culprits"]]
        clip = trainer.gradient_clip_val
        record = {
            "what": what,
            "in": "training" if validation is None else "validation",
            "epoch": step.epoch,
            "batch": step.batch,
            "optimizer_steps": trainer.global_step,
            "lr": step.lr,
            "clip": clip,
            "precision": str(trainer.precision),
            "weights_finite": finite,
            "material_ids": [name for one in everyone for name in one["material_ids"]],
            "alone_not_finite": alone_bad,
            "material_ids_of_batch_before": [
                n for one in everyone for n in one["before"]
            ],
            "history": [known.to_dict() for known in self._steps],
        }
        path = on_first_rank(lambda: self.run.write_json(FILE, record))
        where = f"in batch {step.batch} of epoch {step.epoch}"
        if validation is not None:
            where = f"after epoch {step.epoch}"
        raise InputError(
            f"the {what} {where}; {_advice(alone_bad, step.lr, clip, trainer)}; "
            f"{path} holds the crystals and the last losses"
        )

    def _before(self, step: _Step) -> _Step | None:
        for before, after in pairwise(self._steps):
            if after is step:
                return before
        return None


def _runs_ahead(module: L.LightningModule) -> bool:
    """Return whether the host runs ahead of the device and should not wait for it."""
    return module.device.type == "cuda"


def _send_for(value: Tensor) -> Callable[[], float]:
    """Request a number from a GPU; return a function that waits for it and reads it."""
    host = torch.empty((), dtype=torch.float32, pin_memory=True)
    host.copy_(value, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def read() -> float:
        there.synchronize()
        return float(host)

    return read


def _whole(loss: Tensor, trainer: L.Trainer) -> Tensor:
    """Return the loss of the whole batch from a rank's loss as Lightning scaled it."""
    loss = loss.detach().float() * trainer.accumulate_grad_batches
    return sum_over_ranks(loss) / world_size()


def _rows(step: _Step | None) -> list[int]:
    if step is None or step.rows is None:
        return []
    return step.rows.tolist()


def _plain(value: float | None) -> float | str | None:
    """Return a number for JSON; NaN and infinities become text."""
    return value if value is None or math.isfinite(value) else str(value)


def _advice(
    culprits: list[str], lr: float | None, clip: float | None, trainer: L.Trainer
) -> str:
    """Return advice on what to do."""
    if culprits:
        names = ", ".join(culprits[:_NAMED])
        more = len(culprits) - _NAMED
        names += f" and {more} more" if more > 0 else ""
        return (
            f"{names} alone {'gives' if len(culprits) == 1 else 'give'} a loss that is "
            "not finite: check structure and label, or leave it out of the store"
        )
    ways = [f"lower `optimizer.lr` (here {lr:.3g})" if lr else "lower `optimizer.lr`"]
    ways.append(f"lower `trainer.clip` ({clip:g})" if clip else "set `trainer.clip=1`")
    if "32" not in str(trainer.precision):
        ways.append("set `trainer.precision=32-true`")
    return ", or ".join((", ".join(ways[:-1]), ways[-1])) + ", and `overwrite=true`"
