"""Embeddings of test crystals in two dimensions, before and after fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.studies.dataset_files import store_of
from crysdistill.studies.run_files import config_of, one_of_each, with_most_labels
from crysdistill.studies.statistics import higher_is_better

if TYPE_CHECKING:
    from crysdistill.encoders import Encoder

MOST = 1000
"""The most crystals on a map."""

BEFORE, AFTER = "pretrained", "fine-tuned"
"""The stages of an encoder."""

_LEAST = 10  # crystals, for a map that shows anything
_BATCH = 128
_ABSENT = "Embeddings are not drawn"


class Maps(NamedTuple):
    """What is known of embeddings.

    Args:
        points: columns `task, target, arm, stage, x, y, value` (of the target) and
            `explained_x`, `explained_y` (the share of the variance along each axis).
        absent: sentences on what is not known, and why.
    """

    points: pd.DataFrame
    absent: list[str]


def embedding_maps(table: pd.DataFrame) -> Maps:
    """Return the crystal embeddings of each task on their two principal components.

    They are those of test crystals, by the pretrained encoder and by the best arm that
    fine-tunes it with the most labels, in its first run.

    Args:
        table: the table from `check_results`; `run` is a path.
    """
    parts: list[pd.DataFrame] = []
    absent: dict[str, str] = {}
    tasks = list(with_most_labels(table).groupby(["task", "target"], sort=False))
    for (task, target), part in tasks:
        found = _task(part, str(target))
        if isinstance(found, str):
            absent[str(task)] = found
        else:
            parts.append(found.assign(task=str(task), target=str(target)))
    reasons = set(absent.values())
    said = [f"{_ABSENT} for {task}: {why}." for task, why in absent.items()]
    if len(reasons) == 1 and not parts:
        said = [f"{_ABSENT}: {reasons.pop()}."]
    return Maps(pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(), said)


def _task(part: pd.DataFrame, target: str) -> pd.DataFrame | str:
    """Return the points of a task, or why there are none."""
    part = part[np.isfinite(part["value"])]
    firsts = one_of_each(part)
    own = [row.arm for row in firsts.itertuples() if _is_fine_tuned(Path(str(row.run)))]
    tuned = part[part["arm"].isin(own)]
    if tuned.empty:
        return "no fine-tuned network has its weights beside its results"
    means = tuned.groupby("arm", sort=False)["value"].mean()
    higher = higher_is_better(tuned["metric"].iloc[0])
    arm = str(means.idxmax() if higher else means.idxmin())
    run = Path(tuned.loc[tuned["arm"] == arm, "run"].iloc[0])
    store = store_of(pd.Series([str(run)]))
    if store is None:
        return "the dataset is not on this machine"
    if target not in store.property_names:
        return "the dataset no longer has the target"
    try:
        encoders = _encoders(run)
    except InputError:
        return "the pretrained weights are not on this machine"
    rows = _tested(run, store)
    values = store.property(target)[rows]
    rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
    if len(rows) < _LEAST:
        return f"fewer than {_LEAST} of the dataset's crystals were tested"
    found = [
        _points(encoder, store, rows, values).assign(stage=stage)
        for stage, encoder in encoders.items()
    ]
    return pd.concat(found).assign(arm=arm)


def _is_fine_tuned(run: Path) -> bool:
    config = config_of(run)
    return (
        isinstance(config.get("weights"), str)
        and "freeze" in config
        and not (run / "network-0").exists()  # an ensemble has several encoders
        and (run / "weights.safetensors").exists()
        and (run / "split.csv").exists()
    )


def _encoders(run: Path) -> dict[str, Encoder]:
    from crysdistill.transfer.weights import load_encoder  # slow: it imports torch

    return {
        BEFORE: load_encoder(config_of(run)["weights"]),
        AFTER: load_encoder(run / "weights.safetensors"),
    }


def _tested(run: Path, store: Store) -> np.ndarray:
    """Return the rows of at most `MOST` test crystals."""
    split = pd.read_csv(run / "split.csv", dtype=str)
    wanted = set(split.loc[split["subset"] == "test", "material_id"])
    rows = np.array(
        [row for row, name in enumerate(store.material_ids) if name in wanted], int
    )
    if len(rows) > MOST:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST, replace=False))
    return rows


def _points(
    encoder: Encoder, store: Store, rows: np.ndarray, values: np.ndarray
) -> pd.DataFrame:
    """Return the crystals on the principal components of their embeddings.

    The signs of components mean nothing; here the target rises along both.
    """
    import torch
    from sklearn.decomposition import PCA

    parts = np.array_split(rows, -(-len(rows) // _BATCH))
    with torch.no_grad():
        found = [encoder(store.batch(part)).crystals.numpy() for part in parts]
    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(np.concatenate(found).astype(np.float64))  # (B, 2)
    rising = (points * (values - values.mean())[:, None]).sum(axis=0)
    points = points * np.where(rising < 0, -1.0, 1.0)
    x, y = pca.explained_variance_ratio_
    return pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "value": values}).assign(
        explained_x=x, explained_y=y
    )
