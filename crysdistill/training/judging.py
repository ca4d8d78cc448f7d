"""Judges a predictor: checks labels, computes metrics and writes predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.splits import Split
from crysdistill.store.store import Store
from crysdistill.training.across import OtherStore
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.runs import RunDirectory
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.scores import WORDS, Scores
from crysdistill.transfer.targets import Normalizer, Target

_GUESSES = {
    "mae": "always the median of the training labels",
    "auc": "always the same probability",
    "accuracy": "always the most common class",
}
"""In words, the best guess that does not look at the crystal; see `by_constant`."""


class Answers(Protocol):
    """The interface that all kinds of predictors share."""

    outputs: Outputs

    def answer(self, batch: CrystalBatch) -> Tensor:
        """Return the raw output (B, O)."""
        ...


@dataclass(frozen=True)
class Subset:
    """Crystals to judge a predictor on.

    Args:
        store: the store that holds them.
        rows: their rows.
        names: its property for each target.
    """

    store: Store
    rows: np.ndarray
    names: Sequence[str]

    def batches(self, device: torch.device) -> BatchLoader:
        """Return their batches on a device."""
        loader = BatchLoader(self.store, self.rows, 256, self.names)
        place([loader], device)
        return loader


def subsets_of(
    store: Store, split: Split, names: Sequence[str], other: OtherStore | None
) -> dict[str, Subset]:
    """Return the crystals to judge on, by the name of their number.

    These are `val` and `test`. If the test set is in another store, `within` are the
    test crystals of the split. Sets without crystals are left out.

    Args:
        store: the store to train on.
        split: of its crystals.
        names: the targets.
        other: the crystals to test on in another store.
    """
    own = "test" if other is None else "within"
    found = {"val": split.val, own: split.test}
    subsets = {
        name: Subset(store, rows, names) for name, rows in found.items() if len(rows)
    }
    if other is not None:
        subsets["test"] = Subset(other.store, other.rows, other.names)
    return subsets


def outputs_for(
    targets: Sequence[Target],
    labels: np.ndarray,
    split: Split,
    material_ids: Sequence[str],
) -> Outputs:
    """Return the targets to predict, on the scale of the training labels.

    Args:
        targets: T of them.
        labels: (B, T) of the store, NaN where not known.
        split: of its crystals.
        material_ids: of the store.

    Raises:
        InputError: the training labels have no scale, or a subset cannot judge.
    """
    train, ids = split.train, np.array(material_ids)
    normalizers = [
        Normalizer.fit(target, labels[train, t], ids[train])
        for t, target in enumerate(targets)
    ]
    outputs = Outputs(targets, normalizers)
    _check_subsets(outputs, labels, split)
    return outputs


def one_column(labels: np.ndarray) -> np.ndarray:
    """Return one label for each labelled crystal, for splits: (B, T) to (B,)."""
    if labels.shape[1] == 1:
        return labels[:, 0]
    known = ~np.isnan(labels)
    filled = np.where(known[:, 0], labels[:, 0], np.nanmean(labels[:, 0]))
    return np.where(known.any(axis=1), filled, np.nan)


def _check_subsets(outputs: Outputs, labels: np.ndarray, split: Split) -> None:
    """Refuse subsets that cannot judge a target, and classes not in training."""
    for t, target in enumerate(outputs.targets):
        classes = outputs.normalizers[t].classes
        for subset in ("val", "test"):
            rows = getattr(split, subset)
            if len(rows) and np.isnan(labels[rows, t]).all():
                raise InputError(
                    f"no `{subset}` crystal has a label `{target.name}`; enlarge that "
                    "subset, change `split.seed`, or leave the target out"
                )
        if not classes:
            continue
        for subset in ("train", "val", "test"):
            known = labels[getattr(split, subset), t]
            found = np.unique(known[~np.isnan(known)])
            if len(found) and found.max() >= classes:
                raise InputError(
                    f"`{subset}` has class {found.max():g} of `{target.name}`, which "
                    "no training crystal has; set `split.stratify=true`, or give more "
                    "labels"
                )
            # The AUC of one class is undefined, and zero would be wrong.
            if len(found) == 1 and classes == 2:
                raise InputError(
                    f"all `{subset}` crystals have `{target.name}` {found[0]:g}; "
                    "enlarge that subset, change `split.seed` or set "
                    "`split.stratify=true`"
                )


@torch.no_grad()
def tested(predictor: Answers, loader: BatchLoader) -> tuple[Scores, Tensor, Tensor]:
    """Return the scores of labelled batches, the outputs (B, O) and labels (B, T).

    Args:
        predictor: in eval mode, where the batches are.
        loader: has the labels of all targets.
    """
    outputs, labels = [], []
    scores: Scores | None = None
    for batch in loader:
        outputs.append(predictor.answer(batch))
        labels.append(batch.targets)
        scores = scores or Scores(predictor.outputs).to(batch.cell.device)
        scores.update(outputs[-1], labels[-1])
    if scores is None:
        raise RuntimeError("there is nothing to judge a predictor on")
    return scores, torch.cat(outputs).cpu(), torch.cat(labels).cpu()


def write_predictions(
    run: RunDirectory,
    subset: Subset,
    outputs: Outputs,
    truth: Tensor,
    output: Tensor,
    sd: Tensor | None = None,
) -> None:
    """Write truth, prediction and perhaps `sd` of crystals, columns for each target.

    Args:
        run: the run directory, for `predictions.csv`.
        subset: the crystals.
        outputs: the targets that the output columns stand for.
        truth: (B, T) labels.
        output: (B, O) of a predictor.
        sd: (B, T) standard deviations of the predictions; None if not known.
    """
    several = len(outputs.names) > 1
    header = ["material_id"]
    for name in outputs.names:
        before = f"{name}_" if several else ""
        header += [f"{before}truth", f"{before}prediction"]
        header += [] if sd is None else [f"{before}sd"]
    known = [truth, outputs.predictions(output), *([] if sd is None else [sd])]
    table = torch.stack(known, dim=2).flatten(1).tolist()  # (B, 2 T or 3 T)
    ids = subset.store.material_ids
    lines = (
        [ids[row], *("" if np.isnan(x) else x for x in numbers)]
        for row, numbers in zip(subset.rows.tolist(), table, strict=True)
    )
    run.write_csv("predictions.csv", header, lines)


def by_constant(
    outputs: Outputs, store: Store, split: Split, subset: Subset
) -> dict[str, float]:
    """Return the metrics of the best guess that does not look at the crystal.

    It is the median of the training labels, or the class that most of them have. A
    predictor that is not better has learned nothing.

    Args:
        outputs: the targets.
        store: the store to train on.
        split: of its crystals.
        subset: the crystals to judge on.
    """
    scores, said = Scores(outputs), []
    for target, scale in zip(outputs.targets, outputs.normalizers, strict=True):
        known = torch.from_numpy(store.property(target.name)[split.train]).float()
        known = known[~known.isnan()]
        if scale.classes:
            said.append(torch.bincount(known.long(), minlength=scale.classes).float())
        else:
            said.append(scale.normalize(target.forward(known.median()))[None])
    columns = [subset.store.property(name)[subset.rows] for name in subset.names]
    labels = torch.from_numpy(np.stack(columns, axis=1)).float()  # (B, T)
    scores.update(torch.cat(said).expand(len(labels), -1), labels)
    return scores.compute()


def results_of(
    outputs: Outputs, kinds: list[str], found: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return the numbers for `results.json`, of a single target or of each."""
    if len(outputs.targets) == 1:
        target = outputs.targets[0]
        numbers = {subset: values[target.name] for subset, values in found.items()}
        about = {"target": target.name, "unit": target.unit, "metric": kinds[0]}
        return {**about, **numbers}
    each = {
        target.name: {
            "unit": target.unit,
            "metric": kind,
            **{subset: values[target.name] for subset, values in found.items()},
        }
        for target, kind in zip(outputs.targets, kinds, strict=True)
    }
    scores = {subset: values["score"] for subset, values in found.items()}
    names = ", ".join(outputs.names)
    about = {"target": names, "unit": "", "metric": "score"}
    return {**about, **scores, "targets": each}


def spoken(
    outputs: Outputs, kinds: list[str], found: dict[str, dict[str, float]]
) -> list[str]:
    """Return a line for each target with its numbers, and how good a guess is."""
    lines = []
    for target, kind in zip(outputs.targets, kinds, strict=True):
        unit = f" {target.unit}" if kind == "mae" and target.unit else ""
        said = {
            subset: f"{WORDS[kind]} {values[target.name]:.4g}{unit}"
            for subset, values in found.items()
        }
        name = f"{target.name}: " if len(kinds) > 1 else ""
        within = f", {said['within']} on test within" if "within" in said else ""
        lines.append(
            f"{name}{said['val']} on validation{within}, "
            f"{said.get('test', 'none')} on test"
        )
        if {"test", "constant"} <= found.keys():
            test, guess = (found[x][target.name] for x in ("test", "constant"))
            always = _GUESSES[kind]
            useless = test >= guess if kind == "mae" else test <= guess
            lines.append(
                f"{name}no better than {always}: {said['constant']}"
                if useless
                else f"{name}for comparison, {always}: {said['constant']}"
            )
    return lines
