"""Structure files from the field reports, and similar files."""

from __future__ import annotations

from pathlib import Path

import pytest

from crysdistill.errors import BadStructure
from crysdistill.sources.opening import open_source
from crysdistill.sources.records import parse
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.symmetry import space_group

from .test_cif_statements import FM3M, NACL, cell, shortest, sites


def outcome(path: Path) -> tuple[dict[str, Crystal], dict[str, str]]:
    """Read a source as `build` does: crystals and reasons, by id."""
    good, bad = {}, {}
    for record in open_source(path).records():
        try:
            crystal = parse(record)
        except BadStructure as error:
            bad[record.material_id] = str(error)
        else:
            good[crystal.material_id] = crystal
    assert not any("\n" in reason for reason in bad.values())
    return good, bad


@pytest.mark.parametrize(
    ("name", "formula", "atoms", "volume", "group", "distance"),
    [
        ("magnetic_older_tags.cif", "NiO", 8, 72.5, 225, 2.085),
        ("origin_code_2.cif", "MgAl2O4", 56, 527.5, 227, 1.92),
        ("negative_scale_cartesian.vasp", "CsCl", 2, 69.9, 99, 3.347),
        ("three_scale_factors.vasp", "CsCl", 2, 162.0, None, None),
        ("placeholder_blocks.cif", "CsCl", 2, 69.9, 221, None),
        ("cif_named_poscar/POSCAR_NaCl.cif", "NaCl", 8, 179.4, 225, 2.82),
        ("utf16.cif", "NaCl", 8, 179.4, 225, 2.82),
    ],
)
def test_field_reports_that_are_read(
    shared_data, name, formula, atoms, volume, group, distance
):
    path = shared_data / "field_reports" / name
    good, bad = outcome(path)
    assert not bad
    assert list(good) == [path.stem]
    crystal = good[path.stem]
    assert (crystal.formula, len(crystal.atomic_numbers)) == (formula, atoms)
    assert crystal.volume == pytest.approx(volume, abs=0.06)
    if group is not None:
        assert space_group(crystal, 0.01) == group
    if distance is not None:
        assert shortest(crystal) == pytest.approx(distance, abs=0.005)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "multiplicity_without_symmetry.cif",
            "site Na1 has `_atom_site_symmetry_multiplicity` 4, but its symmetry (1 "
            "operation) makes 1 atom of it; complete the symmetry or mend the number",
        ),
        (
            "two_atom_loops.cif",
            "data_x has 2 loops of atoms, of 1 and 1 rows; put all atoms into one loop",
        ),
        (
            "water_called_w.cif",
            "site W has no type symbol, and its label means W, which the formula (Ca C "
            "H2 O4) lacks; add `_atom_site_type_symbol`",
        ),
        (
            "disorder_groups.cif",
            "site O1A is disordered (disorder groups 1 and 2); use an ordered "
            "approximant, with one atom on every site",
        ),
        (
            "cif2.cif",
            "CIF 2.0 syntax at line 9 (a list, a table or triple quotes), which is not "
            "read; write it as CIF 1.1",
        ),
        (
            "nothing_built.cif",
            "site Cl1 is disordered (occupancy 0.5); use an ordered approximant, with "
            "one atom on every site",
        ),
    ],
)
def test_field_reports_that_are_refused(shared_data, name, reason):
    good, bad = outcome(shared_data / "field_reports" / name)
    assert not good
    assert list(bad.values()) == [reason]


def test_placeholders_beside_labels(shared_data):
    source = open_source(shared_data / "field_reports" / "placeholder_blocks_labelled")
    read = [parse(record) for record in source.records()]
    assert {c.material_id: c.properties["target"] for c in read} == {
        "sd_0": 1.0,
        "sd_1": 2.0,
        "sd_2": 3.0,
    }
    assert [len(c.atomic_numbers) for c in read] == [2, 2, 2]


POSCAR = """CsCl
1.0
4.12 0 0
0 4.12 0
0 0 4.12
Cs Cl
1 1
Direct
0 0 0
0.5 0.5 0.5
"""


@pytest.mark.parametrize(
    ("name", "content", "known"),
    [
        ("POSCAR_NaCl.cif", cell() + FM3M + NACL, "POSCAR_NaCl"),
        ("CONTCAR-1.cif", cell() + FM3M + NACL, "CONTCAR-1"),
        ("POSCAR_NaCl", cell() + FM3M + NACL, "POSCAR_NaCl"),
        ("x.vasp", cell() + FM3M + NACL, "x"),
        ("x.cif", POSCAR, "x"),
        ("POSCAR_x.vasp", POSCAR, "POSCAR_x"),
        ("POSCAR.1", POSCAR, "POSCAR.1"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_content_before_file_name(tmp_path, name, content, known, encoding):
    (tmp_path / name).write_text(content, encoding)
    for path in (tmp_path / name, tmp_path):
        good, bad = outcome(path)
        assert not bad
        assert list(good) == [known]
        atoms = 2 if content is POSCAR else 8
        assert len(good[known].atomic_numbers) == atoms


def test_frames_and_tables_named_like_a_poscar(tmp_path):
    (tmp_path / "POSCAR_x.xyz").write_text(
        '2\nLattice="4 0 0 0 4 0 0 0 4"\nCs 0 0 0\nCl 2 2 2\n'
    )
    good, bad = outcome(tmp_path)
    assert not bad
    assert [c.formula for c in good.values()] == ["CsCl"]


def test_a_cell_without_atoms_has_a_row_and_the_crystal_keeps_its_name(tmp_path):
    template = cell(name="template") + sites("? ? ? ? ?")
    text = template + cell(name="a") + FM3M + NACL + cell(name="b") + FM3M
    (tmp_path / "mp-1.cif").write_text(text)
    (tmp_path / "id_prop.csv").write_text("mp-1,1.5\n")
    good, bad = outcome(tmp_path)
    assert {name: c.properties["target"] for name, c in good.items()} == {"mp-1": 1.5}
    assert bad == {
        "mp-1-2": "mp-1.cif, data_b: has a cell but no atoms (`_atom_site_fract_x`); "
        "add them or remove the block"
    }


# ------------------------------------------------------------------------------ XYZ

XYZ = '2\nLattice="4.1 0 0 0 4.1 0 0 0 4.1" energy=-1.5\nCs 0 0 0\nCl 2.05 2.05 2.05\n'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("4.1 0 0 0", "4.1D0 0.0D+00 0d0 0"),
        ("2.05 2.05", "2.05D+00 0.205d1"),
        ("-1.5", "-1.5D0"),
        ("2\n", "\ufeff2\n"),
        ("4.1\"", "4.1\" pbc=\"T T T\""),
    ],
)  # fmt: skip
def test_xyz_as_programs_write_it(tmp_path, old, new):
    (tmp_path / "a.xyz").write_text(XYZ.replace(old, new, 1), "utf-8")
    good, bad = outcome(tmp_path / "a.xyz")
    assert not bad
    assert good["a"].volume == pytest.approx(68.921)
    assert good["a"].frac_coords[1].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert dict(good["a"].properties) == {"energy": -1.5}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            'Lattice="4.1 0 0 0 4.1 0 0 0 4.1" ',
            "",
            "no cell; add its three vectors, or leave molecules out (`Lattice` in the "
            "second line of a frame)",
        ),
        (
            "energy",
            'pbc="T T F" energy',
            "periodic in 2 of 3 directions (pbc = T T F); only crystals are read, set "
            "`pbc` if it is one",
        ),
        (
            "Cl 2.05 2.05 2.05\n",
            "Cl 2.05 2.05 2.05\nCl 1 1 1\n",
            "has more atoms than its first line counts (line 5 is `Cl 1 1 1`); mend "
            "either",
        ),
        ("2\n", "3\n", "ends early, in the frame at line 1; get the file again"),
    ],
)
def test_xyz_that_is_no_crystal(tmp_path, old, new, reason):
    (tmp_path / "a.xyz").write_text(XYZ.replace(old, new, 1))
    good, bad = outcome(tmp_path / "a.xyz")
    assert (good, list(bad.values())) == ({}, [reason])


def test_xyz_in_utf_16_is_called_so(tmp_path):
    (tmp_path / "a.xyz").write_text(XYZ, "utf-16")
    assert outcome(tmp_path / "a.xyz")[1] == {"a": "UTF-16 text; save it as UTF-8"}
