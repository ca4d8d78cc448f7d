"""Services whose client returns a whole data set at once, or is not installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crysdistill.sources.services import Page
from crysdistill.store.origins import Origin

PAGE_SIZE = 1000
"""Entries on a page."""


@dataclass
class WholeSet:
    """A complete data set in memory, handed out page by page.

    Args:
        origin: the origin of the data set.
        entries: entries in the layout of `Page`.
    """

    origin: Origin
    entries: Sequence[Mapping[str, Any]]

    @property
    def total(self) -> int | None:
        """The number of entries."""
        return len(self.entries)

    def pages(self, cursor: Any = None) -> Iterator[Page]:
        """Yield pages; the cursor is the number of entries before the next page."""
        start = cursor or 0
        while True:
            stop = start + PAGE_SIZE
            following = stop if stop < len(self.entries) else None
            yield Page(self.entries[start:stop], following)
            if following is None:
                return
            start = stop
