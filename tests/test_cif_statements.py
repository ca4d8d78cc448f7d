"""A CIF's statements are checked against the crystal read from it."""

from __future__ import annotations

import numpy as np
import pytest

from crysdistill.errors import BadStructure
from crysdistill.structures.cif import read_cif
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.symmetry import space_group

SITE = "label type_symbol fract_x fract_y fract_z"


def cell(a: float = 5.64, name: str = "x") -> str:
    lengths = "".join(f"_cell_length_{axis} {a}\n" for axis in "abc")
    angles = "".join(
        f"_cell_angle_{angle} 90\n" for angle in ("alpha", "beta", "gamma")
    )
    return f"data_{name}\n{lengths}{angles}"


def sites(rows: str, columns: str = SITE) -> str:
    tags = "".join(f"_atom_site_{column}\n" for column in columns.split())
    return f"loop_\n{tags}{rows}\n"


NACL = sites("Na1 Na 0 0 0\nCl1 Cl 0.5 0.5 0.5")
FM3M = "_symmetry_space_group_name_H-M 'F m -3 m'\n"
CENTRINGS = "x,y,z", "x,y+1/2,z+1/2", "x+1/2,y,z+1/2", "x+1/2,y+1/2,z"


def read(text: str) -> Crystal:
    return read_cif(text.encode(), "x")


def shortest(crystal: Crystal) -> float:
    distances = crystal.to_pymatgen().distance_matrix
    return float(distances[distances > 0.01].min())


def refused(text: str) -> str:
    with pytest.raises(BadStructure) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- symmetry, any tag


def listed(tag: str, operations: tuple[str, ...]) -> str:
    return "loop_\n" + tag + "\n" + "".join(f"'{o}'\n" for o in operations)


@pytest.mark.parametrize(
    "stated",
    [
        FM3M,
        "_space_group_name_H-M_alt Fm-3m\n",
        "_space_group.name_H-M_alt 'F m -3 m'\n",
        "_symmetry.space_group_name_H-M 'F m -3 m'\n",
        "_symmetry.pdbx_full_space_group_name_H-M 'F m -3 m'\n",
        "_SPACE_GROUP.IT_NUMBER 225\n",
        "_symmetry_Int_Tables_number 225\n",
        "_space_group.name_Hall '-F 4 2 3'\n",
        listed("_space_group_symop.operation_xyz", CENTRINGS),
        listed("_symmetry_equiv.pos_as_xyz", CENTRINGS),
        listed(
            "_space_group_symop.magn_operation_xyz",
            tuple(map("{},{}".format, CENTRINGS, ("+1", "-1", "-1", "+1"))),
        ),
        listed("_space_group_symop_magn_operation.xyz", ("x,y,z,+1", "-x,-y,-z,+1"))
        + listed(
            "_space_group_symop_magn_centering.xyz",
            tuple(map("{},{}".format, CENTRINGS, ("+1", "-1", "-1", "+1"))),
        ),
        # If operations are listed, the parent's group describes another cell.
        listed("_space_group_symop_magn_operation.xyz", CENTRINGS)
        + "_parent_space_group.name_H-M_alt 'P m -3 m'\n",
        # Programs write P 1 if they know no symmetry; operations say more.
        "_symmetry_space_group_name_H-M 'P 1'\n_symmetry_Int_Tables_number 1\n"
        + listed("_symmetry_equiv_pos_as_xyz", CENTRINGS),
    ],
)
def test_symmetry_under_any_tag(stated):
    crystal = read(cell() + stated + NACL)
    assert crystal.formula == "NaCl"
    assert len(crystal.atomic_numbers) == 8
    assert shortest(crystal) == pytest.approx(2.82)


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("_space_group_name_Schoenflies Oh^5\n", "`_space_group_name_schoenflies` is"),
        ("_symmetry_cell_setting cubic\n", "`_symmetry_cell_setting` is `cubic`, but"),
        ("_space_group_crystal_system cubic\n", "crystal_system` is `cubic`, but no"),
        ("_aflow_spacegroup 'F m -3 m'\n", "`_aflow_spacegroup` is `F m -3 m`, but"),
        ("_cod_original_sg_symbol_H-M Fm-3m\n", "`_cod_original_sg_symbol_h-m` is"),
        ("_space_group.magn_name_BNS 'C_c2/c'\n", "magn_name_bns` is `C_c2/c`, but no"),
        ("_space_group_magn.number_BNS 15.90\n", "number_bns` is `15.90`, but no sym"),
        (
            "_magnetic_space_group_standard_number 8\n",
            "standard_number` is `8`, but no",
        ),
        ("_parent_space_group.IT_number 225\n", "it_number` is `225`, but no symmetry"),
        (
            "_space_group_name_H-M_alt 'P 1'\n_space_group_magn.number_BNS 15.90\n",
            "it names `P 1` with 1 symmetry operation, but `_space_group_magn_number_b",
        ),
        (
            FM3M + listed("_symmetry_equiv_pos_as_xyz", ("x,y,z",)),
            "it lists 1 symmetry operation, but names `F m -3 m`, which has 192; compl",
        ),
        (
            FM3M + listed("_symmetry_equiv_pos_as_xyz", CENTRINGS),
            "it lists 4 symmetry operations, but names `F m -3 m`, which has 192; comp",
        ),
        (
            "_symmetry_Int_Tables_number 225\n"
            + listed("_symmetry_equiv_pos_as_xyz", ("x,y,z",)),
            "it lists 1 symmetry operation .1 without translations., but gives the spa",
        ),
        (
            "_symmetry_space_group_name_H-M 'P 1'\n_space_group_IT_number 225\n",
            "gives the space group number 225, which has 48; complete the symmetry",
        ),
        (
            "_symmetry_space_group_name_H-M 'P m -3 m'\n_space_group_IT_number 225\n",
            "which is number 221, but gives number 225; complete the symmetry operat",
        ),
        (
            "_space_group_name_Hall '-F 4 2 3'\n_space_group_name_H-M_alt 'P m -3 m'\n",
            "names `-F 4 2 3` with 192 symmetry operations, but names `P m -3 m`, whic",
        ),
        (
            listed("_symmetry_equiv_pos_as_xyz", CENTRINGS[:3]),
            "its 3 symmetry operations do not form a group: one is missing or damaged",
        ),
        (
            listed("_symmetry_equiv_pos_as_xyz", (*CENTRINGS[:3], "x+1/2,y+1/3,z")),
            "its 4 symmetry operations do not form a group",
        ),
        (
            listed("_symmetry_equiv_pos_as_xyz", CENTRINGS)
            + listed("_space_group_symop_operation_xyz", ("x,y,z",)),
            "it lists 1 symmetry operation, but 4 under another tag; complete the",
        ),
        (
            FM3M + "_space_group_name_H-M_alt 'P m -3 m'\n",
            "names `P m -3 m` with 48 symmetry operations, but names `F m -3 m`, which",
        ),
        (
            FM3M + FM3M.replace("F m", "P m"),
            "`_symmetry_space_group_name_h-m` occurs twice, as `F m -3 m` and as `P m",
        ),
        (
            "_space_group_name_H-M_alt 'P n m a'\n_space_group_IT_number 61\n",
            "operations, which is number 62, but gives number 61; complete the symm",
        ),
        (
            "_space_group_name_H-M_alt 'P -1'\n"
            + listed("_symmetry_equiv_pos_as_xyz", ("x,y,z", "-x,-y,z")),
            "lists 2 .*, which is number 3, but names `P -1`, which is number 2; comp",
        ),
        ("_cell_modulation_dimension 1\n" + FM3M, "a modulated structure .superspace"),
        ("_space_group_ssg_name 'F m -3 m(00g)'\n", "a modulated structure .superspac"),
        (
            "_symmetry_space_group_name_H-M 'P 21/c'\n"
            "_space_group_IT_coordinate_system_code b2\n",
            "`P 21/c` does not go with its coordinate system code `b2`, which means `P",
        ),
    ],
)
def test_never_p1_where_a_tag_says_more(stated, reason):
    with pytest.raises(BadStructure, match=reason):
        read(cell() + stated + NACL)


@pytest.mark.parametrize(
    "stated",
    [
        "",
        "_symmetry_space_group_name_H-M ?\n_symmetry_Int_Tables_number ?\n",
        "_symmetry_cell_setting triclinic\n",
        "_space_group_magn.number_BNS 1.1\n_space_group_magn.name_BNS 'P 1'\n",
        "_symmetry_equiv_pos_site_id 1\n_symmetry_equiv_pos_as_xyz x,y,z\n",
        "_geom_bond_site_symmetry_2 3_555\n",
        "_space_group_id 1\n_space_group_IT_number 1\n",
    ],
)
def test_p1_where_no_tag_says_more(stated):
    assert len(read(cell() + stated + NACL).atomic_numbers) == 2


def test_counts_settle_what_names_leave_open():
    """Formula and Z show that all atoms are listed; the name is descriptive only."""
    atoms = "".join(
        f"{s}{n} {s} {' '.join(str(x) for x in np.add(site, shift) % 1)}\n"
        for s, site in (("Na", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5)))
        for n, shift in enumerate(
            [(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
        )
    )
    identity = FM3M + listed("_symmetry_equiv_pos_as_xyz", ("x,y,z",))
    assert "names `F m -3 m`" in refused(cell() + identity + sites(atoms))
    counted = "_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z 4\n"
    crystal = read(cell() + identity + counted + sites(atoms))
    assert len(crystal.atomic_numbers) == 8


# ------------------------------------------------------------------------- origins

SPINEL = {
    1: sites("Mg1 Mg 0 0 0\nAl1 Al 0.625 0.625 0.625\nO1 O 0.3874 0.3874 0.3874"),
    2: sites("Mg1 Mg 0.125 0.125 0.125\nAl1 Al 0.5 0.5 0.5\nO1 O .2624 .2624 .2624"),
}


@pytest.mark.parametrize("origin", [1, 2])
@pytest.mark.parametrize(
    "stated",
    [
        "_symmetry_space_group_name_H-M 'F d -3 m'\n"
        "_space_group_IT_coordinate_system_code {}\n",
        "_space_group_IT_number 227\n_space_group.IT_coordinate_system_code {}\n",
        "_symmetry_space_group_name_H-M 'F d -3 m:{}'\n",
        "_symmetry_space_group_name_H-M 'F d -3 m :{}'\n",
        "_space_group_name_H-M_alt 'F d -3 m (origin choice {})'\n",
        "_space_group_name_H-M_alt 'F d -3 m O{}'\n",
        "_space_group_name_H-M_alt Fd-3m\n",  # the other origin makes atoms coincide
    ],
)
def test_both_origins(stated, origin):
    crystal = read(cell(8.08) + stated.format(origin) + SPINEL[origin])
    assert crystal.formula == "MgAl2O4"
    assert len(crystal.atomic_numbers) == 56
    assert crystal.volume == pytest.approx(527.5, abs=0.1)
    assert shortest(crystal) == pytest.approx(1.92, abs=0.01)
    assert space_group(crystal, 0.01) == 227


CARBON = sites("C1 C 0 0 0")


def with_column(name: str, value: str) -> str:
    return sites(f"C1 C 0 0 0 {value}", f"{SITE} {name}")


FD3M = cell(3.567) + "_symmetry_space_group_name_H-M 'F d -3 m'\n"


def test_an_origin_that_nothing_settles_is_refused():
    assert refused(FD3M + CARBON) == (
        "`F d -3 m` has two origins and the file does not say which: 8 atoms with "
        "`F d -3 m:1` and 16 atoms with `F d -3 m:2`; write one of these symbols, or "
        "list the symmetry operations"
    )


@pytest.mark.parametrize(
    ("said", "atoms"),
    [
        ("_chemical_formula_sum C\n_cell_formula_units_Z 8\n" + CARBON, 8),
        ("_chemical_formula_sum C\n_cell_formula_units_Z 16\n" + CARBON, 16),
        (with_column("symmetry_multiplicity", "8"), 8),
        (with_column("site_symmetry_multiplicity", "16"), 16),
        (with_column("site_symmetry_order", "24"), 8),
        (with_column("Wyckoff_symbol", ".8a"), 8),
    ],
)
def test_the_counts_of_a_file_settle_its_origin(said, atoms):
    assert len(read(FD3M + said).atomic_numbers) == atoms


@pytest.mark.parametrize(
    ("stated", "atoms"),
    [
        ("_space_group_IT_number 62\n_space_group_IT_coordinate_system_code cab\n", 8),
        ("_space_group_name_H-M_alt 'P 2/m'\n"
         "_space_group_IT_coordinate_system_code c1\n", 4),
        ("_space_group_name_H-M_alt 'R -3 m'\n"
         "_space_group_IT_coordinate_system_code R\n", 12),
        ("_space_group_name_H-M_alt 'P m -3 m'\n"
         "_space_group_IT_coordinate_system_code 1\n", 48),
    ],
)  # fmt: skip
def test_other_codes_of_the_coordinate_system(stated, atoms):
    place = "Na1 Na 0.1 0.2 0.3"
    assert len(read(cell(9.0) + stated + sites(place)).atomic_numbers) == atoms


# -------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            sites("Na1 Na 4 0 0 0", "label type_symbol site_symmetry_multiplicity "
                  "fract_x fract_y fract_z"),
            "site Na1 has `_atom_site_site_symmetry_multiplicity` 4, but its symmetry "
            r"\(1 operation\) makes 1 atom of it; complete the symmetry or mend",
        ),
        (
            FM3M + sites("Na1 Na 8 0 0 0", "label type_symbol symmetry_multiplicity "
                         "fract_x fract_y fract_z"),
            r"multiplicity` 8, but its symmetry \(192 operations\) makes 4 atoms of it",
        ),
        (
            FM3M + sites("Na1 Na 8c 0 0 0", "label type_symbol Wyckoff_symbol "
                         "fract_x fract_y fract_z"),
            "`_atom_site_wyckoff_symbol` 8, but its symmetry",
        ),
        (
            sites("Na1 Na b 0 0 0", "label type_symbol Wyckoff_symbol fract_x fract_y "
                  "fract_z"),
            "a site has the Wyckoff position `b`, but no symmetry operations and no sp",
        ),
        (
            FM3M + "_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z 8\n" + NACL,
            r"its atoms \(Na4 Cl4\) make up 4 formula units \(Na Cl\), but "
            "`_cell_formula_units_Z` is 8; complete the file or mend either",
        ),
        (
            "_cell_formula_units_Z 4\n" + NACL,
            r"its atoms \(Na1 Cl1\) do not make up 4 formula units .`_cell_formula_un",
        ),
        (  # hydrogens without positions
            FM3M + "_chemical_formula_sum 'H2 Na Cl O'\n" + NACL,
            r"its atoms \(Na4 Cl4\) do not make up its formula \(H2 Na Cl O\): cut sho",
        ),
        (
            FM3M + "_chemical_formula_sum 'Na Br'\n" + NACL,
            r"its atoms \(Na4 Cl4\) hold Cl, which its formula \(Na Br\) lacks; correc",
        ),
        ("_cell_volume 44.9\n" + NACL, "its cell has 179.4 .* but `_cell_volume` is"),
        ("_cell_length_a 6.1\n" + NACL, "`_cell_length_a` occurs twice, as `5.64` and"),
        (
            NACL + sites("Na1 0.5\nCl1 1", "label occupancy"),
            "data_x has 2 loops of atoms, of 2 and 2 rows; put all atoms into one loop",
        ),
        (
            "_chemical_formula_moiety 'Ca C O3, H2 O'\n"
            + sites("Ca 0 0 0\nW .5 .5 .5", "label fract_x fract_y fract_z"),
            r"site W has no type symbol, and its label means W, which the formula \(Ca "
            r"C O3, H2 O\) lacks; add `_atom_site_type_symbol`",
        ),
        (
            "_chemical_formula_sum 'C2 N'\n"
            + sites("CA 0 0 0\nN .5 .5 .5", "label fract_x fract_y fract_z"),
            "site CA has no type symbol, and its label means Ca, which the formula",
        ),
        (
            sites("C1 C 0 0 0 A\nO1 O 0.3 0 0 B",
                  "label type_symbol fract_x fract_y fract_z label_alt_id"),
            r"site C1 is disordered \(disorder groups A and B\)",
        ),
        (
            sites("C1 C 0 0 0 1 -1",
                  "label type_symbol fract_x fract_y fract_z occupancy disorder_group"),
            r"site C1 is disordered \(disorder group -1\)",
        ),
        (
            sites("C1 C 0 0 0 . .\nO1 O 0.3 0 0 A 1",
                  "label type_symbol fract_x fract_y fract_z disorder_assembly "
                  "disorder_group"),
            r"site O1 is disordered \(disorder group 1\)",
        ),
        (
            sites("C1 C 0 0 0 1 1\nO1 O 0.3 0 0 1 2",
                  "label type_symbol fract_x fract_y fract_z occupancy disorder_group"),
            r"site C1 is disordered \(disorder groups 1 and 2\)",
        ),
        (
            sites("C1 C 0 0 0 dum", "label type_symbol fract_x fract_y fract_z "
                  "calc_flag"),
            "site C1 is a dummy .`_atom_site_calc_flag`., not an atom; remove it",
        ),
        (sites("? ? ? ? ?"), "its only atoms are placeholders .`.`.; add the atom"),
        ("", "no atoms .`_atom_site_fract_x`.: cut short, or not a crystal structure"),
    ],
)  # fmt: skip
def test_contradictions(text, reason):
    with pytest.raises(BadStructure, match=reason) as caught:
        read(cell() + text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z 4\n" + NACL,
        "_chemical_formula_sum NaCl\n" + NACL,
        "_chemical_formula_sum 'Na4 Cl4'\n_cell_formula_units_Z 4\n" + NACL,  # pymatgen
        "_cell_formula_units_Z 4\n" + NACL,
        "_cell_volume 179.41(3)\n" + NACL,
        "_cell_length_a 5.640(2)\n" + NACL,
        NACL + sites("Na1 0.02\nCl1 0.02", "label U_iso_or_equiv"),
        NACL + "loop_\n_atom_site_aniso_label\n_atom_site_aniso_U_11\nNa1 0.01\n",
        # SHELXL-97 writes under this tag how many operations keep the site in place.
        sites("Na1 Na 48 0 0 0\nCl1 Cl 48 0.5 0.5 0.5", "label type_symbol "
              "symmetry_multiplicity fract_x fract_y fract_z"),
        sites("Na1 Na 4 0 0 0\nCl1 Cl ? 0.5 0.5 0.5", "label type_symbol "
              "symmetry_multiplicity fract_x fract_y fract_z"),
        sites("Na1 Na 0 0 0 1 .\nCl1 Cl 0.5 0.5 0.5 1 1", "label type_symbol fract_x "
              "fract_y fract_z occupancy disorder_group"),  # the disorder is resolved
        "_chemical_formula_sum 'Na Cl'\n"
        + sites("Na1 0 0 0\nCl1 0.5 0.5 0.5", "label fract_x fract_y fract_z"),
    ],
)  # fmt: skip
def test_agreement(text):
    assert len(read(cell() + FM3M + text).atomic_numbers) == 8
