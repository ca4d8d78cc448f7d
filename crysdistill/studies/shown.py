"""The table of a study that grows while its cells finish."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from crysdistill.studies.cells import Cell


class Shown:
    """A live table of arms and tasks: mean test values, and finished cells.

    Args:
        cells: of the study.
        live: whether to show it.
    """

    def __init__(self, cells: Sequence[Cell], live: bool) -> None:
        self.arms = list(dict.fromkeys(cell.arm.name for cell in cells))
        self.tasks = list(dict.fromkeys(cell.task for cell in cells))
        self.total: dict[tuple[str, str], int] = {}
        self.values: dict[tuple[str, str], list[float]] = {}
        self.failed: dict[tuple[str, str], int] = {}
        self.started = time.monotonic()
        for cell in cells:
            place = cell.arm.name, cell.task
            self.total[place] = self.total.get(place, 0) + 1
        self._live: Live | None = None
        # Its own console, because the output of runs is swallowed.
        self._console = Console(file=sys.stdout)
        if live:
            self._live = Live(self.table(), console=self._console, refresh_per_second=2)

    def __enter__(self) -> Shown:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)
            if not self._console.is_terminal:  # a file has no end of the live table
                self._console.print()

    def add(self, cell: Cell, value: float, error: str) -> None:
        """Show the test value of a finished cell, or that it failed."""
        place = cell.arm.name, cell.task
        if error:
            self.failed[place] = self.failed.get(place, 0) + 1
        else:
            self.values.setdefault(place, []).append(value)
        if self._live:
            self._live.update(self.table())

    def table(self) -> Table:
        """Return the table as it is now."""
        done = sum(map(len, self.values.values())) + sum(self.failed.values())
        seconds = int(time.monotonic() - self.started)
        spent = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        caption = f"{done} of {sum(self.total.values())} runs, {spent}"
        table = Table(
            "arm", caption=caption, title="mean test value (runs that are done)"
        )
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
