"""Whether weights have seen a dataset: clean, transductive, unknown or leaked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from crysdistill.store.checks import DatasetCheck, find_check, statement, status
from crysdistill.store.formulas import Composed, join_formulas
from crysdistill.store.origins import joint_licence
from crysdistill.store.used import UNKNOWN, join_used
from crysdistill.transfer.same_store import (
    Judges,
    labels_known,
    seen_in_it,
    used_by,
)
from crysdistill.transfer.weights import Provenance

Word = Literal["clean", "transductive", "unknown", "leaked"]

NOTHING_SEEN = "clean (no pretraining: nothing was seen but labels)"
"""What is said without pretrained weights and teachers."""


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


def seen(
    before: Learned | None, dataset: Dataset, tested: Judges | None = None
) -> tuple[Word, str]:
    """Return whether weights were trained without the crystals of a dataset.

    If the weights learned from this very dataset, its rows decide. Otherwise a
    comparison of structures does. If there was none, the formulas that weights carry
    can prove that they are clean, and give a bound otherwise.

    Args:
        before: the pretrained weights or the teacher of a run; None if it has neither.
        dataset: the crystals.
        tested: the test crystals, if they are known.

    Returns:
        The word, and a sentence that begins with it for results and reports.
    """
    if before is None:
        return "clean", NOTHING_SEEN
    name = dataset.structures_hash
    if found := _known(before, name, tested):
        return found
    shared = _by_formula(before, dataset)
    if shared is None:
        why = not _recorded(before, name, tested) and _not_compared(before)
        return "unknown", f"unknown ({why or _NOT_EXCLUDED})"
    if not shared.any():
        return "clean", (
            "clean (by formula: no crystal of the dataset has the composition of a "
            f"crystal {_where(before)})"
        )
    return "unknown", f"unknown ({in_words(before, shared)})"


def at_most(
    before: Learned | None, dataset: Dataset, tested: Judges
) -> dict[str, dict[str, int]]:
    """Return how many crystals the weights can have seen, for the results of a run.

    Args:
        before: the pretrained weights or the teacher of a run; None if it has neither.
        dataset: the crystals.
        tested: the test crystals.

    Returns:
        The entry `overlap_at_most`; nothing if rows or comparisons of structures tell
        more, or if the weights carry no formulas.
    """
    if before is None or _known(before, dataset.structures_hash, tested):
        return {}
    shared = _by_formula(before, dataset)
    if shared is None:
        return {}
    numbers = {
        "crystals": int(shared.sum()),
        "of_crystals": len(shared),
        "test_crystals": int(shared[tested.rows].sum()),
        "of_test_crystals": len(tested.rows),
    }
    return {"overlap_at_most": numbers}


def of_the_tested(found: Mapping[str, Any]) -> str:
    """Return the end of the sentence `overlap`; "" if it names no bound.

    Args:
        found: the results of a run, with what `at_most` returned.
    """
    numbers = found.get("overlap_at_most", {})
    if not (numbers.get("crystals") and numbers["of_test_crystals"]):
        return ""
    if not found["overlap"].startswith("unknown"):
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


_NOT_EXCLUDED = (
    "nobody has compared the corpus with this dataset; `exclude` it when pretraining"
)


def _known(
    before: Learned, dataset: str, tested: Judges | None
) -> tuple[Word, str] | None:
    """Return what rows and comparisons say of a dataset; None if they say nothing.

    Args:
        before: the weights.
        dataset: the hash of the dataset.
        tested: its test crystals, if they are known.
    """
    if tested is not None and len(tested.rows):
        used = used_by(before.kind, before.provenance, [dataset])
        if found := seen_in_it(used, dataset, tested):
            return found
    check = find_check(before.provenance.checks, dataset)
    if check is None:
        return None
    if check.kept:
        return _kept(before, check, _recorded(before, dataset, tested))
    if _not_compared(before) and not _recorded(before, dataset, tested):
        return None
    return check.status, f"{check.statement}; hash of the overlap {check.overlap[:12]}"


def _recorded(before: Learned, dataset: str, tested: Judges | None) -> bool:
    """Return whether rows prove that no labels of the test crystals were learned.

    Then only corpora count, which checks compare. It holds if the weights learned from
    labels of this dataset alone, and `seen_in_it` found none of test crystals.
    """
    if tested is None or not len(tested.rows):
        return False
    return labels_known(used_by(before.kind, before.provenance, [dataset]), dataset)


def _kept(before: Learned, check: DatasetCheck, recorded: bool) -> tuple[Word, str]:
    """Return what is known if the corpus holds crystals of a dataset."""
    # Encoders of earlier versions recorded nothing, and learned without labels.
    labels = not recorded and bool(
        before.provenance.labels_of_corpus or _not_compared(before)
    )
    return "unknown" if labels else "transductive", (
        f"{check.say(labels)}; hash of the overlap {check.overlap[:12]}"
    )


def _not_compared(before: Learned) -> str:
    """Return what weights learned from beside corpora; "" if nothing.

    Checks compare only the corpora.
    """
    known = before.provenance
    if known.taught_by:
        return (
            f"taught by {known.taught_by}; nobody has compared its crystals with this "
            "dataset"
        )
    if before.kind == "foreign":
        return (
            f"{known.origin or 'a foreign model'}; nobody has compared its crystals "
            "with this dataset"
        )
    if before.kind != "encoder":
        # Its labels may belong to any crystals, whatever its corpus was cleared of.
        return (
            "the weights learned from labels of crystals that nobody has compared with "
            "this dataset"
        )
    return ""


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
    every = [own, *(teacher.provenance for teacher in teachers)]
    stores = {one.store for given in every for one in given.used if one != UNKNOWN}
    used = [own.used]
    for teacher in teachers:
        theirs = teacher.provenance.checks
        used.append(used_by(teacher.kind, teacher.provenance, stores))
        if teacher.kind != "encoder":
            named = teacher.provenance.origin or "a foreign model"
            above = teacher.provenance.taught_by
            strangers.append(f"{named} (taught by {above})" if above else named)
        elif teacher.provenance.taught_by:
            strangers.append(teacher.provenance.taught_by)
        # Of other models only those count in `seen` that recorded all they used.
        recorded = bool(teacher.provenance.corpus) and UNKNOWN not in used[-1]
        if teacher.kind == "encoder" or recorded:
            checks = [one for one in checks if find_check(theirs, one.dataset)]
        found = [one for one in theirs if one.kept]
        checks = [one for one in checks if not find_check(found, one.dataset)] + found
    origins = [t.provenance.origin for t in teachers if t.provenance.origin]
    joined = replace(
        own,
        checks=checks,
        licence=joint_licence([own.licence, *(t.provenance.licence for t in teachers)]),
        taught_by="; ".join(dict.fromkeys(strangers)),
        formulas=join_formulas(
            [own.formulas, *(t.provenance.formulas for t in teachers)]
        ),
        origin="; taught by ".join([own.origin, *dict.fromkeys(origins)]),
        used=join_used(used),
    )
    return replace(joined, overlap=word_of_corpus(joined))


def word_of_corpus(known: Provenance) -> Word:
    """Return one word for the datasets that a corpus was compared with."""
    found = status(known.checks)
    kept = found == "transductive" and known.labels_of_corpus
    return "unknown" if known.taught_by or kept else found


def overlap_in_words(provenance: Provenance) -> str:
    """Return in words which datasets the weights are clean of, and which not."""
    said = statement(provenance.checks, provenance.labels_of_corpus)
    if provenance.taught_by:
        return (
            f"unknown (taught by {provenance.taught_by}; nobody has compared its "
            f"crystals with any dataset); the corpus alone: {said}"
        )
    return said
