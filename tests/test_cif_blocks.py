"""The blocks of a CIF, its encodings, and CIF 2.0."""

from __future__ import annotations

import numpy as np
import pytest

from crysdistill.errors import BadStructure
from crysdistill.structures.cif import read_cif, split_cif

from .test_cif_statements import FM3M, NACL, cell, read, sites


def test_blocks_of_a_file():
    template = cell(name="template") + sites("? ? ? ? ?\n. . . . .")
    bare = cell(name="bare") + FM3M
    talk = "data_global\n_journal_year 1999\n"
    whole = cell(name="whole") + FM3M + NACL
    parts = split_cif((talk + template + whole + bare).encode())
    assert [(part.name, bool(part.problem)) for part in parts] == [
        ("whole", False),
        ("bare", True),
    ]
    assert parts[1].problem == (
        "has a cell but no atoms (`_atom_site_fract_x`); add them or remove the block"
    )
    assert len(read_cif(parts[0].content, "x").atomic_numbers) == 8
    assert split_cif(whole.encode()) == []
    sixteen = split_cif((whole + cell(name="b") + NACL).encode("utf-16"))
    assert [part.name for part in sixteen] == ["whole", "b"]


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings(encoding, line_end):
    text = "# Müller\n" + cell() + FM3M + NACL
    data = text.replace("\n", line_end).encode(encoding)
    np.testing.assert_array_equal(
        read_cif(data, "x").frac_coords, read(text).frac_coords
    )


def test_what_word_processors_and_dos_leave():
    text = cell() + FM3M + NACL.replace("Na 0", "Na\u00a00").replace("0.5", "\u22120.5")
    assert len(read(text + "\x1a").atomic_numbers) == 8
    with pytest.raises(BadStructure, match="starts like UTF-16 but is not: damaged or"):
        read_cif(b"\xff\xfe" + text.encode("utf-16-le")[:401], "x")


@pytest.mark.parametrize(
    "extra",
    ['_a """b "c" d"""\n', "_a [1 2 3]\n", "_a {'b':1 'c':2}\n", "_a '''b c'''\n"],
)
def test_cif_2_is_read_or_called_so(extra):
    mark = "#\\#CIF_2.0\n"
    assert len(read(mark + cell() + FM3M + NACL).atomic_numbers) == 8
    for text in (mark + cell() + FM3M + extra + NACL, cell() + FM3M + extra + NACL):
        try:
            reason = ""
            assert len(read(text).atomic_numbers) == 8
        except BadStructure as error:
            reason = str(error)
        assert not reason or "CIF 2.0 syntax at line" in reason
        assert "cut short" not in reason
