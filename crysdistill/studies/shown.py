"""What a study shows while its cells finish: a live table, or a line for each."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from crysdistill.studies.axes import text_of
from crysdistill.studies.cells import Cell
from crysdistill.transfer.scores import WORDS


class Shown:
    """A live table of arms and tasks: mean test values, and finished cells.

    Where the output is no terminal, each cell that runs now gets a plain line instead.

    Args:
        cells: of the study.
        progress: whether to show anything.
        kept: how many of the cells an earlier call has finished.
    """

    def __init__(self, cells: Sequence[Cell], progress: bool, kept: int = 0) -> None:
        self.arms = list(dict.fromkeys(cell.arm.name for cell in cells))
        self.tasks = list(dict.fromkeys(cell.task for cell in cells))
        self.total: dict[tuple[str, str], int] = {}
        self.values: dict[tuple[str, str], list[float]] = {}
        self.failed: dict[tuple[str, str], int] = {}
        self.started = time.monotonic()
        for cell in cells:
            place = cell.arm.name, cell.task
            self.total[place] = self.total.get(place, 0) + 1
        self.done = kept  # with those that come later in the order of the cells
        self.kept = kept
        self._live: Live | None = None
        # Its own console, because the output of runs is swallowed.
        self._output = sys.stdout
        self._console = Console(file=self._output)
        self._lines = progress and not self._console.is_terminal
        if progress and not self._lines:
            self._live = Live(self.table(), console=self._console, refresh_per_second=2)

    def __enter__(self) -> Shown:
        if self._live:
            self._live.__enter__()
        if self._lines and self.kept:
            total = sum(self.total.values())
            self._say(f"{self.kept} of {total} were finished before")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)

    def add(
        self, cell: Cell, results: Mapping[str, Any], error: str, new: bool = True
    ) -> None:
        """Show the test value of a finished cell, or that it failed.

        Args:
            cell: the cell.
            results: the content of its `results.json`; empty if it failed.
            error: why it failed, or "".
            new: whether it ran now.
        """
        place = cell.arm.name, cell.task
        if error:
            self.failed[place] = self.failed.get(place, 0) + 1
        else:
            self.values.setdefault(place, []).append(results["test"])
        if self._live:
            self._live.update(self.table())
        if new:
            self.done += 1
            if self._lines:
                said = f"failed: {error}" if error else _value(results)
                total = sum(self.total.values())
                where = f"{self.done} of {total}, {self._spent()}"
                self._say(f"{where}: {_coordinates(cell)}: {said}")

    def _say(self, line: str) -> None:
        """Write a line at once, also if it is longer than a terminal is wide."""
        print(line, file=self._output, flush=True)

    def _spent(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def table(self) -> Table:
        """Return the table as it is now."""
        done = sum(map(len, self.values.values())) + sum(self.failed.values())
        caption = f"{done} of {sum(self.total.values())} runs, {self._spent()}"
        table = Table("arm", caption=caption, title="mean test value (finished runs)")
        for task in self.tasks:
            table.add_column(escape(task), justify="right")
        for arm in self.arms:
            table.add_row(escape(arm), *(self._cell(arm, task) for task in self.tasks))
        return table

    def _cell(self, arm: str, task: str) -> str:
        values = self.values.get((arm, task), [])
        total = self.total.get((arm, task), 0)
        failed = self.failed.get((arm, task), 0)
        mean = math.fsum(values) / len(values) if values else math.nan
        text = f"{mean:.4g} ({len(values)}/{total})" if values else f"0/{total}"
        return f"{text}, {failed} failed" if failed else text


def _coordinates(cell: Cell) -> str:
    """Return where a cell lies, as in `arm scratch, labels 100, seed 0`."""
    known = {name: value for name, value in cell.coordinates.items() if name != "task"}
    if known.get("labels", 0) is None:
        known["labels"] = "all"
    task = [f"task {cell.task}"]
    arm, *others = [f"{name} {text_of(value)}" for name, value in known.items()]
    return ", ".join([arm, *task, *others])


def _value(results: Mapping[str, Any]) -> str:
    metric = results["metric"]
    unit = results["unit"] if metric == "mae" else ""  # the others have none
    return f"{WORDS[metric]} {results['test']:.4g} {unit}".rstrip()
