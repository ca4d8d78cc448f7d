"""Objective: predict how often two atoms of a crystal are neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives.objective import (
    Embedded,
    Objective,
    Totals,
    balanced_weights,
    full_precision,
    mean_over_ranks,
    ratio,
)
from crysdistill.objectives.pairs import (
    CLASSES,
    PairBlock,
    Pairs,
    all_pairs,
    sampled_pairs,
)
from crysdistill.objectives.views import masked_or_clean
from crysdistill.ranks import sum_over_ranks

__all__ = ["Connectivity"]

PAIRS_AT_ONCE = 1 << 20
"""Pairs whose logits are held at once; for more, the backward pass recomputes them."""

BINS = 1000
"""Bins of probability from which the AUROC is computed."""

_PARTNERS_AT_ONCE = 12
"""Second atoms that are multiplied with one first atom in a single product."""


class Connectivity(Objective):
    """Predict from two atom embeddings how many edges lead from atom j to atom i.

    The logits of an ordered pair are M (h_i^T W h_j + b) + c with a bilinear form W of
    six slices and a 6 x 6 matrix M, on L2-normalised embeddings h. The classes are 0,
    1, ..., 4 and "5 or more" edges. The loss is a class-weighted mean of their negative
    log-likelihood. CrysGNN takes every ordered pair, i = j included, and weighs
    "not connected" by 0.1, so that the cost and the weight of this class grow with the
    square of the number of atoms. The defaults take every connected pair and as many
    others (`sampled_pairs`), at a cost linear in atoms. They weigh a class by (its
    pairs in the batch)^-balance.

    Numbers, always on sampled pairs of the validation crystals: `edge_f1` of
    "connected or not", whose chance level calls every pair connected (hard to beat,
    since half of the pairs are); and `edge_auroc`, how often a connected pair gets a
    higher probability of being connected than an unconnected one. Neither can be
    perfect: atoms that a symmetry maps onto each other have equal embeddings.

    Source: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892.

    Args:
        encoder_width: F, the width of the embeddings.
        pairs: `sampled` or `all`.
        weights: `balanced`, or `published` for (0.1, 1, 1, 1, 1, 1).
        balance: 0 weighs balanced classes equally, 1 gives them equal shares.
        mask_fraction: the chance that an atom's element is hidden from the encoder; 0,
            as in CrysGNN, hides none.
        normalize: whether the decoder sees embeddings of length one; in CrysXPP it
            sees them unscaled.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "connectivity"
    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        "pairs": "all",
        "weights": "published",
        "mask_fraction": 0.0,
    }

    published_weights: Tensor

    def __init__(
        self,
        encoder_width: int,
        *,
        pairs: Literal["sampled", "all"] = "sampled",
        weights: Literal["balanced", "published"] = "balanced",
        balance: float = 0.5,
        mask_fraction: float = 0.15,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.views = (masked_or_clean(mask_fraction),)
        self.normalize = normalize
        for name, value, known in (
            ("pairs", pairs, ("sampled", "all")),
            ("weights", weights, ("balanced", "published")),
        ):
            if value not in known:
                raise InputError(
                    f"`{name}` is {value!r} but must be one of {', '.join(known)}"
                    f"{did_you_mean(str(value), known)}"
                )
        self.pairs = pairs
        self.weights = weights
        self.balance = balance
        weight = balanced_weights(torch.zeros(CLASSES), balance)
        weight[0] = 0.1
        self.register_buffer("published_weights", weight, persistent=False)  # (6,)
        self.bilinear = nn.Bilinear(encoder_width, encoder_width, CLASSES)
        self.mix = nn.Linear(CLASSES, CLASSES)
        self.totals = Totals(both=1, said=1, connected=BINS, others=BINS)

    def _atoms(self, seen: tuple[Embedded, ...]) -> Tensor:
        atoms = seen[0].atoms
        return F.normalize(atoms, dim=1) if self.normalize else atoms

    def forward(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> Tensor:
        """Return the weighted mean negative log-likelihood of the pairs, in nats."""
        h = self._atoms(seen)  # (N, F)
        if self.pairs == "sampled":
            chosen = sampled_pairs(batch, seed)
            logits = self._logits_of(chosen, h)
            weight = self._class_weights(torch.bincount(chosen.labels, minlength=6))
            total = F.cross_entropy(
                logits, chosen.labels, weight.to(logits.dtype), reduction="sum"
            )
            return mean_over_ranks(total, weight[chosen.labels].sum())
        products, bias = self._products(h)
        blocks = list(all_pairs(batch, PAIRS_AT_ONCE))
        counts = torch.zeros(CLASSES, dtype=torch.int64, device=h.device)
        for block in blocks:
            counts = counts + _count(block.labels)
        weight = self._class_weights(counts)
        # This connects the loss to all weights even if this rank has no pairs.
        total = 0.0 * (products.sum() + bias.sum()).to(weight.dtype)
        for block in blocks:
            arguments = (products, bias, h, block, weight)
            if len(blocks) > 1 and torch.is_grad_enabled():
                part = checkpoint(_block_loss, *arguments, use_reentrant=False)
            else:
                part = _block_loss(*arguments)
            total = total + part
        return mean_over_ranks(total, (counts * weight).sum())

    def update(
        self, seen: tuple[Embedded, ...], batch: CrystalBatch, seed: int
    ) -> None:
        """Add a validation batch to the numbers."""
        chosen = sampled_pairs(batch, seed)
        logits = self._logits_of(chosen, self._atoms(seen))
        connected = chosen.labels > 0
        p = logits[:, 1:].logsumexp(dim=1) - logits[:, 0]
        p = p.sigmoid()  # p(1) + ... + p(5)
        said = p > 0.5
        shelf = (p * BINS).long().clamp(0, BINS - 1)
        self.totals.update(
            both=(said & connected).sum(),
            said=said.sum(),
            connected=torch.bincount(shelf[connected], minlength=BINS),
            others=torch.bincount(shelf[~connected], minlength=BINS),
        )

    def compute(self) -> dict[str, float]:
        """Return F1 score and AUROC of edges, each beside its chance level."""
        sums = self.totals.compute()
        connected, others = sums["connected"], sums["others"]
        n, m = connected.sum(), others.sum()
        below = others.cumsum(0) - others
        # Twice the pairs of pairs in the right order; those in one bin count half.
        ordered = (connected * (2 * below + others)).sum()
        return {
            "edge_f1": ratio(2 * sums["both"], sums["said"] + n),
            "edge_f1_chance": ratio(2 * n, 2 * n + m),
            "edge_auroc": ratio(ordered, 2 * n * m),
            "edge_auroc_chance": ratio(n * m, 2 * n * m),
        }

    def _class_weights(self, counts: Tensor) -> Tensor:
        """Return the weight of each class, (6,), from its pairs in the batch."""
        if self.weights == "published":
            return self.published_weights
        return balanced_weights(sum_over_ranks(counts), self.balance)

    def _products(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return M W applied to the first atoms, (N, 6, F), and the bias (6,).

        h_i^T (M W) costs one matrix product per atom and none per pair. Each pair then
        needs only a product of two short vectors. Because M is folded into W, there is
        one tensor of logits instead of two.
        """
        form = torch.einsum("km,mfg->fkg", self.mix.weight, self.bilinear.weight)
        bias = F.linear(self.bilinear.bias, self.mix.weight, self.mix.bias)  # (6,)
        products = h @ form.flatten(1)  # (N, 6 F)
        return products.unflatten(1, (CLASSES, -1)), bias

    def _logits_of(self, pairs: Pairs, h: Tensor) -> Tensor:
        """Return the logits of listed pairs, (P, 6)."""
        products, bias = self._products(h)
        # The pairs of each first atom are cut into segments of twelve. A pair then
        # costs one gathered row of F numbers, and a segment one of 6 F. The total is
        # linear in pairs, however unevenly atoms share them.
        width = _PARTNERS_AT_ONCE
        segments = (pairs.counts + width - 1) // width  # (N,)
        owner = torch.repeat_interleave(segments)  # (S,), the first atom
        starts = pairs.counts.cumsum(0) - pairs.counts
        segment_starts = segments.cumsum(0) - segments
        place = torch.arange(len(pairs.first), device=h.device)
        place = place + (segment_starts * width - starts)[pairs.first]  # (P,)
        partner = pairs.second.new_zeros(len(owner) * width)
        partner[place] = pairs.second
        seconds = h.index_select(0, partner).unflatten(0, (-1, width))  # (S, 12, F)
        firsts = products.index_select(0, owner)  # (S, 6, F)
        scores = seconds @ firsts.transpose(1, 2)  # (S, 12, 6)
        scores = scores.flatten(0, 1).index_select(0, place)  # (P, 6)
        return full_precision(scores + bias)


def _count(labels: Tensor) -> Tensor:
    """Return how often each class occurs, (6,), ignoring -1."""
    return torch.bincount(labels.flatten() + 1, minlength=CLASSES + 1)[1:]


def _block_loss(
    products: Tensor, bias: Tensor, h: Tensor, block: PairBlock, weight: Tensor
) -> Tensor:
    """Return the weighted sum of negative log-likelihoods over a block of pairs."""
    g, rows = block.first.shape
    firsts = products.index_select(0, block.first.flatten())  # (g R, 6, F)
    firsts = firsts.view(g, rows * CLASSES, -1)  # (g, R 6, F)
    seconds = h.index_select(0, block.second.flatten()).view(g, -1, h.shape[1])
    scores = firsts @ seconds.transpose(1, 2)  # (g, R 6, S)
    scores = scores.view(g, rows, CLASSES, -1) + bias.unsqueeze(1)
    scores = full_precision(scores)  # (g, R, 6, S)
    label = block.labels.long().clamp(min=0)
    right = scores.gather(2, label.unsqueeze(2)).squeeze(2)  # (g, R, S)
    nll = scores.logsumexp(dim=2) - right
    return (nll * weight[label] * (block.labels >= 0)).sum()
