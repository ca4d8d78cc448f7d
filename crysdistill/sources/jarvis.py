"""JARVIS: `jarvis:DATASET`, such as `jarvis:dft_3d`, by the client `jarvis-tools`.

The client downloads a whole data set and keeps it in its own cache. `tables.py` reads a
file that was downloaded by hand, without the client.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

from crysdistill.errors import InputError, did_you_mean, first_line, not_installed
from crysdistill.sources.whole_sets import WholeSet
from crysdistill.store.origins import Origin

URL = "https://jarvis.nist.gov"
CITATION = "10.1038/s41524-020-00440-1"

_LICENCES = {
    "mp_": "CC-BY-4.0",
    "megnet": "CC-BY-4.0",
    "m3gnet": "CC-BY-4.0",
    "oqmd": "CC-BY-4.0",
    "alex": "CC-BY-4.0",
    "cod": "CC0-1.0",
}
"""Other databases behind a JARVIS data set, by the beginning of its name."""


def open_service(rest: str) -> WholeSet:
    """Return the service that the text after `jarvis:` names.

    Args:
        rest: the name of a data set.

    Raises:
        InputError: there is no such data set, it holds no structures, the package is
            missing or the download fails.
    """
    try:
        from jarvis.db import figshare
    except ImportError:
        raise not_installed("jarvis-tools", "jarvis") from None
    known = list(figshare.get_db_info())
    if rest not in known:
        hint = did_you_mean(rest, known) or "; such as `jarvis:dft_3d`"
        raise InputError(f"jarvis: unknown data set `{rest}`{hint}")
    try:
        with redirect_stdout(sys.stderr):  # the client prints
            found = figshare.data(rest)
    except Exception as error:  # the network's, the zip's, the disk's
        raise InputError(
            f"jarvis: `{rest}` cannot be downloaded ({first_line(error)}); try again, "
            "or give a file that you have as a source"
        ) from None
    if not isinstance(found, list) or not any(
        isinstance(entry, dict) and "atoms" in entry for entry in found
    ):
        raise InputError(f"jarvis: `{rest}` holds no structures; choose another")
    starts = (start for start in _LICENCES if rest.startswith(start))
    licence = _LICENCES.get(next(starts, ""), "")
    origin = Origin(f"JARVIS {rest}", URL, licence, rest, citation=CITATION)
    return WholeSet(origin, [_entry(entry) for entry in found])


def _entry(entry: Any) -> dict[str, Any]:
    """Return an entry for `tables.py`, which reads the layout of JARVIS."""
    if not isinstance(entry, dict):
        return {"problem": f"`{str(entry)[:40]}` is no entry of JARVIS"}
    if not isinstance(entry.get("atoms"), dict):
        name = entry.get("jid") or entry.get("id")
        return {"id": name, "structure": None, "problem": "no `atoms` in the entry"}
    return entry
