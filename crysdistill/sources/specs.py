"""Specs: `SCHEME:REST` names a database on the network and a query.

To add a database, add a file beside this one with `open_service(rest)`, and a line
here.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from crysdistill.errors import InputError, did_you_mean
from crysdistill.sources.services import Service

SERVICES = {
    "optimade": "crysdistill.sources.optimade",
    "mp": "crysdistill.sources.materials_project",
    "jarvis": "crysdistill.sources.jarvis",
    "matbench": "crysdistill.sources.matbench",
    "hf": "crysdistill.sources.hugging_face",
}
"""Modules by scheme; the `open_service` of a module makes the service.

A module is imported only when it is needed, because its package may be missing.
"""

# One letter would be a drive of Windows.
_SPEC = re.compile(r"([A-Za-z][\w-]+):(?!\\)")


def is_spec(text: str | Path) -> bool:
    """Whether a source is named by a spec and not by a path."""
    return (
        isinstance(text, str)
        and _SPEC.match(text) is not None
        and not Path(text).exists()
    )


def open_service(spec: str) -> Service:
    """Return the service that a spec names; this may ask the network for its name.

    Args:
        spec: `SCHEME:REST`, such as `optimade:oqmd?filter=nelements=2`.

    Raises:
        InputError: there is no such scheme, REST is invalid, a package is missing, or
            the service does not answer.
    """
    scheme, _, rest = spec.partition(":")
    if scheme not in SERVICES:
        known = ", ".join(f"`{name}:`" for name in SERVICES)
        hint = did_you_mean(scheme, SERVICES) or f"; databases begin with {known}"
        raise InputError(f"{spec}: no such database or file{hint}")
    try:
        module = importlib.import_module(SERVICES[scheme])
    except ModuleNotFoundError as error:
        raise InputError(
            f"{spec}: needs the package `{error.name}`, which is not installed: `pip "
            f"install 'crysdistill[{scheme}]'`"
        ) from None
    return module.open_service(rest)
