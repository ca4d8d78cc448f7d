"""Services: databases that return structures page by page over the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from crysdistill.store.origins import Origin


@dataclass(frozen=True)
class Page:
    """Some entries of a service, and the cursor of the next page.

    Args:
        entries: entries in the layouts that `tables.py` reads: flat (`id`, `lattice`,
            `species`, `frac`, and known properties beside them) or with `structure`
            (pymatgen's `as_dict`) beside `material_id` and properties. An entry without
            a usable structure is `{"id", "problem": reason}`, for quarantine.
        cursor: plain JSON with which `Service.pages` continues after this page; None
            after the last page.
    """

    entries: Sequence[Mapping[str, Any]]
    cursor: Any


class Service(Protocol):
    """The interface of a database's client; each client is a file beside this one."""

    origin: Origin
    """The origin of its structures."""

    total: int | None
    """The number of entries, if the service gives it."""

    def pages(self, cursor: Any = None) -> Iterator[Page]:
        """Yield pages from the beginning, or from after the page of `cursor`.

        Raises:
            InputError: the service cannot be used (package missing, no key, refused),
                even after the retries that it asks for. The yielded pages are kept.
        """
