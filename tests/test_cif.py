"""CIF: agreement with pymatgen, and refused files."""

from __future__ import annotations

import warnings
import zipfile

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifParser, CifWriter

from crysdistill.errors import BadStructure
from crysdistill.structures.cif import read_cif
from crysdistill.structures.crystal import Crystal

from .conftest import structures

PLAIN = """data_CsCl
_symmetry_space_group_name_H-M 'P 1'
_cell_length_a 4.12
_cell_length_b 4.12(1)
_cell_length_c 4.12
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_chemical_formula_sum 'Cs1 Cl1'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Cs Cs1 0 0 0 1
Cl Cl1 0.5 0.50(2) 0.5 1.0
"""


def pymatgen_reads(cif: str) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CifParser.from_str(cif).parse_structures(primitive=False)[0]


def assert_equal(crystal: Crystal, structure: Structure) -> None:
    """Same cell, atoms in the same order, same distances."""
    numbers = [site.specie.Z for site in structure]
    assert crystal.atomic_numbers.tolist() == numbers
    np.testing.assert_array_equal(crystal.cell, structure.lattice.matrix)
    delta = crystal.frac_coords - structure.frac_coords
    np.testing.assert_allclose(delta - np.rint(delta), 0, atol=1e-9)
    ours = np.sort(crystal.to_pymatgen().distance_matrix, axis=None)
    theirs = np.sort(structure.distance_matrix, axis=None)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_plain_cif():
    crystal = read_cif(PLAIN.encode(), "CsCl")
    assert crystal.material_id == "CsCl"
    assert crystal.atomic_numbers.tolist() == [55, 17]
    assert crystal.frac_coords.tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert crystal.volume == pytest.approx(4.12**3)
    assert_equal(crystal, pymatgen_reads(PLAIN))


PROTOTYPES = {
    **structures(),
    "spinel": Structure.from_spacegroup(
        "Fd-3m",
        Lattice.cubic(8.08),
        ["Mg", "Al", "O"],
        [[0, 0, 0], [5 / 8, 5 / 8, 5 / 8], [0.387, 0.387, 0.387]],
    ),
    "quartz": Structure.from_spacegroup(
        "P3_221",
        Lattice.hexagonal(4.914, 5.405),
        ["Si", "O"],
        [[0.4698, 0, 2 / 3], [0.4145, 0.2662, 0.7856]],
    ),
    "calcite": Structure.from_spacegroup(
        "R-3c",
        Lattice.hexagonal(4.99, 17.06),
        ["Ca", "C", "O"],
        [[0, 0, 0], [0, 0, 0.25], [0.257, 0, 0.25]],
    ),
    "GdFeO3": Structure.from_spacegroup(
        "Pnma",
        Lattice.orthorhombic(5.59, 7.67, 5.35),
        ["Gd", "Fe", "O", "O"],
        [[0.06, 0.25, 0.98], [0, 0, 0.5], [0.47, 0.25, 0.1], [0.3, 0.05, 0.7]],
    ),
    "monoclinic": Structure.from_spacegroup(
        "P2_1/c",
        Lattice.monoclinic(5.15, 5.21, 5.32, 99.2),
        ["Zr", "O", "O"],
        [[0.275, 0.04, 0.208], [0.07, 0.332, 0.345], [0.45, 0.757, 0.479]],
    ),
}


@pytest.mark.parametrize("name", list(PROTOTYPES))
@pytest.mark.parametrize("symprec", [None, 0.01])
def test_agreement_with_pymatgen(name, symprec):
    cif = str(CifWriter(PROTOTYPES[name], symprec=symprec))
    crystal = read_cif(cif.encode(), name)
    assert_equal(crystal, pymatgen_reads(cif))
    assert crystal.formula == PROTOTYPES[name].composition.reduced_formula


def listed(cif: str, tag: str) -> str:
    """Take the list of symmetry operations out of a CIF, leaving its names."""
    start = cif.index("loop_\n _symmetry_equiv")
    return cif[:start] + tag + "\n" + cif[cif.index("loop_\n _atom_site") :]


@pytest.mark.parametrize("name", ["NaCl", "quartz", "calcite", "GdFeO3", "monoclinic"])
@pytest.mark.parametrize("named", ["symbol", "number", "hall"])
def test_symmetry_from_a_name_alone(name, named):
    hall = {
        "NaCl": "-F 4 2 3",
        "quartz": 'P 32 2"',
        "calcite": '-R 3 2"c',
        "GdFeO3": "-P 2ac 2n",
        "monoclinic": "-P 2ybc",
    }[name]
    whole = str(CifWriter(PROTOTYPES[name], symprec=0.01))
    cif = listed(whole, "")
    if named != "symbol":
        cif = cif.replace("_symmetry_space_group_name_H-M", "_nothing")
    if named == "hall":
        cif = listed(whole, f"_space_group_name_Hall '{hall}'")
        cif = cif.replace("_space_group_name_H-M", "_nothing")
        cif = cif.replace("_symmetry_Int_Tables_number", "_neither")
    expected = read_cif(whole.encode(), name)
    found = read_cif(cif.encode(), name)
    np.testing.assert_allclose(
        np.sort(found.to_pymatgen().distance_matrix, axis=None),
        np.sort(expected.to_pymatgen().distance_matrix, axis=None),
        atol=1e-6,
    )


def test_rhombohedral_cell_of_a_named_group():
    cell = "".join(
        f"_cell_length_{a} 4.75\n_cell_angle_{b} 57.1\n"
        for a, b in zip("abc", ("alpha", "beta", "gamma"), strict=True)
    )
    cif = (
        "data_Bi\n_symmetry_space_group_name_H-M 'R -3 m'\n"
        + cell
        + "loop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n"
        "_atom_site_fract_z\nBi1 0.234 0.234 0.234\n"
    )
    assert len(read_cif(cif.encode(), "Bi").atomic_numbers) == 2
    wrong = cif.replace("57.1", "90", 1)
    with pytest.raises(BadStructure, match="its symmetry does not fit its cell"):
        read_cif(wrong.replace("R -3 m", "P 6/m m m").encode(), "Bi")


def test_images_on_a_special_position_are_one_atom():
    """Rounding near a special position must not multiply atoms."""
    cif = str(CifWriter(PROTOTYPES["hcp-Mg"], symprec=0.01))
    for third, two_thirds in (
        ("0.3333", "0.6667"),
        ("0.333", "0.667"),
        ("0.33", "0.67"),
    ):
        rounded = cif.replace("0.33333333", third).replace("0.66666667", two_thirds)
        assert rounded != cif
        assert len(read_cif(rounded.encode(), "Mg").atomic_numbers) == 2
        if third == "0.3333":  # with fewer digits, pymatgen finds too many atoms
            assert_equal(read_cif(rounded.encode(), "Mg"), pymatgen_reads(rounded))


def test_operations_with_odd_fractions():
    operations = (
        "loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'\n'X+499/999, .5+y, -1/2+z'\n"
    )
    cif = PLAIN.replace("loop_\n", operations + "loop_\n", 1).replace(
        "Cs1 Cl1", "Cs Cl"
    )
    crystal = read_cif(cif.replace("0.50(2) 0.5 ", "0 0 ").encode(), "x")
    assert len(crystal.atomic_numbers) == 4
    assert 499 / 999 in crystal.frac_coords


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Cl Cl1", "Cl1- Cl1"),
        ("Cl Cl1", "'Cl-' Cl1"),
        ("Cl Cl1", "CL Cl1"),
        ("Cl Cl1", "? Cl1"),
        ("_atom_site_type_symbol\n", "_atom_site_other\n"),
        ("data_CsCl", "# Gonz\u00e1lez\ndata_CsCl"),
        ("data_CsCl", "\ufeffdata_CsCl"),
        ("data_CsCl", "data_global\n_author 'A. N\u00e4me'\ndata_CsCl"),
        ("\n", "\r\n"),
        ("'P 1'", "?"),
        ("0.5 1.0", "0.5 1"),
        ("0.5 1.0", "-0.5 1.0"),
        ("_atom_site_fract_x", "_ATOM_SITE_fract_X"),
        (
            "_cell_length_a 4.12",
            "_cell_length_a 4.12\n_journal_year 1\n_journal_year 1",
        ),
        ("'Cs1 Cl1'", "CsCl"),
        ("'Cs1 Cl1'", "'(Cs Cl)n'"),
        ("'Cs1 Cl1'", "'Cs6 Cl6'"),
    ],
)
def test_harmless_variations(old, new):
    crystal = read_cif(PLAIN.replace(old, new).encode(), "x")
    np.testing.assert_array_equal(
        crystal.atomic_numbers, read_cif(PLAIN.encode(), "x").atomic_numbers
    )


def test_deuterium_is_hydrogen():
    cif = PLAIN.replace("Cl Cl1", "D D1").replace("Cs1 Cl1", "Cs1 D1")
    assert read_cif(cif.encode(), "x").atomic_numbers.tolist() == [55, 1]


def test_first_block_with_atoms():
    second = PLAIN.replace("data_CsCl", "data_other").replace("4.12", "5.12")
    crystal = read_cif(("data_global\n_a 1\n" + PLAIN + second).encode(), "x")
    assert crystal.volume == pytest.approx(4.12**3)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "0.5 1.0",
            "0.5 0.5",
            r"site Cl1 is disordered \(occupancy 0.5\); use an ordered approximant",
        ),
        ("0.5 1.0", "0.5 0", r"site Cl1 is disordered \(occupancy 0\)"),
        (
            "0.5 1.0",
            "0.5 1.2",
            "site Cl1 has occupancy 1.2, which is more than one atom",
        ),
        (
            "0.5 1.0",
            "0.5 .",
            r"the occupancy of site Cl1 is `\.`; write 1 if it is full",
        ),
        ("0.5 1.0", "0.5 ?", r"the occupancy of site Cl1 is `\?`; write 1"),
        (
            "Cl Cl1",
            "Xx Cl1",
            "site Cl1 holds `Xx`, not an element between H and Fm; name",
        ),
        ("Cl Cl1", "Vac Vac1", "site Vac1 holds `Vac`, not an element"),
        ("Cl Cl1", "? Vac1", "site Vac1 holds `Vac1`, not an element"),
        ("Cl Cl1", "Lr Lr1", "site Lr1 holds `Lr`, not an element between H and Fm"),
        ("Cl Cl1 0.5", "Cl Cl1 ?", r"a coordinate of site Cl1 is `\?`, not a number"),
        ("Cl Cl1 0.5", "Cl Cl1 nan", "a coordinate of site Cl1 is `nan`, not a number"),
        ("Cl Cl1 0.5", "Cl Cl1 .", r"a coordinate of site Cl1 is `\.`, not a number"),
        ("_cell_length_b 4.12(1)\n", "", "no `_cell_length_b`: cut short, or no cell"),
        ("length_b 4.12(1)", "length_b ?", r"`_cell_length_b` is `\?`, not a number"),
        (
            "length_b 4.12(1)",
            "length_b 0",
            "`_cell_length_b` is 0, which is impossible",
        ),
        ("length_b 4.12(1)", "length_b -4", "`_cell_length_b` is -4, which is imposs"),
        ("length_b 4.12(1)", "length_b 0.01", "lattice vector b is 0.01 Å long"),
        (
            "angle_beta 90",
            "angle_beta 180",
            "`_cell_angle_beta` is 180, which is imposs",
        ),
        (
            "angle_beta 90",
            "angle_beta 0",
            "`_cell_angle_beta` is 0, which is impossible",
        ),
        (
            "alpha 90\n_cell_angle_beta 90",
            "alpha 20\n_cell_angle_beta 30",
            "the angles 20, 30, 90 form no cell .impossible.; mend them",
        ),
        (
            "1.0\n",
            "1.0\nCl Cl2 0.5 0.5 0.5 1\n",
            r"two atoms on one point: atoms 1 and 2 \(Cl and Cl\) are 0.00 Å apart",
        ),
        ("0.5 1.0\n", "0.5", "Wrong number of values in loop _atom_site.*cut short"),
        (
            "Cl Cl1 0.5 0.50(2) 0.5 1.0\n",
            "",
            r"its atoms \(Cs1\) do not make up its formula \(Cs1 Cl1\): cut short, or",
        ),
        ("'Cs1 Cl1'", "'Cs2 Cl3'", "do not make up its formula"),
        (
            "'Cs1 Cl1'",
            "'Rb1 Cl1'",
            r"its atoms \(Cl1 Cs1\) hold Cs, which its formula \(Rb1 Cl1\) lacks; corr",
        ),
        (
            "_fract_x",
            "_Cartn_x",
            "Cartesian coordinates only; write `_atom_site_fract_x`",
        ),
        ("_fract_z", "_nothing", "no `_atom_site_fract_z`; complete the coordinates"),
        ("'P 1'", "'P 77'", "the space group `P 77` is not known and no symmetry oper"),
        (
            "_symmetry_space_group_name_H-M 'P 1'",
            "_symmetry_Int_Tables_number 231",
            "no space group has number `231`; mend it",
        ),
        (
            "_symmetry_space_group_name_H-M 'P 1'",
            "_symmetry_equiv_pos_as_xyz 'x, y'",
            "the symmetry operation `x, y` cannot be read; mend the file",
        ),
        (
            "_atom_site_occupancy",
            "_atom_site_attached_hydrogens",
            "site Cs1 has hydrogens without coordinates; add them",
        ),
    ],
)
def test_refusals(old, new, reason):
    assert old in PLAIN
    text = PLAIN.replace(old, new)
    with pytest.raises(BadStructure, match=reason):
        read_cif(text.encode(), "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "^empty file; get it again or remove it"),
        (b" \n\n", "^empty file"),
        (
            b"<!DOCTYPE html><html><body>404</body></html>",
            "a web page or XML, not a CIF",
        ),
        (
            b"404: Not Found",
            "not a valid CIF at line 1 .*: damaged or cut short; get the",
        ),
        (b"\x1f\x8b\x00\x00 zip", "not a valid CIF at line 1"),
        (b"# nothing but a comment\n", "no atoms .`_atom_site_fract_x`.: cut short"),
        (PLAIN[:120].encode(), "no atoms|not a valid CIF"),
    ],
)
def test_refused_files(content, reason):
    with pytest.raises(BadStructure, match=reason):
        read_cif(content, "x")


def test_a_cut_file_is_never_read_as_a_smaller_crystal():
    cif = str(CifWriter(PROTOTYPES["GdFeO3"])).encode()
    atoms = len(read_cif(cif, "x").atomic_numbers)
    refused = 0
    for end in range(0, len(cif), 7):
        try:
            assert len(read_cif(cif[:end], "x").atomic_numbers) == atoms
        except BadStructure as error:
            refused += "\n" not in str(error)
    assert refused > 0.98 * len(cif) / 7


@pytest.mark.parametrize(
    "archive", ["cgcnn_folder/cgcnn_folder", "cgcnn_published/structures"]
)
def test_agreement_with_pymatgen_on_real_files(shared_data, archive):
    with zipfile.ZipFile(shared_data / f"{archive}.zip") as files:
        names = sorted(name for name in files.namelist() if name.endswith(".cif"))
        for name in names[:: len(names) // 30]:
            cif = files.read(name)
            assert_equal(read_cif(cif, name), pymatgen_reads(cif.decode()))
