"""Relational losses: distances and angles between the embeddings of a batch.

They need no projector, since distances and angles do not depend on the width.

Source: W. Park, D. Kim, Y. Lu and M. Cho, CVPR 2019, 3967,
doi:10.1109/CVPR.2019.00409: distances over their mean, cosines of angles, Huber's loss
of their differences, and angles with twice the weight of distances.

Differs from the paper: each part is divided by the loss of a student whose distances
(or cosines) are all equal to the mean. It is then about 1 for a student that has
learned nothing, as the standardised losses are. Relations between atoms are those
within a crystal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import gather_rows, sum_over_ranks

_LEAST = 1e-3  # limits the steps from batches whose relations hardly vary
_CLOSE = 1e-3  # of the mean distance
_TINY = torch.finfo(torch.float32).tiny


def crystal_relations(student: Tensor, teacher: Tensor, batch: CrystalBatch) -> Tensor:
    """Return the loss of distances and angles between the crystals of a batch.

    The memory for angles grows with the cube of the number of crystals: about 20 MB
    for 128 of them, and 1 GB for 512.

    Args:
        student: (B, F).
        teacher: (B, F'), of any width.
        batch: not used.

    Returns:
        A scalar; with several ranks this rank's share of it.
    """
    (mine, first), (theirs, _) = (gather_rows(x.float()) for x in (student, teacher))
    own = slice(first, first + len(student))
    others = 1 - torch.eye(len(mine), device=mine.device)  # (n, n)
    far = _share(_distances(mine)[own], _distances(theirs)[own], others[own])
    triples = others[own].unsqueeze(2) * others[own].unsqueeze(1) * others  # (B, n, n)
    angles = _share(_cosines(mine, own), _cosines(theirs, own), triples)
    return (far + 2 * angles) / 3


def atom_relations(student: Tensor, teacher: Tensor, batch: CrystalBatch) -> Tensor:
    """Return the loss of distances between the atoms of each crystal.

    Every crystal has the same weight, whatever its number of pairs; a crystal with one
    atom does not count.

    Args:
        student: (N, F).
        teacher: (N, F'), of any width.
        batch: the batch that assigns atoms to crystals.

    Returns:
        A scalar; with several ranks this rank's share of it.
    """
    i, j, weight = _pairs(batch)
    return _share(
        _over_mean(_between(student, i, j), weight),
        _over_mean(_between(teacher, i, j), weight),
        weight,
    )


def compared_crystals(
    student: Tensor, teacher: Tensor, batch: CrystalBatch
) -> tuple[Tensor, Tensor]:
    """Return the distances of all pairs of crystals over their mean, (P, 1) each."""
    pairs = torch.triu_indices(len(student), len(student), 1, device=student.device)
    found = [_distances(x.float())[*pairs].unsqueeze(1) for x in (student, teacher)]
    return found[0], found[1]


def compared_atoms(
    student: Tensor, teacher: Tensor, batch: CrystalBatch
) -> tuple[Tensor, Tensor]:
    """Return the distances of all pairs of atoms over their mean, (P, 1) each."""
    i, j, weight = _pairs(batch)
    found = [
        _over_mean(_between(x, i, j), weight).unsqueeze(1) for x in (student, teacher)
    ]
    return found[0], found[1]


def _distances(x: Tensor) -> Tensor:
    """Return all distances over their mean, (n, n)."""
    # Matrix products would be faster, but wrong for two nearly equal embeddings.
    found = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = found.sum() / max(1, len(x) * (len(x) - 1))
    return found / mean.clamp(min=_TINY)


def _cosines(x: Tensor, own: slice) -> Tensor:
    """Return the cosines of the angles at our own crystals, (B, n, n)."""
    to_all = x.unsqueeze(0) - x[own].unsqueeze(1)  # (B, n, F)
    length = torch.linalg.vector_norm(to_all, dim=2, keepdim=True)
    # Between two nearly equal embeddings the direction is noise, its gradient huge.
    mean = sum_over_ranks(length.sum()) / max(1, len(x) * (len(x) - 1))
    unit = to_all / length.clamp(min=(_CLOSE * mean).clamp(min=_TINY))
    return unit @ unit.transpose(1, 2)


def _pairs(batch: CrystalBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return both atoms of every pair within a crystal, and 1 / its number of pairs."""
    atoms = batch.ptr.diff()  # (B,)
    owner = batch.batch  # (N,)
    after = batch.ptr[1:][owner] - torch.arange(len(owner), device=owner.device) - 1
    i = torch.repeat_interleave(after)  # (P,), each with all later atoms of its crystal
    start = torch.cumsum(after, 0) - after
    j = i + 1 + torch.arange(len(i), device=i.device) - start[i]
    pairs = (atoms * (atoms - 1) / 2)[owner[i]]
    return i, j, 1 / pairs


def _between(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return the distance of each pair, (P,); its gradient is 0 at distance 0."""
    return torch.linalg.vector_norm(x.float()[i] - x.float()[j], dim=1)


def _over_mean(distances: Tensor, weight: Tensor) -> Tensor:
    """Return distances over their mean on all ranks; gradients include the mean's."""
    sums = torch.stack((weight @ distances, weight.sum())).unsqueeze(0)  # (1, 2)
    total = gather_rows(sums)[0].sum(dim=0)
    return distances * total[1] / total[0].clamp(min=_TINY)


def _share(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's share of the loss over the loss of the constant mean."""
    mean = _ratio((weight * teacher).sum(), weight.sum())
    total = sum_over_ranks((weight * _huber(mean, teacher)).sum())
    least = _LEAST * sum_over_ranks(weight.sum())
    wrong = (weight * _huber(student, teacher)).sum()
    return wrong / (total + least).clamp(min=_TINY)


def _huber(a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    return F.smooth_l1_loss(a, b, reduction="none")


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole over all ranks; 0 for 0 / 0."""
    part, whole = sum_over_ranks(part), sum_over_ranks(whole)
    return part / torch.where(whole > 0, whole, torch.ones_like(whole))
