"""Weights files: data survive a round trip, and every refusal has a reason."""

from __future__ import annotations

import errno
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crysdistill import __version__
from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings, make_batch
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import (
    Provenance,
    load_encoder,
    load_predictor,
    read_header,
    save_weights,
)
from tests.conftest import random_crystal

GRAPH = GraphSettings(cutoff=6.0, max_neighbors=5, mode="nearest")
ORIGIN = Provenance("abc123", "clean", "CC-BY-4.0", "a test")


@pytest.fixture
def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(
        CGCNN(width=6, convolutions=2, cutoff=6.0, bias=False, normalize=True),
        PropertyHead(6, hidden=7, layers=2),
        Outputs(
            [Target("bulk_modulus", "GPa", transform="log10")],
            [Normalizer(1.9753183792829514, 0.3341568293238605)],
        ),
        GRAPH,
    ).eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.fixture
def batch():
    return make_batch([random_crystal(seed) for seed in range(2)], GRAPH)


def rewrite(path, edit_header=None, edit_tensors=None):
    """Change a weights file as another version or a careless user might."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["crysdistill"])
    tensors = load_file(path)
    for edit, thing in ((edit_header, header), (edit_tensors, tensors)):
        if edit is not None:
            edit(thing)
    save_file(tensors, path, metadata={"crysdistill": json.dumps(header)})


def test_a_predictor_comes_back_as_it_was(predictor, path, batch):
    save_weights(path, predictor, provenance=ORIGIN)
    again = load_predictor(path)
    assert not again.training
    assert torch.equal(again.predict(batch), predictor.predict(batch))
    assert (again.target, again.normalizer) == (predictor.target, predictor.normalizer)
    assert again.graph == GRAPH
    assert again.encoder.settings == predictor.encoder.settings
    assert again.head.settings == predictor.head.settings


def test_the_header_tells_all_without_the_tensors(predictor, path):
    save_weights(path, predictor, provenance=ORIGIN)
    header = read_header(path)
    assert (header.kind, header.version) == ("predictor", __version__)
    assert header.encoder == {"name": "cgcnn", "settings": predictor.encoder.settings}
    assert header.encoder["settings"]["elements"] == "cgcnn92"
    assert header.graph == GRAPH
    assert header.provenance == ORIGIN
    assert header.target == predictor.target
    assert header.normalizer == predictor.normalizer


def test_loading_does_not_touch_the_random_state(predictor, path):
    save_weights(path, predictor)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_predictor(path)
    assert torch.equal(torch.rand(1), expected)


def test_the_same_model_gives_the_same_file(predictor, path):
    save_weights(path, predictor)
    first = path.read_bytes()
    save_weights(path, predictor)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file_alone(predictor, path, monkeypatch):
    save_weights(path, predictor)
    before = path.read_bytes()

    def fail(number):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("crysdistill.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, predictor)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_encoder_without_a_graph_is_refused(predictor, path):
    with pytest.raises(InputError, match="`graph` is missing: say which graph"):
        save_weights(path, predictor.encoder)
    with pytest.raises(
        InputError, match="`graph` is given but a predictor has its own"
    ):
        save_weights(path, predictor, GRAPH)
    with pytest.raises(
        InputError, match=r"`overlap` is 'clear' .* did you mean `clean`"
    ):
        Provenance(overlap="clear")


def test_an_encoder_cannot_predict(predictor, path):
    save_weights(path, predictor.encoder, GRAPH)
    with pytest.raises(
        InputError, match="holds an encoder without a head, which cannot"
    ):
        load_predictor(path)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def write_pickle(path):
    path.write_bytes(pickle.dumps(Harmful()))


def write_checkpoint(path):
    torch.save({"state_dict": Harmful()}, path)


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (write_pickle, "is a PyTorch checkpoint, not a weights file; import a pub"),
        (write_checkpoint, "is a PyTorch checkpoint, not a weights file; import a pub"),
        (lambda path: path.write_bytes(b""), "is not a weights file$"),
        (lambda path: path.write_text("a,b\n1,2\n" * 9), "is not a weights file$"),
        (lambda path: path.write_bytes(b"\x05" + b"\0" * 7 + b"{aaaa"), "is not a w"),
        (lambda path: path.mkdir(), "is a folder; give the weights file in it"),
        (lambda path: None, "no such file"),
        (
            lambda path: save_file({"a": torch.zeros(2)}, path),
            "is a safetensors file but not a weights file of crysdistill",
        ),
    ],
)
def test_files_of_another_kind_are_refused(write, text, path):
    write(path)
    for load in (load_encoder, load_predictor, read_header):
        with pytest.raises(InputError, match=text):
            load(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_short_says_so(share, predictor, path):
    save_weights(path, predictor)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(9, int(share * len(whole)))])
    with pytest.raises(InputError, match="is cut short; copy or write it again"):
        load_predictor(path)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda h: h.update(format=3, version="9.0"),
            r"format 3 but .* reads formats 1 to 2; use the version that wrote .*9\.0",
        ),
        (lambda h: h.pop("format"), "the `crysdistill` entry is not readable"),
        (lambda h: h.pop("graph"), "the `crysdistill` entry lacks `graph`"),
        (lambda h: h.pop("targets"), "a predictor needs `head`, `targets` and `norm"),
        (
            lambda h: h.update(kind="store"),
            "holds `store`, which is neither of encoder",
        ),
        (
            lambda h: h["encoder"].update(name="cgcn"),
            "unknown encoder 'cgcn'; .* did you mean `cgcnn`",
        ),
        (
            lambda h: h["encoder"]["settings"].update(heads=4),
            "settings of encoder `cgcnn` do not fit .*heads",
        ),
        (
            lambda h: h["encoder"]["settings"].update(elements="mendeleev"),
            "unknown element table 'mendeleev'",
        ),
        (
            lambda h: h["graph"].update(triplets=True),
            "`graph` does not fit .*triplets.*; it takes cutoff, max_neighbors, mode",
        ),
        (
            lambda h: h["graph"].update(cutoff=-1.0),
            "`graph`: `cutoff` is -1.0 but must",
        ),
        (lambda h: h["head"].update(gates=2), "`head` does not fit .*gates"),
        (
            lambda h: h["encoder"]["settings"].update(width=7),
            "`width` is 6 but the encoder's is 7",
        ),
    ],
)
def test_headers_that_do_not_fit_are_refused(edit, text, predictor, path):
    save_weights(path, predictor)
    rewrite(path, edit_header=edit)
    with pytest.raises(InputError, match=text):
        load_predictor(path)


def deeper(header):
    header["encoder"]["settings"]["convolutions"] = 3


def shallower(header):
    header["encoder"]["settings"]["convolutions"] = 1


def wider(header):
    header["head"]["hidden"] = 9


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            deeper,
            "another architecture; missing: encoder.convolutions.2.gate.linear.weight",
        ),
        (shallower, "another architecture; unexpected: encoder.convolutions.1.*more"),
        (wider, r"other shape: head.first.weight is \(7, 6\) instead of \(9, 6\)"),
    ],
)
def test_weights_of_another_architecture_are_named(edit, text, predictor, path):
    save_weights(path, predictor)
    rewrite(path, edit_header=edit)
    with pytest.raises(InputError, match=text):
        load_predictor(path)


def test_a_model_does_not_change_with_the_element_table(predictor, path):
    save_weights(path, predictor)

    def move_iron(tensors):
        row = tensors["encoder.element_table"][26]
        tensors["encoder.element_table"][26] = row.flip(0)

    rewrite(path, edit_tensors=move_iron)
    with pytest.raises(InputError, match="the element table differs from the one in"):
        load_encoder(path)


def test_an_encoder_comes_back_and_so_does_that_of_a_predictor(predictor, path, batch):
    expected = predictor.encoder(batch).atoms
    save_weights(path, predictor)
    assert torch.equal(load_encoder(path)(batch).atoms, expected)
    save_weights(path, predictor.encoder, GRAPH)
    assert read_header(path).kind == "encoder"
    assert read_header(path).provenance == Provenance()
    assert torch.equal(load_encoder(path)(batch).atoms, expected)


# ------------------------------------------------------------------ earlier versions


def as_version_0_1(header):
    """Describe a predictor as version 0.1 did, with one target."""
    task = header["targets"][0]["task"]
    header.update(format=1, version="0.1.0", elements="cgcnn92")
    header["provenance"]["excluded"] = []
    target, scale = header.pop("targets")[0], header.pop("normalizers")[0]
    header["target"] = {k: target[k] for k in ("name", "unit", "task", "transform")}
    header["normalizer"] = {k: scale[k] for k in ("mean", "std")}
    head = header["head"]
    old = {k: head[k] for k in ("width", "hidden", "layers", "outputs", "dropout")}
    header["head"] = {**old, "task": task}


def test_weights_of_version_0_1_still_predict(predictor, path, batch):
    save_weights(path, predictor, provenance=ORIGIN)
    rewrite(path, edit_header=as_version_0_1)
    again = load_predictor(path)
    assert torch.equal(again.predict(batch), predictor.predict(batch))
    header = read_header(path)
    assert header.targets == predictor.outputs.targets
    assert header.provenance == ORIGIN
    assert header.version == "0.1.0"


def test_a_classifier_of_version_0_1_has_two_classes(path, batch):
    torch.manual_seed(0)
    classifier = Predictor(
        CGCNN(width=6, convolutions=1),
        PropertyHead(6, hidden=7, outputs=2, dropout=0.5),
        Outputs([Target("metal", task="classification")], [Normalizer(classes=2)]),
        GRAPH,
    ).eval()
    save_weights(path, classifier)
    rewrite(path, edit_header=as_version_0_1)
    again = load_predictor(path)
    assert again.head.settings == classifier.head.settings
    assert torch.equal(again.predict(batch), classifier.predict(batch))
