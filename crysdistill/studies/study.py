"""A study: every cell of its axes is an ordinary run, resumable cell by cell."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pandas as pd
import rich
import torch
from rich.markup import escape

from crysdistill.errors import InputError
from crysdistill.files import write_whole
from crysdistill.locks import locked
from crysdistill.schema import Unread, write_value
from crysdistill.studies.axes import read_axes
from crysdistill.studies.cells import Cell, make_cells
from crysdistill.studies.facts import study_facts
from crysdistill.studies.fairness import (
    Draw,
    draw_splits,
    overlap_of_runs,
    overlaps,
    unfair,
    unfair_runs,
)
from crysdistill.studies.kinds import KINDS, STUDIES_SET, Settings, check_key, flat
from crysdistill.studies.running import Job, record_of, run_job, write_record
from crysdistill.studies.search import TuneSettings
from crysdistill.studies.shown import Shown
from crysdistill.studies.unchanged import check_unchanged
from crysdistill.workers import check_engine, engine

_SCHEMAS = tuple(kind.schema for kind in KINDS.values())
_FIRST = ["arm", "task", "target", "unit", "metric", "labels", "seed", "fold"]
_LAST = ["value", "validation", "processor", "run", "error"]


@dataclass
class StudyConfig:
    """A comparison of ways to use pretrained weights.

    Args:
        base: the settings that all runs share: any key of `train`, `finetune`,
            `distill` and `fit`. A run takes the keys that its kind has.
        out: the study's folder; every run lies in `OUT/runs/`.
        weights: the weights file of the pretrained encoder; short for `base.weights`.
        axes: lists by name, whose product are the runs: `arm`; `task`, names with the
            keys of each; `labels`, numbers of training crystals, or `all`; `seed`;
            `fold`; `weights`; `repeats`, networks whose mean predicts; or any key of a
            run, such as `freeze.convolutions`.
        exclude: coordinates of runs to leave out, such as `{arm: stack, labels: 50}`.
        controls: true adds the controls that answer to one of the arms; false none; a
            list of names adds those.
        tune: a search of settings, the same for every arm and task; null for none.
        workers: the number of runs at a time, each with one thread; null takes all
            cores, or one run at a time for each GPU. The GPUs are taken in turn.
        cluster: use Dask workers instead: `local:N`, `tcp://HOST:PORT`, a scheduler
            file, or `slurm:FILE.yaml`.
    """

    MOVED: ClassVar[Mapping[str, str]] = {
        "arms": "axes.arm",
        "labels": "axes.labels",
        "seeds": "axes.seed",
        "baselines": "controls",
    }
    """Keys of version 0.1, and where they went."""

    base: Annotated[dict[str, Any], Unread(_SCHEMAS, STUDIES_SET)]
    out: Path = Path("runs/study")
    weights: Path | None = None
    axes: Annotated[dict[str, Any], Unread()] = field(default_factory=dict)
    exclude: Annotated[list[Any], Unread()] = field(default_factory=list)
    controls: bool | list[str] = True
    tune: TuneSettings | None = None
    workers: int | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.base, Mapping):
            raise InputError(
                "`base` must hold keys of runs, such as `base.dataset=d.h5`"
            )
        check_engine(self.workers, self.cluster)

    @property
    def shared(self) -> Settings:
        """The settings that all cells share, by dotted keys.

        Raises:
            InputError: a key is unknown, or `weights` is given twice.
        """
        found = flat(self.base)
        for key in found:
            check_key(key, "base")
        if self.weights is not None:
            if "weights" in found:
                raise InputError(
                    "`weights` and `base.weights` are both given; leave one out"
                )
            found["weights"] = self.weights
        return found


def study(config: StudyConfig, progress: bool = True) -> pd.DataFrame:
    """Run every cell that has not run yet; return one row for each cell.

    All arms of a task, a number of labels and a seed have the same training, validation
    and test crystals. Validation chooses the epoch. A run that fails is shown with its
    error, and the others go on.

    Args:
        config: the study.
        progress: whether to show a growing table.

    Returns:
        Columns `arm, task, target, unit, metric, labels, seed`, `fold` if there are
        folds, each further axis, and `value, validation, processor, run, error`; also
        written to `OUT/results.csv`.

    Raises:
        InputError: the configuration cannot be used, a split does not give what is
            asked for, the folder holds a study with other settings, or another process
            works there.
    """
    axes = read_axes(config.axes)
    cells = make_cells(
        config.shared, axes, config.exclude, config.controls, config.tune
    )
    draws = draw_splits(cells)
    overlap = overlaps(cells)
    lines = unfair(cells, draws, overlap)
    with _alone(config.out):
        check_unchanged(config.out, cells, axes)
        for line in lines if progress else ():
            rich.print(escape(line))
        facts = study_facts(cells, draws, overlap, lines, _command(config))
        _write_facts(config.out, facts)
        rows = []
        try:
            for cell, error in _run(config, cells, progress):
                rows.append(_row(config.out, cell, draws[cell.name], error))
        except BaseException:  # a report can be made of what is finished
            rows = [
                _row(config.out, cell, draws[cell.name], "")
                for cell in cells
                if (config.out / "runs" / cell.name / "results.json").exists()
            ]
            raise
        finally:
            if rows:
                _table(rows, axes).to_csv(config.out / "results.csv", index=False)
            if said := overlap_of_runs(config.out, cells):
                more = unfair_runs(said, lines)
                facts |= {"overlap_of_runs": said, "not_fair": [*lines, *more]}
                _write_facts(config.out, facts)
        _write_facts(config.out, {**facts, **_tuned(config, cells)})
    return _table(rows, axes)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder of a study against other processes."""
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder}: another study is running there; wait, or give another `out`"
    with locked(folder / ".lock", refusal):
        yield


def _run(
    config: StudyConfig, cells: Sequence[Cell], progress: bool
) -> Iterator[tuple[Cell, str]]:
    """Yield every cell after it has run, with its error or ""."""
    jobs = [_job(config, cell) for cell in cells]
    workers, devices = config.workers, _devices()
    if workers is None and config.cluster is None and devices:
        workers = len(devices)  # more runs at a time would share their memory
    missing = [job for job in jobs if not job.done]
    kept = len(jobs) - len(missing)
    runs = {job.config.out for job in missing}
    if len(missing) < 2 and config.cluster is None:
        workers = 1
    opened = {Path(job.config.dataset) for job in jobs}
    with (
        Shown(cells, progress, kept) as shown,
        engine(
            workers, config.cluster, folder=config.out, opened=sorted(opened),
            kept="finished runs are kept; ", devices=devices,
        ) as work,
    ):  # fmt: skip
        errors = work.map(run_job, missing)
        for cell, job in zip(cells, jobs, strict=True):
            new = job.config.out in runs
            error = next(errors) if new else ""
            if not error:
                _keep_coordinates(job)
            shown.add(cell, {} if error else _results(job.config.out), error, new)
            yield cell, error


def _devices() -> list[str]:
    """Return the GPUs that this process sees, by the names that CUDA knows."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else map(str, range(count))
    return [name.strip() for name in names][:count]  # CUDA sees none after a wrong name


def _job(study: StudyConfig, cell: Cell) -> Job:
    config = replace(cell.config, out=study.out / "runs" / cell.name)
    threads = 1
    if hasattr(config, "trainer"):
        config = replace(config, trainer=replace(config.trainer, progress=False))
        threads = config.trainer.threads or 1
    if study.cluster is not None:
        config = _with_whole_paths(config)
    return Job(
        cell.arm.kind, config, cell.repeats, cell.coordinates, cell.search, threads
    )


def _with_whole_paths(config: Any) -> Any:
    """Return a configuration for a machine whose working directory may be another."""
    found: dict[str, Any] = {}
    for name in ("out", "dataset", "weights", "teacher"):
        value = getattr(config, name, None)
        if isinstance(value, list):
            found[name] = [p.absolute() if p.exists() else p for p in value]
        elif isinstance(value, Path) and (value.exists() or name == "out"):
            found[name] = value.absolute()
        elif isinstance(value, str) and Path(value).exists():
            found[name] = str(Path(value).absolute())
    return replace(config, **found)


def _keep_coordinates(job: Job) -> None:
    """Write the coordinates of a run that an earlier study without some axes made."""
    record = record_of(job.config.out)
    known = json.loads(json.dumps(job.coordinates, default=str))
    if record.get("cell") != known:
        write_record(job.config.out, {**record, "cell": known})


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text("utf-8"))


def _row(out: Path, cell: Cell, draw: Draw, error: str) -> dict[str, Any]:
    folder = out / "runs" / cell.name
    found = {} if error else _results(folder)
    fold = cell.config.split.fold
    further = {
        name: value if isinstance(value, int | float | str) else write_value(value)
        for name, value in cell.coordinates.items()
        if name not in (*_FIRST, *_LAST)
    }
    return {
        "arm": cell.arm.name,
        "task": cell.task,
        "target": ", ".join(target.name for target in cell.config.all_targets),
        "unit": draw.unit,
        "metric": draw.metric,
        "labels": draw.labels,
        "seed": cell.config.seed,
        **({} if fold is None else {"fold": fold}),
        **further,
        "value": found.get("test", float("nan")),
        "validation": found.get("val", float("nan")),
        "processor": record_of(folder).get("processor", float("nan")),
        "run": f"runs/{cell.name}",
        "error": error,
    }


def _table(rows: Sequence[dict[str, Any]], axes: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows with their columns in order; axes come before the values."""
    table = pd.DataFrame(rows)
    further = [n for n in axes if n not in _FIRST and n in table.columns]
    order = [n for n in _FIRST if n in table.columns]
    return table[[*order, *further, *_LAST]]


def _tuned(config: StudyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return what the search tried and chose, by the folder of the run."""
    if config.tune is None:
        return {}
    folders = {f"runs/{cell.name}": config.out / "runs" / cell.name for cell in cells}
    chosen = {name: record_of(path).get("chosen") for name, path in folders.items()}
    return {
        "tune": {
            "trials": config.tune.trials,
            "folds": config.tune.folds,
            "keys": list(config.tune.ranges()),
            "chosen": {name: found for name, found in chosen.items() if found},
        }
    }


def _write_facts(out: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts, indent=2, default=str) + "\n"
    write_whole(out / "study.json", text.encode())


def _command(config: StudyConfig) -> str:
    """Return a command that runs the study."""
    given = {
        "out": config.out,
        "weights": config.weights,
        "controls": config.controls,
        "exclude": config.exclude or None,
        "tune": config.tune,
    }
    words = [f"{k}={write_value(v)}" for k, v in given.items() if v is not None]
    words += [f"base.{key}={write_value(v)}" for key, v in flat(config.base).items()]
    words += [f"axes.{name}={write_value(v)}" for name, v in config.axes.items()]
    return shlex.join(["crysdistill", "study", *words])
