"""Predictions and embeddings for crystals without labels."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from crysdistill.files import FULL, whole, writable, write_whole
from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.store.store import Store
from crysdistill.teachers.frozen import asked
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
"""Where to compute; `auto` takes a GPU if there is one."""

Level = Literal["crystals", "atoms", "layers"]
"""The embeddings to write: of crystals, of their atoms, or of atoms in each layer."""


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

    A classifier gives the probability of class 1; with more than two classes it gives
    the most likely one and the probability of each. Structures that cannot be read are
    listed in `OUT.quarantine.csv`. Labels in a source are not read.

    Args:
        weights: of a predictor.
        sources: structure files, folders, tables or stores.
        out: the CSV to write.
        batch_size: crystals in a batch.
        accelerator: where to compute.
        units: whether column names include the unit, as in `gap (eV)`.
        workers: processes that read structures; None uses all cores.
        progress: whether to show a progress bar.

    Returns:
        The path of the CSV.

    Raises:
        InputError: the weights or a source cannot be read, no crystal is left, a frozen
            teacher does not know a crystal, or there is no room; an earlier result then
            stays.
    """
    out, device = writable(out, [weights, *sources]), _device(accelerator)
    predictor = load_predictor(weights).to(device)
    outputs = predictor.outputs
    with _as_store(sources, predictor.graph, out, workers, progress) as store, _room():
        loader, rows = _batches(store, batch_size, device), np.arange(len(store))
        with (
            tempfile.TemporaryDirectory(prefix="crysdistill-") as spare,
            asked([predictor], store, rows, fallback=Path(spare), device=device,
                  progress=progress),
        ):  # fmt: skip
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
        with whole(out) as partial:
            pd.DataFrame({"material_id": ids, **table}).to_csv(partial, index=False)
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
    """Write an encoder's embeddings of crystals as a table that can teach a student.

    `crysdistill.teachers.table` describes the table. At the level `crystals` it has
    `material_id` and the columns `e0`, `e1`, ...

    Args:
        weights: of an encoder or a predictor.
        sources: structure files, folders, tables or stores.
        out: the file to write: `.parquet`, `.safetensors` or `.h5`; `.csv` for
            crystals.
        level: which embeddings to write.
        batch_size: crystals in a batch.
        accelerator: where to compute.
        workers: processes that read structures; None uses all cores.
        progress: whether to show a progress bar.

    Returns:
        The path of the file.

    Raises:
        InputError: the weights or a source cannot be read, no crystal is left, `level`
            is unknown, or there is no room; an earlier result then stays.
    """
    if level not in get_args(Level):
        raise InputError(
            f"`level` is {level!r} but must be one of {', '.join(get_args(Level))}"
            f"{did_you_mean(str(level), get_args(Level))}"
        )
    out, device = writable(out, [weights, *sources]), _device(accelerator)
    check_ending(out, level)
    encoder, header = load_encoder(weights).to(device), read_header(weights)
    widths = _widths(encoder, level)
    with _as_store(sources, header.graph, out, workers, progress) as store, _room():
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
    """Return the arrays of a batch for the table."""

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
    """Return a table's record of the weights that made it."""
    provenance = header.provenance
    facts = {"kind": header.kind, **provenance.record()}
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


@contextmanager
def _as_store(
    sources: Sequence[str | Path],
    graph: GraphSettings,
    out: Path,
    workers: int | None,
    progress: bool,
) -> Iterator[Store]:
    """Yield the sources as a store with the graph of the weights.

    A store with this graph is read as it is. Anything else is built into a temporary
    store, by the same code that builds corpora.
    """
    quarantine = out.with_name(out.name + ".quarantine.csv")
    if len(sources) == 1 and Path(sources[0]).suffix == ".h5":
        store = Store.open(sources[0])
        if store.graph == graph:
            yield store
            quarantine.unlink(missing_ok=True)  # left by an earlier result
            return
    with tempfile.TemporaryDirectory(prefix="crysdistill-") as folder:
        try:
            report = build(
                sources,
                Path(folder) / "structures.h5",
                graph=graph,
                symmetry=None,
                labels=False,
                workers=workers,
                progress=progress,
            )
        except InputError as error:
            if not _is_full(error.__context__):
                raise
            raise InputError(
                f"{tempfile.gettempdir()} has no room for the graphs of these "
                "crystals; make room, or set TMPDIR to a folder that has some"
            ) from None
        for remark in report.remarks:
            print(remark)
        refused = report.quarantine.read_bytes()
        if not report.built:
            with _room():
                write_whole(quarantine, refused)
            raise InputError(
                f"none of {report.read:,} entries became a crystal; {quarantine} says "
                f"why{f', and {out} is as it was' if out.exists() else ''}"
            )
        yield Store.open(report.store)
        # Written only now, so that it belongs to the result beside it.
        if not report.rejections:
            quarantine.unlink(missing_ok=True)
            return
        with _room():
            write_whole(quarantine, refused)
        print(f"{quarantine}: {len(report.rejections):,} refused, and why")


@contextmanager
def _room() -> Iterator[None]:
    """Turn a full disk into an error that names the file; an earlier file stays."""
    try:
        yield
    except OSError as error:
        if not _is_full(error):
            raise
        raise InputError(
            f"{error.filename}: {os.strerror(error.errno or 0)}; nothing is written "
            "and an earlier file of that name is as it was; make room and run it again"
        ) from None


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in FULL
