"""The firewall of a build: what stands in a dataset, or twice, stays out of the store.

A search needs the whole corpus, not shards, so that the shards are merged twice: first
into a store of everything, which is searched, then into the store that was asked for.
Both steps leave a file beside the shards, so that an interrupted build goes on.
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
"""Among the shards: the store of all crystals."""

FOUND = "excluded.json"
"""Among the shards: what the search found in it."""


@dataclass(frozen=True)
class Firewall:
    """The datasets that a build keeps out.

    Args:
        datasets: what was read of them.
        kinds: of the pairs that keep a crystal out.
        duplicates: whether a crystal may enter twice, under two ids.
        workers: processes of the search; where None, all cores if it is large.
        cluster: Dask workers instead.
        progress: whether to show progress bars.
    """

    datasets: Sequence[Side] = ()
    kinds: tuple[str, ...] = ()
    duplicates: bool = True
    workers: int | None = None
    cluster: str | None = None
    progress: bool = False
    identity: dict[str, Any] = field(init=False)
    """What an interrupted build must have in common with the one that goes on."""

    def __post_init__(self) -> None:
        identity: dict[str, Any] = {}
        if self.datasets:
            hashes = [(s.name, s.crystals.structures_hash) for s in self.datasets]
            identity = {"exclude": hashes, "exclude_kinds": self.kinds}
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
            kinds: of the pairs that keep a crystal out; there may be none.
            duplicates: whether a crystal may enter twice.
            workers: processes.
            cluster: Dask workers instead, for the search.
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
        """Return the rows to drop, with reasons, and enter the checks into `facts`.

        Args:
            shards: of the build, all of them.
            folder: where they are; may hold what an interrupted build found.
            facts: of the store; `checks` is added.
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
        corpus = Store.open(everything)
        if not len(corpus):  # nothing was read: nothing to be compared
            return Exclusion({}, [])
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
