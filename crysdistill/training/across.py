"""A test set in another store: train on one, test on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

import numpy as np

from crysdistill.errors import InputError
from crysdistill.overlap.exclusion import SAME
from crysdistill.overlap.finding import find_overlaps
from crysdistill.splits import Split
from crysdistill.store.store import Store
from crysdistill.training.pretrained import described, options
from crysdistill.training.settings import AcrossSettings
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.targets import Target


@dataclass(frozen=True)
class OtherStore:
    """Another store with labels, and the crystals in it to test on.

    Args:
        store: the store.
        names: its property for each target.
        rows: the rows to test on; at first all that have a label.
        shared: how many labelled crystals the training or the validation set also
            holds.
        kept: whether these are among `rows`.
    """

    store: Store
    names: tuple[str, ...]
    rows: np.ndarray
    shared: int = 0
    kept: bool = False

    @property
    def remark(self) -> str:
        """A line on the test set."""
        said = f"test on {len(self.rows):,} crystals of {self.store.path}"
        also = "which the training or validation set also holds"
        if self.shared and self.kept:
            return f"{said}; {self.shared:,} of them, {also}, are kept"
        if self.shared:
            return f"{said}; {self.shared:,} others, {also}, are left out"
        return f"{said}; none of them is in the training or validation set"

    def overlap(self, pretrained: str) -> str:
        """Return whether test crystals were seen before, in training or pretraining.

        Args:
            pretrained: the sentence on the pretrained weights or the teacher.
        """
        if not (self.shared and self.kept):
            return pretrained
        return (
            f"leaked (the training or validation set holds {self.shared:,} of the "
            f"{len(self.rows):,} test crystals with their labels); before this run: "
            f"{pretrained}"
        )

    def facts(self) -> dict[str, Any]:
        """Return the entry for `results.json`."""
        return {
            "store": str(self.store.path),
            "hash": self.store.hash,
            "properties": list(self.names),
            "crystals": len(self.rows),
            "shared": self.shared,
            "shared_kept": self.kept,
        }


def open_other(
    settings: AcrossSettings, targets: Sequence[Target], store: Store
) -> OtherStore | None:
    """Open the store to test on, and check its graph and labels; None if not given.

    Args:
        settings: name the store.
        targets: the targets of the run.
        store: the store to train on.

    Raises:
        InputError: the store cannot be opened, holds another graph (the text has the
            command that builds it again), or lacks usable labels.
    """
    if settings.dataset is None:
        return None
    other = Store.open(settings.dataset)
    if other.graph != store.graph:
        new = other.path.with_name(f"{other.path.stem}-{store.graph.mode}.h5")
        raise InputError(
            f"`test.dataset` {other.path} holds another graph "
            f"({described(other.graph)}) than {store.path} ({described(store.graph)}); "
            f"build it again with `crysdistill build {quote(str(other.path))} -o "
            f"{quote(str(new))} {options(store.graph)}`"
        )
    names = tuple(settings.properties) or tuple(target.name for target in targets)
    if len(names) != len(targets):
        raise InputError(
            f"`test.properties` names {len(names)} but there are {len(targets)} "
            "targets; name one for each target, in their order"
        )
    for name, target in zip(names, targets, strict=True):
        target.check(other.property(name), other.material_ids)
    known = ~np.isnan(_labels(other, names)).all(axis=1)  # (B,)
    return OtherStore(other, names, np.flatnonzero(known))


def find_shared(other: OtherStore, store: Store, split: Split) -> np.ndarray:
    """Return the labelled rows of another store that the run learns or chooses from.

    Args:
        other: the store to test on.
        store: the store to train on.
        split: of its crystals.
    """
    [overlap] = find_overlaps(
        store,
        [(other.store.path.name, other.store)],
        kinds=SAME,
        pairs_per_entry=len(store),  # all: the nearest one may not be in training
        workers=1,  # runs of a study go on beside each other
    )
    used = np.zeros(len(store), bool)
    used[split.train] = used[split.val] = True
    here, there, _ = overlap.found.pairs.T
    return np.intersect1d(there[used[here]], other.rows)


def choose_tested(
    other: OtherStore, shared: np.ndarray, keep: bool, outputs: Outputs
) -> OtherStore:
    """Leave shared crystals out of the test set or mark them; check what is left.

    Args:
        other: the store, with all labelled crystals.
        shared: what `find_shared` returned.
        keep: whether to test on these crystals too.
        outputs: the targets, with the classes of the training crystals.

    Raises:
        InputError: no crystal is left, or those left cannot judge a target.
    """
    path = other.store.path
    rows = other.rows if keep else np.setdiff1d(other.rows, shared)
    if len(other.rows) and not len(rows):
        raise InputError(
            f"all {len(shared):,} labelled crystals of {path} are also in the training "
            "or validation set; take fewer to train on, or set "
            "`test.keep_shared=true` to test on them nevertheless"
        )
    labels = _labels(other.store, other.names)[rows]  # (n, T)
    for t, name in enumerate(other.names):
        found = np.unique(labels[~np.isnan(labels[:, t]), t])
        classes = outputs.normalizers[t].classes
        if not len(found):
            raise InputError(
                f"{path}: no crystal to test on has a label `{name}`; give another "
                "`test.dataset`"
            )
        if classes and found.max() >= classes:
            raise InputError(
                f"{path}: `{name}` has class {found.max():g}, which no training "
                "crystal has; give a `test.dataset` with the same classes"
            )
        # The AUC of one class is undefined, and zero would be wrong.
        if classes == 2 and len(found) == 1:
            raise InputError(
                f"{path}: all crystals to test on have `{name}` {found[0]:g}; give a "
                "`test.dataset` with both classes"
            )
    return OtherStore(other.store, other.names, rows, len(shared), keep)


def _labels(store: Store, names: Sequence[str]) -> np.ndarray:
    """Return the labels of all crystals, (B, T), NaN where not known."""
    return np.stack([store.property(name) for name in names], axis=1)
