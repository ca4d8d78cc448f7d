"""A teacher with random weights: the control for every distillation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from crysdistill.encoders import Encoder, make_encoder
from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.store.store import Store
from crysdistill.teachers.encoder import EncoderTeacher


class RandomTeacher(EncoderTeacher):
    """An encoder with random weights.

    A student gains regularisation from it, not knowledge.

    Args:
        encoder: `name` and settings of the encoder that it replaces.
        seed: the seed of its weights; the caller's random state is not touched.
        graph: the graph of the batches that it will answer for.
    """

    def __init__(
        self, encoder: Mapping[str, Any], seed: int, graph: GraphSettings
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = make_encoder(graph=graph, **encoder)
        super().__init__(made, graph, name=f"random {made.name}")
        self._fitted = False

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Fit the batch-norm statistics to the student's training crystals.

        Without this step the activations grow from layer to layer, all atoms look
        alike, and the control is weaker than it should be. Only the first call fits
        them; later crystals do not change the teacher.
        """
        if self._fitted:
            return
        self._fitted = True
        parts = np.array_split(rows, max(1, -(-len(rows) // 256)))
        fit_batch_norms(self.encoder, (store.batch(p) for p in parts if len(p)))


@torch.no_grad()
def fit_batch_norms(encoder: Encoder, batches: Iterable[CrystalBatch]) -> None:
    """Set the running statistics of batch norms to their averages over `batches`.

    Nothing changes if there are no batches. The encoder is left in eval mode.
    """
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    encoder.train()
    for number, batch in enumerate(batches):
        if number == 0:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over all batches
        encoder(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()
