"""OPTIMADE: one protocol for a dozen databases (Evans et al. 2024, 10.1039/D4DD00039K).

`optimade:DATABASE?filter=FILTER&properties=A,B`; DATABASE is a name of `DATABASES` or
the address of any other.

The package `optimade` checks the filter. Its `OptimadeClient` is not used: what has
arrived is lost when a later page fails, and 429 is tried again for ever, a second
apart, whatever `Retry-After` says (version 1.5.0). Nor are its adapters to pymatgen:
they want all fields of an entry, and drop attached atoms without a word.
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
"""Entries to ask for at once; a service that gives fewer says so."""

_FIRST_TRIES = 3  # an address with a typo should not take minutes
_LONGEST_DELAY = 60.0  # seconds between pages, whatever the service says
_OPTIONS = ("filter", "properties", "page_limit")


class Database(NamedTuple):
    """A provider of OPTIMADE: what its origin says, where `/info` does not."""

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
"""By short name. A licence that is "" is asked of `/info`, or stays unknown."""


def open_service(rest: str) -> OptimadeService:
    """Return the service of what follows `optimade:`.

    Args:
        rest: `DATABASE?filter=...&properties=...`.

    Raises:
        InputError: it is not understood, or the service does not answer.
    """
    query = _parse(rest)
    web = Web()
    info: dict[str, Any] = {}
    with suppress(Refused):  # then it does not say
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
    """What to ask, and whom.

    Args:
        base: address of the service, with the version of the protocol.
        database: as it is known here.
        filter: in the language of OPTIMADE.
        properties: names of numbers to take along.
        page_limit: entries to ask for at once.
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
        """Yield pages; the cursor is the address of the next one.

        Raises:
            InputError: there is no usable answer, or it leads in a circle.
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
                raise InputError(f"{following}: comes after itself; tell the database")
            seen.add(following)
            answer, url = self._get(following), following

    def _first(self) -> tuple[dict[str, Any], str]:
        """Ask for the first page; smaller ones if ours are too large."""
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
        """Return an answer, not sooner after the last than the service wants."""
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
    """Read `DATABASE?filter=...`; what stands in it may be percent-encoded or not."""
    where, _, text = rest.partition("?")
    options: dict[str, str] = {}
    # A filter may hold `=`; `&` ends it only where another option follows.
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
    """Return the versioned address of a database, and what is known of it."""
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
    """Refuse a filter that no database would understand, before one is asked."""
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
    """Refuse a property that no entry would have."""
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
    """Return the address of the next page, which may come as text or as an object."""
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
    """Return how a database calls itself."""
    meta = info.get("meta")
    provider = meta.get("provider") if isinstance(meta, Mapping) else None
    return str(provider.get("name") or "") if isinstance(provider, Mapping) else ""


def _licence(info: Mapping[str, Any], known: str) -> str:
    """Return the licence that `/info` names, else the one known here.

    Several are alternatives; of these we take what allows most. But a mirror cannot
    allow what the owners of the data do not.
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
    """Return the SPDX identifier that the address of a licence stands for, or ""."""
    if match := re.search(r"spdx\.org/licenses/([\w.+-]+?)(\.html|\.json)?/?$", link):
        return match[1]
    if match := re.search(r"creativecommons\.org/licenses/([a-z-]+)/([\d.]+)", link):
        return f"CC-{match[1].upper()}-{match[2]}"
    return "CC0-1.0" if "creativecommons.org/publicdomain/zero/1.0" in link else ""
