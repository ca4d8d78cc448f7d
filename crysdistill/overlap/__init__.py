"""Which crystals of a corpus also stand in a dataset."""

from crysdistill.overlap.report import CrystalList, Overlap, find_overlap

__all__ = ["CrystalList", "Overlap", "find_overlap"]
