"""Encoders side by side: their embeddings in one vector, their weights in one file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import make_batch
from crysdistill.training.pretrained import load_pretrained
from crysdistill.transfer.features import CrystalFeatures
from crysdistill.transfer.side_by_side import SideBySide
from crysdistill.transfer.tensors import read_metadata
from crysdistill.transfer.weights import load_encoder, read_header, save_weights
from tests.conftest import random_crystal
from tests.test_frozen import GRAPH
from tests.toy_stores import labelled, open_store


@pytest.fixture
def encoders():
    torch.manual_seed(0)
    deep = make_encoder("cgcnn", GRAPH, width=6, convolutions=3)
    flat = make_encoder("gatgnn", GRAPH, width=4, convolutions=1)
    return [deep.eval(), flat.eval()]


@pytest.fixture
def batch():
    return make_batch([random_crystal(seed, 4) for seed in range(3)], GRAPH)


def test_each_says_what_it_says_alone(encoders, batch):
    deep, flat = (encoder(batch, layers=True) for encoder in encoders)
    both = SideBySide(encoders).eval()(batch, layers=True)
    torch.testing.assert_close(both.atoms, torch.cat([deep.atoms, flat.atoms], 1))
    torch.testing.assert_close(
        both.crystals, torch.cat([deep.crystals, flat.crystals], 1)
    )
    assert len(both.layers) == 4
    for step, x in enumerate(both.layers):  # the flat one repeats its last layer
        second = flat.layers[min(step, 1)]
        torch.testing.assert_close(x, torch.cat([deep.layers[step], second], 1))


def test_features_hold_every_layer_and_the_composition_once(encoders, batch):
    both = SideBySide(encoders).eval()
    features = CrystalFeatures(both)
    found = features(both(batch, layers=True), batch)
    assert found.shape == (3, features.width)
    assert features.width == CrystalFeatures(None).width + 2 * 4 * (6 + 4)


def test_every_weight_is_in_one_block(encoders):
    both = SideBySide(encoders)
    blocks = both.blocks()
    assert len(blocks.convolutions) == 3
    found = [id(p) for block in blocks for p in block.parameters()]
    assert sorted(found) == sorted(id(p) for p in both.parameters())
    first = {id(p) for p in blocks.convolutions[0].parameters()}
    assert first == {
        id(p) for one in encoders for p in one.blocks().convolutions[0].parameters()
    }


def test_a_file_brings_it_back(encoders, batch, tmp_path):
    both = SideBySide(encoders).eval()
    path = save_weights(tmp_path / "both.safetensors", both, GRAPH)
    again = load_encoder(path)
    assert isinstance(again, SideBySide)
    assert read_header(path).encoder["name"] == "side_by_side"
    torch.testing.assert_close(again(batch).atoms, both(batch).atoms, atol=0, rtol=0)


def test_refusals(encoders, tmp_path):
    with pytest.raises(InputError, match="`encoders` holds 1 but must hold 2 or more"):
        SideBySide(encoders[:1])
    path = save_weights(tmp_path / "both.safetensors", SideBySide(encoders), GRAPH)
    about = read_metadata(path)
    header = json.loads(about["crysdistill"])
    header["encoder"]["settings"] = {}
    save_file(load_file(path), path, {"crysdistill": json.dumps(header)})
    text = "the settings of encoder `side_by_side` do not fit crysdistill"
    with pytest.raises(InputError, match=text):
        load_encoder(path)


def test_no_run_starts_from_them(encoders, tmp_path):
    path = save_weights(tmp_path / "both.safetensors", SideBySide(encoders), GRAPH)
    store = open_store(tmp_path / "s.h5", labelled(4), graph=GRAPH)
    with pytest.raises(InputError) as caught:
        load_pretrained(path, store)
    assert str(caught.value) == (
        f"{path} holds 2 encoders side by side, and a run starts from one; give the "
        "weights that they came from"
    )
