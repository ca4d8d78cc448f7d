"""A result goes where it can be written, and never over what it is made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crysdistill.cli import main
from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.files import writable
from crysdistill.store.store import Store
from crysdistill.transfer.weights import save_weights
from tests.test_cli import refusal
from tests.toy_stores import (
    SMALL_ENCODER,
    SMALL_GRAPH,
    labelled,
    write_lines,
    write_store,
)


class TestWritable:
    def test_returns_the_path_of_a_new_file_and_of_an_earlier_result(self, tmp_path):
        given = tmp_path / "given.csv"
        given.write_text("1")
        assert writable(tmp_path / "new.csv", [given]) == tmp_path / "new.csv"
        (tmp_path / "old.csv").write_text("1")  # the same content, another file
        assert writable(str(tmp_path / "old.csv"), [given]) == tmp_path / "old.csv"

    def test_refuses_what_is_no_place_for_a_file(self, tmp_path):
        with pytest.raises(InputError, match="no: no such folder; create it first"):
            writable(tmp_path / "no" / "a.csv")
        with pytest.raises(InputError, match="a folder; give the name of a file in it"):
            writable(tmp_path)

    def test_refuses_what_lies_in_a_folder_that_is_read(self, tmp_path):
        folder = tmp_path / "cif"
        folder.mkdir()
        labels = folder / "id_prop.csv"
        labels.write_text("a,1")
        with pytest.raises(InputError, match=r"id_prop\.csv is read here"):
            writable(labels, [folder])
        assert writable(folder / "new.csv", [folder]) == folder / "new.csv"
        assert writable(labels, ["x" * 300, None]) == labels

    def test_refuses_an_input_by_any_of_its_names(self, tmp_path):
        given = tmp_path / "given.csv"
        given.write_text("1")
        link = tmp_path / "link.csv"
        link.symlink_to(given)
        for out in (given, link, tmp_path / ".." / tmp_path.name / "given.csv"):
            for inputs in ([given], [3, str(given)], [tmp_path / "absent", link]):
                with pytest.raises(InputError) as caught:
                    writable(out, inputs)
                assert str(caught.value) == (
                    f"{out} is read here, and would be overwritten; give the result "
                    "another name"
                )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ("overlap corpus.h5 dataset.h5 -o dataset.h5", "dataset.h5"),
        ("overlap corpus.h5 dataset.h5 -o ./corpus.h5", "corpus.h5"),
        ("overlap table.json dataset.h5 -o table.csv", "table.json"),
        ("overlap encoder.safetensors dataset.h5 -o dataset.h5", "dataset.h5"),
        (
            "overlap encoder.safetensors dataset.h5 -o encoder.safetensors",
            "encoder.safetensors",
        ),
        ("split dataset.h5 -o dataset.h5 --overwrite", "dataset.h5"),
        ("embed encoder.safetensors corpus.h5 -o corpus.h5", "corpus.h5"),
        ("embed encoder.safetensors corpus.h5 -o encoder.safetensors",
         "encoder.safetensors"),
        ("predict encoder.safetensors table.json -o table.json", "table.json"),
        ("predict encoder.safetensors . -o table.json", "table.json"),
        ("import-cgcnn old.pth.tar -o old.pth.tar", "old.pth.tar"),
    ],
)  # fmt: skip
def test_no_verb_writes_over_what_it_reads(words, out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "corpus.h5", labelled(2))
    write_store(tmp_path / "dataset.h5", labelled(2))
    for name in ("table.json", "old.pth.tar"):  # refused before they are read
        (tmp_path / name).write_text("{}")
    torch.manual_seed(0)
    encoder = make_encoder(**SMALL_ENCODER, cutoff=SMALL_GRAPH.cutoff)
    save_weights(tmp_path / "encoder.safetensors", encoder, SMALL_GRAPH)
    before = contents(tmp_path)
    assert refusal(capsys, *words.split()) == (
        f"{out} is read here, and would be overwritten; give the result another name"
    )
    assert contents(tmp_path) == before


def test_a_build_replaces_only_a_store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write_lines(tmp_path / "crystals.jsonl", labelled(2))
    before = source.read_bytes()
    words = ["build", source.name, "-o", source.name, "--overwrite"]
    said = f"{source.name} exists, and is no store; give another name"
    assert refusal(capsys, *words) == said
    assert source.read_bytes() == before
    (tmp_path / "empty.h5").touch()
    main(["build", source.name, "-o", "empty.h5", "--overwrite", "--workers", "1"])
    assert len(Store.open("empty.h5")) == 2


def test_a_page_does_not_replace_its_store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store = write_store(tmp_path / "dataset.h5", labelled(2))
    before = store.read_bytes()
    assert main(["inspect", "dataset.h5", "-o", "dataset.h5"]) == 2
    assert "dataset.h5 is read here" in capsys.readouterr().err
    assert store.read_bytes() == before
