"""Features of crystals for controls that train no network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from crysdistill.encoders import Encoder
from crysdistill.graphs.batch import CrystalBatch, composition, mean_over_atoms
from crysdistill.objectives.targets import FAMILIES
from crysdistill.objectives.targets.elements import PROPERTIES, property_table
from crysdistill.objectives.targets.surroundings import Surroundings
from crysdistill.structures.elements import MAX_ATOMIC_NUMBER
from crysdistill.transfer.features import CrystalFeatures

_ELEMENTS = MAX_ATOMIC_NUMBER + 1
_NORMS = (2, 3, 5, 7, 10)


def onehot(batch: CrystalBatch) -> Tensor:
    """Return the fraction of every element, (B, 101)."""
    return composition(batch, _ELEMENTS)


@cache
def _properties() -> Tensor:
    """Return the properties of the elements, (101, P); a gap is the median element."""
    table = property_table(tuple(PROPERTIES))
    middle = table.nanmedian(dim=0).values
    return torch.where(torch.isnan(table), middle, table).double()


def magpie(batch: CrystalBatch) -> Tensor:
    """Return statistics of the elements in a composition, (B, 6 P + 6).

    For each property of the elements: weighted mean, mean absolute deviation, smallest,
    largest, range, and that of the most frequent element. Then the number of elements
    and the p-norms of their fractions.

    Source: L. Ward et al., npj Comput. Mater. 2, 16028 (2016),
    doi:10.1038/npjcompumats.2016.28.

    Differs from the paper: the properties are those of `PROPERTIES`, not Magpie's 22;
    their electrons stand for its fractions of valence orbitals.
    """
    share = composition(batch, _ELEMENTS).double()  # (B, 101)
    table = _properties().to(share.device)  # (101, P)
    mean = share @ table  # (B, P)
    there = (share > 0)[:, :, None]  # (B, 101, 1)
    deviation = (share[:, :, None] * (table - mean[:, None]).abs()).sum(dim=1)
    least = torch.where(there, table, torch.inf).amin(dim=1)
    most = torch.where(there, table, -torch.inf).amax(dim=1)
    mode = table[share.argmax(dim=1)]
    norms = [share.pow(p).sum(dim=1).pow(1 / p) for p in _NORMS]
    count = (share > 0).sum(dim=1).double()
    alone = torch.stack([count, *norms], dim=1)  # (B, 6)
    return torch.cat([mean, deviation, least, most, most - least, mode, alone], dim=1)


def structure(batch: CrystalBatch) -> Tensor:
    """Return a fingerprint of composition and structure, without any learning.

    The families of the objective `bank`, as mean and deviation over the atoms, beside
    the composition: radial, angular, coordination, orbital and density terms.
    """
    seen = Surroundings(batch)
    parts = [composition(batch, _ELEMENTS)]
    for kind in FAMILIES.values():
        found = kind().to(batch.cell.device).compute(seen)
        found = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
        if kind.level == "crystals":
            parts.append(found)
            continue
        mean = mean_over_atoms(found, batch)  # (B, K)
        square = mean_over_atoms((found - mean[batch.batch]).square(), batch)
        parts += [mean, square.sqrt()]
    return torch.cat(parts, dim=1)


DESCRIPTORS: dict[str, Callable[[CrystalBatch], Tensor]] = {
    "onehot": onehot,
    "magpie": magpie,
    "structure": structure,
}
"""Features that need no encoder, by name."""


@torch.no_grad()
def describe(
    batches: Iterable[CrystalBatch], features: str, encoder: Encoder | None
) -> tuple[np.ndarray, Tensor]:
    """Return features (n, D) float64 and labels (n, T) of labelled batches.

    Args:
        batches: labelled batches.
        features: one of `DESCRIPTORS`, or `encoder`.
        encoder: the frozen encoder, in eval mode, for `encoder`.
    """
    found, labels = [], []
    embedded = CrystalFeatures(encoder) if encoder is not None else None
    for batch in batches:
        if embedded is not None and encoder is not None:
            x = embedded.to(batch.cell.device)(encoder(batch, layers=True), batch)
        else:
            x = DESCRIPTORS[features](batch)
        found.append(x.double().cpu())
        labels.append(batch.targets.cpu())
    return torch.cat(found).numpy(), torch.cat(labels)
