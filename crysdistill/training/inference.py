"""Predictions and embeddings for crystals without labels."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from crysdistill.corpus.build import build
from crysdistill.encoders import Embeddings, Encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.store.store import Store
from crysdistill.teachers.tables.layout import ABOUT
from crysdistill.teachers.tables.writing import (
    Contents,
    Part,
    check_ending,
    write_table,
)
from crysdistill.training.loader import BatchLoader, place
from crysdistill.transfer.weights import (
    WeightsHeader,
    load_encoder,
    load_predictor,
    read_header,
)

Accelerator = Literal["auto", "cpu", "gpu"]
"""Where to compute; `auto` takes a GPU where there is one."""

Level = Literal["crystals", "atoms", "layers"]
"""What to write of each crystal: one vector; one for each atom; those of each layer."""


def predict(
    weights: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    batch_size: int = 256,
    accelerator: Accelerator = "auto",
    units: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Predict properties; write `material_id` and a column for each target.

    Classifiers give the probability of class 1; those of more than two classes give
    the most likely one, and beside it the probability of each. Structures that cannot
    be read are listed in `OUT.quarantine.csv`; labels, where a source has some, are not
    read.

    Args:
        weights: of a predictor.
        sources: structure files, folders, tables or stores.
        out: the CSV to write.
        batch_size: crystals in a batch.
        accelerator: where to compute.
        units: whether the unit stands behind the name, as in `gap (eV)`.
        workers: processes that read structures; all cores where None.
        progress: whether to show a progress bar.

    Returns:
        The path of the CSV.

    Raises:
        InputError: the weights or a source cannot be read.
    """
    out, device = _writable(out), _device(accelerator)
    predictor = load_predictor(weights).to(device)
    outputs = predictor.outputs
    with _as_store(sources, predictor.graph, out, workers, progress) as store:
        loader = _batches(store, batch_size, device)
        found = [
            predictor.answer(batch).cpu()
            for batch in track(loader, "predicting", disable=not progress)
        ]
        columns = outputs.columns(
            torch.cat(found) if found else torch.empty(0, outputs.size)
        )
        ids = store.material_ids
        if units:
            known = {t.name: f"{t.name} ({t.unit})" for t in outputs.targets if t.unit}
            columns = {known.get(name, name): x for name, x in columns.items()}
        table = {name: x.tolist() for name, x in columns.items()}
    pd.DataFrame({"material_id": ids, **table}).to_csv(out, index=False)
    return out


def embed(
    weights: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    level: Level = "crystals",
    batch_size: int = 256,
    accelerator: Accelerator = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write what an encoder makes of crystals, as a table that can teach a student.

    `crysdistill.teachers.table` describes it. Of crystals it has `material_id` and the
    columns `e0`, `e1`, ...

    Args:
        weights: of an encoder or a predictor.
        sources: structure files, folders, tables or stores.
        out: the file to write: `.parquet`, `.safetensors` or `.h5`; `.csv` for
            crystals.
        level: what to write of each crystal.
        batch_size: crystals in a batch.
        accelerator: where to compute.
        workers: processes that read structures; all cores where None.
        progress: whether to show a progress bar.

    Returns:
        The path of the file.

    Raises:
        InputError: the weights or a source cannot be read, or `level` is unknown.
    """
    if level not in get_args(Level):
        raise InputError(
            f"`level` is {level!r} but must be one of {', '.join(get_args(Level))}"
            f"{did_you_mean(str(level), get_args(Level))}"
        )
    out, device = _writable(out), _device(accelerator)
    check_ending(out, level)
    encoder, header = load_encoder(weights).to(device), read_header(weights)
    widths = _widths(encoder, level)
    with _as_store(sources, header.graph, out, workers, progress) as store:
        loader = _batches(store, batch_size, device)

        @torch.no_grad()
        def parts() -> Iterator[Part]:
            for batch in track(loader, "embedding", disable=not progress):
                yield _part(encoder(batch, level == "layers"), batch, level)

        ptr = np.asarray(store.atom_offsets, np.int64)
        write_table(
            out, Contents(store.material_ids, ptr, widths, _about(header)), parts()
        )
    return out


def _widths(encoder: Encoder, level: Level) -> dict[str, int]:
    """Return the width of each block of a table."""
    if level == "crystals":
        return {"crystals": encoder.crystal_width}
    if level == "atoms":
        return {"atoms": encoder.width}
    layers = range(1 + len(encoder.blocks().convolutions))  # the embedding comes first
    return {f"layer{k}": encoder.width for k in layers}


def _part(found: Embeddings, batch: CrystalBatch, level: Level) -> Part:
    """Return what a table holds of a batch."""

    def plain(x: Tensor) -> np.ndarray:
        return x.float().cpu().numpy()

    if level == "crystals":
        return {"crystals": plain(found.crystals)}
    blocks = {f"layer{k}": plain(x) for k, x in enumerate(found.layers)}
    if level == "atoms":
        blocks = {"atoms": plain(found.atoms)}
    numbers = batch.atomic_numbers.cpu().numpy().astype(np.uint8)
    return {
        **blocks,
        "frac_coords": plain(batch.frac_coords),
        "atomic_numbers": numbers,
    }


def _about(header: WeightsHeader) -> dict[str, str]:
    """Return what a table says of the weights that made it."""
    provenance = header.provenance
    facts = {"kind": header.kind, "provenance": asdict(provenance)}
    return {
        ABOUT: json.dumps(facts, sort_keys=True),
        "origin": provenance.origin,
        "licence": provenance.licence,
    }


def _device(accelerator: str) -> torch.device:
    """Return the device that an accelerator means."""
    known = get_args(Accelerator)
    if accelerator not in known:
        raise InputError(
            f"`accelerator` is {accelerator!r} but must be one of {', '.join(known)}"
            f"{did_you_mean(str(accelerator), known)}"
        )
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError(
            "`accelerator` is gpu but there is no GPU here that PyTorch can use; take "
            "`cpu` or `auto`"
        )
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def _batches(store: Store, batch_size: int, device: torch.device) -> BatchLoader:
    """Return all crystals in order, on a device."""
    loader = BatchLoader(store, np.arange(len(store)), batch_size)
    place([loader], device)
    return loader


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
