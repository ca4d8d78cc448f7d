"""The GPU benchmark runs on a CPU, or reports that there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.__main__ import COLUMNS, main


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    said = capsys.readouterr().out
    assert said.startswith("there is no GPU here")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path, capsys):
    table = tmp_path / "table.md"
    assert main(["--device", "cpu", "--smoke", "--write", str(table)]) == 0
    lines = table.read_text().splitlines()
    cells = [line.split("|")[1:-1] for line in lines if line.startswith("| ")]
    rows = [[cell.strip() for cell in line] for line in cells[1:]]
    assert [row[:4] for row in rows] == [
        [what, "16", precision, "eager"]
        for what in ("training", "pretraining")
        for precision in ("fp32", "bf16")
    ]
    for row in rows:
        assert len(row) == len(COLUMNS)
        assert float(row[4].replace(",", "")) > 0
    assert "alloys of" in capsys.readouterr().out
