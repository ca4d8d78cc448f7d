"""Finding which crystals of a corpus are also in one dataset or in several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from crysdistill.errors import InputError
from crysdistill.overlap.facts import Collection
from crysdistill.overlap.identities import told_apart
from crysdistill.overlap.report import Overlap, check_kinds
from crysdistill.overlap.search import KINDS, search
from crysdistill.workers import check_engine


def find_overlap(
    corpus: Collection,
    dataset: Collection,
    *,
    kinds: Iterable[str] = KINDS,
    pairs_per_entry: int = 1000,
    workers: int | None = None,
    cluster: str | None = None,
    progress: bool = False,
) -> Overlap:
    """Find which crystals of a corpus are also in a dataset.

    Each pair has the strongest kind that holds:

    - `id`: the same `material_id`.
    - `structure`: the same crystal. Same reduced formula, volumes per atom within
      20 %, and pymatgen's StructureMatcher pairs the atoms; supercells, primitive and
      conventional cells, shuffled atoms, other origins, rotated, mirrored and strained
      cells are the same. If the space groups differ at both tolerances and neither
      crystal is P1 (displaced atoms lead to P1), only a homogeneous strain may separate
      them: displacive polymorphs are not merged.
    - `prototype`: the same structure type with other elements in it (or with elements
      exchanged). Same anonymised formula, same space group at one of the tolerances and
      similar fingerprints; or almost equal fingerprints, whatever the symmetry. If that
      proves little, an anonymous match by the StructureMatcher is needed too: without a
      common group, in triclinic groups, and within one reduced formula.
    - `formula`: the same reduced formula.

    The result does not depend on the number of workers, where they are, or the order
    of the rows.

    Args:
        corpus: the unlabelled crystals.
        dataset: the labelled ones.
        kinds: the kinds to look for; skipping `prototype` at least halves the time.
        pairs_per_entry: list at most this many pairs of a kind per dataset entry, the
            nearest; all are counted. Every rock salt is a prototype of every other.
        workers: processes; if None, all cores for a large task, else only this one.
        cluster: Dask workers instead: `local:N`, `tcp://HOST:PORT` or a scheduler file
            of a running scheduler, or `slurm:FILE.yaml`; see `engine`.
        progress: whether to show a progress bar.

    Raises:
        InputError: a setting is out of range, or one side is empty.
    """
    [overlap] = find_overlaps(
        corpus,
        {"": dataset},
        kinds=kinds,
        pairs_per_entry=pairs_per_entry,
        workers=workers,
        cluster=cluster,
        progress=progress,
    )
    return overlap


def find_overlaps(
    corpus: Collection,
    datasets: Mapping[str, Collection] | Sequence[tuple[str, Collection]],
    *,
    kinds: Iterable[str] = KINDS,
    pairs_per_entry: int = 1000,
    workers: int | None = None,
    cluster: str | None = None,
    progress: bool = False,
) -> list[Overlap]:
    """Find which crystals of a corpus are also in datasets, in one search for all.

    Args:
        corpus: the unlabelled crystals.
        datasets: the labelled ones under the names that the progress bar shows.
        kinds: as in `find_overlap`, like all that follows.
        pairs_per_entry: see there.
        workers: see there.
        cluster: see there.
        progress: whether to show a progress bar.

    Returns:
        One overlap for each dataset.

    Raises:
        InputError: a setting is out of range, or one side is empty.
    """
    named = list(datasets.items() if isinstance(datasets, Mapping) else datasets)
    wanted = check_kinds(kinds)
    if pairs_per_entry < 1:
        raise InputError(
            f"`pairs_per_entry` is {pairs_per_entry} but must be at least 1"
        )
    check_engine(workers, cluster)
    if not len(corpus):
        raise InputError("the corpus holds no crystals; nothing can be compared")
    for _, side in named:
        if not len(side):
            raise InputError("the dataset holds no crystals; nothing can be compared")
    if not named:
        return []
    first, _ = told_apart(corpus, corpus)
    sides = [
        first if side is corpus else told_apart(corpus, side)[1] for _, side in named
    ]
    names = [name for name, _ in named]
    found = search(
        first, sides, names, wanted, pairs_per_entry, workers, cluster, progress
    )
    return [
        Overlap(
            corpus.material_ids,
            side.material_ids,
            (corpus.structures_hash, side.structures_hash),
            of_set,
            wanted,
            pairs_per_entry,
        )
        for (_, side), of_set in zip(named, found, strict=True)
    ]
