"""Hugging Face: `hf:OWNER/NAME[/CONFIG[/SPLIT]]`, streamed by its client `datasets`.

`?properties=a,b` names the numbers to read as labels. `hf:./folder[?...]` names a local
folder with the same tables (Parquet, Arrow, JSON lines). The columns are those of
OPTIMADE (`lattice_vectors`, `cartesian_site_positions`, `species_at_sites`), as in
LeMat-Bulk; or `lattice`, `species`, `frac`; or pymatgen's `structure`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from crysdistill.errors import (
    BadStructure,
    InputError,
    did_you_mean,
    first_line,
    not_installed,
)
from crysdistill.sources.entries import label_values
from crysdistill.sources.identity import ID_KEYS
from crysdistill.sources.services import Page
from crysdistill.sources.whole_sets import PAGE_SIZE
from crysdistill.store.origins import Origin
from crysdistill.structures.crystal import FULL_OCCUPANCY, disordered
from crysdistill.structures.readers import fractional

URL = "https://huggingface.co/datasets/"

_LAYOUTS = (
    ("lattice_vectors", "cartesian_site_positions", "species_at_sites"),
    ("lattice", "species", "frac"),
    ("structure",),
)
_BESIDE = ("species", "dimension_types")  # optional columns of OPTIMADE
_IDS = ("immutable_id", *ID_KEYS)
_SPDX = {"mit": "MIT", "apache-2.0": "Apache-2.0", "odc-by": "ODC-By-1.0"}


def open_service(rest: str) -> HuggingFace:
    """Return the service that the text after `hf:` names.

    Args:
        rest: `OWNER/NAME[/CONFIG[/SPLIT]]` or a folder, and `?properties=...`.

    Raises:
        InputError: the package is missing, there is no such data set, configuration or
            split, or it lacks the columns of structures.
    """
    try:
        import datasets  # noqa: F401 - heavy, so imported only when needed
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise not_installed("datasets", "hf") from None
    where, _, text = rest.partition("?")
    key, _, value = text.partition("=")
    if text and key != "properties":
        hint = did_you_mean(key, ["properties"])
        raise InputError(f"hf: unknown option `{key}`{hint or '; use `properties=`'}")
    properties = tuple(name.strip() for name in value.split(",") if name.strip())
    name, config, split = _parts(where)
    revision = _revision(name)
    try:
        config = _chosen("configuration", config, _configs(name, revision), name)
        split = _chosen("split", split, _splits(name, config, revision), name)
        rows = _stream(name, config, split, revision)
        columns = rows.column_names or list(next(iter(rows), {}))
    except InputError:
        raise
    except Exception as error:  # the hub's, the network's, the file formats'
        raise _unreadable(name, error) from None
    layout = next((names for names in _LAYOUTS if set(names) <= set(columns)), None)
    if layout is None:
        raise InputError(
            f"hf: `{name}` has the columns {', '.join(columns)}; structures need "
            + ", or ".join(f"`{' '.join(names)}`" for names in _LAYOUTS)
        )
    for column in properties:
        if column not in columns:
            raise InputError(
                f"hf: `{name}` has no column `{column}`{did_you_mean(column, columns)}"
            )
    found = (*layout, *_BESIDE, *_IDS, *properties)
    keep = tuple(column for column in dict.fromkeys(found) if column in columns)
    title = name if revision is None else f"{name}@{revision}"
    origin = Origin(
        f"Hugging Face {name}",
        URL + name if revision else "",
        _licence(name, revision),
        "/".join((title, config, split)),
    )
    total = getattr((rows.info.splits or {}).get(split), "num_examples", None)
    table = Table(name, config, split, revision, layout, keep, properties)
    return HuggingFace(origin, table, total)


@dataclass(frozen=True)
class Table:
    """One split of a data set.

    Args:
        name: the data set, or its folder.
        config: the configuration of the data set.
        split: the split of the data set.
        revision: the commit of the data set; None for a folder.
        layout: the columns that hold the structure.
        columns: all columns to read.
        properties: the columns to read as labels.
    """

    name: str
    config: str
    split: str
    revision: str | None
    layout: tuple[str, ...]
    columns: tuple[str, ...]
    properties: tuple[str, ...]


@dataclass
class HuggingFace:
    """A table of structures, page by page."""

    origin: Origin
    table: Table
    total: int | None = None

    def pages(self, cursor: Any = None) -> Iterator[Page]:
        """Yield pages; the cursor holds the client's own state and the revision.

        Raises:
            InputError: the data cannot be read.
        """
        table, number = self.table, 0
        revision = table.revision
        if cursor is not None:
            revision, number = cursor["revision"], cursor["rows"]
        try:
            rows = _stream(table.name, table.config, table.split, revision)
            rows = rows.select_columns(list(table.columns))
            if cursor is not None:
                rows.load_state_dict(cursor["state"])
        except Exception as error:  # the hub's, the network's, the file formats'
            raise _unreadable(table.name, error) from None
        waiting = iter(rows)
        page = self._take(waiting)
        while True:
            state = rows.state_dict()
            following = self._take(waiting)
            entries = [entry_of(r, table, number + n) for n, r in enumerate(page)]
            number += len(page)
            here = {"revision": revision, "rows": number, "state": state}
            yield Page(entries, here if following else None)
            if not following:
                return
            page = following

    def _take(self, waiting: Iterator[Any]) -> list[Any]:
        try:
            return list(islice(waiting, PAGE_SIZE))
        except Exception as error:  # as above
            raise _unreadable(self.table.name, error) from None


def entry_of(row: Mapping[str, Any], table: Table, number: int) -> dict[str, Any]:
    """Return an entry for `tables.py`, or its problem.

    Args:
        row: the row that the client returns.
        table: the table, which names the columns.
        number: the number of the row, which becomes its id if it has none.
    """
    names = (str(row[key]).strip() for key in _IDS if row.get(key) is not None)
    stem = table.name.rstrip("/").rpartition("/")[2]
    name = next(filter(None, names), f"{stem}-{number}")
    try:
        structure = _structure(row, table.layout)
        values = label_values(row, table.properties)
    except BadStructure as problem:
        return {"material_id": name, "structure": None, "problem": str(problem)}
    return {"material_id": name, **values, "structure": structure}


def _structure(row: Mapping[str, Any], layout: tuple[str, ...]) -> dict[str, Any]:
    """Return a structure in the layout that `tables.py` reads."""
    for key in layout:
        if row.get(key) is None:
            raise BadStructure(f"no `{key}` in its row; leave it out")
    if layout == ("structure",):
        structure = _decoded(row["structure"], "structure")
        if not isinstance(structure, dict):
            raise BadStructure("`structure` is not what pymatgen writes; leave it out")
        return structure
    if layout == ("lattice", "species", "frac"):
        return {key: row[key] for key in layout}
    periodic = row.get("dimension_types")
    if periodic and list(periodic) != [1, 1, 1]:
        raise BadStructure(
            f"periodic in {list(periodic).count(1)} of 3 directions; only crystals are "
            "read"
        )
    try:
        lattice = np.array(row["lattice_vectors"], np.float64)
        positions = np.array(row["cartesian_site_positions"], np.float64)
    except (ValueError, TypeError):
        raise BadStructure(
            "lattice or positions are no numbers; leave it out"
        ) from None
    symbols = _symbols(row)
    frac = fractional(positions, lattice)
    return {"lattice": lattice.tolist(), "species": symbols, "frac": frac.tolist()}


def _symbols(row: Mapping[str, Any]) -> list[str]:
    """Return the element on each site; OPTIMADE's `species` may be JSON in a string."""
    names = [str(name) for name in row["species_at_sites"]]
    kinds = _decoded(row.get("species") or [], "species")
    meant: dict[str, str] = {}
    for kind in kinds if isinstance(kinds, list) else []:
        if not isinstance(kind, Mapping) or not kind.get("chemical_symbols"):
            continue
        held = [str(symbol) for symbol in kind["chemical_symbols"]]
        shares = kind.get("concentration") or [1.0] * len(held)
        if len(held) != 1 or abs(float(shares[0]) - 1) > FULL_OCCUPANCY:
            parts = zip(held, map(float, shares), strict=False)
            shown = " + ".join(f"{symbol} {share:g}" for symbol, share in parts)
            if kind.get("name") in names:
                site = names.index(str(kind["name"]))
                raise BadStructure(disordered(str(site), shown))
        meant[str(kind.get("name"))] = held[0]
    return [meant.get(name, name) for name in names]


def _decoded(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise BadStructure(f"`{column}` is not valid JSON; leave it out") from None


# -------------------------------------------------------------------------- the client


def _parts(where: str) -> tuple[str, str, str]:
    """Return data set, configuration and split; "" for a missing part."""
    if re.match(r"[./~]", where):
        folder = Path(where).expanduser()
        if not folder.is_dir():
            raise InputError(f"hf: {folder}: no such folder")
        return str(folder), "", ""
    parts = where.strip("/").split("/")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise InputError(
            f"hf: `{where}` should be `OWNER/NAME[/CONFIG[/SPLIT]]`, such as "
            "`LeMaterial/LeMat-Bulk/compatible_pbe`, or a folder, `./folder`"
        )
    config, split = (*parts[2:], "", "")[:2]
    return "/".join(parts[:2]), config, split


def _is_folder(name: str) -> bool:
    return Path(name).is_dir()


def _revision(name: str) -> str | None:
    """Return the newest commit of a data set; all pages come from one commit."""
    if _is_folder(name):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=30).sha
    except Exception as error:  # the hub's and the network's own
        raise _unreadable(name, error) from None


def _saved(name: str) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return (Path(name) / "state.json").is_file()


def _configs(name: str, revision: str | None) -> list[str]:
    import datasets

    if _saved(name):
        return ["default"]
    return datasets.get_dataset_config_names(name, revision=revision)


def _splits(name: str, config: str, revision: str | None) -> list[str]:
    import datasets

    if _saved(name):
        return ["train"]
    return datasets.get_dataset_split_names(name, config, revision=revision)


def _chosen(what: str, wanted: str, known: list[str], name: str) -> str:
    """Return the named configuration or split, or the only one if none is named."""
    if wanted in known:
        return wanted
    if not wanted and (len(known) == 1 or "train" in known):
        return known[0] if len(known) == 1 else "train"
    hint = did_you_mean(wanted, known) if wanted else ""
    says = f"no {what} `{wanted}`" if wanted else f"several {what}s; name one"
    raise InputError(f"hf: `{name}` has {says}{hint or '; known: ' + ', '.join(known)}")


def _stream(name: str, config: str, split: str, revision: str | None) -> Any:
    import datasets

    if _saved(name):
        return datasets.load_from_disk(name).to_iterable_dataset()
    return datasets.load_dataset(
        name, config, split=split, streaming=True, revision=revision
    )


def _licence(name: str, revision: str | None) -> str:
    """Return the licence on the card of a data set, as an SPDX expression, or ""."""
    from huggingface_hub import DatasetCard, hf_hub_download

    try:
        if _is_folder(name):
            path = Path(name) / "README.md"
        else:
            path = Path(
                hf_hub_download(
                    name, "README.md", repo_type="dataset", revision=revision
                )
            )
        found = DatasetCard.load(path).data.license
    except Exception:  # no card, or a card without a licence
        return ""
    names = found if isinstance(found, list) else [found]
    spelt = [
        _SPDX.get(n, n.upper() if n.startswith("cc") else n)
        for n in (str(n).lower() for n in names if n)
        if n not in ("unknown", "other")
    ]
    return " AND ".join(spelt)


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(
        f"hf: `{name}` cannot be read ({first_line(error)}); check the name and the "
        "network, and try again"
    )
