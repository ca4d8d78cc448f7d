"""What a study says at its end: results, advice, and runs that failed."""

from __future__ import annotations

import sys

import pandas as pd
import rich

from crysdistill.studies.sections.freezing import freezing
from crysdistill.studies.statistics import check_results
from crysdistill.studies.tables import console_table, result_groups


def conclude(results: pd.DataFrame) -> bool:
    """Print the end of a study; return whether no run failed.

    Args:
        results: the table from `study`.
    """
    failed = results[results["error"] != ""]
    if len(failed) < len(results):
        rich.print(console_table(results))
        for sentence in freezing_sentences(results):
            print(f"\n{sentence}")
        rich.print("`crysdistill report DIR` makes a page of it")
    for row in failed.itertuples():
        print(f"failed: {row.run}: {row.error}", file=sys.stderr)
    return failed.empty


def freezing_sentences(results: pd.DataFrame, reference: str = "scratch") -> list[str]:
    """Return which layers to freeze, how sure that is, and what an error costs.

    Args:
        results: the table from `study`.
        reference: the arm that the others are compared with.

    Returns:
        A sentence for each task and number of labels; none if the study has no axis
        `freeze.convolutions`.
    """
    table = check_results(results, reference)
    section = freezing(result_groups(table, reference), table)
    return [] if section is None else list(section.said)
