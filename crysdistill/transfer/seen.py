"""Whether weights have seen a dataset: clean, transductive or unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from crysdistill.store.checks import find_check, statement, status
from crysdistill.store.formulas import Composed, join_formulas
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


class Dataset(Composed, Protocol):
    """The crystals of a dataset: a store or another collection."""

    @property
    def structures_hash(self) -> str:
        """A SHA-256 of names, species, cells and coordinates."""


def seen(before: Learned | None, dataset: Dataset) -> tuple[Word, str]:
    """Return whether weights were trained without the crystals of a dataset.

    A comparison of structures decides. If there was none, the formulas that weights
    carry can prove that they are clean, and give a bound otherwise.

    Args:
        before: the pretrained weights or the teacher of a run; None if it has neither.
        dataset: the crystals.

    Returns:
        The word, and a sentence that begins with it for results and reports.
    """
    if before is None:
        return "clean", "clean (no pretraining: nothing was seen but labels)"
    word, sentence = _compared(before, dataset.structures_hash)
    shared = _by_formula(before, dataset) if word == "unknown" else None
    if shared is None:
        return word, sentence
    if not shared.any():
        return "clean", (
            "clean (by formula: no crystal of the dataset has the composition of a "
            f"crystal {_where(before)})"
        )
    return "unknown", f"unknown ({in_words(before, shared)})"


def at_most(
    before: Learned | None, dataset: Dataset, tested: np.ndarray
) -> dict[str, dict[str, int]]:
    """Return how many crystals the weights can have seen, for the results of a run.

    Args:
        before: the pretrained weights or the teacher of a run; None if it has neither.
        dataset: the crystals.
        tested: the rows of the test crystals.

    Returns:
        The entry `overlap_at_most`; nothing if structures were compared, or if the
        weights carry no formulas.
    """
    if before is None or _compared(before, dataset.structures_hash)[0] != "unknown":
        return {}
    shared = _by_formula(before, dataset)
    if shared is None:
        return {}
    numbers = {
        "crystals": int(shared.sum()),
        "of_crystals": len(shared),
        "test_crystals": int(shared[tested].sum()),
        "of_test_crystals": len(tested),
    }
    return {"overlap_at_most": numbers}


def of_the_tested(found: Mapping[str, Any]) -> str:
    """Return the end of the sentence `overlap`; "" if it names no bound.

    Args:
        found: the results of a run, with what `at_most` returned.
    """
    numbers = found.get("overlap_at_most", {})
    if not numbers.get("crystals") or not found["overlap"].startswith("unknown"):
        return ""
    return (
        f"; of the {numbers['of_test_crystals']:,} test crystals at most "
        f"{numbers['test_crystals']:,}"
    )


def in_words(learned: Learned, shared: np.ndarray) -> str:
    """Return in words how many crystals of a dataset weights can have seen.

    Args:
        learned: the weights.
        shared: (B,) whether a crystal has the formula of one that they learned from.
    """
    some, where = int(shared.sum()), _where(learned)
    if not some:
        return (
            f"none of {len(shared):,} crystals has the composition of a crystal {where}"
        )
    share = round(100 * some / len(shared))
    share = share if some == len(shared) else min(99, share)
    return (
        f"at most {some:,} of {len(shared):,} crystals, {share or 'under 1'} %, can be "
        f"{where}: their compositions occur there"
    )


def _where(learned: Learned) -> str:
    """Return what the formulas in weights are those of."""
    if learned.kind == "encoder" and not learned.provenance.taught_by:
        return "in the corpus"
    return "among those that the weights learned from"


def _by_formula(learned: Learned, dataset: Dataset) -> np.ndarray | None:
    """Return which crystals have a known formula, (B,); None if none are known."""
    formulas = learned.provenance.formulas
    return None if formulas is None else formulas.has(dataset)


def _compared(before: Learned, dataset: str) -> tuple[Word, str]:
    """Return what comparisons of structures say of a dataset, given by its hash."""
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
        formulas=join_formulas(
            [own.formulas, *(t.provenance.formulas for t in teachers)]
        ),
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
