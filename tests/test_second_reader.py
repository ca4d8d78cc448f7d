"""CIF: two other readers check ours on real files and on 2,000 mutated ones.

They are pymatgen and gemmi's own reader of small structures. The latter shares only the
parser and the tables of groups with ours. Two readers must never find different
crystals in a file, unless the reason is written down here.
"""

from __future__ import annotations

import random
import re
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import gemmi
import pytest
from pymatgen.core import Composition
from pymatgen.io.cif import CifParser, CifWriter

from crysdistill.errors import BadStructure
from crysdistill.sources.records import Record, parse
from crysdistill.structures.crystal import Crystal

from .test_cif import PROTOTYPES
from .test_cif_statements import CENTRINGS, FM3M, NACL, SPINEL, cell, listed, sites

HYDRATE = """data_hydrate
_cell_length_a 6.10(2)
_cell_length_b 7.20(2)
_cell_length_c 5.300(10)
_cell_angle_alpha 90
_cell_angle_beta 101.30(5)
_cell_angle_gamma 90
_cell_volume 228.3(9)
_cell_formula_units_Z 4
_chemical_formula_sum 'C H2 Ca O4'
_symmetry_space_group_name_H-M 'P 1 21/c 1'
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x, y, z'
2 '-x, y+1/2, -z+1/2'
3 '-x, -y, -z'
4 'x, -y+1/2, z+1/2'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
_atom_site_symmetry_multiplicity
Ca1 0.2500(3) 0.1000(2) 0.2000(3) 1 4
C1 0.600(1) 0.200(1) 0.400(1) 1 4
O1 0.500(1) 0.050(1) 0.420(1) 1 4
O2 0.780(1) 0.210(1) 0.360(1) 1 4
O3 0.530(1) 0.350(1) 0.450(1) 1 4
O4 0.100(1) 0.350(1) 0.050(1) 1 4
H1 0.20(2) 0.41(2) 0.06(2) 1 4
H2 0.01(2) 0.42(2) 0.11(2) 1 4
"""
CORUNDUM = """data_corundum
_cell_length_a 4.7602
_cell_length_b 4.7602
_cell_length_c 12.9933
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 120
_space_group_name_H-M_alt 'R -3 c'
_space_group_IT_number 167
_chemical_formula_sum 'Al2 O3'
_cell_formula_units_Z 6
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_Wyckoff_symbol
_atom_site_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Al1 Al3+ c 12 0 0 0.35216
O1 O2- e 18 0.30624 0 0.25
"""
DOTTED = re.sub(r"(_cell|_atom_site|_symmetry)_", r"\1.", cell() + FM3M + NACL)
SEEDS = (
    HYDRATE,
    CORUNDUM,
    cell() + FM3M + NACL,
    DOTTED,
    cell() + listed("_space_group_symop_operation_xyz", CENTRINGS) + NACL,
    cell() + listed("_space_group_symop.magn_operation_xyz", CENTRINGS) + NACL,
    cell(8.08) + "_symmetry_space_group_name_H-M 'F d -3 m:2'\n" + SPINEL[2],
    cell(8.08)
    + "_symmetry_space_group_name_H-M 'F d -3 m'\n"
    + "_space_group_IT_coordinate_system_code 1\n"
    + SPINEL[1],
    str(CifWriter(PROTOTYPES["quartz"], symprec=0.01)),
    str(CifWriter(PROTOTYPES["GdFeO3"], symprec=0.01)),
    str(CifWriter(PROTOTYPES["monoclinic"])),
    "data_global\n_a 1\n" + cell(name="t") + sites("? ? ? ? ?") + CORUNDUM,
)  # fmt: skip
VALUES = (
    *("?", ".", "0", "1", "0.5", "-0.25", "0.25(3)", "1/2", "4", "8", "abc", "''"),
    *("'F m -3 m'", "'P 1'", "'P n m a'", "Cl", "O2-", "H", "D", "Xx", "nan", "1e9"),
    *("'x, y, z'", "'-x, -y, -z'", "'x+1/2, y, z'", "225", "1", ";", "loop_", "90.0"),
)
TAGS = (
    "_symmetry_space_group_name_H-M",
    "_space_group_name_Hall",
    "_symmetry_Int_Tables_number",
    "_space_group_symop_operation_xyz",
    "_atom_site_occupancy",
    "_atom_site_disorder_group",
    "_atom_site_type_symbol",
    "_atom_site_symmetry_multiplicity",
    "_cell_formula_units_Z",
    "_chemical_formula_sum",
    "_nothing",
)
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32")


KINDS = (
    *("value", "value", "value", "digit", "digit", "digit", "uncertainty", "tag"),
    *("delete", "line", "repeat", "swap", "cut", "case", "loop"),
)


def mutated(text: str, rng: random.Random) -> str:
    """Change one or two words, lines, tags or loops of a CIF."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        lines = text.split("\n")
        tags = [n for n, line in enumerate(lines) if line.strip().startswith("_")]
        rows = [n for n in range(len(lines)) if n not in tags and len(lines[n]) > 6]
        row = rng.randrange(len(lines))
        what = rng.choice(KINDS)
        if not rows or not tags:  # an earlier cut removed them
            continue
        if what == "value":  # of a pair, a row of atoms or an operation
            row = rng.choice(tags + rows)
            words = re.findall(r"'[^']*'|\S+", lines[row])
            place = rng.randrange(
                1 if row in tags and len(words) > 1 else 0, len(words)
            )
            words[place] = rng.choice(VALUES)
            lines[row] = " ".join(words)
        elif what == "digit":
            lines[row] = re.sub(
                r"\d", lambda m: rng.choice((*"15", *m[0] * 6)), lines[row]
            )
        elif what == "uncertainty":
            lines[row] = re.sub(r"(\.\d+)\b(?!\()", r"\1(7)", lines[row])
        elif what == "tag":
            row = rng.choice(tags)
            tag = lines[row].split()[0]
            lines[row] = lines[row].replace(tag, rng.choice(TAGS), 1)
        elif what == "delete":
            del lines[rng.choice(rows)]
        elif what == "line":
            del lines[row]
        elif what == "repeat":
            row = rng.choice(rows)
            lines.insert(row, lines[row])
        elif what == "swap":
            row, other = rng.choice(rows), rng.choice(rows)
            lines[row], lines[other] = lines[other], lines[row]
        elif what == "cut":
            lines = [*lines[:row], lines[row][: rng.randint(0, len(lines[row]))]]
        elif what == "case":
            lines[row] = lines[row].swapcase()
        else:
            loops = [n for n, line in enumerate(lines) if line == "loop_"]
            lines += lines[rng.choice(loops) :] if loops else []
        text = "\n".join(lines)
    return text


Summary = tuple[str, int, float]
"""Reduced formula, number of atoms, volume of the cell."""


def by_pymatgen(text: str) -> Summary | None:
    """Return what pymatgen reads; None if it stops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = CifParser.from_str(text).parse_structures(primitive=False)[0]
            amounts = found.composition.element_composition
            return _formula(amounts), round(sum(amounts.values())), found.volume
        except Exception:
            return None


def by_gemmi(text: str) -> Summary | None:
    """Return what gemmi reads in the first block with atoms; None if it stops."""
    try:
        for block in gemmi.cif.read_string(text):
            found = gemmi.make_small_structure_from_block(block)
            atoms = Counter(
                site.element.name for site in found.get_all_unit_cell_sites()
            )
            if atoms and set(atoms) != {"X"}:
                return (
                    _formula(Composition(atoms)),
                    sum(atoms.values()),
                    found.cell.volume,
                )
    except Exception:
        return None
    return None


def _formula(amounts: Composition) -> str:
    """Return a reduced formula in which deuterium is hydrogen."""
    merged: Counter[str] = Counter()
    for element, amount in amounts.items():
        merged["H" if str(element) == "D" else str(element)] += round(amount)
    return Composition(merged).reduced_formula


def summary(crystal: Crystal) -> Summary:
    return crystal.formula, len(crystal.atomic_numbers), crystal.volume


def same(one: Summary, other: Summary) -> bool:
    return one[:2] == other[:2] and abs(one[2] / other[2] - 1) < 1e-6


# Cases where two readers differ and ours is right: the wrong reader, the reason, and a
# pattern that the text must contain.
EXPLAINED = (
    ("both", "magnetic operations are not known: P1", r"(?i)symop.magn_operation"),
    ("gemmi", "a symbol without origin: always the second", r"F d -3 m'"),
    ("gemmi", "a number alone is not known: P1", r"(?i)number\s+\d"),
    ("gemmi", "elements are not read from labels: X", r"(?m)^\S+ [.?] "),
    ("pymatgen", "elements are not read from labels: no atom", r"(?m)^\S+ [.?] "),
    ("pymatgen", "`:2` is not known: P1", r"F d -3 m:2"),
    ("pymatgen", "tags in capitals are not known", r"(?m)^\s*_[A-Z_]{5}"),
)


def explanation(text: str, reader: str, ours: Summary, theirs: Summary) -> str | None:
    """Return why a reader differs; None if no reason is known."""
    stated = re.search(r"_chemical_formula_sum\s+'([A-Za-z0-9 ]+)'", text)
    if stated:
        formula = Composition(stated[1].replace(" ", "")).reduced_formula
        if ours[0] == formula != theirs[0]:
            return f"{reader}: the formula of the file agrees with us alone"
    for who, why, what in EXPLAINED:
        if who in ("both", reader) and re.search(what, text):
            return f"{reader}: {why}"
    return None


# Known differences in the shared files.
FOREIGN = {
    "magnetic_older_tags.cif": "gemmi: magnetic operations are not known",
    "origin_code_2.cif": "pymatgen: the coordinate system code is not known",
    "POSCAR_NaCl.cif": "pymatgen: `_space_group_name_h-m_alt` is another tag",
    "utf16.cif": "pymatgen: the same",
}


@pytest.mark.slow
def test_two_thousand_mutations():
    rng = random.Random(14)
    counts: Counter[str] = Counter()
    reasons, unexplained = [], []
    for number in range(2000):
        text = mutated(SEEDS[number % len(SEEDS)], rng)
        encoding = ENCODINGS[number // 20 % 4] if number % 20 == 0 else "utf-8"
        try:
            ours = summary(parse(Record("a.cif", "x", "cif", text.encode(encoding))))
        except BadStructure as error:
            reasons.append(str(error))
            continue
        counts["read"] += 1
        others = {"gemmi": by_gemmi(text)}
        # pymatgen is slow for groups of 192 operations.
        if number % 10 == 0 or not re.search("F [dm] -3 m", text):
            others["pymatgen"] = by_pymatgen(text)
        for reader, theirs in others.items():
            if theirs is None:
                counts[f"{reader} stops"] += 1
            elif same(ours, theirs):
                counts[f"{reader} agrees"] += 1
            elif (why := explanation(text, reader, ours, theirs)) is not None:
                counts[why] += 1
            else:
                unexplained.append((reader, ours, theirs, text))
    assert not unexplained, unexplained[0]
    assert counts["read"] + len(reasons) == 2000
    assert not [r for r in reasons if "\n" in r or "cannot be read as cif" in r]
    assert counts["gemmi agrees"] > 400
    assert counts["pymatgen agrees"] > 400


@pytest.mark.slow
def test_all_shared_files(shared_data):
    """Every CIF of the shared folders and archives is read alike."""
    files = {str(p): p.read_bytes() for p in sorted(Path(shared_data).rglob("*.cif"))}
    for archive in ("cgcnn_folder/cgcnn_folder.zip", "cgcnn_published/structures.zip"):
        with zipfile.ZipFile(shared_data / archive) as packed:
            files |= {
                name: packed.read(name)
                for name in packed.namelist()
                if name.endswith(".cif")
            }
    assert len(files) > 1100
    for number, (name, data) in enumerate(files.items()):
        try:
            ours = summary(parse(Record(name, "x", "cif", data)))
        except BadStructure:
            assert "field_reports" in name
            continue
        text = data.decode("utf-16" if data[:1] == b"\xff" else "utf-8")
        others = [by_gemmi(text)]
        if number % 3 == 0 or "field_reports" in name:  # pymatgen is slow
            others.append(by_pymatgen(text))
        for theirs in others:
            agrees = theirs is None or same(ours, theirs)
            assert agrees or Path(name).name in FOREIGN, name
