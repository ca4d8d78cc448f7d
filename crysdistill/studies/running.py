"""Runs one cell of a study, in this process or in a worker."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from crysdistill.errors import InputError
from crysdistill.files import write_whole
from crysdistill.splits import read_split
from crysdistill.store.store import Store
from crysdistill.studies.ensembles import run_ensemble
from crysdistill.studies.kinds import KINDS
from crysdistill.studies.search import Search, search
from crysdistill.training.finetune import FinetuneConfig
from crysdistill.transfer.drift import block_cka, weight_drift
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.weights import load_encoder, load_predictor

RECORD = "cell.json"
"""The coordinates of a cell and what it cost, in its run folder."""

_LOOKED_AT = 256  # crystals not trained on by which the answers of blocks are compared


class Job(NamedTuple):
    """What a worker needs to run a cell.

    Args:
        kind: of `KINDS`.
        config: of the run; `out` is its folder.
        repeats: networks whose mean predicts.
        coordinates: of the cell.
        search: of its settings; None for none.
        threads: CPU threads.
    """

    kind: str
    config: Any
    repeats: int
    coordinates: dict[str, Any]
    search: Search | None = None
    threads: int = 1

    @property
    def done(self) -> bool:
        """Whether its folder holds its result."""
        return (self.config.out / "results.json").exists()


def run_job(job: Job) -> str:
    """Run a cell, or go on with it; return why it failed, or "".

    The output of the run is swallowed. The traceback of a failure lies in the study's
    folder `errors`.
    """
    folder: Path = job.config.out
    log = folder.parents[1] / "errors" / f"{folder.name}.txt"
    started, threads = time.process_time(), torch.get_num_threads()
    torch.set_flush_denormal(True)  # tails of Gaussians slow a CPU down
    torch.set_num_threads(job.threads)  # also for the same sums wherever it runs
    error, chosen = "", record_of(folder).get("chosen")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = job.config
            if job.search is not None:
                file = folder.parents[1] / "search" / f"{folder.name}.log"
                config, chosen = search(job.kind, config, job.search, file)
            _run(job.kind, config, job.repeats)
    except Exception as problem:  # the other cells go on
        error = _in_one_line(problem)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        torch.set_num_threads(threads)
        if (folder / "config.yaml").exists():  # the run has begun
            spent = record_of(folder).get("processor", 0.0)
            spent += time.process_time() - started
            write_record(
                folder,
                {
                    "cell": job.coordinates,
                    "processor": round(spent, 3),
                    "error": error,
                    **({"chosen": chosen} if chosen else {}),
                },
            )
    if not error:
        log.unlink(missing_ok=True)
    return error


def record_of(folder: Path) -> dict[str, Any]:
    """Return what `write_record` wrote into a run folder; empty if nothing."""
    try:
        return dict(json.loads((folder / RECORD).read_bytes()))
    except (OSError, ValueError):
        return {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what a study knows about one of its runs into the run's folder.

    Args:
        folder: of the run.
        record: `cell`, the coordinates by the name of the axis; `processor`, seconds;
            `error`, why it failed; `chosen`, the settings that a search found.
    """
    text = json.dumps(record, indent=2, default=str) + "\n"
    write_whole(folder / RECORD, text.encode())


def _run(kind: str, config: Any, repeats: int) -> None:
    folder = config.out
    if folder.exists() and not (folder / "config.yaml").exists():
        shutil.rmtree(folder)  # no run had begun there
    # Weights without results: it stopped while it was judged.
    (folder / "weights.safetensors").unlink(missing_ok=True)
    config = replace(config, resume=True)
    run = KINDS[kind].run
    if repeats > 1:
        run_ensemble(run, config, repeats)
        return
    run(config)
    if isinstance(config, FinetuneConfig):
        _add_drift(config)


def _add_drift(config: FinetuneConfig) -> None:
    """Add to a run's results how far each block of its encoder has moved."""
    path = config.out / "results.json"
    results = json.loads(path.read_text("utf-8"))
    predictor = load_predictor(config.out / "weights.safetensors")
    if not isinstance(predictor, Predictor):
        return
    before, store = load_encoder(config.weights), Store.open(config.dataset)
    split = read_split(
        config.out / "split.csv", store.material_ids, np.arange(len(store))
    )
    rows = np.concatenate([split.val, split.test])[:_LOOKED_AT]
    results["drift"] = weight_drift(before, predictor.encoder)
    results["cka"] = block_cka(before, predictor.encoder, [store.batch(np.sort(rows))])
    write_whole(path, (json.dumps(results, indent=2) + "\n").encode())


def _in_one_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    if isinstance(problem, InputError):
        return text
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
