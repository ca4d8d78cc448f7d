"""Training from scratch: a predictor from labels alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from crysdistill.encoders import Encoder, make_encoder
from crysdistill.store.store import Store
from crysdistill.training.labelled import LabelledConfig, LabelledPlan
from crysdistill.training.run import execute
from crysdistill.training.settings import EncoderChoice


@dataclass(kw_only=True)
class TrainConfig(LabelledConfig):
    """A predictor trained on labels alone.

    Args:
        encoder: `name` and the settings of that encoder.
    """

    out: Path = Path("runs/train")
    encoder: EncoderChoice = field(default_factory=lambda: {"name": "cgcnn"})


class TrainPlan(LabelledPlan[TrainConfig]):
    """Begin with random weights."""

    def encoder(self, store: Store) -> Encoder:
        """Make a new encoder for the graph of the store."""
        return make_encoder(
            graph=store.graph, source=str(store.path), **self.config.encoder
        )


def train(config: TrainConfig) -> Path:
    """Train a predictor from scratch; return the path of its weights file.

    Raises:
        InputError: the dataset or a setting cannot be used.
    """
    return execute(TrainPlan(config))
