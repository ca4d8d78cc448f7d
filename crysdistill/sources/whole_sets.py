"""Services whose client hands out a whole data set at once, or is not there."""

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
    """A data set that is here as a whole, page by page.

    Args:
        origin: where it comes from.
        entries: as `Page` wants them.
    """

    origin: Origin
    entries: Sequence[Mapping[str, Any]]

    @property
    def total(self) -> int | None:
        """The number of entries."""
        return len(self.entries)

    def pages(self, cursor: Any = None) -> Iterator[Page]:
        """Yield pages; the cursor is the number of entries before the next one."""
        start = cursor or 0
        while True:
            stop = start + PAGE_SIZE
            following = stop if stop < len(self.entries) else None
            yield Page(self.entries[start:stop], following)
            if following is None:
                return
            start = stop
