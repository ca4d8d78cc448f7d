"""Compare a dataset with the formulas in weights, where their corpus is not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich
from pymatgen.core import Composition
from rich.markup import escape

from crysdistill.errors import InputError
from crysdistill.files import writable
from crysdistill.overlap.facts import Collection
from crysdistill.overlap.files import compare_files
from crysdistill.overlap.sides import open_side
from crysdistill.store.checks import find_check
from crysdistill.structures.elements import symbols
from crysdistill.transfer.seen import in_words
from crysdistill.transfer.shipped import located
from crysdistill.transfer.weights import read_header


def compare(
    corpus: str | Path,
    dataset: str | Path,
    out: str | Path | None = None,
    **options: Any,
) -> None:
    """Compare a dataset with a corpus, or with weights that stand for one.

    Args:
        corpus: anything that `build` reads, a weights file, or the name of weights of
            the package.
        dataset: anything that `build` reads.
        out: the CSV to write; see `compare_files` and `compare_weights`.
        options: the others of `compare_files` or `compare_weights`.

    Raises:
        InputError: a side or an option cannot be used.
    """
    if _is_weights(dataset):
        raise InputError(
            f"{dataset} holds weights, which stand for a corpus; name them before the "
            "dataset"
        )
    if _is_weights(corpus):
        for name in ("kinds", "pairs_per_entry", "cluster"):
            if name in options:
                raise InputError(
                    f"`--{name.replace('_', '-')}` needs the corpus itself; weights "
                    "know only its formulas"
                )
        compare_weights(corpus, dataset, out, **options)
    elif out is None:
        raise InputError("`-o` is missing; name the table of pairs: `-o pairs.csv`")
    else:
        compare_files(corpus, dataset, out, **options)


def _is_weights(path: str | Path) -> bool:
    """Tell by its name whether a path means a weights file; see `located`."""
    found = located(path)
    return found.suffix == ".safetensors" and not found.is_dir()


def compare_weights(
    weights: str | Path,
    dataset: str | Path,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Print how many crystals of a dataset weights can have seen, and list them.

    A crystal can be in the corpus only if the corpus has its reduced formula; see
    `Formulas`. If the structures of the same dataset were compared before, that result
    is printed as well: it is sharper.

    Args:
        weights: a weights file that carries the formulas of its corpus, or the name of
            weights of the package.
        dataset: the crystals for evaluation; anything that `build` reads.
        out: CSV file for the crystals that can be in the corpus, `dataset_id,formula`;
            None writes none.
        workers: processes; if None, all cores for a large source.
        progress: whether to show a progress bar.

    Returns:
        Which crystals can be in the corpus, (B,) bool.

    Raises:
        InputError: the weights carry no formulas, a side cannot be read, or the dataset
            is empty.
    """
    if out is not None:
        writable(out, (located(weights), dataset))  # before the work
    header = read_header(Path(weights))
    formulas = header.provenance.formulas
    if formulas is None:
        raise InputError(
            f"{weights} carries no formulas of its corpus (earlier versions wrote "
            "none, and nobody knows those of a foreign teacher); compare with the "
            "corpus itself"
        )
    side = open_side(dataset, workers=workers, progress=progress)
    if side.remark:
        rich.print(escape(side.remark))
    if not len(side.crystals):
        raise InputError(f"{side.path} holds no crystals; nothing can be compared")
    shared = formulas.has(side.crystals)
    check = find_check(header.provenance.checks, side.crystals.structures_hash)
    if check is not None:
        print(f"{weights}: structures were compared: {check.statement}")
    print(f"{weights}: by formula alone, {in_words(header, shared)}")
    if out is not None:
        _listed(side.crystals, shared).to_csv(out, index=False, lineterminator="\n")
        print(f"crystals that can be in it: {out}")
    return shared


def _listed(crystals: Collection, shared: np.ndarray) -> pd.DataFrame:
    """Return names and reduced formulas of some crystals."""
    names, numbers = crystals.material_ids, np.asarray(crystals.atomic_numbers)
    rows = np.flatnonzero(shared).tolist()
    found = []
    for row in rows:
        start, end = crystals.atom_offsets[row : row + 2].tolist()
        z, amounts = np.unique(numbers[start:end], return_counts=True)
        atoms = {symbols()[k]: n for k, n in zip(z, amounts.tolist(), strict=True)}
        found.append(Composition(atoms).reduced_formula)
    return pd.DataFrame({"dataset_id": [names[row] for row in rows], "formula": found})
