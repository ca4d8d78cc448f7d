"""What weights have seen of a dataset: is it clean, transductive, or not known."""

from __future__ import annotations

from typing import Literal, Protocol

from crysdistill.store.checks import find_check
from crysdistill.transfer.weights import Provenance

Word = Literal["clean", "transductive", "unknown"]


class Learned(Protocol):
    """What is known of something that has learned: weights, or a foreign model."""

    @property
    def kind(self) -> str:
        """`encoder`, `predictor` for one that learned labels, or `foreign`."""

    @property
    def provenance(self) -> Provenance:
        """What it learned from, and under which licence."""


def seen(before: Learned | None, dataset: str) -> tuple[Word, str]:
    """Say whether weights were made without the crystals of a dataset.

    Args:
        before: of the weights that a run starts from or learns from; None where there
            are none.
        dataset: the `structures_hash` of the dataset.

    Returns:
        The word, and a sentence with it for results and reports.
    """
    if before is None:
        return "clean", "clean (no pretraining: nothing was seen but labels)"
    check = find_check(before.provenance.checks, dataset)
    if check is not None and check.kept:
        return (
            check.status,
            f"{check.statement}; hash of the overlap {check.overlap[:12]}",
        )
    if before.kind == "foreign":
        return "unknown", (
            f"unknown ({before.provenance.origin or 'a foreign model'}; nobody has "
            "compared its crystals with this dataset)"
        )
    if before.kind == "predictor":
        # Its labels may be those of any crystal, whatever its corpus was cleared of.
        return "unknown", (
            "unknown (the weights learned from labels, of crystals that nobody has "
            "compared with this dataset)"
        )
    if check is None:
        return "unknown", (
            "unknown (nobody has compared the corpus with this dataset; "
            "`exclude` it when pretraining)"
        )
    return check.status, f"{check.statement}; hash of the overlap {check.overlap[:12]}"
