"""Materials Project: `mp:QUERY` by its client `mp-api`, with the key in `MP_API_KEY`.

QUERY holds arguments of `MPRester.materials.summary.search`, such as
`elements=Si,O&num_sites=1,20&is_stable=true`. `properties=band_gap,...` names the
numbers to read as labels. A range may be open: `band_gap=1,`. An empty query asks for
everything.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from crysdistill.errors import (
    BadStructure,
    InputError,
    did_you_mean,
    first_line,
    not_installed,
)
from crysdistill.sources.entries import label_values
from crysdistill.sources.services import Page
from crysdistill.sources.whole_sets import PAGE_SIZE
from crysdistill.store.origins import Origin

URL = "https://materialsproject.org"
CITATION = "10.1063/1.4812323"

_LISTS = (
    "elements",
    "exclude_elements",
    "has_props",
    "material_ids",
    "possible_species",
    "spacegroup_number",
)
_OWN = ("self", "num_chunks", "chunk_size", "all_fields", "fields", "kwargs")


def open_service(rest: str) -> MaterialsProject:
    """Return the service that the text after `mp:` names.

    Entries from GNoME are left out, because their licence forbids commercial use. The
    query `include_gnome=true` includes them.

    Args:
        rest: the query.

    Raises:
        InputError: the query is not understood, there is no key, the package is missing
            or the service does not answer.
    """
    try:
        from mp_api.client import MPRester
        from mp_api.client.routes.materials.summary import SummaryRester
    except ImportError:
        raise not_installed("mp-api", "mp") from None
    allowed = [
        name
        for name in inspect.signature(SummaryRester.search).parameters
        if name not in _OWN and not name.startswith("_")
    ]
    query, properties = _parse(rest.removeprefix("?"), allowed)
    query.setdefault("include_gnome", False)
    key = os.environ.get("MP_API_KEY", "")
    if not key:
        raise InputError(
            "mp: no API key; get yours at https://materialsproject.org/api and set the "
            "environment variable MP_API_KEY"
        )
    try:
        client = MPRester(key, use_document_model=False, mute_progress_bars=True)
    except Exception as error:  # requests', the client's, pydantic's
        raise _no_answer(error) from None
    licence = "CC-BY-4.0 AND CC-BY-NC-4.0" if query["include_gnome"] else "CC-BY-4.0"
    origin = Origin("Materials Project", URL, licence, rest, citation=CITATION)
    return MaterialsProject(origin, client, query, properties)


@dataclass
class MaterialsProject:
    """A query to the Materials Project, page by page.

    Args:
        origin: the origin of its structures.
        client: an `MPRester`; it retries failed requests itself.
        query: arguments of its summary search.
        properties: the numbers to read as labels.
        page_size: entries on a page.
    """

    origin: Origin
    client: Any
    query: dict[str, Any]
    properties: tuple[str, ...] = ()
    page_size: int = PAGE_SIZE
    total: int | None = field(default=None, init=False)

    def pages(self, cursor: Any = None) -> Iterator[Page]:
        """Yield pages; the cursor holds the next page's number and the version.

        Raises:
            InputError: the service refuses or does not answer, or its database has
                changed since the cursor was given.
        """
        version = getattr(self.client, "db_version", None)
        number = 1
        if cursor is not None:
            number, before = cursor["page"], cursor["db_version"]
            if before != version:
                raise InputError(
                    f"mp: the database has changed from {before} to {version}; start "
                    "the download anew"
                )
        while True:
            try:
                # Pages are stable only if sorted. Ask for one chunk at a time, because
                # the client returns nothing before it has everything.
                found = self.client.materials.summary.search(
                    **self.query,
                    fields=["material_id", "structure", *self.properties],
                    all_fields=False,
                    num_chunks=1,
                    chunk_size=self.page_size,
                    _page=number,
                    _sort_fields="material_id",
                )
            except Exception as error:  # MPRestError, requests'
                raise _no_answer(error) from None
            number += 1
            more = len(found) >= self.page_size
            following = {"page": number, "db_version": version} if more else None
            yield Page([entry_of(doc, self.properties) for doc in found], following)
            if not more:
                return


def entry_of(document: Any, properties: tuple[str, ...]) -> dict[str, Any]:
    """Return an entry for `tables.py`, or its problem."""
    doc: Any = document
    if hasattr(doc, "model_dump"):
        doc = {name: getattr(doc, name, None) for name in doc.model_fields_set}
    if not isinstance(doc, Mapping) or not doc.get("material_id"):
        return {"problem": f"an entry without `material_id`: `{str(document)[:60]}`"}
    structure: Any = doc.get("structure")
    if hasattr(structure, "as_dict"):
        structure = structure.as_dict()
    name = str(doc["material_id"])
    try:
        if not isinstance(structure, Mapping):
            raise BadStructure("no `structure` in the answer; leave it out")
        values = label_values(doc, properties)
    except BadStructure as problem:
        return {"material_id": name, "structure": None, "problem": str(problem)}
    return {"material_id": name, **values, "structure": structure}


def _no_answer(error: Exception) -> InputError:
    return InputError(f"mp: no usable answer ({first_line(error)}); try again later")


def _parse(text: str, allowed: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read `KEY=VALUE&...` as arguments of the search."""
    query: dict[str, Any] = {}
    properties: tuple[str, ...] = ()
    for part in text.split("&") if text else ():
        key, _, value = part.partition("=")
        value = unquote(value).strip()
        if key == "properties":
            properties = tuple(name for name in value.split(",") if name)
        elif key not in allowed:
            hint = did_you_mean(key, [*allowed, "properties"])
            raise InputError(f"mp: unknown option `{key}`{hint}")
        elif not value:
            raise InputError(f"mp: `{key}` has no value; write `{key}=...`")
        else:
            query[key] = _value(key, value)
    return query, properties


def _value(key: str, text: str) -> Any:
    """Return a flag, a number, a range, a list or a word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    parts = [part.strip() for part in text.split(",")]
    numbers = [_number(part) for part in parts]
    known = [number for part, number in zip(parts, numbers, strict=True) if part]
    if key in _LISTS:
        found = [p if n is None else n for p, n in zip(parts, numbers, strict=True)]
        return found[0] if key == "spacegroup_number" and len(found) == 1 else found
    if None not in known:
        return numbers[0] if len(parts) == 1 else tuple(numbers)
    if key == "magnetic_ordering":
        from pymatgen.analysis.magnetism import Ordering

        if text not in {member.value for member in Ordering}:
            names = ", ".join(member.value for member in Ordering)
            raise InputError(f"mp: `magnetic_ordering` is `{text}`; known: {names}")
        return Ordering(text)
    return text if len(parts) == 1 else parts


def _number(text: str) -> float | int | None:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return None
