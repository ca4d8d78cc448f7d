"""How far test crystals are from training crystals and from the pretraining corpus.

The distance of two crystals is the share of atoms that must be exchanged to get from
one composition to the other: 0 for the same composition, 1 for no common element.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import coo_array, csc_array

from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.studies.dataset_files import store_of
from crysdistill.studies.run_files import config_of, one_of_each, with_most_labels

_ELEMENTS = 119

_ABSENT = "Errors by distance to the corpus are not shown"


def training_distances(table: pd.DataFrame, predictions: pd.DataFrame) -> pd.Series:
    """Return how far each test crystal is from the training crystals of its run.

    Args:
        table: the table from `check_results`; `run` is a path.
        predictions: the table from `judged_predictions`.

    Returns:
        A distance for each prediction; NaN where the store or the split is not known.
    """
    found = pd.Series(np.nan, index=predictions.index)
    for task, part in with_most_labels(table).groupby("task"):
        store = store_of(part["run"])
        if store is None:
            continue
        row_of = {name: row for row, name in enumerate(store.material_ids)}
        fractions = _fractions(store)
        for (seed, fold), runs in part.groupby(["seed", "fold"]):
            mask = (predictions["task"] == task) & (predictions["seed"] == seed)
            mask &= predictions["fold"] == fold
            path = Path(runs["run"].iloc[0]) / "split.csv"
            if not mask.any() or not path.exists():
                continue
            split = pd.read_csv(path, dtype=str)
            train = split.loc[split["subset"] == "train", "material_id"]
            tested = predictions.loc[mask, "material_id"]
            if not ({*train, *tested} <= row_of.keys()) or train.empty:
                continue
            names = tested.unique()
            far = nearest(
                fractions[:, [row_of[name] for name in names]],
                fractions[:, [row_of[name] for name in train]],
            )
            found[mask] = tested.map(dict(zip(names, far, strict=True)))
    return found


class CorpusDistances(NamedTuple):
    """How far test crystals are from the corpus.

    Args:
        values: one for each prediction; NaN where not known.
        absent: sentences on what is not known, and why.
    """

    values: pd.Series
    absent: list[str]


def corpus_distances(table: pd.DataFrame, predictions: pd.DataFrame) -> CorpusDistances:
    """Return how far each test crystal is from the corpus of the pretrained weights.

    Crystals that pretraining left out of the corpus do not count.

    Args:
        table: the table from `check_results`; `run` is a path.
        predictions: the table from `judged_predictions`.
    """
    values = pd.Series(np.nan, index=predictions.index)
    known: dict[str, csc_array | str] = {}
    absent: list[str] = []
    for task, part in with_most_labels(table).groupby("task", sort=False):
        weights = _weights_of(one_of_each(part)["run"])
        if not weights:
            continue
        if len(weights) > 1:
            absent.append(f"{_ABSENT} for {task}: its arms have several weights.")
            continue
        if weights[0] not in known:
            known[weights[0]] = _corpus(weights[0])
        corpus, store = known[weights[0]], store_of(part["run"])
        if isinstance(corpus, str):
            absent.append(f"{_ABSENT}: {corpus}.")
            continue
        mask = predictions["task"] == task
        tested = predictions.loc[mask, "material_id"]
        row_of = {name: n for n, name in enumerate(store.material_ids)} if store else {}
        names = tested.unique()
        if store is None or not set(names) <= row_of.keys():
            absent.append(f"{_ABSENT} for {task}: its dataset is not on this machine.")
            continue
        asked = _fractions(store)[:, [row_of[name] for name in names]]
        far = nearest(asked, corpus)
        values[mask] = tested.map(dict(zip(names, far, strict=True)))
    return CorpusDistances(values, list(dict.fromkeys(absent)))


def nearest(asked: csc_array, others: csc_array) -> np.ndarray:
    """Return the distance of crystals to the nearest of others, (n,).

    Args:
        asked: (elements, n) their compositions, from `Store`s as fractions.
        others: (elements, m) those of at least one crystal.
    """
    known = others.tocsr()  # which crystals hold an element, and how much of it
    rows = [slice(*known.indptr[z : z + 2]) for z in range(known.shape[0])]
    shared = np.zeros(others.shape[1])
    found = np.ones(asked.shape[1])
    for place in range(asked.shape[1]):
        own = slice(*asked.indptr[place : place + 2])
        touched = [known.indices[rows[z]] for z in asked.indices[own]]
        for z, share, crystals in zip(
            asked.indices[own], asked.data[own], touched, strict=True
        ):
            shared[crystals] += np.minimum(known.data[rows[z]], share)
        most = max(shared[crystals].max(initial=0) for crystals in touched)
        found[place] = max(0.0, 1 - most)
        for crystals in touched:
            shared[crystals] = 0
    return found


def _fractions(store: Store) -> csc_array:
    """Return the fraction of each element, (elements, B)."""
    sizes = np.diff(store.atom_offsets)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    share = 1 / np.repeat(sizes, sizes)
    place = (np.asarray(store.atomic_numbers, int), owner)
    return coo_array((share, place), shape=(_ELEMENTS, len(sizes))).tocsc()


def _weights_of(runs: pd.Series) -> list[str]:
    """Return the pretrained weights of runs, be they a start or a teacher."""
    from crysdistill.transfer.shipped import located

    found: dict[str, None] = {}
    for run in runs.unique():
        config = config_of(Path(run))
        for given in (config.get("weights"), config.get("teacher")):
            for one in given if isinstance(given, list) else [given]:
                if one and located(one).suffix == ".safetensors":
                    found[str(one)] = None
    return list(found)


def _corpus(weights: str) -> csc_array | str:
    """Return the compositions of the corpus, or why they are not known."""
    from crysdistill.transfer.shipped import located
    from crysdistill.transfer.weights import read_header

    try:
        provenance = read_header(weights).provenance
    except InputError:
        return f"{weights} is not on this machine"
    folders = (located(weights).parent, Path(provenance.origin.partition(": ")[0]))
    for folder in folders:
        config = config_of(folder)
        path = Path(str(config.get("corpus") or ""))
        if not path.is_file():
            continue
        try:
            store = Store.open(path, verify=False)
        except InputError:
            continue
        if store.hash == provenance.corpus:
            return _learned(store, config, folder)
    return f"the corpus of {weights} is not on this machine"


def _learned(store: Store, config: dict[str, Any], run: Path) -> csc_array | str:
    """Return the compositions of the crystals that pretraining did not leave out."""
    if config.get("subset") is not None:
        return f"{run} learned from a part of its corpus"
    if config.get("weights") is not None:
        return f"{run} began with weights that have a corpus of their own"
    rows: Sequence[int] = range(len(store))
    if config.get("exclude"):
        try:
            found = json.loads((run / "excluded.json").read_bytes())["found"]
            left_out = {int(row) for row, _ in found["rows"]}
        except (OSError, ValueError, KeyError, TypeError):
            return f"{run} does not say which crystals it left out of its corpus"
        rows = [row for row in rows if row not in left_out]
    return _fractions(store)[:, list(rows)]
