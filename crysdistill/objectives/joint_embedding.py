"""Objective: predict the embeddings of hidden atoms in the full crystal."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.layers.settings import positive
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    full_precision,
    mean_over_ranks,
)
from crysdistill.objectives.spread import (
    lacking_variance,
    overlap_of_columns,
    standardized,
)
from crysdistill.objectives.views import Clean, MaskedAtoms, masked_or_clean
from crysdistill.ranks import gather_rows, world_size

__all__ = ["JointEmbedding"]

_UNIT = 1 << 12  # embeddings are judged in fixed point: whole numbers of 1 / 4096
_LEAST_VARIANCE = 1e-6


class JointEmbedding(Objective):
    """Predict the embeddings that hidden atoms have when nothing is hidden.

    A predictor maps the embedding of a hidden atom to its embedding in the clean view,
    standardised over the atoms of the batch. No gradient flows through this target. Two
    terms keep the clean embeddings from collapsing: the shortfall of their deviations
    from 1, and the squared correlations of their columns. The loss is the mean squared
    error, which is 1 if every answer is the mean, plus the two weighted terms.

    Numbers: `joint_embedding_r2`, the explained share of the variance of the hidden
    atoms' clean embeddings, averaged over the columns that vary; its chance level, 0,
    always answers the mean. `joint_embedding_rank`, the effective rank of the clean
    embeddings over their width; its chance level has all of them on one axis.

    Sources: M. Assran et al., CVPR 2023, arXiv:2301.08243 (I-JEPA); A. Baevski et al.,
    ICML 2022, arXiv:2202.03555 (data2vec); the two terms, A. Bardes et al., ICLR 2022,
    arXiv:2105.04906, Eqs. 1 to 4; effective rank, O. Roy and M. Vetterli, EUSIPCO
    2007, p. 606.

    Differs from the papers:

    - The encoder itself embeds the clean view, instead of a second encoder whose
      weights follow slowly; hence the two terms against collapse.
    - Correlations replace covariances, so that embeddings may have any scale above 1.
    - Targets are embeddings after the last convolution, not a mean of several layers.

    Args:
        encoder_width: F, the width of the embeddings.
        mask_fraction: the chance that an atom is hidden.
        variance: the weight of the variance term.
        covariance: the weight of the correlations.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "joint_embedding"

    def __init__(
        self,
        encoder_width: int,
        *,
        mask_fraction: float = 0.15,
        variance: float = 1.0,
        covariance: float = 0.04,
    ) -> None:
        super().__init__()
        hidden = masked_or_clean(mask_fraction)
        if not isinstance(hidden, MaskedAtoms):
            raise InputError(
                "`mask_fraction` is 0 but must be positive: the targets are the "
                "embeddings of hidden atoms"
            )
        positive(variance=variance, covariance=covariance)
        self.views = (hidden, Clean())
        self.weights = variance, covariance
        self.predictor = nn.Sequential(
            nn.Linear(encoder_width, encoder_width),
            nn.SiLU(),
            nn.Linear(encoder_width, encoder_width),
        )
        names = ("said", "said_squares", "wanted", "wanted_squares", "both")
        self.totals = Totals(
            count=1,
            atoms=1,
            sums=encoder_width,
            products=encoder_width**2,
            **dict.fromkeys(names, encoder_width),
        )

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the prediction error plus the two weighted terms."""
        said, asked = self._predict(seen[0])  # (n, F), (n,)
        rows, first = gather_rows(full_precision(seen[1].atoms))  # (N of all, F)
        wanted = standardized(rows.detach())[first + asked]  # (n, F)
        squares = (said - wanted).square().sum()
        error = mean_over_ranks(squares, torch.full_like(squares, said.numel()))
        variance, covariance = self.weights
        with torch.autocast(rows.device.type, enabled=False):
            spread = variance * lacking_variance(rows)
            spread = spread + covariance * overlap_of_columns(standardized(rows))
        return error + spread / world_size()

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers, in fixed point."""
        said, asked = self._predict(seen[0])
        clean = _rounded(seen[1].atoms)  # (N, F)
        p, t = _rounded(said), clean[asked]
        device = clean.device
        # Sums of products of whole numbers are exact in any order.
        self.totals.update(
            count=torch.tensor(len(t), device=device),
            atoms=torch.tensor(len(clean), device=device),
            said=p.sum(dim=0).long(),
            said_squares=p.square().sum(dim=0).long(),
            wanted=t.sum(dim=0).long(),
            wanted_squares=t.square().sum(dim=0).long(),
            both=(p * t).sum(dim=0).long(),
            sums=clean.sum(dim=0).long(),
            products=(clean.T @ clean).flatten().long(),
        )

    def compute(self) -> dict[str, float]:
        """Return R2 and effective rank, each beside its chance level."""
        sums = {name: x.double() for name, x in self.totals.compute().items()}
        width = len(sums["sums"])
        return {
            "joint_embedding_r2": _explained(sums),
            "joint_embedding_r2_chance": 0.0,
            "joint_embedding_rank": _effective_rank(sums) / width,
            "joint_embedding_rank_chance": 1 / width,
        }

    def _predict(self, masked: Embedded) -> tuple[Tensor, Tensor]:
        """Return the predictions for hidden atoms, (n, F), and their indices, (n,)."""
        asked = masked.batch.masked_atoms.nonzero().squeeze(1)
        return full_precision(self.predictor(masked.atoms[asked])), asked


def _rounded(x: Tensor) -> Tensor:
    """Return whole numbers of units, in double precision."""
    return (x.double() * _UNIT).round()


def _explained(sums: dict[str, Tensor]) -> float:
    """Return R2 of standardised targets, from sums over all batches.

    With t the targets, of mean m and deviation s, and p the prediction of (t - m) / s:
    1 - mean (p - (t - m) / s)^2 for each column, averaged over columns.
    """
    n = sums["count"].clamp(min=1)
    p, pp, t, tt, pt = (
        sums[name] / n
        for name in ("said", "said_squares", "wanted", "wanted_squares", "both")
    )
    p, t = p / _UNIT, t / _UNIT
    pp, tt, pt = pp / _UNIT**2, tt / _UNIT**2, pt / _UNIT**2
    variance = tt - t.square()  # (F,)
    varies = variance > _LEAST_VARIANCE
    if not varies.any():
        return float("nan")
    together = (pt - p * t) / variance.clamp(min=_LEAST_VARIANCE).sqrt()
    return (2 * together - pp)[varies].mean().item()


def _effective_rank(sums: dict[str, Tensor]) -> float:
    """Return exp(entropy of the singular values' shares) of the centred embeddings."""
    n, width = sums["atoms"].clamp(min=1), len(sums["sums"])
    mean = sums["sums"] / n / _UNIT
    moments = sums["products"].view(width, width) / n / _UNIT**2
    variances = torch.linalg.eigvalsh(moments - torch.outer(mean, mean)).clamp(min=0)
    singular = variances.masked_fill(variances < _LEAST_VARIANCE, 0.0).sqrt()
    if not singular.any():
        return float("nan")
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()
