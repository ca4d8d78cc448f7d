"""The report of a study, or of several, from their files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from crysdistill.errors import InputError
from crysdistill.studies.dataset_files import tested_crystals
from crysdistill.studies.distances import corpus_distances, training_distances
from crysdistill.studies.embedding_maps import embedding_maps
from crysdistill.studies.joining import join_studies, read_study, study_names
from crysdistill.studies.report import write_report
from crysdistill.studies.run_files import (
    encoder_blocks,
    epochs,
    judged_predictions,
    test_over_train,
    training_logs,
    versions,
)
from crysdistill.studies.statistics import check_results, read_published

__all__ = ["epochs", "report_study"]


def report_study(
    folder: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    title: str | None = None,
    pretraining: pd.DataFrame | None = None,
    next_steps: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
    published: str | Path | None = None,
    reference: str = "scratch",
) -> Path:
    """Write the report of a study from the files of its runs.

    Args:
        folder: the study's folder, with `results.csv` and `runs/`; several folders
            make one report.
        out: the page to write; `report.html` in the folder if None.
        title: the title of the page.
        pretraining: the log of the pretraining run.
        next_steps: commands to show at the end.
        facts: further facts about the study; see `write_report`.
        published: a CSV of published predictions, to compare crystal by crystal.
        reference: the arm that the others are compared with.

    Returns:
        The path of the page.

    Raises:
        InputError: a folder holds no study, studies disagree, or the path of the page
            of several studies is missing.
    """
    folders = [folder] if isinstance(folder, str | Path) else list(folder)
    names = study_names(folders)
    if out is None and len(folders) > 1:
        raise InputError("several studies make one page; say where with `--out`")
    models = None if published is None else read_published(published)
    study = join_studies(
        {name: read_study(f) for name, f in zip(names, folders, strict=True)}
    )
    table = check_results(study.results, reference)
    known = table["test_train"].isna().all()
    ratios = test_over_train(table) if known else table["test_train"]
    predictions = judged_predictions(table)
    absent: list[str] = []
    if predictions is not None:
        predictions["distance"] = training_distances(table, predictions)
        corpus = corpus_distances(table, predictions)
        predictions["corpus_distance"], absent = corpus
    maps = embedding_maps(table)
    blocks = encoder_blocks(table) if "freeze.convolutions" in table else None
    said = {**study.facts, **(facts or {})}
    said.setdefault("versions", versions(table))
    if not {"arms", "controls", "roles"} <= said.keys():
        said = {**_as_declared(table), **said}
    named = " and ".join(Path(name).resolve().name for name in names)
    return write_report(
        Path(out) if out is not None else Path(folders[0]) / "report.html",
        title=title or f"{'Study' if len(names) == 1 else 'Studies'} {named}",
        results=table.assign(test_train=ratios),
        failed=study.results,
        facts=said,
        pretraining=pretraining,
        curves=training_logs(table),
        predictions=predictions,
        crystals=None if predictions is None else tested_crystals(table, predictions),
        blocks=blocks,
        published=models,
        embeddings=maps.points,
        not_shown=[*absent, *maps.absent],
        next_steps=list(next_steps),
        reference=reference,
    )


def _as_declared(table: pd.DataFrame) -> dict[str, Any]:
    """Return facts about the arms, from their registry, for studies that wrote none."""
    from crysdistill.studies.arms import make_arm  # slow: it imports the training

    found = {}
    for name in dict.fromkeys(table["method"]):
        with contextlib.suppress(InputError):  # an arm of somebody else
            found[name] = make_arm(name)
    return {
        "arms": {name: arm.about for name, arm in found.items()},
        "controls": [name for name, arm in found.items() if arm.control],
        "roles": {name: arm.role for name, arm in found.items() if arm.role},
    }
