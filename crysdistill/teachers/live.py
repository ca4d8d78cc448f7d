"""Teachers that answer for any crystal: models and formulas, no file of ours."""

from __future__ import annotations

from collections.abc import Callable

from crysdistill.teachers.chgnet import CHGNetTeacher
from crysdistill.teachers.dispersion import DispersionTeacher
from crysdistill.teachers.electrostatics import EwaldTeacher
from crysdistill.teachers.teacher import Teacher

LIVE: dict[str, Callable[[str], Teacher]] = {
    "chgnet": CHGNetTeacher,
    "dftd4": DispersionTeacher,
    "ewald": EwaldTeacher,
}
"""Teachers by name, where their package is installed; each takes the text after the
colon, which may be empty."""
