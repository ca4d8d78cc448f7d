"""Structure types: each type and each of its decorations is listed once."""

from __future__ import annotations

import pytest

from crysdistill.demo.structure_types import decorations, prototypes


def test_smaller_cells_come_first_whatever_the_limit():
    names = [prototype.name for prototype in prototypes(16)]
    few = [prototype.name for prototype in prototypes(4)]
    assert 30 < len(few) < len(names)
    assert names[: len(few)] == few


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("B2", 21),  # equivalent sites: 7 * 6 / 2
        ("L1_0", 21),
        ("L1_2", 42),  # 7 * 6
        ("L2_1", 105),  # X2YZ with equivalent Y and Z: 7 * 6 * 5 / 2
        ("E2_1", 210),  # perovskite: 7 * 6 * 5
    ],
)
def test_equivalent_decorations_come_once(name, count):
    (prototype,) = [p for p in prototypes(16) if p.name == name]
    assert len(list(decorations(prototype))) == count


def test_one_structure_has_one_prototype():
    names = {prototype.name for prototype in prototypes(16)}
    assert len(names) == len(prototypes(16))
    assert {"B1", "B2", "B3", "B4", "L1_2", "A15", "C14", "C15"} <= names
    # pyrite also without symmetry; L1_2 also as tetragonal; 6H as zincblende
    assert not names & {"AB2_aP12_1_4a_8a", "D0_c", "B6"}
    # quartz and carbon monoxide are not alloys
    assert not names & {"A2B_hP9_152_c_a", "C8", "B21"}
