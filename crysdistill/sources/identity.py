"""Ids: the keys that hold them, and made-up ids for entries without one.

The program makes up ids such as `data-0`. They name an entry in tables but do not
identify a crystal. Records mark them (`made_up`), stores keep the mark, and no search
matches two of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ID_KEYS = ("material_id", "id", "entry_id", "task_id", "mp_id", "jid")
"""Keys that may hold the id of an entry; the first present key counts."""

_LIKE_AN_ID = re.compile(
    r"(.*[\W_])?(id|ids|uid|uuid|identifier|refcode|code|key|name|label|title"
    r"|file|filename|cif|cif_file)|.*[a-z]I[Dd]",
)
"""Patterns of other keys that may hold an id."""

_SURE = re.compile(r"(.*[\W_])?(id|uid|uuid|identifier|refcode)", re.IGNORECASE)


def id_text(value: Any) -> str:
    """Return an id as text, with its leading zeros; "" if there is none."""
    if isinstance(value, bool):
        return ""
    if isinstance(value, float) and value.is_integer():  # a column with empty cells
        value = int(value)
    return str(value).strip() if isinstance(value, str | int) else ""


def entry_id(entry: Mapping[str, Any], keys: Sequence[str] = ID_KEYS) -> str:
    """Return the id of an entry; "" if it has none.

    Args:
        entry: the content of the entry.
        keys: the keys that may hold the id, the best first.
    """
    return next(filter(None, (id_text(entry.get(key)) for key in keys)), "")


class IdSurvey:
    """Finds the keys that hold the ids of a file's entries.

    It takes the usual keys first. If no entry has any of them, it takes a key that has
    the name of an id (`qmof_id`, `ID`, `refcode`, `name`) and a different value in
    every entry.
    """

    def __init__(self) -> None:
        self._usual = False
        self._seen: dict[str, set[int]] | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Look at one entry."""
        if self._usual or entry_id(entry):
            self._usual = True
            return
        if self._seen is None:
            self._seen = {key: set() for key in filter(_is_like_an_id, entry)}
        for key, seen in list(self._seen.items()):
            name = id_text(entry.get(key))
            if not name or hash(name) in seen:
                del self._seen[key]
            seen.add(hash(name))

    @property
    def missing(self) -> bool:
        """Whether there are entries, and none of them has an id."""
        return self._seen is not None and not self._usual and not self._seen

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, the best first."""
        if self._usual or not self._seen:
            return ID_KEYS
        # `qmof_id` rather than `name`
        best = sorted(self._seen, key=lambda key: not _SURE.fullmatch(key))
        return (*ID_KEYS, best[0])


def find_id_column(names: Iterable[str]) -> str | None:
    """Return the column of a table that has the name of an id, or None."""
    names = [name for name in names if name]
    lower = {name.lower().replace(" ", "_"): name for name in reversed(names)}
    known = next((lower[key] for key in ID_KEYS if key in lower), None)
    if known is not None:
        return known
    sure = [name for name in names if _SURE.fullmatch(name)]
    return next(iter([*sure, *filter(_is_like_an_id, names)]), None)


def same_name(text: str) -> str:
    """Return a name with each accented letter as one character (macOS writes two)."""
    return unicodedata.normalize("NFC", text)


def is_id_key(key: str) -> bool:
    """Whether a key surely holds an id by its name, such as `qmof_id`."""
    return bool(_SURE.fullmatch(key))


def made_up_remark(path: object, example: str) -> str:
    """Return the remark that a file has no ids, with an example of the made-up ones."""
    known = ", ".join(f"`{key}`" for key in ID_KEYS[:3])
    return (
        f"{path}: no ids found (no {known}, ...); entries are numbered, as in "
        f"`{example}`, and none is compared by id"
    )


def _is_like_an_id(key: object) -> bool:
    return isinstance(key, str) and bool(
        _LIKE_AN_ID.fullmatch(key) or _LIKE_AN_ID.fullmatch(key.lower())
    )
