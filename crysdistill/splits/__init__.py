"""Splits into train, validation and test sets: drawn once, written, never shared."""

from crysdistill.splits.draws import (
    grouped_split,
    ordered_split,
    random_split,
    split_beside,
    stratified_split,
)
from crysdistill.splits.folds import folds_of_groups, folds_of_rows
from crysdistill.splits.groups import GROUPINGS, Groups, find_groups
from crysdistill.splits.settings import (
    SplitSettings,
    fold_file,
    make_folds,
    make_split,
)
from crysdistill.splits.split import SUBSETS, Split, read_split

__all__ = [
    "GROUPINGS",
    "SUBSETS",
    "Groups",
    "Split",
    "SplitSettings",
    "find_groups",
    "fold_file",
    "folds_of_groups",
    "folds_of_rows",
    "grouped_split",
    "make_folds",
    "make_split",
    "ordered_split",
    "random_split",
    "read_split",
    "split_beside",
    "stratified_split",
]
