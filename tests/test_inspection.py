"""The output of `crysdistill inspect` for a store with known contents."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
from rich.console import Console

from crysdistill.cli import main
from crysdistill.corpus.build import build
from crysdistill.corpus.inspection import Inspection, Section, _sources, inspect
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, distances, make_batch
from crysdistill.store.store import Store
from crysdistill.structures.elements import atomic_numbers_by_symbol, symbols
from crysdistill.structures.symmetry import CRYSTAL_SYSTEMS
from crysdistill.studies.store_page import histogram, table_place, write_page
from tests.conftest import structures

GAPS = {"diamond": 5.4, "NaCl": 8.5, "TiO2": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight textbook structures, and one of them slightly distorted."""
    folder = tmp_path_factory.mktemp("inspection")
    entries = dict(structures())
    # Moved by 0.04 Å: P1 at the tight tolerance, unchanged at the loose one.
    entries["CsCl-bent"] = entries["CsCl"].copy()
    entries["CsCl-bent"].translate_sites([0], [0.008, 0.005, 0.003])
    lines = [
        json.dumps({"material_id": name, "structure": entry.as_dict()})
        for name, entry in entries.items()
    ]
    (folder / "structures.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = ["material_id,gap", *(f"{name},{gap}" for name, gap in GAPS.items())]
    (folder / "properties.csv").write_text("\n".join(table), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def path(folder):
    return made(folder / "structures.jsonl", folder / "store.h5")


@pytest.fixture(scope="module")
def inspection(path) -> Inspection:
    return inspect(path)


def made(source, out, **options):
    build(
        [source],
        out,
        graph=GraphSettings(cutoff=6.0),
        keep_unlabelled=True,
        workers=1,
        progress=False,
        **options,
    )
    return out


def rows(inspection: Inspection, title: str) -> dict[str, tuple[str, ...]]:
    (section,) = [s for s in inspection.sections if s.title == title]
    return {row[0]: row[1:] for row in section.rows}


def printed(inspection: Inspection, width: int = 100) -> str:
    text = io.StringIO()
    inspection.print(Console(file=text, width=width))
    return text.getvalue()


# ------------------------------------------------------------------------- the numbers


def test_the_store_as_a_whole(inspection, path):
    facts = inspection.facts
    # fcc and bcc have conventional cells of 4 and 2 atoms, NaCl 8, diamond 8, ...
    sizes = [len(entry) for entry in structures().values()] + [2]
    assert facts["crystals"] == "9"
    assert facts["atoms"] == str(sum(sizes))
    edges = int(Store.open(path).edge_offsets[-1])
    size = path.stat().st_size
    assert facts["edges"] == f"{edges:,}"
    assert facts["bytes"] == (
        f"{size:,} ({size / 9:,.0f} per crystal, {size / edges:.1f} per edge)"
    )
    assert facts["graph"] == "shells: cutoff 6 Å, max_neighbors 12"
    assert "symprec 0.01 and 0.1 Å, angle_tolerance 5°" in facts["symmetry"]
    assert facts["label noise"].startswith("11.1% of the crystals")  # CsCl-bent
    assert facts["without a space group"] == "0"
    assert facts["hash"] == Store.open(path).hash
    assert facts["integrity"] == "OK: every checksum matches"


def test_sources(inspection):
    ((source, numbers),) = rows(inspection, "Sources").items()
    assert source.endswith("structures.jsonl")
    assert numbers == ("9", "100.0%")


def test_elements(inspection):
    numbers = atomic_numbers_by_symbol()
    counts = inspection.element_counts
    found = {symbols()[z]: int(counts[z]) for z in np.flatnonzero(counts)}
    assert found == {
        **dict.fromkeys(("Cu", "Fe", "Na", "C", "Sr", "Mg"), 1),
        **{"Cl": 3, "Cs": 2, "Ti": 2, "O": 2},
    }
    assert counts.shape == (101,)
    assert counts[numbers["Cl"]] == 3
    shown = rows(inspection, "Elements")
    assert next(iter(shown)) == "Cl"
    atoms = int(inspection.facts["atoms"])
    assert shown["Cl"] == ("3", "33.3%", f"{(4 + 1 + 1) / atoms:.1%}")


def test_symmetry(inspection):
    systems = dict(zip(CRYSTAL_SYSTEMS, inspection.systems.tolist(), strict=True))
    assert systems == {
        **dict.fromkeys(CRYSTAL_SYSTEMS, 0),
        **{"cubic": 6, "tetragonal": 1, "hexagonal": 1, "triclinic": 1},
    }
    assert rows(inspection, "Crystal systems")["cubic"] == ("6", "66.7%")
    groups = rows(inspection, "Space groups")
    assert groups["Fm-3m (225)"] == ("2", "22.2%")  # Cu and NaCl
    assert groups["P42/mnm (136)"] == ("1", "11.1%")
    assert groups["P63/mmc (194)"] == ("1", "11.1%")


def test_sizes_agree_with_graphs_made_one_by_one(inspection):
    shown = rows(inspection, "Sizes")
    assert (shown["atoms per cell"][0], shown["atoms per cell"][-1]) == ("2", "8")
    entries = list(structures().values())
    volumes = [entry.volume / len(entry) for entry in entries]
    np.testing.assert_allclose(
        inspection.sizes["volume per atom (Å³)"][:8], volumes, rtol=1e-5
    )
    crystals = Store.open(inspection.store).crystals()
    shortest = [
        distances(make_batch([crystal], GraphSettings(cutoff=6.0))).min().item()
        for crystal in crystals
    ]
    found = inspection.sizes["shortest distance (Å)"]
    np.testing.assert_allclose(found, shortest, rtol=1e-5)
    assert found[0] == pytest.approx(3.61 / np.sqrt(2), rel=1e-5)  # fcc copper


def test_properties(inspection):
    assert rows(inspection, "Properties") == {
        "gap": ("3", "33.3%", "3", "5.4", "8.5"),
    }
    assert sorted(inspection.properties["gap"]) == sorted(GAPS.values())


def test_long_tables_are_summed_up():
    counts = {f"source {n}": 100 - n for n in range(30)}
    found = _sources(counts, sum(counts.values())).rows
    assert len(found) == 12
    assert found[0][:2] == ("source 0", "100")
    assert found[-1][:2] == ("19 others", f"{sum(range(71, 90)):,}")


def test_without_symmetry_or_labels(folder, tmp_path):
    source = folder / "structures.jsonl"
    found = inspect(made(source, tmp_path / "s.h5", symmetry=None, labels=False))
    assert found.facts["symmetry"] == "not searched for"
    assert "label noise" not in found.facts
    titles = [section.title for section in found.sections]
    assert titles == ["Sources", "Origins", "Sizes", "Elements"]
    text = write_page(found, tmp_path / "page.html").read_text()
    assert "Crystal systems" not in text


# ---------------------------------------------------------------- terminal and command


def test_what_is_printed(inspection):
    shown = printed(inspection, width=60)
    assert inspection.facts["hash"] in shown  # unbroken, so that users can copy it
    assert "Fm-3m (225)" in shown
    assert re.search(r"gap +3 +33.3%", shown)


def test_names_are_no_markup(inspection):
    odd = Section("Odd", ("name", "n"), [("[bold]x[/bold]", "1")])
    shown = printed(replace(inspection, facts={"store": "[red]s.h5"}, sections=[odd]))
    assert "[bold]x[/bold]" in shown
    assert "[red]s.h5" in shown


def test_command(path, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    assert main(["inspect", str(path), "-o", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "OK: every checksum matches" in shown
    assert shown.rstrip().endswith(str(page))
    assert page.exists()


def test_a_corrupted_store_is_named(path, tmp_path, capsys):
    copy = tmp_path / "corrupted.h5"
    copy.write_bytes(path.read_bytes())
    with h5py.File(copy, "r+") as file:
        file["structures/cells"][0, 0, 0] += 0.5
    page = tmp_path / "page.html"
    assert main(["inspect", str(copy), "-o", str(page)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: {copy}: `structures/cells` is corrupted (its checksum differs); "
        "build the store again or restore it from a copy\n"
    )
    assert not page.exists()


def test_a_folder_is_no_page(inspection, tmp_path):
    with pytest.raises(InputError, match="is a folder; give the name of an HTML file"):
        write_page(inspection, tmp_path)


# ---------------------------------------------------------------------------- the page


def test_the_page_holds_everything_and_needs_nothing(inspection, tmp_path):
    text = write_page(inspection, tmp_path / "page.html").read_text(encoding="utf-8")
    for fact in inspection.facts.values():
        assert fact in text
    for section in inspection.sections:
        assert f"<h2>{section.title}</h2>" in text
        assert all(cell in text for row in section.rows for cell in row)
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", text)
    assert all((a or b).startswith(("#", "data:")) for a, b in links)
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import", text)
    # sizes (4), elements, systems, one property
    assert text.count("<svg") == 7
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    # the heat map shows all elements, and counts those present
    assert all(f">{symbol}<" in text for symbol in symbols()[1:])
    again = write_page(inspection, tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("symbol", "row", "column"),
    [
        ("H", 0, 0), ("He", 0, 17), ("Li", 1, 0), ("Be", 1, 1), ("B", 1, 12),
        ("Ne", 1, 17), ("Al", 2, 12), ("K", 3, 0), ("Sc", 3, 2), ("Fe", 3, 7),
        ("Kr", 3, 17), ("Xe", 4, 17), ("Ba", 5, 1), ("La", 7.3, 2), ("Lu", 7.3, 16),
        ("Hf", 5, 3), ("Rn", 5, 17), ("Ra", 6, 1), ("Ac", 8.3, 2), ("Fm", 8.3, 13),
    ],
)  # fmt: skip
def test_the_periodic_table(symbol, row, column):
    number = atomic_numbers_by_symbol()[symbol]
    assert table_place(number) == pytest.approx((row, column))


def test_no_two_elements_share_a_place():
    places = {table_place(number) for number in range(1, 101)}
    assert len(places) == 100


@pytest.mark.parametrize(
    "values",
    [[1.0], [2.0, 2.0, 2.0], [1, 2, 200], [-1.5, 3.2], [0.001, 5.0, np.nan, np.inf]],
)
def test_any_values_make_a_histogram(values):
    assert "<svg" in histogram(np.array(values, float), "x_$y")
