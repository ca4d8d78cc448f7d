"""What weights have seen of a dataset: is it clean, transductive, or not known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, Protocol

from crysdistill.store.checks import find_check, statement, status
from crysdistill.store.origins import joint_licence
from crysdistill.transfer.weights import Provenance

Word = Literal["clean", "transductive", "unknown"]


class Learned(Protocol):
    """What is known of something that has learned: weights, or a foreign model."""

    @property
    def kind(self) -> str:
        """`encoder`, `foreign`, or a word for what learned labels."""

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
    if before.provenance.taught_by:
        return "unknown", (
            f"unknown (taught by {before.provenance.taught_by}; nobody has compared "
            "its crystals with this dataset)"
        )
    if before.kind == "foreign":
        return "unknown", (
            f"unknown ({before.provenance.origin or 'a foreign model'}; nobody has "
            "compared its crystals with this dataset)"
        )
    if before.kind in ("predictor", "frozen", "stack"):
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


def with_teachers(own: Provenance, teachers: Iterable[Learned]) -> Provenance:
    """Return what weights say of themselves that have also learned from teachers.

    They have seen what their teachers have: clean of a dataset is only what was
    compared with it on all sides, and of a stranger nothing is known.

    Args:
        own: of their corpus.
        teachers: what these have learned from.
    """
    teachers = list(teachers)
    if not teachers:
        return own
    checks, strangers = list(own.checks), []
    for teacher in teachers:
        theirs = teacher.provenance.checks
        if teacher.kind == "encoder":
            if teacher.provenance.taught_by:
                strangers.append(teacher.provenance.taught_by)
            checks = [one for one in checks if find_check(theirs, one.dataset)]
        else:
            strangers.append(teacher.provenance.origin or "a foreign model")
        found = [one for one in theirs if one.kept]
        checks = [one for one in checks if not find_check(found, one.dataset)] + found
    overlap = status(checks)
    if strangers and overlap == "clean":
        overlap = "unknown"
    origins = [t.provenance.origin for t in teachers if t.provenance.origin]
    return replace(
        own,
        checks=checks,
        overlap=overlap,
        licence=joint_licence([own.licence, *(t.provenance.licence for t in teachers)]),
        taught_by="; ".join(dict.fromkeys(strangers)),
        origin="; taught by ".join([own.origin, *dict.fromkeys(origins)]),
    )


def overlap_in_words(provenance: Provenance) -> str:
    """Say of which datasets weights are clean, and of which not."""
    said = statement(provenance.checks)
    if not provenance.taught_by:
        return said
    return (
        f"unknown (taught by {provenance.taught_by}; nobody has compared its crystals "
        f"with any dataset); the corpus alone: {said}"
    )
