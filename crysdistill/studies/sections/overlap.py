"""The overlap of corpus and test crystals, in any form in which it is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from crysdistill.errors import InputError, did_you_mean

OVERLAP_WORDS = {
    "clean": "the pretraining corpus holds no crystal that matches a test crystal",
    "transductive": "the pretraining corpus holds test crystals (without the labels to "
    "predict), so the gain may be smaller on crystals that it has never seen",
    "leaked": "the pretrained weights, their teachers or the runs themselves learned "
    "from labels of test crystals, so the test errors say little",
    "unknown": "it is not known whether the pretrained weights or their teachers "
    "learned from test crystals, or from their labels",
}
"""The meaning of each status of an overlap."""

WORST_FIRST = ("leaked", "unknown", "transductive", "clean")
"""The words from the worst on; what is not known may be a leak."""


def overlap(given: Any) -> dict[str, Any] | None:
    """Return the status of the overlap, its meaning, and a table.

    Args:
        given: a text that begins with the word, a mapping with the word as `status`,
            or rows of a table with such a column; None if nothing is known.

    Raises:
        InputError: the status is not one of `OVERLAP_WORDS`.
    """
    if given is None:
        return None
    if isinstance(given, pd.DataFrame):
        given = given.to_dict("records")
    rows: list[Mapping[str, Any]] = []
    facts: dict[str, Any] = {}
    said = ""
    if isinstance(given, str):
        word, _, said = given.strip().partition(" ")
        if word not in OVERLAP_WORDS:
            word, said = "unknown", given
        elif said.startswith("(") and said.endswith(")"):
            said = said[1:-1]
        elif said:
            said = given
    elif isinstance(given, Mapping):
        facts = dict(given)
        word = str(facts.pop("status", "unknown"))
        rows = list(facts.pop("rows", []))
    else:
        rows = list(given)
        found = {str(row["status"]) for row in rows if "status" in row}
        word = next((w for w in WORST_FIRST if w in found), "unknown")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if word not in OVERLAP_WORDS:
        raise InputError(
            f"the overlap's status is {word!r} but must be one of "
            f"{', '.join(OVERLAP_WORDS)}{did_you_mean(word, OVERLAP_WORDS)}"
        )
    return {
        "word": word,
        "meaning": OVERLAP_WORDS[word],
        "said": said,
        "facts": facts,
        "columns": columns,
        "rows": [[row.get(name, "") for name in columns] for row in rows],
    }


def known_overlap(facts: Mapping[str, Any]) -> Any:
    """Return what a study knows of its overlap, for `overlap`.

    Its runs know their test crystals, so what they say counts more than what was known
    before the first of them.

    Args:
        facts: about the study: `overlap_of_runs`, `overlap` or `tasks`.
    """
    if rows := facts.get("overlap_of_runs"):
        return rows if len(rows) > 1 else rows[0]["said"]
    known = facts.get("overlap")
    return _of_tasks(facts.get("tasks") or {}) if known is None else known


def _of_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return what is known of the overlap of several tasks."""
    rows = []
    for name, facts in tasks.items():
        sentence = str(facts.get("overlap") or "")
        if not sentence:
            continue
        word = sentence.partition(" ")[0]
        status = word if word in OVERLAP_WORDS else "unknown"
        rows.append({"task": name, "status": status, "said": sentence})
    if not rows:
        return None
    return rows if len(rows) > 1 else rows[0]["said"]
