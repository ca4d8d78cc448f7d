"""Groups of similar crystals that a split keeps together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from crysdistill.errors import InputError, did_you_mean
from crysdistill.overlap.facts import Collection
from crysdistill.splits.prototypes import prototype_names
from crysdistill.structures.crystal import reduced_formula
from crysdistill.structures.elements import (
    atomic_numbers_by_symbol,
    element_table,
    symbols,
)
from crysdistill.structures.symmetry import CRYSTAL_SYSTEMS, crystal_system

CLUSTERS = 10
"""The default number of clusters."""


@dataclass(frozen=True)
class Groups:
    """The group of each of some rows.

    Args:
        by: the property that members of a group share, one of `GROUPINGS`.
        rows: (B,) rows of a store.
        names: (B,) the name of the group of each.
    """

    by: str
    rows: np.ndarray
    names: Sequence[str]

    @property
    def word(self) -> str:
        """The word for a group."""
        return self.by.replace("_", " ")

    @property
    def plural(self) -> str:
        """The word for several groups."""
        return f"{self.word}s"

    def of(self, rows: np.ndarray) -> Groups:
        """Return the groups of some of the rows, in the order of `rows`."""
        return Groups(self.by, rows, [self.name_of[row] for row in rows.tolist()])

    @cached_property
    def name_of(self) -> dict[int, str]:
        """The name of the group by row."""
        return dict(zip(self.rows.tolist(), self.names, strict=True))


def find_groups(
    crystals: Collection, rows: np.ndarray, by: str, clusters: int = CLUSTERS
) -> Groups:
    """Find the groups of some crystals.

    - `formula`: the same reduced formula.
    - `prototype`: the same structure type, or the same crystal; see `prototypes.py`.
    - `cluster`: alike in composition and density; see `cluster_names`.
    - `crystal_system`, `space_group`: those of the store, at its tighter tolerance.

    The groups depend on the crystals only, not on the order of the rows.

    Args:
        crystals: a store.
        rows: the rows of the crystals.
        by: one of `GROUPINGS`.
        clusters: the number of clusters, if `by` is `cluster`.

    Raises:
        InputError: `by` is unknown, or the store lacks the data for it.
    """
    if by not in GROUPINGS:
        raise InputError(
            f"no groups by `{by}`{did_you_mean(by, GROUPINGS)}; there are: "
            f"{', '.join(GROUPINGS)}"
        )
    names = partial(cluster_names, clusters=clusters) if by == "cluster" else None
    return Groups(by, rows, (names or GROUPINGS[by])(crystals, rows))


def with_elements(
    crystals: Collection, rows: np.ndarray, elements: Sequence[str]
) -> np.ndarray:
    """Return the rows whose crystals hold at least one of some elements.

    Args:
        crystals: a store.
        rows: the rows to choose from.
        elements: symbols.

    Raises:
        InputError: a symbol is not an element, or no crystal holds it.
    """
    numbers = atomic_numbers_by_symbol()
    holds = _counts(crystals, rows) > 0  # (B, 101)
    found = np.zeros(len(rows), bool)
    for symbol in elements:
        if symbol not in numbers:
            raise InputError(
                f"`split.elements` names {symbol!r}, which is not an element"
                f"{did_you_mean(symbol, numbers)}"
            )
        column = holds[:, numbers[symbol]]
        if not column.any():
            raise InputError(
                f"`split.elements` names {symbol}, but no crystal of the dataset "
                "holds it; leave it out"
            )
        found |= column
    return rows[found]


# ------------------------------------------------------------------------------- kinds


def formula_names(crystals: Collection, rows: np.ndarray) -> list[str]:
    """Return the reduced formula of each crystal."""
    start = crystals.atom_offsets
    numbers = crystals.atomic_numbers
    return [reduced_formula(numbers[start[r] : start[r + 1]]) for r in rows.tolist()]


def crystal_system_names(crystals: Collection, rows: np.ndarray) -> list[str]:
    """Return the crystal system of each crystal."""
    systems = crystal_system(_space_groups(crystals, rows))
    names = (*CRYSTAL_SYSTEMS, "not known")  # at -1
    return [names[system] for system in systems.tolist()]


def space_group_names(crystals: Collection, rows: np.ndarray) -> list[str]:
    """Return the number of the space group of each crystal."""
    groups = _space_groups(crystals, rows)
    return [str(group) if group else "not known" for group in groups.tolist()]


def cluster_names(
    crystals: Collection, rows: np.ndarray, clusters: int = CLUSTERS
) -> list[str]:
    """Return the cluster of each crystal, numbered from the largest on.

    k-means on the mean element vector of the atoms (`cgcnn92`) and the logarithm of
    the volume per atom. Leaving out whole clusters tests extrapolation: B. Meredig et
    al. (2018), Mol. Syst. Des. Eng. 3, 819-825, doi:10.1039/C8ME00012C.

    Args:
        crystals: a store.
        rows: the rows of the crystals.
        clusters: the number of clusters.

    Raises:
        InputError: there are fewer different crystals than clusters.
    """
    from sklearn.cluster import KMeans

    names = [crystals.material_ids[row] for row in rows.tolist()]
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    features = _features(crystals, rows[order])  # k-means depends on their order
    different = len(np.unique(features, axis=0))
    if not 2 <= clusters <= different:
        raise InputError(
            f"`split.clusters` is {clusters} but must be between 2 and {different}, "
            "the number of crystals that differ in composition or density"
        )
    found = KMeans(clusters, n_init=4, random_state=0).fit_predict(features)
    sizes = np.bincount(found, minlength=clusters)
    # Among equal sizes, the cluster with the first name comes first.
    firsts = np.array([np.argmax(found == number) for number in range(clusters)])
    ranks = np.empty(clusters, np.int64)
    ranks[np.lexsort((firsts, -sizes))] = np.arange(clusters)
    labels = np.empty(len(rows), np.int64)
    labels[order] = ranks[found]
    return [f"{rank:03d}" for rank in labels.tolist()]


GROUPINGS: dict[str, Callable[[Collection, np.ndarray], list[str]]] = {
    "formula": formula_names,
    "prototype": prototype_names,
    "cluster": cluster_names,
    "crystal_system": crystal_system_names,
    "space_group": space_group_names,
}
"""Ways to name the group of each crystal."""


def _space_groups(crystals: Collection, rows: np.ndarray) -> np.ndarray:
    """Return space groups at the tighter tolerance, (B,), 0 if not known."""
    known = np.asarray(crystals.space_groups)
    if not known.size or not known[rows].any():
        raise InputError(
            "the store has no space groups; build it again without `--no-symmetry`"
        )
    return known[rows, 0]


def _features(crystals: Collection, rows: np.ndarray) -> np.ndarray:
    """Return the features that `cluster_names` compares, (B, 93)."""
    counts = _counts(crystals, rows)
    atoms = counts.sum(axis=1, keepdims=True)
    elements = counts / atoms @ element_table("cgcnn92")  # (B, 92)
    cells = np.asarray(crystals.cells, np.float64)[rows]
    volumes = np.abs(np.linalg.det(cells))[:, None] / atoms
    return np.concatenate([elements, np.log(volumes)], axis=1)


def _counts(crystals: Collection, rows: np.ndarray) -> np.ndarray:
    """Return the atoms of each element of each crystal, (B, 101) float64."""
    start = crystals.atom_offsets
    width = len(symbols())
    return np.array(
        [
            np.bincount(
                crystals.atomic_numbers[start[r] : start[r + 1]], minlength=width
            )
            for r in rows.tolist()
        ],
        np.float64,
    ).reshape(-1, width)
