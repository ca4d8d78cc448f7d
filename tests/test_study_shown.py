"""The output of a running study: lines in a file, a table on a terminal."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crysdistill.errors import InputError
from crysdistill.studies.kinds import KINDS
from crysdistill.studies.study import StudyConfig, study
from tests.toy_stores import labelled, write_store
from tests.toy_studies import BASE, results


class Output(io.StringIO):
    """A stream that counts flushes after a whole line."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.flushed = terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        self.flushed += self.getvalue().endswith("\n")


@pytest.fixture
def config(tmp_path) -> StudyConfig:
    return StudyConfig(
        base={"dataset": write_store(tmp_path / "d.h5", labelled(40)), **BASE},
        out=tmp_path / "a folder [bold] with a long name" / "study",
        axes={"arm": ["mean", "median"], "labels": [10, None], "seed": [0]},
        controls=False,
        workers=1,
    )


@pytest.fixture
def failing(monkeypatch):
    """Make the arm `median` fail."""
    run = KINDS["readout"].run

    def broken(config):
        if config.readout == "median":
            raise InputError("no room on the disk; " + "free some of it, " * 9)
        return run(config)

    kind = KINDS["readout"]._replace(run=broken)
    monkeypatch.setitem(KINDS, "readout", kind)


def shown(config: StudyConfig, monkeypatch, terminal: bool = False) -> Output:
    output = Output(terminal)
    monkeypatch.setattr(sys, "stdout", output)
    study(config)
    return output


def test_a_file_gets_a_line_for_each_cell(config, monkeypatch, failing):
    output = shown(config, monkeypatch)
    lines = output.getvalue().splitlines()
    error = "failed: no room on the disk; " + "free some of it, " * 9
    folder = next(Path(config.out / "runs").glob("mean-*-10-*"))
    value = f"MAE {results(folder)['test']:.4g} 1/Å³"
    place = "task density, labels 10, seed 0"
    assert len(lines) == 4
    assert re.sub(r"\d:\d\d:\d\d", "TIME", lines[0]) == (
        f"1 of 4, TIME: arm mean, {place}: {value}"
    )
    assert lines[1].endswith(f": arm median, {place}: {error.strip()}")
    assert "arm mean, task density, labels all, seed 0" in lines[2]
    assert lines[3].startswith("4 of 4, ")
    assert output.flushed >= 4
    assert "\x1b" not in output.getvalue()


def test_what_was_finished_before_is_counted(config, monkeypatch):
    shown(replace(config, axes={**config.axes, "labels": [10]}), monkeypatch)
    lines = shown(config, monkeypatch).getvalue().splitlines()
    assert lines[0] == "2 of 4 were finished before"
    assert [line.partition(",")[0] for line in lines[1:]] == ["3 of 4", "4 of 4"]
    assert shown(config, monkeypatch).getvalue() == "4 of 4 were finished before\n"


def test_a_terminal_gets_a_table(config, monkeypatch):
    said = shown(config, monkeypatch, terminal=True).getvalue()
    assert "mean test value" in said
    assert "4 of 4 runs" in said
    assert "arm mean" not in said


def test_nothing_without_progress(config, capsys):
    study(config, progress=False)
    assert capsys.readouterr().out == ""
