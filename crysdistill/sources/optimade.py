"""OPTIMADE: one protocol for a dozen databases (Evans et al. 2024, 10.1039/D4DD00039K).

`optimade:DATABASE?filter=FILTER&properties=A,B`; DATABASE is a name in `DATABASES` or
the address of any other database.

The package `optimade` checks the filter. We do not use its `OptimadeClient` (version
1.5.0): it loses the pages that arrived when a later page fails, and after a 429 it
retries every second for ever, whatever `Retry-After` says. We do not use its adapters
to pymatgen either: they need all fields of an entry, and silently drop attached atoms.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin

from optimade.exceptions import BadRequest
from optimade.filterparser import LarkParser

from crysdistill.errors import InputError, did_you_mean
from crysdistill.sources.optimade_entries import FIELDS, entry_of
from crysdistill.sources.services import Page
from crysdistill.sources.web import Refused, Web, short, start
from crysdistill.store.origins import Origin, is_non_commercial

PAGE_LIMIT = 100
"""Entries on a page; a service that allows fewer refuses with an error."""

_FIRST_TRIES = 3  # an address with a typo should not take minutes
_LONGEST_DELAY = 60.0  # seconds between pages, whatever the service says
_OPTIONS = ("filter", "properties", "page_limit")


class Database(NamedTuple):
    """An OPTIMADE provider, with the facts of its origin that `/info` may lack."""

    name: str
    url: str
    licence: str = ""
    citation: str = ""


DATABASES = {
    "mp": Database(
        "Materials Project",
        "https://optimade.materialsproject.org",
        "CC-BY-4.0",
        "10.1063/1.4812323",
    ),
    "oqmd": Database(
        "OQMD", "https://oqmd.org/optimade", "CC-BY-4.0", "10.1038/npjcompumats.2015.10"
    ),
    "alexandria": Database(
        "Alexandria (PBE)",
        "https://alexandria.icams.rub.de/pbe",
        "CC-BY-4.0",
        "10.1002/adma.202210788",
    ),
    "alexandria-pbesol": Database(
        "Alexandria (PBEsol)",
        "https://alexandria.icams.rub.de/pbesol",
        "CC-BY-4.0",
        "10.1002/adma.202210788",
    ),
    "odbx": Database("odbx", "https://optimade.odbx.science"),
    "gnome": Database(
        "GNoME (odbx)",
        "https://optimade-gnome.odbx.science",
        "CC-BY-NC-4.0",
        "10.1038/s41586-023-06735-9",
    ),
    "jarvis": Database(
        "JARVIS-DFT",
        "https://jarvis.nist.gov/optimade/jarvisdft",
        citation="10.1038/s41524-020-00440-1",
    ),
    "nomad": Database(
        "NOMAD",
        "https://nomad-lab.eu/prod/v1/optimade",
        "CC-BY-4.0",
        "10.21105/joss.05388",
    ),
    "aflow": Database(
        "AFLOW",
        "https://aflow.org/API/optimade",
        "CC-BY-4.0",
        "10.1016/j.commatsci.2012.02.005",
    ),
    "cod": Database(
        "Crystallography Open Database",
        "https://www.crystallography.net/cod/optimade",
        "CC0-1.0",
        "10.1093/nar/gkr900",
    ),
    "mcloud": Database(
        "Materials Cloud MC3D", "https://optimade.materialscloud.io/main/mc3d-pbe-v1"
    ),
    "mcloud-2d": Database(
        "Materials Cloud MC2D", "https://optimade.materialscloud.io/main/mc2d"
    ),
}
"""Databases by short name. If a licence is "", `/info` may name it."""


def open_service(rest: str) -> OptimadeService:
    """Return the service that the text after `optimade:` names.

    Args:
        rest: `DATABASE?filter=...&properties=...`.

    Raises:
        InputError: the text cannot be parsed, or the service does not answer.
    """
    query = _parse(rest)
    web = Web()
    info: dict[str, Any] = {}
    with suppress(Refused):  # then `/info` names no origin
        info = web.get(f"{query.base}/info", tries=_FIRST_TRIES)
    if query.properties:
        with suppress(Refused):
            _check_properties(query, web.get(f"{query.base}/info/structures"))
    known = query.database
    origin = Origin(
        known.name if known else _name(info) or query.base,
        query.base,
        _licence(info, known.licence if known else ""),
        query.filter,
        citation=known.citation if known else "",
    )
    return OptimadeService(origin, query, web)


@dataclass(frozen=True)
class Query:
    """A query and the database that answers it.

    Args:
        base: address of the service, with the version of the protocol.
        database: its entry in `DATABASES`, or None.
        filter: the filter, in the language of OPTIMADE.
        properties: names of the numbers to read as labels.
        page_limit: entries on a page.
    """

    base: str
    database: Database | None = None
    filter: str = ""
    properties: tuple[str, ...] = ()
    page_limit: int = PAGE_LIMIT


@dataclass
class OptimadeService:
    """A query to one database, page by page."""

    origin: Origin
    query: Query
    web: Web
    total: int | None = None
    _delay: float = field(default=0.0, init=False)

    def pages(self, cursor: Any = None) -> Iterator[Page]:
        """Yield pages; the cursor is the address of the next page.

        Raises:
            InputError: there is no usable answer, or a page leads back to an earlier
                one.
        """
        seen = set()
        answer, url = (self._get(cursor), cursor) if cursor else self._first()
        while True:
            entries = [
                entry_of(resource, self.query.properties)
                for resource in _data(answer, url)
            ]
            following = _next(answer, url)
            yield Page(entries, following)
            if following is None:
                return
            if following in seen or following == url:
                raise InputError(
                    f"{following}: leads back to itself; report it to the database"
                )
            seen.add(following)
            answer, url = self._get(following), following

    def _first(self) -> tuple[dict[str, Any], str]:
        """Ask for the first page; ask for a smaller one if ours is too large."""
        url = f"{self.query.base}/structures"
        params: dict[str, Any] = {
            "response_fields": ",".join((*FIELDS, *self.query.properties)),
            "page_limit": self.query.page_limit,
        }
        if self.query.filter:
            params["filter"] = self.query.filter
        try:
            return self._get(url, params), url
        except Refused as error:
            if error.status != 403:
                raise
            del params["page_limit"]
            return self._get(url, params), url

    def _get(self, url: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return an answer, after the delay that the service asks for."""
        time.sleep(self._delay)
        answer = self.web.get(url, params)
        meta = answer.get("meta")
        meta = meta if isinstance(meta, Mapping) else {}
        delay = meta.get("request_delay")
        if isinstance(delay, int | float):
            self._delay = min(max(float(delay), 0.0), _LONGEST_DELAY)
        returned = meta.get("data_returned")
        if isinstance(returned, int):
            self.total = returned
        return answer


# ------------------------------------------------------------------------------- query


def _parse(rest: str) -> Query:
    """Parse `DATABASE?filter=...`; its text may be percent-encoded or not."""
    where, _, text = rest.partition("?")
    options: dict[str, str] = {}
    # A filter may hold `=`; `&` ends it only if another option follows.
    for part in re.split(r"&(?=\w+=)", text) if text else ():
        key, _, value = part.partition("=")
        if key not in _OPTIONS:
            hint = did_you_mean(key, _OPTIONS) or f"; known: {', '.join(_OPTIONS)}"
            raise InputError(f"optimade: unknown option `{key}`{hint}")
        options[key] = unquote(value).strip()
    limit = options.get("page_limit", str(PAGE_LIMIT))
    if not limit.isdecimal() or int(limit) < 1:
        raise InputError(f"optimade: `page_limit` is `{limit}` but must be at least 1")
    names = options.get("properties", "").split(",")
    properties = tuple(name.strip() for name in names if name.strip())
    filter_ = options.get("filter", "")
    _check_filter(filter_)
    base, database = _address(where)
    return Query(base, database, filter_, properties, int(limit))


def _address(where: str) -> tuple[str, Database | None]:
    """Return the versioned address of a database, and its entry in `DATABASES`."""
    database = DATABASES.get(where.lower())
    if database is None and not re.match(r"https?://", where):
        hint = did_you_mean(where, DATABASES) or f"; known: {', '.join(DATABASES)}"
        raise InputError(
            f"optimade: unknown database `{where}`{hint}; or give an address, "
            "`http(s)://...`"
        )
    url = (database.url if database else where).rstrip("/").removesuffix("/structures")
    return url if re.search(r"/v\d[\d.]*$", url) else f"{url}/v1", database


def _check_filter(text: str) -> None:
    """Refuse an invalid filter before asking a database."""
    if not text:
        return
    try:
        LarkParser().parse(text)
    except BadRequest as error:
        column = getattr(error.__cause__, "column", None) or 0
        place = f"from `{text[column - 1 :]}` on" if column > 0 else "at its end"
        raise InputError(
            f"optimade: the filter `{text}` is not understood {place}; it should look "
            'like `elements HAS "Si" AND nelements=2`'
        ) from None


def _check_properties(query: Query, info: Mapping[str, Any]) -> None:
    """Refuse a property that the database does not list."""
    data = info.get("data")
    known = data.get("properties") if isinstance(data, Mapping) else None
    if not isinstance(known, Mapping):
        return
    for name in query.properties:
        if name not in known:
            hint = did_you_mean(name, known) or "; its `/info/structures` lists them"
            raise InputError(f"optimade: {query.base} has no property `{name}`{hint}")


# ----------------------------------------------------------------------------- answers


def _data(answer: Mapping[str, Any], url: str) -> Sequence[Any]:
    data = answer.get("data")
    if not isinstance(data, list):
        raise InputError(
            f"{short(url)}: not an answer in OPTIMADE's format: `{start(str(answer))}`"
        )
    return data


def _next(answer: Mapping[str, Any], url: str) -> str | None:
    """Return the address of the next page; the answer gives text or an object."""
    links, meta = answer.get("links"), answer.get("meta")
    following = links.get("next") if isinstance(links, Mapping) else None
    if isinstance(following, Mapping):
        following = following.get("href")
    if following:
        return urljoin(url, str(following))
    if isinstance(meta, Mapping) and meta.get("more_data_available") is True:
        raise InputError(f"{url}: has more entries but does not say where they are")
    return None


def _attributes(info: Mapping[str, Any]) -> Mapping[str, Any]:
    data = info.get("data")
    attributes = data.get("attributes") if isinstance(data, Mapping) else None
    return attributes if isinstance(attributes, Mapping) else {}


def _name(info: Mapping[str, Any]) -> str:
    """Return the name that a database gives itself."""
    meta = info.get("meta")
    provider = meta.get("provider") if isinstance(meta, Mapping) else None
    return str(provider.get("name") or "") if isinstance(provider, Mapping) else ""


def _licence(info: Mapping[str, Any], known: str) -> str:
    """Return the licence that `/info` names, else the one known here.

    Several licences are alternatives; we take those that allow most. But a mirror
    cannot allow more than the owners of the data.
    """
    attributes = _attributes(info)
    offered = attributes.get("available_licenses")
    link = attributes.get("license")
    if isinstance(link, Mapping):
        link = link.get("href")
    names = [str(n) for n in offered if n] if isinstance(offered, list) else []
    if not names and isinstance(link, str):
        names = [name for name in [_spdx(link)] if name]
    if not names or (is_non_commercial(known) and not is_non_commercial(names[0])):
        return known
    free = [name for name in names if not is_non_commercial(name)]
    return " OR ".join(free or names)


def _spdx(link: str) -> str:
    """Return the SPDX identifier for the address of a licence, or ""."""
    if match := re.search(r"spdx\.org/licenses/([\w.+-]+?)(\.html|\.json)?/?$", link):
        return match[1]
    if match := re.search(r"creativecommons\.org/licenses/([a-z-]+)/([\d.]+)", link):
        return f"CC-{match[1].upper()}-{match[2]}"
    return "CC0-1.0" if "creativecommons.org/publicdomain/zero/1.0" in link else ""
