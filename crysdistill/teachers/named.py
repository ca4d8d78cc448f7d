"""Teachers that a name stands for."""

from __future__ import annotations

from collections.abc import Callable

from crysdistill.teachers.ensemble import ENSEMBLE, EnsembleTeacher
from crysdistill.teachers.live import LIVE
from crysdistill.teachers.teacher import Teacher

NAMED: dict[str, Callable[[str], Teacher]] = {**LIVE, ENSEMBLE: EnsembleTeacher}
"""All teachers with a name; an ensemble also needs the files of its members."""
