"""A fair search of settings: the same number of trials in every cell, without its test.

Optuna proposes the settings. Each cell searches inside its own training part, so that
no test crystal of any cell has a say in the settings of that cell.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from sklearn.model_selection import KFold

from crysdistill.configs import read_value
from crysdistill.errors import InputError
from crysdistill.schema import Unread, write_value
from crysdistill.splits import Split, SplitSettings, make_split
from crysdistill.store.store import Store
from crysdistill.studies.kinds import KINDS, Settings, check_key, configure, flat, plain
from crysdistill.training.judging import one_column
from crysdistill.training.settings import AcrossSettings

_HIGHER = ("auc", "accuracy")
_FORM = "{low: 0.001, high: 0.01, log: true} or a list of choices"


@dataclass
class TuneSettings:
    """A search of settings on every arm and task.

    Args:
        keys: for each key of a run its range, `{low: 0.001, high: 0.01, log: true}`
            (whole numbers stay whole), or a list of choices. An arm searches those that
            its runs have.
        trials: settings that are tried in every cell.
        folds: judge settings on this many parts of the training crystals, each trained
            on the others; 1 judges them on the validation crystals.
        halving: with folds, give up settings that are in the worse half after the
            first, second, fourth, ... part (L. Li et al., arXiv:1810.05934).
    """

    keys: Annotated[dict[str, Any], Unread()] = field(default_factory=dict)
    trials: int = 20
    folds: int = 1
    halving: bool = True

    def __post_init__(self) -> None:
        for name in ("trials", "folds"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"`{name}` is {getattr(self, name)} but must be at least 1"
                )

    def ranges(self) -> dict[str, Range]:
        """Return the ranges by dotted keys.

        Raises:
            InputError: there is none, a key is unknown, or a range cannot be used.
        """
        found = dict(_ranges(self.keys, ""))
        if not found:
            raise InputError(
                "`tune.keys` is empty; give ranges, such as "
                "`tune.keys.optimizer.lr={low: 0.001, high: 0.01, log: true}`"
            )
        return found


@dataclass(frozen=True)
class Range:
    """The values of a key that may be tried.

    Args:
        choices: all of them; empty for a range of numbers.
        low: the smallest number.
        high: the largest number.
        log: whether to draw its logarithm evenly.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


def _ranges(given: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Range]]:
    for name, value in given.items():
        key, value = f"{prefix}{name}", read_value(value, f"tune.keys.{prefix}{name}")
        if isinstance(value, Mapping) and not {"low", "high"} & set(value):
            yield from _ranges(value, f"{key}.")
            continue
        check_key(key, "tune.keys")
        yield key, _range(key, value)


def _range(key: str, value: Any) -> Range:
    place = f"tune.keys.{key}"
    if isinstance(value, list | tuple) and value:
        # As texts, which the configuration of a run reads: a file and Python say alike.
        return Range(tuple(v if isinstance(v, str) else write_value(v) for v in value))
    unknown = set(value) - {"low", "high", "log"} if isinstance(value, Mapping) else {1}
    if unknown:
        raise InputError(f"`{place}` is {write_value(value)} but must be {_FORM}")
    try:
        low, high = (_number(value[name]) for name in ("low", "high"))
    except (KeyError, ValueError):
        raise InputError(
            f"`{place}` is {write_value(value)} but must be {_FORM}"
        ) from None
    log = str(value.get("log", False)).lower() == "true"
    if not low < high or (log and low <= 0):
        need = "be above 0, and `low`" if log and low <= 0 else ""
        raise InputError(
            f"`{place}.low` is {low} but must {need or 'be'} below `high`, {high}"
        )
    return Range(low=low, high=high, log=log)


def _number(value: Any) -> float:
    """Return a number; a whole one as an integer."""
    text = str(value)
    return int(text) if text.lstrip("-").isdecimal() else float(text)


@dataclass(frozen=True)
class Search:
    """The search of one cell.

    Args:
        ranges: by key, of the keys that the cell's runs have.
        trials: settings that are tried.
        folds: parts of the training crystals; 1 for the validation crystals.
        halving: whether to give up bad settings early.
    """

    ranges: Mapping[str, Range]
    trials: int
    folds: int
    halving: bool

    def described(self) -> Settings:
        """Return it as plain values, for the identity of a run."""
        ranges = {f"tune.{key}": repr(one) for key, one in self.ranges.items()}
        spent = {"trials": self.trials, "folds": self.folds, "halving": self.halving}
        return {**ranges, **{f"tune.{name}": value for name, value in spent.items()}}


def search(kind: str, config: Any, wanted: Search, log: Path) -> tuple[Any, Settings]:
    """Return the configuration with the best settings, and these settings.

    After an interruption, finished trials are not repeated, and the result is the same.

    Args:
        kind: of `KINDS`.
        config: of the cell's run; its test crystals are left out.
        wanted: the search.
        log: the file of Optuna's storage; trials run beside it.

    Raises:
        InputError: a trial cannot run.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    log.parent.mkdir(parents=True, exist_ok=True)
    work = log.with_suffix("")
    folds = _inner_splits(config, wanted.folds, work)
    pruner: Any = optuna.pruners.NopPruner()
    if wanted.halving and len(folds) > 1:
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=2
        )
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(log))),
        study_name=log.stem,
        pruner=pruner,
        load_if_exists=True,
    )
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    while len(study.get_trials(states=done)) < wanted.trials:
        number = len(study.get_trials(states=done))
        # One seed for each trial: a resumed search proposes what it would have.
        study.sampler = optuna.samplers.TPESampler(seed=1000 * config.seed + number)
        trial = study.ask()
        given = {key: _suggest(trial, key, one) for key, one in wanted.ranges.items()}
        values: list[float] = []
        for step, file in enumerate(folds, start=1):
            values.append(_tried(kind, config, given, file, work))
            trial.report(float(np.mean(values)), step)
            if step < len(folds) and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(np.mean(values)))
    shutil.rmtree(work, ignore_errors=True)
    chosen = {key: study.best_params[key] for key in wanted.ranges}
    chosen = {key: _decoded(wanted.ranges[key], value) for key, value in chosen.items()}
    return with_settings(kind, config, chosen), chosen


def _suggest(trial: Any, key: str, one: Range) -> Any:
    if one.choices:
        # By place, since a choice may be a list or a mapping.
        return _decoded(one, trial.suggest_categorical(key, range(len(one.choices))))
    if isinstance(one.low, int) and isinstance(one.high, int):
        return trial.suggest_int(key, one.low, one.high, log=one.log)
    return trial.suggest_float(key, one.low, one.high, log=one.log)


def _decoded(one: Range, value: Any) -> Any:
    return one.choices[value] if one.choices else value


def with_settings(kind: str, config: Any, changes: Settings) -> Any:
    """Return a configuration after some of its keys have changed, read strictly."""
    known = {key: value for key, value in plain(config).items() if key not in changes}
    return replace(
        configure(kind, {}, {**flat(known), **changes}),
        **{name: getattr(config, name) for name in ("out", "resume", "overwrite")},
    )


def _inner_splits(config: Any, folds: int, work: Path) -> list[Path]:
    """Write splits of the training part alone, and return their files."""
    store = Store.open(config.dataset)
    columns = [store.property(target.name) for target in config.all_targets]
    split = make_split(store, config.split, one_column(np.stack(columns, axis=1)))
    parts = [(split.train, split.val)]
    if folds > 1:
        if len(split.train) < 2 * folds:
            raise InputError(
                f"`tune.folds` is {folds} but there are {len(split.train)} training "
                "crystals; lower it"
            )
        order = KFold(folds, shuffle=True, random_state=config.seed)
        rows = np.sort(split.train)
        parts = [(rows[train], rows[val]) for train, val in order.split(rows)]
    work.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (train, val) in enumerate(parts):
        inner = Split(train, val, np.zeros(0, np.int64))
        files.append(work / f"split-{number}.csv")
        inner.write(files[-1], store.material_ids)
    return files


def _tried(kind: str, config: Any, given: Settings, file: Path, work: Path) -> float:
    """Return the validation error of some settings on an inner split."""
    folder = work / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    trial = with_settings(kind, config, given)
    split = SplitSettings(file=str(file))
    inner = {"out": folder, "split": split, "test": AcrossSettings()}
    KINDS[kind].run(replace(trial, **inner, resume=False))
    results = json.loads((folder / "results.json").read_text("utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    value = float(results["val"])
    return -value if results["metric"] in _HIGHER else value
