"""Services: databases that hand out structures page by page, over the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from crysdistill.store.origins import Origin


@dataclass(frozen=True)
class Page:
    """Some entries of a service, and where it goes on.

    Args:
        entries: as `tables.py` reads them from JSON lines: flat (`id`, `lattice`,
            `species`, `frac`, and known properties beside them) or with `structure`
            (pymatgen's `as_dict`) beside `material_id` and properties. An entry that
            holds no usable structure is `{"id", "problem": reason}`, for quarantine.
        cursor: plain JSON from which `Service.pages` goes on after this page; None
            after the last.
    """

    entries: Sequence[Mapping[str, Any]]
    cursor: Any


class Service(Protocol):
    """What a client of a database offers; one file beside this one for each."""

    origin: Origin
    """Where its structures come from."""

    total: int | None
    """How many entries there will be, as far as the service tells."""

    def pages(self, cursor: Any = None) -> Iterator[Page]:
        """Yield pages from the beginning, or from after the page of `cursor`.

        Raises:
            InputError: the service cannot be used (package missing, no key, refused);
                after retries as it asks for them. What was yielded is kept.
        """
