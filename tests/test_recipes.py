"""The recipes: each has a small run, and does nothing without arguments."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from crysdistill.cli import VERBS
from tests.forks import Command

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    f"{path.parent.name}.{path.stem}": path
    for folder in ("pretrain", "finetune")
    for path in sorted((ROOT / folder).glob("[!_]*.py"))
}
SHOWN = {
    "pretrain.crysgnn": (r"together\W+162,162\W+162,162", "by chance"),
    "pretrain.tasks": (r"corpus.h5: 60", r"dataset.h5: 60"),
    "pretrain.evidence": ("bank ┃ +random teacher ┃", r"mean( +│ +[+-]\d+\.\d%){3} │"),
    "pretrain.scaling": (
        r"16x1: .* epochs in \d\.\d\d of the time",
        "8x2 +┃ +8x2 +┃ +16x1 +┃",
        "scratch +┃",
    ),
    "pretrain.advice": ("fit ┃", "the advice was right in . of 1"),
    "finetune.freeze_layers": ("0.765", "bulk modulus", "learned first", "scratch"),
    "finetune.distil_small_data": ("0.588", "random-teacher", "published"),
    "finetune.dft_to_experiment": ("0.265", "measurements", "left out"),
    "finetune.learning_curve": ("exponent", "scratch"),
    "finetune.metal_or_semiconductor": ("AUC", "0.95", "semiconductors"),
    "finetune.site_energies": ("0.130", "groups 4, 5 and 6", "told apart"),
}


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def test_there_are_recipes():
    assert set(SHOWN) <= set(FILES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_it_runs_in_small(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        assert importlib.import_module(name).main(["--smoke"]) == 0
    finally:
        torch.set_flush_denormal(False)  # a separate process would end here
    shown = capsys.readouterr().out
    for pattern in SHOWN.get(name, ()):
        assert re.search(pattern, shown), shown
    assert not list(tmp_path.iterdir()), "a smoke run leaves something behind"


@pytest.mark.parametrize("name", FILES)
def test_it_opens_with_its_command(name):
    assert docstring(FILES[name]).startswith(f"`python -m {name} ")


@pytest.mark.parametrize("name", FILES)
def test_commands_in_its_docstring_are_understood(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = docstring(FILES[name]).replace("\\\n", " ")
    for line in re.findall(r"^    (crysdistill .*|python -m .*)$", text, re.M):
        words = shlex.split(line)
        if words[0] == "crysdistill":
            VERBS[words[1]].parser(words[1]).parse(words[2:])
            continue
        # The arguments are valid if only the named files are missing.
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(words[2]).main(words[3:])
        torch.set_flush_denormal(False)
        assert stop.value.code == 2
        assert re.search(r"no such (file|store|weights)", capsys.readouterr().err), line


@pytest.mark.parametrize("name", FILES)
def test_it_says_what_it_needs(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main([])
    assert stop.value.code == 2
    assert "--smoke" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_it_takes_only_public_names(name):
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and "crysdistill" in (node.module or ""):
            names = [*(node.module or "").split("."), *(a.name for a in node.names)]
            assert not [n for n in names if n.startswith("_")], f"line {node.lineno}"


def test_importing_one_does_nothing(tmp_path):
    script = tmp_path / "imports.py"
    script.write_text(
        "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)"
    )
    done = Command(*FILES, script=script).wait()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == [script]
