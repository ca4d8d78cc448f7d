"""Drawing subsets of whole groups, as close to the wanted sizes as groups allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crysdistill.errors import InputError
from crysdistill.splits.groups import Groups
from crysdistill.splits.order import hashed_order, shuffled

_NEAR = 0.1  # share of the wanted size
_WINDOW = 4000  # the last crystals of a subset, for which sums are searched


def draw_whole_groups(
    groups: Groups,
    material_ids: Sequence[str],
    wanted: Mapping[str, int],
    seed: int,
    whole: bool,
) -> dict[str, np.ndarray]:
    """Draw whole groups; if `whole`, the last subset takes all remaining groups."""
    names, number = np.unique(groups.names, return_inverse=True)
    order = hashed_order(names.tolist(), seed)
    sizes = np.bincount(number, minlength=len(names))[order]
    dealt = _deal(sizes, wanted, whole, {})
    if any(wanted[name] and not dealt[name].any() for name in wanted):
        dealt = _deal(sizes, wanted, whole, _reserve(sizes, wanted))
    for name, mask in dealt.items():
        if wanted[name] and not mask.any():
            largest = int(sizes.argmax())
            raise InputError(
                f"no whole {groups.word} is left for `{name}`, which asks for "
                f"{wanted[name]} crystals: the largest of {len(sizes)}, "
                f"{names[order[largest]]}, holds {sizes[largest]} of "
                f"{len(groups.rows)}; ask for sizes that whole {groups.plural} can "
                "give, or choose another `split.by`"
            )
    return {
        name: shuffled(groups.rows[np.isin(number, order[mask])], material_ids, seed)
        for name, mask in dealt.items()
    }


def _deal(
    sizes: np.ndarray,
    wanted: Mapping[str, int],
    whole: bool,
    reserved: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """Give groups to subsets, (G,) bool each; `reserved` groups are already given."""
    free = np.ones(len(sizes), bool)
    free[list(reserved.values())] = False
    dealt = {}
    for name, size in wanted.items():
        mask = np.zeros(len(sizes), bool)
        if name in reserved:
            mask[reserved[name]] = True
            size = max(0, size - int(sizes[reserved[name]]))
        places = np.flatnonzero(free)
        if name == "train" and whole:
            mask[places] = True
        else:
            mask[places[nearest_sum(sizes[places], size)]] = True
        free &= ~mask
        dealt[name] = mask
    return dealt


def _reserve(sizes: np.ndarray, wanted: Mapping[str, int]) -> dict[str, int]:
    """Reserve a group for each subset except the first, so that none stays empty."""
    reserved: dict[str, int] = {}
    asked = [name for name, size in wanted.items() if size]
    for name in reversed(asked[1:]):
        gap = np.abs(sizes - wanted[name]).astype(float)
        gap[list(reserved.values())] = np.inf
        if np.isfinite(gap).any():
            reserved[name] = int(gap.argmin())
    return reserved


def nearest_sum(sizes: np.ndarray, wanted: int) -> np.ndarray:
    """Return groups that add up to a number of crystals, or as close as possible.

    The search takes groups in their order. Once a sum is within a tenth of the wanted
    number, it looks at only twice as many more groups. So the order, which a seed
    draws, matters if groups are few, and sums are exact if groups are many. If there
    are very many, the first groups are taken in order, and only the last few thousand
    crystals are searched for.

    Args:
        sizes: (G,) crystals of each group.
        wanted: the wanted number of crystals.

    Returns:
        (G,) bool.
    """
    taken = np.zeros(len(sizes), bool)
    ends = np.cumsum(sizes)
    start = int(np.searchsorted(ends, wanted - _WINDOW, side="right"))
    taken[:start] = True
    left = wanted - (int(ends[start - 1]) if start else 0)
    # first[s]: the group that first reaches the sum s; 0 for no group.
    first = np.full(2 * left + 1, -1, np.int64)
    first[0] = 0
    close = slice(left - int(_NEAR * left), left + int(_NEAR * left) + 1)
    last = len(sizes)
    for place in range(start, len(sizes)):
        if first[left] >= 0 or place >= last:
            break
        size = int(sizes[place])
        if size < len(first):
            new = (first[: len(first) - size] >= 0) & (first[size:] < 0)
            first[size:][new] = place + 1
        if last == len(sizes) and (first[close] >= 0).any():
            last = start + 3 * (place + 1 - start)
    reached = np.flatnonzero(first >= 0)
    total = int(reached[np.abs(reached - left).argmin()])
    while total:
        place = int(first[total]) - 1
        taken[place] = True
        total -= int(sizes[place])
    return taken
