"""Objective: predict many numbers at once that follow from a crystal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.graphs.randomness import per_crystal_uniform
from crysdistill.objectives.explained import explained, fixed
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    full_precision,
)
from crysdistill.objectives.targets import FAMILIES, Family
from crysdistill.objectives.targets.surroundings import Surroundings
from crysdistill.objectives.views import masked_or_clean
from crysdistill.ranks import sum_over_ranks
from crysdistill.store.kept import kept
from crysdistill.store.store import Store

__all__ = ["Bank"]

_SAMPLE = 2000  # crystals from which means and deviations are computed
_AT_ONCE = 50  # crystals of that sample in one batch
_SAME = 1e-4  # a column that varies less than this is rounding noise


class Bank(Objective):
    """Regress families of targets from the embeddings of atoms and of crystals.

    Each step computes the targets from the unchanged crystals. It standardises them by
    mean and deviation over (at most 2,000) training crystals and clips them. Atoms
    whose element the view hides have targets too. The loss of a family is the mean
    squared error over the known targets, averaged over its columns: about 1 if every
    answer is the mean. Columns that do not vary in the corpus are left out.

    Numbers: for each family `bank_FAMILY_r2`, the explained share of the variance of
    its standardised targets. It is below 0 where the mean of the held-out crystals
    would be a better answer, and NaN where they do not vary. Its chance level, 0,
    always answers that mean.

    Sources: descriptors as targets, S. Jia et al., arXiv:2503.01227 (2025); clipping
    and a random share of targets, J. Burns et al., arXiv:2506.15792 (2025).

    Args:
        encoder_width: F, the width of the atom embeddings.
        crystal_width: F', the width of the crystal embeddings.
        families: the families and their weights in the loss; null takes all, each with
            weight 1. Of atoms: `radial`, counts of neighbours by kind and distance;
            `angular`, how they are arranged; `coordination`, coordination numbers,
            bond lengths, bond valences; `orbitals`, their valence orbitals;
            `densities`, embedded-atom densities; `charges`, charge taken from
            neighbours. Of crystals: `crystal`, density, packing, composition.
        mask_fraction: the chance that an atom's element is hidden from the encoder; 0
            hides none.
        share: the share of each family's columns, drawn at random, that a step learns.
        clip: the largest standardised target, in deviations.

    Raises:
        InputError: a family is unknown, or a setting is out of range.
    """

    name: ClassVar[str] = "bank"

    mean: Tensor
    deviation: Tensor
    owner: Tensor
    weights: Tensor

    def __init__(
        self,
        encoder_width: int,
        crystal_width: int,
        *,
        families: dict[str, float] | None = None,
        mask_fraction: float = 0.15,
        share: float = 1.0,
        clip: float = 6.0,
    ) -> None:
        super().__init__()
        weights = _checked(
            dict.fromkeys(FAMILIES, 1.0) if families is None else families
        )
        if not 0 < share <= 1:
            raise InputError(f"`share` is {share} but must be above 0 and at most 1")
        if not clip > 0:
            raise InputError(f"`clip` is {clip} but must be positive")
        self.views = (masked_or_clean(mask_fraction),)
        self.share, self.clip = share, clip
        # Atoms first, so that the columns of one level stand together.
        names = sorted(weights, key=lambda name: FAMILIES[name].level)
        self.families = nn.ModuleDict({name: FAMILIES[name]() for name in names})
        sizes = [len(family.columns) for family in self._members()]
        total = sum(sizes)
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        buffers = {
            "mean": torch.zeros(total),
            "deviation": torch.ones(total),
            "owner": owner,  # (K,), the family of each column
            "weights": torch.tensor([weights[name] for name in names]),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.decoders = nn.ModuleDict()
        for level, width in (("atoms", encoder_width), ("crystals", crystal_width)):
            size = sum(len(f.columns) for f in self._members() if f.level == level)
            if size:
                self.decoders[level] = nn.Sequential(
                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size)
                )
        self.totals = Totals(known=total, wrong=total, total=total, squares=total)

    def _members(self) -> Iterator[Family]:
        """Yield the families in the order of their columns."""
        for family in self.families.values():
            assert isinstance(family, Family)  # noqa: S101 - for the type checker
            yield family

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Find mean and deviation of every column over a sample of the corpus.

        From then on, runs save them.

        Raises:
            InputError: no target of a family varies.
        """
        drawn = np.random.default_rng(0).permutation(len(rows))[:_SAMPLE]
        sample = rows[np.sort(drawn)]
        found = []
        for family in self._members():
            key = {
                "what": "scale of a family of targets, version 1",
                "family": family.name,
                "columns": [column.name for column in family.columns],
                "rows": sample,
            }
            scale = kept(store, key, partial(_scale, family, store, sample))
            if np.isnan(scale["deviation"]).all():
                raise InputError(
                    f"no target of family `{family.name}` varies over the "
                    f"{len(sample):,} crystals looked at; leave it out of "
                    "`objectives.bank.families`"
                )
            found.append(scale)
        for name in ("mean", "deviation"):
            values = torch.from_numpy(np.concatenate([scale[name] for scale in found]))
            self.register_buffer(name, values, persistent=True)

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the mean squared error, averaged over columns, then over families."""
        wrong, counts = [], []
        for predicted, wanted, known in self._compare(seen[0], batch):
            wrong.append(((predicted - wanted) * known).square().sum(dim=0))  # (K',)
            counts.append(known.sum(dim=0))
        count = sum_over_ranks(torch.cat(counts).to(self.weights.dtype))  # (K,)
        asked = ((count > 0) & self._drawn(seed)).to(count.dtype)  # (K,)
        columns = torch.zeros_like(self.weights).index_add(0, self.owner, asked)
        weight = self.weights / self.weights.sum() / columns.clamp(min=1)  # a column's
        share = asked * weight[self.owner] / count.clamp(min=1)  # (K,)
        return (torch.cat(wrong) * share).sum()

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        sums: dict[str, list[Tensor]] = {name: [] for name in self.totals.names}
        for predicted, wanted, known in self._compare(seen[0], batch):
            wanted, off = wanted.double(), (predicted.double() - wanted) * known
            for name, entries in (
                ("wrong", off.square()),
                ("total", wanted),
                ("squares", wanted.square()),
            ):
                sums[name].append(fixed(entries).sum(dim=0))
            sums["known"].append(known.long().sum(dim=0))
        self.totals.update(**{name: torch.cat(parts) for name, parts in sums.items()})

    def compute(self) -> dict[str, float]:
        """Return the explained share of each family's variance."""
        sums = self.totals.compute()
        numbers: dict[str, float] = {}
        for number, name in enumerate(self.families):
            own = {key: value[self.owner == number] for key, value in sums.items()}
            numbers[f"bank_{name}_r2"] = explained(own, own["known"])
            numbers[f"bank_{name}_r2_chance"] = 0.0
        return numbers

    @torch.no_grad()
    def wanted(self, batch: CrystalBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return standardised targets, 0 where unknown, and a mask of the known ones.

        Returns:
            For each level, both (N or B, K'); the mask is bool.
        """
        around = Surroundings(batch)
        found: dict[str, list[Tensor]] = {}
        # Half precision would ruin positions and distances.
        with torch.autocast(batch.cell.device.type, enabled=False):
            for family in self._members():
                found.setdefault(family.level, []).append(family.compute(around))
        result, first = {}, 0
        for level, parts in found.items():
            raw = torch.cat(parts, dim=1)
            own = slice(first, first + raw.shape[1])
            first = own.stop
            standard = (raw - self.mean[own]) / self.deviation[own]
            known = standard.isfinite()
            standard = standard.clamp(-self.clip, self.clip).nan_to_num(0.0)
            result[level] = standard * known, known
        return result

    def _compare(
        self, embedded: Embedded, batch: CrystalBatch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield predictions, targets and the mask of known targets, level by level."""
        embeddings = {"atoms": embedded.atoms, "crystals": embedded.crystals}
        for level, (wanted, known) in self.wanted(batch).items():
            predicted = full_precision(self.decoders[level](embeddings[level]))
            yield predicted, wanted, known

    def _drawn(self, seed: int) -> Tensor:
        """Return which columns this step learns, (K,) bool: a share of each family."""
        if self.share == 1:
            return torch.ones_like(self.owner, dtype=torch.bool)
        # One draw that depends on no rank's crystals.
        nobody = torch.zeros(1, dtype=torch.int64, device=self.owner.device)
        draw = per_crystal_uniform(nobody, len(self.owner), seed, "bank columns")[0]
        drawn = []
        for number, family in enumerate(self._members()):
            own = draw[self.owner == number]
            most = max(1, round(self.share * len(family.columns)))
            drawn.append(own.argsort().argsort() < most)
        return torch.cat(drawn)


def _checked(families: Mapping[str, float]) -> dict[str, float]:
    """Refuse families that are not known, and weights that weigh nothing."""
    if not families:
        raise InputError("`families` is empty; name at least one")
    for name, weight in families.items():
        if name not in FAMILIES:
            raise InputError(
                f"unknown family {name!r}; choose one of {', '.join(FAMILIES)}"
                f"{did_you_mean(name, FAMILIES)}"
            )
        if not 0 < weight < math.inf:
            raise InputError(f"`families.{name}` is {weight} but must be positive")
    return {name: float(families[name]) for name in FAMILIES if name in families}


@torch.no_grad()
def _scale(family: Family, store: Store, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean and deviation of each column; NaN where it does not vary."""
    size = len(family.columns)
    count, total, squares = torch.zeros(3, size, dtype=torch.float64)
    for first in range(0, len(rows), _AT_ONCE):
        batch = store.batch(rows[first : first + _AT_ONCE])
        raw = family.compute(Surroundings(batch)).double()
        known = raw.isfinite()
        raw = raw.masked_fill(~known, 0.0)
        count += known.sum(dim=0)
        total += raw.sum(dim=0)
        squares += raw.square().sum(dim=0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    noise = _SAME * mean.abs().clamp(min=1.0)
    deviation[~(deviation > noise)] = torch.nan
    return {"mean": mean.float().numpy(), "deviation": deviation.float().numpy()}
