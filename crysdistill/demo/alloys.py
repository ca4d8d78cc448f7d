"""A corpus of alloys that needs no download: real structure types, real physics.

The structures are prototypes of the AFLOW library, as pymatgen bundles them, whose
sites are decorated with the seven metals that effective-medium theory (EMT)
describes. EMT also gives their labels: the formation energy and the bulk modulus at
the equilibrium volume. Everything follows from a seed: each machine makes the same
crystals, and a shorter list is the beginning of a longer one.

Sources: prototypes: M. J. Mehl et al., Comput. Mater. Sci. 136, S1 (2017),
doi:10.1016/j.commatsci.2017.01.017, and D. Hicks et al., Comput. Mater. Sci. 161, S1
(2019), doi:10.1016/j.commatsci.2018.10.043. EMT: K. W. Jacobsen, P. Stoltze and J. K.
Nørskov, Surf. Sci. 366, 394 (1996), doi:10.1016/0039-6028(96)00816-3, as in ASE.
"""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np

from crysdistill.demo.emt import (
    atomic_volumes,
    label_alloys,
    rounded,
)
from crysdistill.demo.structure_types import Prototype, decorations, prototypes
from crysdistill.errors import InputError
from crysdistill.structures.crystal import Crystal
from crysdistill.structures.elements import atomic_numbers_by_symbol

VOLUME_JITTER = 0.02
"""The volume varies evenly by up to this share, so that composition and prototype
alone do not determine it."""


def prototype_of(material_id: str) -> str:
    """Return the prototype's name from an id such as `A15-AlNi3-0123`.

    Raises:
        InputError: the id was not made here.
    """
    match = re.fullmatch(r"([^-]+)-[^-]+-\d+", material_id)
    if not match:
        raise InputError(
            f"`{material_id}` is no id of this corpus, such as `A15-AlNi3-0123`"
        )
    return match[1]


def alloy_corpus(count: int, seed: int, max_atoms: int = 16) -> list[Crystal]:
    """Return the first `count` alloys of the sequence for `seed`.

    The sequence proceeds in rounds: each round takes one new decoration (2-4 elements)
    of every prototype that has any left, in shuffled order. No structure occurs twice,
    not even with its sites renamed. Cells are estimates: the atomic volumes of the
    metals, times the expansion of the prototype, times a jitter.

    Args:
        count: the number of alloys.
        seed: the seed of the sequence.
        max_atoms: prototypes with larger primitive cells are left out.

    Raises:
        InputError: an argument is out of range, or there are fewer decorations than
            `count`.
    """
    _at_least("count", count, 1)
    _at_least("max_atoms", max_atoms, 2)
    sequence = []
    for prototype in prototypes(max_atoms):
        shuffled = sorted(
            (_digest(seed, prototype, elements), elements)
            for elements in decorations(prototype)
        )
        sequence += [
            (turn, digest, prototype, elements)
            for turn, (digest, elements) in enumerate(shuffled)
        ]
    if count > len(sequence):
        raise InputError(
            f"`count` is {count} but there are {len(sequence)} alloys of at most "
            f"{max_atoms} atoms; increase `max_atoms`"
        )
    sequence.sort(key=lambda entry: entry[:2])
    return [
        _decorate(prototype, elements, digest, serial)
        for serial, (_, digest, prototype, elements) in enumerate(sequence[:count])
    ]


def demo_sets(
    seed: int, corpus_size: int, dataset_size: int, workers: int = 1
) -> tuple[list[Crystal], list[Crystal]]:
    """Return an unlabelled corpus and a labelled dataset with no structure in common.

    Both come from one sequence of `alloy_corpus`. The dataset is its beginning, so that
    it holds every prototype about equally often and does not depend on `corpus_size`.
    The corpus follows. Dataset structures are at their EMT equilibrium volume. Corpus
    structures keep their estimated cells, which cost nothing: they differ from
    equilibrium by 1.6 % in length (one standard deviation), and pretraining on
    equilibrium cells was no better overall.

    Args:
        seed: the seed of the sequence.
        corpus_size: structures without labels.
        dataset_size: structures with labels.
        workers: processes that compute labels.

    Raises:
        InputError: an argument is out of range.
    """
    _at_least("corpus_size", corpus_size, 1)
    _at_least("dataset_size", dataset_size, 1)
    dataset: list[Crystal] = []
    used = 0
    while len(dataset) < dataset_size:  # repeats only if alloys got no label
        wanted = dataset_size - len(dataset)
        dataset += label_alloys(alloy_corpus(used + wanted, seed)[used:], workers)
        used += wanted
    return alloy_corpus(used + corpus_size, seed)[used:], dataset


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"`{name}` is {value} but must be at least {least}")


def _digest(seed: int, prototype: Prototype, elements: tuple[str, ...]) -> bytes:
    """Return 16 bytes for shuffling and jitter, the same on every machine.

    NumPy may change its random streams between versions.
    """
    text = f"{seed} {prototype.name} {' '.join(elements)}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _decorate(
    prototype: Prototype, elements: tuple[str, ...], digest: bytes, serial: int
) -> Crystal:
    """Return the prototype with elements on its sites and an estimated volume."""
    counts = np.bincount(prototype.kinds).tolist()  # K numbers
    share = int.from_bytes(digest[8:], "big") / 2**64  # the order took the first half
    jitter = 1 + VOLUME_JITTER * (2 * share - 1)
    decoration = list(zip(elements, counts, strict=True))
    volume = sum(atomic_volumes()[element] * count for element, count in decoration)
    scale = (volume / sum(counts) * prototype.expansion * jitter) ** (1 / 3)
    divisor = math.gcd(*counts)
    formula = "".join(
        f"{element}{count // divisor if count > divisor else ''}"
        for element, count in decoration
    )
    numbers = np.array([atomic_numbers_by_symbol()[element] for element in elements])
    return Crystal(
        f"{prototype.name}-{formula}-{serial:04d}",
        numbers[prototype.kinds].astype(np.uint8),
        prototype.frac_coords.copy(),
        rounded(prototype.cell * scale),
    )
