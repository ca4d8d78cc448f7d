"""Whether weights have seen a dataset: clean, transductive or unknown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, Protocol

from crysdistill.store.checks import find_check, statement, status
from crysdistill.store.origins import joint_licence
from crysdistill.transfer.weights import Provenance

Word = Literal["clean", "transductive", "unknown"]


class Learned(Protocol):
    """What is known of a trained model: a weights file or a foreign model."""

    @property
    def kind(self) -> str:
        """`encoder`, `foreign`, or the kind of a model trained on labels."""

    @property
    def provenance(self) -> Provenance:
        """Its training data and licence."""


def seen(before: Learned | None, dataset: str) -> tuple[Word, str]:
    """Return whether weights were trained without the crystals of a dataset.

    Args:
        before: the pretrained weights or the teacher of a run; None if it has neither.
        dataset: the `structures_hash` of the dataset.

    Returns:
        The word, and a sentence that begins with it for results and reports.
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
        # Its labels may belong to any crystals, whatever its corpus was cleared of.
        return "unknown", (
            "unknown (the weights learned from labels of crystals that nobody has "
            "compared with this dataset)"
        )
    if check is None:
        return "unknown", (
            "unknown (nobody has compared the corpus with this dataset; "
            "`exclude` it when pretraining)"
        )
    return check.status, f"{check.statement}; hash of the overlap {check.overlap[:12]}"


def with_teachers(own: Provenance, teachers: Iterable[Learned]) -> Provenance:
    """Return the provenance of weights that have also learned from teachers.

    The weights have seen all that their teachers have seen. They are clean of a dataset
    only if the corpus and every teacher's data were compared with it; nothing is known
    of a foreign teacher's data.

    Args:
        own: the provenance from their corpus.
        teachers: what is known of the teachers.
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
    """Return in words which datasets the weights are clean of, and which not."""
    said = statement(provenance.checks)
    if not provenance.taught_by:
        return said
    return (
        f"unknown (taught by {provenance.taught_by}; nobody has compared its crystals "
        f"with any dataset); the corpus alone: {said}"
    )
