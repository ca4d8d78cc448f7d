"""Small runs with callbacks from the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy

from crysdistill.encoders import make_encoder
from crysdistill.ranks import on_first_rank, rank, world_size
from crysdistill.store.store import Store
from crysdistill.training.loader import BatchLoader
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.supervised import SupervisedModule
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.targets import Normalizer, Target
from tests.toy_stores import SMALL_ENCODER

DENSITY = Target("density", "1/Å³")


def _strategy() -> str | DDPStrategy:
    return "auto" if world_size() == 1 else DDPStrategy(broadcast_buffers=False)


class ToyRun:
    """A predictor of densities, its loaders and its folder.

    Args:
        store: crystals with `density`; the last quarter is for validation.
        folder: of the run.
        batch_size: of training.
        optimizer: how weights move.
        convolution: of the encoder.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        batch_size: int = 8,
        optimizer: OptimizerSettings | None = None,
        convolution: str = "published",
    ) -> None:
        torch.manual_seed(0)
        rows = np.arange(len(store))
        train, val = np.split(rows, [3 * len(rows) // 4])
        names = np.array(store.material_ids)
        labels = store.property("density")
        normalizer = Normalizer.fit(DENSITY, labels[train], names[train])
        encoder = make_encoder(**{**SMALL_ENCODER, "convolution": convolution})
        head = PropertyHead(encoder.width, 8, 1)
        outputs = Outputs([DENSITY], [normalizer])
        predictor = Predictor(encoder, head, outputs, store.graph)
        settings = optimizer or OptimizerSettings(schedule="constant")
        self.module = SupervisedModule(predictor, settings)
        self.train = BatchLoader(store, train, batch_size, ["density"], True)
        self.val = BatchLoader(store, val, batch_size, ["density"])
        self.run = on_first_rank(lambda: RunDirectory(folder, "seed: 0\n"))
        for loader in (self.train, self.val):
            loader.divide(rank(), world_size())

    def fit(
        self,
        callbacks: Sequence[L.Callback],
        ckpt_path: Path | None = None,
        **options: Any,
    ) -> L.Trainer:
        settings = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "devices": world_size(),
            "strategy": _strategy(),
            "log_every_n_steps": 1,
            "default_root_dir": self.run.path,
        }
        trainer = L.Trainer(**{**settings, **options}, callbacks=list(callbacks))
        trainer.fit(self.module, self.train, self.val, ckpt_path=ckpt_path)
        return trainer
