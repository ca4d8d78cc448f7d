"""Teachers that a name stands for: models and formulas that need no file of ours."""

from __future__ import annotations

from collections.abc import Callable

from crysdistill.teachers.chgnet import CHGNetTeacher
from crysdistill.teachers.dispersion import DispersionTeacher
from crysdistill.teachers.electrostatics import EwaldTeacher
from crysdistill.teachers.ensemble import ENSEMBLE, EnsembleTeacher
from crysdistill.teachers.teacher import Teacher

LIVE: dict[str, Callable[[str], Teacher]] = {
    "chgnet": CHGNetTeacher,
    "dftd4": DispersionTeacher,
    "ewald": EwaldTeacher,
}
"""Teachers that answer for any crystal on any machine, where their package is
installed; each takes the text after the colon, which may be empty."""

NAMED: dict[str, Callable[[str], Teacher]] = {**LIVE, ENSEMBLE: EnsembleTeacher}
"""All teachers with a name; an ensemble also needs the files of its members."""
