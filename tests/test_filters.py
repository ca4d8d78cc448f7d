"""Filters: what they refuse, and that every refusal is counted."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from crysdistill.cli import main
from crysdistill.corpus.build import build
from crysdistill.corpus.filters import Filters, count_filtered
from crysdistill.errors import InputError
from crysdistill.graphs.neighbors import GraphSettings, find_neighbors
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from tests.conftest import from_structure, structures
from tests.toy_stores import write_lines

CRYSTALS = {name: from_structure(name, s) for name, s in structures().items()}
# 216 Å³ for one atom, and two atoms of hydrogen 0.74 Å apart.
SPARSE = Crystal("sparse", np.array([2], np.uint8), np.zeros((1, 3)), np.eye(3) * 6)
MOLECULE = Crystal(
    "H2",
    np.array([1, 1], np.uint8),
    np.array([[0, 0, 0], [0.185, 0, 0]]),
    np.eye(3) * 4,
)

CASES = {
    "max_atoms": (Filters(max_atoms=4), {"NaCl", "diamond", "SrTiO3", "TiO2"}),
    "max_volume": (Filters(max_volume=30.0), {"sparse", "H2", "CsCl"}),
    "min_distance": (Filters(min_distance=0.8), {"H2"}),
    "elements": (Filters(elements=("Cu", "Na", "Cl")), None),
    "without": (Filters(without=("O", "C")), {"SrTiO3", "TiO2", "diamond"}),
}


def everything() -> list[Crystal]:
    return [*CRYSTALS.values(), SPARSE, MOLECULE]


def refused(filters: Filters) -> dict[str, str]:
    found = {}
    for crystal in everything():
        graph = find_neighbors(crystal.frac_coords, crystal.cell, GraphSettings())
        reason = filters.before_graph(crystal) or filters.after_graph(graph)
        if reason:
            found[crystal.material_id] = reason
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_each_refuses(name):
    filters, names = CASES[name]
    if names is None:
        names = {c.material_id for c in everything()} - {"fcc-Cu", "NaCl"}
    found = refused(filters)
    assert set(found) == names
    assert count_filtered(found.values()) == {name: len(names)}
    assert refused(Filters()) == {}


def test_the_reasons():
    assert refused(Filters(max_volume=100))["sparse"] == (
        "filtered: 216.0 Å³ per atom, more than `max_volume` 100"
    )
    assert refused(Filters(min_distance=1))["H2"] == (
        "filtered: two atoms 0.74 Å apart, less than `min_distance` 1"
    )
    assert refused(Filters(elements=("Sr", "Ti")))["SrTiO3"] == (
        "filtered: O is not in `elements`"
    )
    assert refused(Filters(without=("Ti",)))["TiO2"] == "filtered: Ti is in `without`"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_atoms": 0}, "`max_atoms` is 0 but must be positive"),
        ({"max_volume": -1.0}, "`max_volume` is -1.0 but must be positive"),
        ({"min_distance": float("nan")}, "`min_distance` is nan but must be positive"),
        ({"elements": ("Si", "si")}, "`si` is no element; did you mean `Si`?"),
        ({"without": ("Xx",)}, "`Xx` is no element"),
    ],
)
def test_bad_limits(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Filters(**settings)


def test_a_build_lists_and_counts_what_it_filters(tmp_path, capsys):
    source = write_lines(tmp_path / "s.jsonl", everything())
    out = tmp_path / "s.h5"
    options = "--max-volume 30 --without O,C --no-symmetry --workers 1 --no-progress"
    assert main(f"build {source} -o {out} {options}".split()) == 0
    shown = capsys.readouterr().out
    assert "4 of 10 crystals" in shown
    assert "6 refused" in shown
    assert "3 of them by `max_volume`" in shown
    assert "3 of them by `without`" in shown
    assert Store.open(out).facts["filters"]["max_volume"] == 30.0
    with (tmp_path / "s.h5.quarantine.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6
    report = build([source], tmp_path / "t.h5", symmetry=None, progress=False)
    assert report.filtered == {}
