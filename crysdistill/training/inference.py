"""Predictions and embeddings for crystals without labels."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.progress import track

from crysdistill.corpus.build import build
from crysdistill.store.store import Store
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.training.loader import BatchLoader
from crysdistill.transfer.weights import load_encoder, load_predictor, read_header


def predict(
    weights: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Predict a property; write `material_id` and the target's column.

    Classifiers give the probability of class 1. Structures that cannot be read are
    listed in `OUT.quarantine.csv`; labels, where a source has some, are not read.

    Args:
        weights: of a predictor.
        sources: structure files, folders, tables or stores.
        out: the CSV to write.
        batch_size: crystals in a batch.
        workers: processes that read structures; all cores where None.
        progress: whether to show a progress bar.

    Returns:
        The path of the CSV.

    Raises:
        InputError: the weights or a source cannot be read.
    """
    out = _writable(out)
    predictor = load_predictor(weights)
    with _as_store(sources, predictor.graph, out, workers, progress) as store:
        loader = BatchLoader(store, np.arange(len(store)), batch_size)
        values = [
            predictor.predict(batch)
            for batch in track(loader, "predicting", disable=not progress)
        ]
        flat = torch.cat(values).tolist() if values else []
        table = {"material_id": store.material_ids, predictor.target.name: flat}
    pd.DataFrame(table).to_csv(out, index=False)
    return out


def embed(
    weights: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write crystal embeddings: `material_id` and the columns `e0`, `e1`, ...

    Args:
        weights: of an encoder or a predictor.
        sources: structure files, folders, tables or stores.
        out: the Parquet file to write; with the ending `.csv`, a CSV.
        batch_size: crystals in a batch.
        workers: processes that read structures; all cores where None.
        progress: whether to show a progress bar.

    Returns:
        The path of the file.

    Raises:
        InputError: the weights or a source cannot be read.
    """
    out = _writable(out)
    encoder, graph = load_encoder(weights), read_header(weights).graph
    with _as_store(sources, graph, out, workers, progress) as store:
        loader = BatchLoader(store, np.arange(len(store)), batch_size)
        with torch.no_grad():
            rows = [
                encoder.pool(encoder(batch), batch)
                for batch in track(loader, "embedding", disable=not progress)
            ]
        values = torch.cat(rows) if rows else torch.empty(0, encoder.width)
        table = pd.DataFrame(
            values.numpy(), columns=[f"e{i}" for i in range(encoder.width)]
        )
        table.insert(0, "material_id", store.material_ids)
    if out.suffix == ".csv":
        table.to_csv(out, index=False)
    else:
        table.to_parquet(out, index=False)
    return out


def _writable(out: str | Path) -> Path:
    """Refuse a result that could not be written, before the work is done."""
    out = Path(out)
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; create it first")
    if out.is_dir():
        raise InputError(f"{out}: a folder; give the name of a file in it")
    return out


@contextmanager
def _as_store(
    sources: Sequence[str | Path],
    graph: GraphSettings,
    out: Path,
    workers: int | None,
    progress: bool,
) -> Iterator[Store]:
    """Yield the sources as a store with the graph that the weights know.

    A store that has this graph is read as it is; anything else is built into a
    temporary one, by the same code that builds corpora.
    """
    quarantine = out.with_name(out.name + ".quarantine.csv")
    quarantine.unlink(missing_ok=True)  # that of an earlier result
    if len(sources) == 1 and Path(sources[0]).suffix == ".h5":
        store = Store.open(sources[0])
        if store.graph == graph:
            yield store
            return
    with tempfile.TemporaryDirectory(prefix="crysdistill-") as folder:
        report = build(
            sources,
            Path(folder) / "structures.h5",
            graph=graph,
            symmetry=None,
            labels=False,
            workers=workers,
            progress=progress,
        )
        if report.rejections:
            shutil.copy(report.quarantine, quarantine)
            print(f"{quarantine}: {len(report.rejections):,} refused, and why")
        yield Store.open(report.store)
