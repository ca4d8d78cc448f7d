"""The worked examples of CONTRIBUTING.md work as described."""

from __future__ import annotations

import json
import re
import sys
import types
from functools import partial

import pytest

from crysdistill.encoders import ENCODERS
from crysdistill.objectives import OBJECTIVES
from tests import test_conformance as conformance
from tests.test_layers import ROOT
from tests.toy_runs import results
from tests.toy_stores import labelled, write_store

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


def load(block: str, kind: str, monkeypatch) -> type:
    """Run an example as its own module."""
    module = types.ModuleType(f"example_{kind.lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, module.__name__, "exec"), module.__dict__)
    return module.__dict__[kind]


@pytest.fixture
def examples(monkeypatch) -> None:
    encoder = load(BLOCKS[0], "PlainConv", monkeypatch)
    objective = load(BLOCKS[1], "AtomVolume", monkeypatch)
    monkeypatch.setitem(ENCODERS, encoder.name, encoder)
    monkeypatch.setitem(OBJECTIVES, objective.name, objective)


def test_there_are_two_examples_and_they_are_short():
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        body = block[block.index("class ") :]
        code = re.sub(r'^ +""".*?"""\n', "", body, flags=re.M | re.S)
        assert len([line for line in code.splitlines() if line.strip()]) <= 42


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(
    "check",
    [
        conformance.test_what_it_declares,
        conformance.test_blocks_hold_every_weight_once,
        partial(conformance.test_every_weight_learns, training=False),
        conformance.test_settings_rebuild_it,
        conformance.test_an_empty_rank,
        conformance.test_one_atom_and_551,
        conformance.test_double_precision,
        conformance.test_what_is_frozen_stays,
        conformance.test_a_crystal_does_not_depend_on_its_company,
        conformance.test_nothing_turns_with_the_crystal,
    ],
)
def test_the_encoder_conforms(check):
    check("plain_conv")


@pytest.mark.usefixtures("examples")
def test_both_run_from_the_command_line(tmp_path, capsys):
    from crysdistill.cli import main

    store = write_store(tmp_path / "s.h5", labelled(30))
    small = ["trainer.epochs=2", "trainer.progress=false", "trainer.batch_size=8"]
    given = [f"corpus={store}", f"out={tmp_path / 'p'}", "encoder.name=plain_conv"]
    given += ["encoder.width=8", "objectives={atom_volume: {mask_fraction: 0.3}}"]
    assert main(["pretrain", *given, *small, "held_out=0.2"]) == 0
    assert results(tmp_path / "p")["numbers"]["atom_volume_r"] > 0
    weights = tmp_path / "p" / "weights.safetensors"
    given = [f"dataset={store}", f"out={tmp_path / 'f'}", "target.name=density"]
    more = [f"weights={weights}", "freeze.convolutions=1"]
    assert main(["finetune", *given, *more, *small]) == 0
    found = json.loads((tmp_path / "f" / "results.json").read_text())
    assert found["convolutions"] == 1
    capsys.readouterr()
    mistyped = ["encoder.name=plain_conv", "encoder.widht=3"]
    assert main(["train", *given, *mistyped]) == 2
    assert "did you mean `encoder.width`" in capsys.readouterr().err
