"""A corpus of alloys that needs no download: real structure types, real physics."""

from crysdistill.demo.alloys import alloy_corpus, demo_sets, prototype_of
from crysdistill.demo.emt import METALS, PROPERTIES, label_alloys
from crysdistill.demo.structure_types import prototypes

__all__ = [
    "METALS",
    "PROPERTIES",
    "alloy_corpus",
    "demo_sets",
    "label_alloys",
    "prototype_of",
    "prototypes",
]
