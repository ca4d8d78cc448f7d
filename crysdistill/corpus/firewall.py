"""The firewall of a build: it keeps crystals of datasets, and duplicates, out.

A search needs the whole corpus, not shards. So the shards are merged twice: first into
a store of everything, which is searched, then into the final store. Both steps leave a
file beside the shards, so that an interrupted build can continue.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crysdistill.corpus.merge import merge_shards
from crysdistill.files import write_whole

if TYPE_CHECKING:
    from crysdistill.overlap.exclusion import Exclusion
    from crysdistill.overlap.sides import Side

EVERYTHING = "everything.h5"
"""The store of all crystals, among the shards."""

FOUND = "excluded.json"
"""The result of the search, among the shards."""


@dataclass(frozen=True)
class Firewall:
    """The datasets that a build keeps out.

    Args:
        datasets: the datasets as the search needs them.
        kinds: the kinds of pairs that exclude a crystal.
        duplicates: whether a crystal may enter twice, under two ids.
        workers: processes of the search; None uses all cores if the search is large.
        cluster: use Dask workers.
        progress: whether to show progress bars.
    """

    datasets: Sequence[Side] = ()
    kinds: tuple[str, ...] = ()
    duplicates: bool = True
    workers: int | None = None
    cluster: str | None = None
    progress: bool = False
    identity: dict[str, Any] = field(init=False)
    """Facts that an interrupted build must share with the build that continues it."""

    def __post_init__(self) -> None:
        identity: dict[str, Any] = {}
        if self.datasets:
            hashes = [(s.name, s.crystals.structures_hash) for s in self.datasets]
            identity = {"exclude": hashes, "exclude_kinds": list(self.kinds)}
        if not self.duplicates:
            identity["duplicates"] = False
        object.__setattr__(self, "identity", identity)

    @classmethod
    def open(
        cls,
        paths: Sequence[str | Path],
        kinds: Iterable[str],
        duplicates: bool,
        workers: int | None,
        cluster: str | None,
        progress: bool,
    ) -> Firewall:
        """Read the datasets.

        Args:
            paths: stores or sources.
            kinds: the kinds of pairs that exclude a crystal; may be empty.
            duplicates: whether a crystal may enter twice.
            workers: processes.
            cluster: use Dask workers for the search.
            progress: whether to show progress bars.

        Raises:
            InputError: a dataset cannot be read or is empty, or a kind is unknown.
        """
        if not paths:
            return cls((), (), duplicates, workers, cluster, progress)
        # Not needed by a build without a firewall, and some of it slow to import.
        from crysdistill.overlap.exclusion import check_exclude_kinds
        from crysdistill.overlap.sides import open_sides

        wanted = check_exclude_kinds(kinds)
        sides = open_sides(paths, workers=workers, progress=progress)
        return cls(sides, wanted, duplicates, workers, cluster, progress)

    def apply(
        self, shards: Sequence[Path], folder: Path, facts: dict[str, Any]
    ) -> Mapping[int, str]:
        """Return the rows to drop, with reasons, and add the checks to `facts`.

        Args:
            shards: all shards of the build.
            folder: the folder of the shards; may hold an interrupted build's result.
            facts: the facts of the store; `checks` is added.
        """
        if not self.datasets and self.duplicates:
            return {}
        from crysdistill.overlap.exclusion import Exclusion

        path = folder / FOUND
        if path.exists():
            found = Exclusion.from_dict(json.loads(path.read_bytes()))
        else:
            found = self._search(shards, folder / EVERYTHING, facts)
            write_whole(path, json.dumps(found.to_dict()).encode())
        facts["checks"] = [check.to_dict() for check in found.checks]
        return found.rows

    def _search(
        self, shards: Sequence[Path], everything: Path, facts: dict[str, Any]
    ) -> Exclusion:
        from crysdistill.overlap.exclusion import (
            Exclusion,
            find_duplicates,
            find_exclusion,
        )
        from crysdistill.store.store import Store

        if not everything.exists():
            merge_shards(shards, everything, facts, progress=self.progress)
        if not everything.exists():  # nothing was read, so there is nothing to compare
            return Exclusion({}, [])
        corpus = Store.open(everything)
        how: dict[str, Any] = {
            "workers": self.workers,
            "cluster": self.cluster,
            "progress": self.progress,
        }
        found = find_exclusion(corpus, self.datasets, kinds=self.kinds, **how)
        if self.duplicates:
            return found
        twice = find_duplicates(corpus, without=found.rows, **how)
        return Exclusion(dict(sorted({**found.rows, **twice}.items())), found.checks)
