"""The content of a store: its numbers as tables, and the columns for pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crysdistill.graphs.batch import distances
from crysdistill.store.checks import read_checks, statement
from crysdistill.store.origins import Origin, licence_remark
from crysdistill.store.store import Store
from crysdistill.structures.elements import MAX_ATOMIC_NUMBER, symbols
from crysdistill.structures.symmetry import CRYSTAL_SYSTEMS, crystal_system

_ABSENT = "–"
_CHUNK = 1024  # crystals whose edges are measured at once
_LONGEST = 12  # the most rows of a table whose length is open
_QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Section:
    """One table.

    Args:
        title: the subject of the table.
        columns: the names of the columns; the first holds text, the others numbers.
        rows: the cells as text, ready to show.
        note: a sentence below the table; "" for none.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Args:
        store: the file.
        facts: facts about the whole store, as text by name.
        sections: tables.
        element_counts: (101,) crystals that hold each element, by atomic number.
        sizes: the columns behind the table of sizes by name, (B,) each.
        systems: (7,) crystals of each of `CRYSTAL_SYSTEMS`.
        properties: known values by name.
    """

    store: Path
    facts: dict[str, str]
    sections: list[Section]
    element_counts: np.ndarray
    sizes: dict[str, np.ndarray]
    systems: np.ndarray
    properties: dict[str, np.ndarray]

    def print(self, console: Console | None = None) -> None:
        """Print the facts and tables."""
        console = console or Console(highlight=False)
        width = max(map(len, self.facts)) + 2
        for name, fact in self.facts.items():
            # A line break in a path or hash would keep users from copying it.
            line = Text.assemble((f"{name:{width}}", "bold"), fact)
            console.print(line, soft_wrap=True)
        for section in self.sections:
            console.print()
            console.print(_table(section))
            if section.note:
                console.print(Text(section.note, "dim"))


def inspect(path: str | Path) -> Inspection:
    """Check a store and describe its content.

    Args:
        path: the store.

    Raises:
        InputError: it cannot be read, or a checksum differs; then no number in it can
            be trusted, so none is given.
    """
    store = Store.open(path)
    store.verify()
    offsets = store.atom_offsets
    crystals = len(store)
    atoms = np.diff(offsets)  # (B,)
    volumes = np.abs(np.linalg.det(store.cells.astype(np.float64)))  # (B,)
    sizes = {
        "atoms per cell": atoms,
        "volume per atom (Å³)": volumes / atoms,
        "shortest distance (Å)": _shortest_distances(store),
        "edges per atom": np.diff(store.edge_offsets) / atoms,
    }
    groups = store.space_groups
    systems = crystal_system(groups[:, 0])  # (B,)
    counted = np.bincount(systems[systems >= 0], minlength=len(CRYSTAL_SYSTEMS))
    atoms_of = np.bincount(store.atomic_numbers, minlength=MAX_ATOMIC_NUMBER + 1)
    elements = _element_counts(offsets, store.atomic_numbers)
    columns = {name: store.property(name) for name in store.property_names}
    known = {name: values[~np.isnan(values)] for name, values in columns.items()}
    sections = [
        _sources(store.facts["sources"], crystals),
        _origins(store.origins),
        _sizes(sizes),
        _elements(elements, atoms_of, crystals),
    ]
    if groups.any():
        sections += [_systems(counted, crystals), _space_groups(groups[:, 0])]
    if known:
        sections.append(_properties(known, crystals))
    facts = _facts(store, groups)
    return Inspection(store.path, facts, sections, elements, sizes, counted, known)


def _facts(store: Store, groups: np.ndarray) -> dict[str, str]:
    """Return facts about the whole store."""
    crystals, size = len(store), store.path.stat().st_size
    atoms, edges = int(store.atom_offsets[-1]), int(store.edge_offsets[-1])
    each = f"{size / crystals:,.0f} per crystal, " if crystals else ""
    per_edge = f"{size / edges:.1f} per edge" if edges else "no edges"
    graph = store.graph
    facts = {
        "store": str(store.path),
        "crystals": f"{crystals:,}",
        "atoms": f"{atoms:,}",
        "edges": f"{edges:,}",
        "bytes": f"{size:,} ({each}{per_edge})",
        "graph": f"{graph.mode}: cutoff {graph.cutoff:g} Å, "
        f"max_neighbors {graph.max_neighbors}",
        "symmetry": "not searched for",
    }
    if groups.any():
        differ = np.mean((groups != groups[:, :1]).any(axis=1))
        missing = int(np.sum(groups[:, 0] == 0))
        facts["symmetry"] = _symmetry(**store.facts["symmetry"])
        facts["label noise"] = (
            f"{differ:.1%} of the crystals have another space group at the looser "
            "tolerance"
        )
        facts["without a space group"] = f"{missing:,}"
    if checks := read_checks(store.facts):
        facts["overlap"] = statement(checks)
    filters = {name: v for name, v in store.facts.get("filters", {}).items() if v}
    if filters:
        facts["filters"] = ", ".join(f"{name} {v}" for name, v in filters.items())
    facts["licence"] = licence_remark(store.licence)
    facts["made by"] = f"crysdistill {store.facts['version']}"
    facts["hash"] = store.hash
    facts["integrity"] = "OK: every checksum matches"
    return facts


def _symmetry(engine: str, symprec: list[float], angle_tolerance: float) -> str:
    tolerances = " and ".join(f"{tolerance:g}" for tolerance in symprec)
    return f"{engine}, symprec {tolerances} Å, angle_tolerance {angle_tolerance:g}°"


def _shortest_distances(store: Store) -> np.ndarray:
    """Return the length of the shortest edge of each crystal, (B,) in Å."""
    shortest = np.empty(len(store))
    for start in range(0, len(store), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(store)))
        lengths = distances(store.batch(rows)).numpy()  # (E,)
        # Edges are sorted by crystal, and a store refuses atoms without an edge.
        first = store.edge_offsets[rows] - store.edge_offsets[start]
        shortest[rows] = np.minimum.reduceat(lengths, first)
    return shortest


def _element_counts(offsets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the number of crystals that hold each element, (101,)."""
    crystal = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))  # (N,)
    kinds = MAX_ATOMIC_NUMBER + 1
    pairs = np.unique(crystal * kinds + numbers)
    return np.bincount(pairs % kinds, minlength=kinds)


def _sources(sources: Mapping[str, int], crystals: int) -> Section:
    counts = {str(name): count for name, count in sources.items()}
    rows = list(_ranked(counts, crystals))
    return Section("Sources", ("source", "crystals", "share"), rows)


def _sizes(sizes: Mapping[str, np.ndarray]) -> Section:
    rows = [
        (name, *(_quantile(values, share) for share in _QUANTILES.values()))
        for name, values in sizes.items()
    ]
    return Section("Sizes", ("", *_QUANTILES), rows)


def _elements(counts: np.ndarray, atoms: np.ndarray, crystals: int) -> Section:
    present = np.flatnonzero(counts)
    order = present[np.argsort(-counts[present], kind="stable")]
    rows = [
        (
            symbols()[z],
            f"{counts[z]:,}",
            f"{counts[z] / crystals:.1%}",
            f"{atoms[z] / atoms.sum():.1%}",
        )
        for z in order[:_LONGEST].tolist()
    ]
    columns = ("element", "crystals", "share", "share of atoms")
    note = f"{len(present)} elements in all" if len(present) > _LONGEST else ""
    return Section("Elements", columns, rows, note)


def _systems(counts: np.ndarray, crystals: int) -> Section:
    rows = [
        (name, f"{count:,}", f"{count / crystals:.1%}")
        for name, count in zip(CRYSTAL_SYSTEMS, counts.tolist(), strict=True)
    ]
    return Section("Crystal systems", ("system", "crystals", "share"), rows)


def _space_groups(groups: np.ndarray) -> Section:
    found, counts = np.unique(groups[groups > 0], return_counts=True)
    named = {
        f"{_space_group_name(number)} ({number})": count
        for number, count in zip(found.tolist(), counts.tolist(), strict=True)
    }
    rows = list(_ranked(named, len(groups)))
    return Section("Space groups", ("space group", "crystals", "share"), rows)


def _space_group_name(number: int) -> str:
    import gemmi

    name = gemmi.find_spacegroup_by_number(number).short_name()
    # gemmi names the hexagonal setting of rhombohedral groups: H-3m for R-3m.
    return name.replace("H", "R") if name.startswith("H") else name


def _properties(known: Mapping[str, np.ndarray], crystals: int) -> Section:
    rows = [
        (
            name,
            f"{len(values):,}",
            f"{len(values) / crystals if crystals else 0:.1%}",
            *(_quantile(values, share) for share in (0.0, 0.5, 1.0)),
        )
        for name, values in known.items()
    ]
    columns = ("property", "known", "share", "min", "median", "max")
    return Section("Properties", columns, rows)


def _origins(origins: Sequence[Origin]) -> Section:
    columns = ("origin", "licence", "retrieved", "query", "where")
    rows = [
        tuple(
            text or _ABSENT
            for text in (o.name, o.licence, o.retrieved, o.query, o.citation or o.url)
        )
        for o in origins
    ]
    return Section("Origins", columns, rows)


def _ranked(counts: Mapping[str, int], total: int) -> Iterator[tuple[str, ...]]:
    """Yield rows of the largest counts, and one that sums up the rest."""
    ordered = sorted(counts.items(), key=lambda entry: -entry[1])
    shown = ordered if len(ordered) <= _LONGEST else ordered[: _LONGEST - 1]
    rest = ordered[len(shown) :]
    if rest:
        shown = [*shown, (f"{len(rest):,} others", sum(count for _, count in rest))]
    for name, count in shown:
        yield name, f"{count:,}", f"{count / total:.1%}" if total else _ABSENT


def _quantile(values: np.ndarray, share: float) -> str:
    if not len(values):
        return _ABSENT
    return f"{np.quantile(values, share):.4g}"


def _table(section: Section) -> Table:
    """Return a table for the terminal; its text is never read as markup."""
    table = Table(
        title=section.title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        pad_edge=False,
    )
    for place, name in enumerate(section.columns):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*map(Text, row))
    return table
