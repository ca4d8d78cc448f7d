"""Controls that train no network, each an ordinary run with a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from crysdistill.encoders import Encoder, make_encoder
from crysdistill.schema import dump_config
from crysdistill.splits import Split, make_split
from crysdistill.store.store import Store
from crysdistill.studies.descriptors import describe
from crysdistill.teachers.random import fit_batch_norms
from crysdistill.training.across import (
    OtherStore,
    choose_tested,
    find_shared,
    open_other,
)
from crysdistill.training.judging import (
    one_column,
    outputs_for,
    results_of,
    subsets_of,
    write_predictions,
)
from crysdistill.training.labelled import LabelSettings
from crysdistill.training.loader import BatchLoader
from crysdistill.training.overlap import find_seen
from crysdistill.training.pretrained import load_pretrained
from crysdistill.training.runs import RunDirectory, open_run
from crysdistill.training.settings import EncoderChoice
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.ridge import PENALTIES, logistic
from crysdistill.transfer.scores import Scores
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import read_header

Readout = Literal["mean", "median", "ridge", "forest", "boosted"]

_TREES = 300
_BATCH = 256
_SURE = 1e-6  # probabilities are kept away from 0 and 1, whose logits are infinite


@dataclass(kw_only=True)
class ReadoutConfig(LabelSettings):
    """A predictor on fixed features of the crystals, with a readout for each target.

    Crystals for validation are only predicted.

    Args:
        readout: `mean` or `median` of the training labels; `ridge` (for classes
            logistic regression); `forest`, random; `boosted` trees.
        features: `onehot` or `magpie`, the composition; `structure`, a fingerprint;
            `encoder`, frozen embeddings beside the composition.
        weights: of the frozen encoder; None for one with random weights.
        encoder: the architecture of the random encoder.
        out: the run directory.
        seed: of trees and random weights.
        resume: accepted like in other runs; this one is short and starts anew.
        overwrite: delete the files of an earlier run.
    """

    readout: Readout = "ridge"
    features: Literal["onehot", "magpie", "structure", "encoder"] = "magpie"
    weights: Path | None = None
    encoder: EncoderChoice = field(default_factory=lambda: {"name": "cgcnn"})
    out: Path = Path("runs/readout")
    seed: int = 0
    resume: bool = False
    overwrite: bool = False


def readout(config: ReadoutConfig) -> Path:
    """Fit a readout to the training crystals and judge it; return its run directory.

    Raises:
        InputError: the dataset, the weights or a setting cannot be used.
    """
    store, targets = Store.open(config.dataset), config.all_targets
    labels = np.stack([store.property(t.name) for t in targets], axis=1)  # (B, T)
    split = make_split(store, config.split, one_column(labels))
    outputs = outputs_for(targets, labels, split, store.material_ids)
    text, out = dump_config(config), config.out
    again = config.overwrite or (config.resume and (out / "config.yaml").exists())
    with open_run(out, text, overwrite=again) as run:
        split.write(run.path / "split.csv", store.material_ids)
        _judge(config, store, split, outputs, run)
    return out


def _judge(
    config: ReadoutConfig,
    store: Store,
    split: Split,
    outputs: Outputs,
    run: RunDirectory,
) -> None:
    other = judged_elsewhere(config, store, split, outputs)
    encoder = _encoder(config, store, split) if config.features == "encoder" else None
    loader = BatchLoader(store, split.train, _BATCH, outputs.names)
    x, known = _features(config, loader, encoder)
    models = [
        _fit(config, target, normalizer, x, known[:, t])
        for t, (target, normalizer) in enumerate(
            zip(outputs.targets, outputs.normalizers, strict=True)
        )
    ]
    found, kinds = {}, Scores(outputs).kinds
    for name, subset in subsets_of(store, split, outputs.names, other).items():
        batches = BatchLoader(subset.store, subset.rows, _BATCH, subset.names)
        x, known = _features(config, batches, encoder)
        answers = torch.cat([model(x) for model in models], dim=1).float()  # (n, O)
        scores = Scores(outputs)
        scores.update(answers, known)
        found[name] = scores.compute()
        if name == "test":
            write_predictions(run, subset, outputs, known, answers)
    before = read_header(config.weights) if config.weights else None
    results = {
        "labels": len(split.train),
        "seed": config.seed,
        "dataset": store.hash,
        **find_seen(before, store, split, outputs.names, other),
        "split": split.hash(store.material_ids),
        "split_by": split.made_by,
        **({"test_set": other.facts()} if other else {}),
        **results_of(outputs, kinds, found),
    }
    run.write_json("results.json", results)


def judged_elsewhere(
    config: Any, store: Store, split: Split, outputs: Outputs
) -> OtherStore | None:
    """Return the test crystals in another store, if the configuration names one."""
    other = open_other(config.test, outputs.targets, store)
    if other is None:
        return None
    shared = find_shared(other, store, split)
    return choose_tested(other, shared, config.test.keep_shared, outputs)


def _features(
    config: ReadoutConfig, batches: BatchLoader, encoder: Encoder | None
) -> tuple[np.ndarray, Tensor]:
    """Return features (n, D) and labels (n, T)."""
    if config.readout in ("mean", "median"):
        labels = torch.cat([batch.targets for batch in batches])
        return np.zeros((len(labels), 1)), labels
    return describe(batches, config.features, encoder)


def _encoder(config: ReadoutConfig, store: Store, split: Split) -> Encoder:
    """Return the frozen encoder, in eval mode."""
    if config.weights is not None:
        return load_pretrained(config.weights, store).eval()
    torch.manual_seed(config.seed)
    encoder = make_encoder(graph=store.graph, **config.encoder)
    # Otherwise all atoms would look alike, and the control would be too weak.
    batches = BatchLoader(store, np.sort(split.train), _BATCH)
    fit_batch_norms(encoder, batches)
    return encoder.eval()


def _fit(
    config: ReadoutConfig,
    target: Target,
    normalizer: Normalizer,
    x: np.ndarray,
    labels: Tensor,
) -> Callable[[np.ndarray], Tensor]:
    """Return a function from features to normalised predictions or logits, (n, 1 or C).

    Args:
        config: the run.
        target: the target.
        normalizer: its scale, from the training labels.
        x: (n, D) features of the training crystals.
        labels: (n,) in the target's unit, NaN where not known.
    """
    own = ~torch.isnan(labels)
    x, y = x[own.numpy()], labels[own].double()
    if normalizer.classes:
        return _fit_classes(config, x, y.long().numpy(), normalizer.classes)
    if config.readout in ("mean", "median"):
        value = y.mean() if config.readout == "mean" else y.quantile(0.5)
        constant = normalizer.normalize(target.forward(value))
        return lambda asked: constant.expand(len(asked), 1)
    wanted = normalizer.normalize(target.forward(y)).numpy()
    model: Any = {
        "ridge": lambda: make_pipeline(StandardScaler(), RidgeCV(PENALTIES)),
        "forest": lambda: RandomForestRegressor(
            _TREES, random_state=config.seed, n_jobs=1
        ),
        "boosted": lambda: HistGradientBoostingRegressor(random_state=config.seed),
    }[config.readout]()
    model.fit(x, wanted)
    return lambda asked: torch.from_numpy(model.predict(asked))[:, None]


def _fit_classes(
    config: ReadoutConfig, x: np.ndarray, y: np.ndarray, count: int
) -> Callable[[np.ndarray], Tensor]:
    """Return a function from features to the logits of classes, (n, count)."""
    if config.readout in ("mean", "median"):
        share = _logits(np.bincount(y, minlength=count) / len(y))
        return lambda asked: share.expand(len(asked), count)
    if config.readout == "ridge":
        scaler = StandardScaler().fit(x)
        weight, bias = logistic(scaler.transform(x), y)
        return lambda asked: torch.from_numpy(scaler.transform(asked) @ weight.T + bias)
    model: Any = (
        RandomForestClassifier(_TREES, random_state=config.seed, n_jobs=1)
        if config.readout == "forest"
        else HistGradientBoostingClassifier(random_state=config.seed)
    )
    model.fit(x, y)
    return lambda asked: _logits(model.predict_proba(asked))


def _logits(probability: np.ndarray) -> Tensor:
    return torch.from_numpy(np.log(np.clip(probability, _SURE, 1.0)))
