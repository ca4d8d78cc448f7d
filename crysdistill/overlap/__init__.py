"""Which crystals of a corpus are also in a dataset."""

from crysdistill.overlap.finding import find_overlap, find_overlaps
from crysdistill.overlap.in_memory import CrystalList
from crysdistill.overlap.report import Overlap

__all__ = ["CrystalList", "Overlap", "find_overlap", "find_overlaps"]
