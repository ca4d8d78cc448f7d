"""Which crystals of a corpus also stand in a dataset."""

from crysdistill.corpus.overlap.report import CrystalList, Overlap, find_overlap

__all__ = ["CrystalList", "Overlap", "find_overlap"]
