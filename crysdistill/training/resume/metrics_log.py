"""The table of logged numbers; a resumed run writes the same table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from crysdistill.files import write_whole


class MetricsLog(Logger):
    """Writes `metrics.csv`, each line at once.

    Checkpoints hold the rows, so a file damaged by a kill or a full disk is restored.

    Args:
        path: the file.

    Attributes:
        rows: the rows logged so far.
        failure: why a row could not be written. It is not raised at once, because other
            ranks do not know of it and would wait.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.failure: OSError | None = None
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """The name of the experiment: none, the folder has it."""
        return ""

    @property
    def version(self) -> str:
        """Its version: none."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None
    ) -> None:
        """Add a row; Lightning calls this after each validation and each epoch."""
        row = {**metrics, "step": step or 0}
        self.rows.append(row)
        try:
            if row.keys() <= set(self._columns):
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
            else:
                self._write()
        except OSError as error:
            error.filename = str(self.path)
            self.failure = error

    @rank_zero_only
    def restore(self, rows: Sequence[dict[str, float]]) -> None:
        """Continue after the rows of a checkpoint."""
        self.rows = list(rows)
        if rows:
            self._write()
        else:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        """Write the whole table."""
        self._columns = sorted(set().union(*self.rows))
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, self._columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, file.getvalue().encode())
