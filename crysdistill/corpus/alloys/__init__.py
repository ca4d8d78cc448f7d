"""A corpus of alloys that needs no download: real structure types, real physics."""

from crysdistill.corpus.alloys.alloys import alloy_corpus, demo_sets, prototype_of
from crysdistill.corpus.alloys.emt import METALS, PROPERTIES, label_alloys
from crysdistill.corpus.alloys.prototypes import prototypes

__all__ = [
    "METALS",
    "PROPERTIES",
    "alloy_corpus",
    "demo_sets",
    "label_alloys",
    "prototype_of",
    "prototypes",
]
