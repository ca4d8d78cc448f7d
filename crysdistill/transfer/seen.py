"""What weights have seen of a dataset: is it clean, transductive, or not known."""

from __future__ import annotations

from typing import Literal

from crysdistill.store.checks import find_check
from crysdistill.transfer.weights import WeightsHeader

Word = Literal["clean", "transductive", "unknown"]


def seen(before: WeightsHeader | None, dataset: str) -> tuple[Word, str]:
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
