"""POSCAR in all forms that VASP reads and programs write."""

from __future__ import annotations

import io
import random
import re
import warnings

import ase.io
import numpy as np
import pytest
from pymatgen.io.vasp import Poscar

from crysdistill.errors import BadStructure
from crysdistill.sources.records import Record, parse
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.poscar import read_poscar

POSCAR = """CsCl
1.0
4.0 0.0 0.0
0.0 4.0 0.0
0.0 0.0 4.0
Cs Cl
1 1
Direct
0.0 0.0 0.0
0.4 0.5 0.5
"""
CARTESIAN = POSCAR.replace("Direct", "Cartesian").replace("0.4 0.5 0.5", "1.6 2 2")


def changed(*changes: tuple[str, str], text: str = POSCAR):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return read_poscar(text.encode(), "x")


@pytest.mark.parametrize(
    "changes",
    [
        [("4.0 0.0 0.0", "4.0D0 0.0D+00 0d0")],
        [("1.0\n", "1.D0 ! scale\n")],
        [("0.0 0.0 4.0", "0.0 0.0 4.0 # c")],
        [("4.0 0.0 0.0", "4.0 0.0 0.0 is a")],
        [("Cs Cl", "Cs Cl ! elements"), ("1 1", "1 1 ! atoms")],
        [("Cs Cl", "Cs_sv/4f2 Cl/0a1")],
        [("Cs Cl", " Cs\nCl"), ("1 1", "1\n1")],
        [("Direct", "direct lattice coordinates")],
        [("Direct", "Selective dynamics\nDirect"), ("0.4 0.5 0.5", ".4 .5 .5 T F T")],
        [("Direct", "S\nD"), ("0.4 0.5 0.5", ".4 .5 .5 T F T Cl")],
        [("0.4 0.5 0.5", "0.4 0.5 0.5 Cl")],
        [("0.4 0.5 0.5", "0.4 0.5 0.5 ! chlorine")],
        [("0.4 0.5 0.5", "-0.6-0.5-0.5")],
        [("0.4 0.5 0.5\n", "0.4 0.5 0.5\n\n0 0 0\n0.1 0.1 0.1\n")],  # velocities
        [("Cs Cl\n", ""), ("0.0 0.0 0.0\n0.4 0.5 0.5", "0 0 0 Cs\n.4 .5 .5 Cl")],
        [("CsCl\n", "\n")],
        [("CsCl\n", "\ufeffCsCl\n")],
        [("1.0\n", "-64\n")],
        [("1.0\n", "-64.0D0\n")],
        [("1.0\n", "1 1 1\n")],
        [("1.0\n", "2.0\n"), ("4.0", "2.0"), ("4.0", "2.0"), ("4.0", "2.0")],
        [("1.0\n", "2 1 0.5\n"), ("4.0", "2.0"), ("0.0 0.0 4.0", "0.0 0.0 8.0")],
    ],
)
def test_dialects(changes):
    crystal = changed(*changes)
    assert crystal.atomic_numbers.tolist() == [55, 17]
    np.testing.assert_allclose(crystal.cell, np.eye(3) * 4, atol=1e-12)
    np.testing.assert_allclose(crystal.frac_coords[1], [0.4, 0.5, 0.5], atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "cell", "place"),
    [
        ("1.0", 4.0, "1.6 2 2"),
        ("2.0", 2.0, "0.8 1 1"),
        ("-64", 2.0, "0.8 1 1"),
        ("-64 ! volume", 3.0, "1.2 1.5 1.5"),
        ("2 2 2", 2.0, "0.8D0 1 1"),
    ],
)
@pytest.mark.parametrize("word", ["Cartesian", "cart", "K", "Kartesisch"])
def test_cartesian_coordinates_are_scaled_like_the_cell(scale, cell, place, word):
    crystal = changed(
        ("1.0", scale),
        *[("4.0", str(cell))] * 3,
        ("Cartesian", word),
        ("1.6 2 2", place),
        text=CARTESIAN,
    )
    np.testing.assert_allclose(crystal.cell, np.eye(3) * 4, atol=1e-12)
    np.testing.assert_allclose(crystal.frac_coords[1], [0.4, 0.5, 0.5], atol=1e-12)


def test_three_scales_stretch_the_axes_of_space():
    """Each factor scales x, y or z: a column, not a lattice vector."""
    crystal = changed(
        ("1.0", "1 2 3"), ("4.0 0.0 0.0", "4.0 1.0 0.0"), ("1.6 2 2", "1.6 2 2"),
        text=CARTESIAN,
    )  # fmt: skip
    assert crystal.cell.tolist() == [[4, 2, 0], [0, 8, 0], [0, 0, 12]]
    position = crystal.frac_coords[1] @ crystal.cell
    np.testing.assert_allclose(position, [1.6, 4.0, 6.0], atol=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("1.0\n", "1 2\n", "line 2 is `1 2`, not one scale factor or three; mend it"),
        ("1.0\n", "one\n", "line 2 is `one`, not one scale factor or three; mend it"),
        ("1.0\n", "1 -2 3\n", "line 2 is `1 -2 3`: of three scale factors none may be"),
        ("4.0 0.0 0.0", "4.0 0.0 x", "line 3 is `4.0 0.0 x`, not three numbers; mend"),
        ("4.0 0.0 0.0", "4.0 0.0", "not a whole POSCAR: a line or a number is missing"),
        ("1 1\n", "1 -1\n", "line 7 counts -1 atoms of an element; mend it"),
        ("1 1\n", "1 1.5\n", "line 7 counts 1.5 atoms of an element; mend it"),
        ("1 1\n", "1 2\n", "not a whole POSCAR: a line or a number is missing"),
        (
            "0.4 0.5 0.5\n",
            "0.4 0.5 0.5\n0.1 0.2 0.3\n",
            "line 7 says 2 atoms but 3 lines of coordinates follow; mend either",
        ),
        (
            "Direct\n",
            "",
            "line 8 should say `Direct` or `Cartesian` but is `0.0",
        ),
        ("Direct\n", "\n", "line 8 should say `Direct`|not a whole POSCAR"),
        (
            "0.4 0.5 0.5",
            "0.4 0.5 0.5 Cs",
            r"atom 1 is Cl by line 6 but Cs by the word behind its coordinates",
        ),
        ("0.0 4.0 0.0", "4.0 0.0 0.0", "its cell of 0 .* is too small for 2 atoms"),
    ],
)
def test_refusals(old, new, reason):
    record = Record("POSCAR", "x", "poscar", POSCAR.replace(old, new, 1).encode())
    with pytest.raises(BadStructure, match=reason) as caught:
        parse(record)
    assert "\n" not in str(caught.value)


def test_a_volume_of_a_flat_cell():
    text = POSCAR.replace("1.0", "-64", 1).replace("0.0 4.0 0.0", "4.0 0.0 0.0")
    with pytest.raises(BadStructure, match="its lattice vectors span no volume; mend"):
        read_poscar(text.encode(), "x")


# ------------------------------------------------------------------------------- fuzz

_VELOCITIES = "\n0.0 0.0 0.0\n0.1 0.1 0.1\n"
SEEDS = (
    POSCAR,
    CARTESIAN,
    POSCAR.replace("Direct", "Selective\nDirect").replace("\n0.0", " T T F\n0.0"),
    CARTESIAN.replace("1.0", "-64.0", 1) + _VELOCITIES,
    POSCAR.replace("1.0", "1.0 2.0 3.0", 1),
    POSCAR.replace("Cs Cl\n", "").replace(
        "0.0 0.0 0.0\n0.4 0.5 0.5", "0 0 0 Cs\n0.4 0.5 0.5 Cl"
    ),
)


WORDS = (
    *("1.0", "-64", "1.5D0", "nan", "inf", "1e400", "0", "-1", "T", "F", "Cs", "Xx"),
    *("?", "", "!", "# x", "Direct", "Cartesian", "Selective", "\x00", "\ufeff", "1/2"),
    *("1*2", "1_0", "\u22121", "99999999999999999999", "0.5-0.5", "(1)", "\u0663"),
)


def mutated(text: str, rng: random.Random) -> str:
    """Change, remove, repeat or move a word, a line or a stretch of text."""
    for _ in range(rng.choice((1, 1, 2))):
        lines = text.split("\n")
        row = rng.randrange(len(lines))
        words = lines[row].split()
        what = rng.choice((0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 7))
        if what == 0 and words:
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[row] = " ".join(words)
        elif what == 1:
            del lines[row]
        elif what == 2:
            lines.insert(row, lines[rng.randrange(len(lines))])
        elif what == 3:
            lines[row] += " " + rng.choice(WORDS)
        elif what == 4:
            other = rng.randrange(len(lines))
            lines[row], lines[other] = lines[other], lines[row]
        elif what == 5:
            lines = lines[: row + 1]
        elif what == 6:
            lines[row] = lines[row][: rng.randint(0, len(lines[row]))]
        else:
            lines[row] = rng.choice(WORDS)
        text = "\n".join(lines)
    return text


def test_two_thousand_mutations():
    """No traceback; each is a crystal or one line; pymatgen sees the same crystal."""
    rng = random.Random(14)
    read = compared = 0
    reasons: list[str] = []
    different: dict[str, int] = {}
    for number in range(2000):
        text = mutated(SEEDS[number % len(SEEDS)], rng)
        record = Record("POSCAR", "x", "poscar", text.encode())
        try:
            crystal = parse(record)
        except BadStructure as error:
            reasons.append(str(error))
            continue
        read += 1
        assert np.isfinite(crystal.frac_coords).all()
        assert crystal.volume > 0
        reason = _differs(text, crystal)
        if reason is None:
            compared += 1
        else:
            different[reason] = different.get(reason, 0) + 1
    assert read + len(reasons) == 2000
    assert compared + sum(different.values()) == read
    assert not [r for r in reasons if "\n" in r or "cannot be read as poscar" in r]
    assert compared > 150
    assert different.keys() <= EXPLAINED, different


EXPLAINED = {
    # Dialects that neither reads: comments, flags, numbers without spaces, species that
    # continue on the next line. `test_dialects` has their values.
    "neither of the others reads it",
    # Comments, Fortran numbers, three factors: pymatgen stops, ASE reads the same.
    "pymatgen reads nothing, ASE the same",
    # The scale is a volume. pymatgen multiplies Cartesian coordinates by it, and ASE
    # inverts left-handed cells. Fractional coordinates do not depend on the scale.
    "pymatgen takes a volume for a length",
}


def _differs(text: str, crystal: Crystal) -> str | None:
    """Return how the others differ; None if pymatgen reads the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            first = Poscar.from_str(text, read_velocities=False).structure
            guessed = any("cannot be determined" in str(w.message) for w in caught)
        except Exception:
            first, guessed = None, True
        try:
            head = re.split(r"(?<=\d)\n\s*\n", text)[0]  # no velocities
            second = ase.io.read(io.StringIO(head), format="vasp")
        except Exception:
            second = None
    if not guessed:
        numbers = [site.specie.Z for site in first]
        if _same(crystal, numbers, first.lattice.matrix, first.frac_coords):
            return None
    elif second is not None and _same(
        crystal,
        second.numbers.tolist(),
        second.cell.array,
        second.get_scaled_positions(wrap=False),
    ):
        return "pymatgen reads nothing, ASE the same"
    elif second is None:
        return "neither of the others reads it"
    if _by_arithmetic(text, crystal):
        return "pymatgen takes a volume for a length"
    return "unexplained: " + text


def _by_arithmetic(text: str, crystal: Crystal) -> bool:
    """Whether fractions are right if the scale is a volume."""
    lines = text.split("\n")
    if not lines[1].strip().startswith("-"):
        return False
    vectors = np.array([line.split()[:3] for line in lines[2:5]], float)
    start = next(n for n, line in enumerate(lines[7:], 8) if line[:1] in ("C", "c"))
    places = [
        line.split()[:3] for line in lines[start : start + len(crystal.atomic_numbers)]
    ]
    volume = abs(float(lines[1].split()[0]))
    delta = np.array(places, float) @ np.linalg.inv(vectors) - crystal.frac_coords
    return np.isclose(crystal.volume, volume) and np.allclose(
        delta, np.rint(delta), atol=1e-6
    )


def _same(crystal: Crystal, numbers: list[int], cell, frac) -> bool:
    if numbers != crystal.atomic_numbers.tolist():
        return False
    delta = frac - crystal.frac_coords
    return np.allclose(cell, crystal.cell) and np.allclose(
        delta, np.rint(delta), atol=1e-6
    )
