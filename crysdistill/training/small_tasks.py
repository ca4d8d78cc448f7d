"""Small tasks on which embeddings are evaluated during pretraining."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import composition
from crysdistill.ranks import on_first_rank
from crysdistill.splits import make_split
from crysdistill.splits.settings import SplitSettings
from crysdistill.store.store import Store
from crysdistill.training.pretrained import options
from crysdistill.transfer.targets import TRANSFORMS, Target

PROBED = "probe_error"
"""The number that chooses the epoch: the mean error of all ridge probes."""

_BATCH = 256
_SHAPE = 1_000  # crystals for measuring how embeddings fill their space
_NEIGHBOURS = 10
_PENALTIES = np.logspace(-3, 4, 15)


@dataclass(kw_only=True)
class ProbeSettings:
    """A small task that evaluates embeddings during pretraining.

    Args:
        dataset: a store with the property, on the graph of the corpus.
        target: the property, a number.
        labels: the most labels that train the probe.
        split: the split of later runs on the dataset. Its `train` part trains the probe
            and its `val` part judges it; `test` is not used.
    """

    dataset: Path
    target: Target
    labels: int = 500
    split: SplitSettings = field(default_factory=SplitSettings)

    def __post_init__(self) -> None:
        if self.labels < 2:
            raise InputError(f"`probes.labels` is {self.labels} but must be at least 2")
        if self.target.task != "regression":
            raise InputError(
                f"`probes` cannot learn {self.target.name!r}, whose task is "
                f"{self.target.task}; give a number"
            )


@dataclass(frozen=True)
class SmallTask:
    """A few labelled crystals that train a probe, and a few that judge it.

    Args:
        name: its name in messages and logs.
        store: the store with the crystals.
        train: the rows that train the probe.
        val: the rows that judge it.
        labels: (B,) of the whole store, on the scale of learning.
    """

    name: str
    store: Store
    train: np.ndarray
    val: np.ndarray
    labels: np.ndarray

    @classmethod
    def open(cls, settings: ProbeSettings, corpus: Store) -> SmallTask:
        """Open the dataset of a probe.

        Raises:
            InputError: the store cannot be read, has another graph than the corpus,
                or lacks the labels.
        """
        store, target = Store.open(settings.dataset), settings.target
        if store.graph != corpus.graph:
            command = f"crysdistill build {store.path} -o NEW.h5"
            raise InputError(
                f"{store.path} has another graph than {corpus.path}; build it again "
                f"with `{command} {options(corpus.graph)}`"
            )
        raw = store.property(target.name)
        target.check(raw, store.material_ids)
        split = make_split(store, settings.split, raw)
        # Some splits keep an order: the first ones would be no fair sample.
        order = np.random.default_rng(settings.split.seed).permutation(split.train)
        train = order[: settings.labels]
        if len(train) < 2 or len(split.val) < 2:
            raise InputError(
                f"{settings.dataset} has {len(train)} crystals to train a probe of "
                f"{target.name!r} and {len(split.val)} to judge it; both need two"
            )
        forward = TRANSFORMS[target.transform].forward
        labels = forward(torch.from_numpy(raw).double()).numpy()
        return cls(target.name, store, train, split.val, labels)

    def errors(self, features: Tensor) -> dict[str, float]:
        """Return the error of each readout over that of the best constant.

        Args:
            features: (train + val, F), of the training crystals, then of the others.

        Returns:
            `ridge` and `knn`; 1 is no better than the constant, 0 is perfect.
        """
        x = features.double().numpy()
        own, asked = x[: len(self.train)], x[len(self.train) :]
        mean, deviation = own.mean(axis=0), own.std(axis=0)
        scale = np.where(
            deviation > 1e-8, deviation, np.inf
        )  # constant features become 0
        own, asked = (own - mean) / scale, (asked - mean) / scale
        y, wanted = self.labels[self.train], self.labels[self.val]
        constant = np.abs(wanted - np.median(y)).mean()
        near = KNeighborsRegressor(min(_NEIGHBOURS, len(y)), weights="distance")
        readouts = {"ridge": RidgeCV(_PENALTIES), "knn": near}
        return {
            name: float(
                np.abs(readout.fit(own, y).predict(asked) - wanted).mean() / constant
            )
            for name, readout in readouts.items()
        }


class SmallTasks:
    """Several small tasks, and held-out crystals of the corpus.

    Args:
        tasks: the small tasks.
        corpus: the corpus of the held-out crystals.
        held_out: their rows.

    Raises:
        InputError: two tasks have the same name.
    """

    def __init__(
        self, tasks: Sequence[SmallTask], corpus: Store, held_out: np.ndarray
    ) -> None:
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"`probes` names {name!r} twice; leave one out")
        self.tasks = tuple(tasks)
        self.corpus = corpus
        self.held_out = held_out[:_SHAPE]

    def look(self, encoder: Encoder) -> dict[str, float]:
        """Evaluate the crystal embeddings of an encoder.

        The encoder runs in eval mode; its mode is then restored.

        Returns:
            `probe_TASK_ridge` and `probe_TASK_knn`, see `SmallTask.errors`;
            `probe_error`, the mean over the `ridge` errors; `effective_rank` and
            `uniformity` of the held-out crystals.
        """
        was_training = encoder.training
        encoder.eval()
        found: dict[str, float] = {}
        for task in self.tasks:
            features = _embedded(encoder, task.store, [*task.train, *task.val])
            for readout, error in task.errors(features).items():
                found[f"probe_{task.name}_{readout}"] = error
        found[PROBED] = _mean_of_ridge(found)
        embeddings = _embedded(encoder, self.corpus, self.held_out)
        encoder.train(was_training)
        return {
            **found,
            "effective_rank": effective_rank(embeddings),
            "uniformity": uniformity(embeddings),
        }

    def look_at_composition(self) -> dict[str, float]:
        """Evaluate the composition instead of embeddings: the control for encoders."""
        found: dict[str, float] = {}
        for task in self.tasks:
            rows = np.array([*task.train, *task.val])
            shares = [composition(batch) for batch in _batches(task.store, rows)]
            for readout, error in task.errors(torch.cat(shares)).items():
                found[f"probe_{task.name}_{readout}"] = error
        return {**found, PROBED: _mean_of_ridge(found)}


class Probes(Callback):
    """Evaluates small tasks after every epoch, on the first rank for all ranks.

    Args:
        tasks: the small tasks.
        encoder: the encoder that is trained.
    """

    def __init__(self, tasks: SmallTasks, encoder: Encoder) -> None:
        self.tasks = tasks
        self.encoder = encoder

    def on_validation_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        """Log the errors of the probes."""
        pl_module.log_dict(on_first_rank(lambda: self.tasks.look(self.encoder)))


# ------------------------------------------------------------ how space is filled


def effective_rank(embeddings: Tensor) -> float:
    """Return how many directions embeddings use: 1 to F.

    The exponential of the entropy of the normalised singular values of the centred
    embeddings, (B, F).

    Source: O. Roy and M. Vetterli, EUSIPCO 2007, Definition 1.
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp(min=1e-30)
    entropy = -(share * share.clamp(min=1e-30).log()).sum()
    return entropy.exp().item()


def uniformity(embeddings: Tensor) -> float:
    """Return how evenly embeddings cover the sphere: 0 if all are equal, to about -4.

    ln of the mean of exp(-2 |x - y|^2) over all pairs of unit vectors of (B, F).

    Source: T. Wang and P. Isola, ICML 2020, arXiv:2005.10242, Eq. 2 with t = 2.
    """
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    square = torch.pdist(unit).square()
    return (-2 * square).exp().mean().log().item()


# -------------------------------------------------------------------------- parts


def _batches(store: Store, rows: np.ndarray) -> Iterator:
    for first in range(0, len(rows), _BATCH):
        yield store.batch(rows[first : first + _BATCH])


@torch.no_grad()
def _embedded(
    encoder: Encoder, store: Store, rows: Sequence[int] | np.ndarray
) -> Tensor:
    """Return the crystal embeddings of some rows, (len(rows), F') on the CPU."""
    device = next(encoder.parameters()).device
    parts = [
        encoder(batch.to(device)).crystals.float().cpu()
        for batch in _batches(store, np.asarray(rows))
    ]
    return torch.cat(parts)


def _mean_of_ridge(found: Mapping[str, float]) -> float:
    return float(np.mean([v for k, v in found.items() if k.endswith("_ridge")]))
