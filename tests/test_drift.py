"""Drift of weights and linear CKA, against plain formulas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from crysdistill.encoders import make_encoder
from crysdistill.errors import InputError
from crysdistill.store.store import Store
from crysdistill.transfer.drift import (
    block_cka,
    block_names,
    linear_cka,
    weight_drift,
)
from tests.toy_stores import SMALL_ENCODER, SMALL_GRAPH, labelled, write_store


def plain_cka(x: np.ndarray, y: np.ndarray) -> float:
    """The definition by Gram matrices: HSIC of linear kernels, normalised."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def test_cka_by_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(30, 8))
    y[:, :5] += x
    found = linear_cka(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(plain_cka(x, y))
    assert 0 < found < 1


def test_cka_does_not_change_with_rotation_and_scale():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, torch.ones(40, 2)) == 0


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return make_encoder(**SMALL_ENCODER, cutoff=SMALL_GRAPH.cutoff)


def test_drift_of_each_block(encoder):
    after = copy.deepcopy(encoder)
    names = block_names(encoder)
    assert names == ["embedding", "convolution 1", "convolution 2"]
    assert weight_drift(encoder, after) == dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for parameter in after.blocks().convolutions[1].parameters():
            parameter.mul_(1.5)
    found = weight_drift(encoder, after)
    assert found["convolution 2"] == pytest.approx(0.5)
    assert found["embedding"] == found["convolution 1"] == 0


def test_other_architectures(encoder):
    other = make_encoder(**{**SMALL_ENCODER, "width": 6}, cutoff=SMALL_GRAPH.cutoff)
    with pytest.raises(InputError, match="the encoders differ in their embedding"):
        weight_drift(encoder, other)


def test_cka_of_blocks(encoder, tmp_path):
    store = Store.open(write_store(tmp_path / "d.h5", labelled(12)))
    batches = [store.batch(np.arange(6)), store.batch(np.arange(6, 12))]
    same = block_cka(encoder, copy.deepcopy(encoder), batches)
    assert list(same) == block_names(encoder)
    assert all(value == pytest.approx(1) for value in same.values())
    after = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in after.blocks().convolutions[0].parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = block_cka(encoder, after, batches)
    assert found["embedding"] == pytest.approx(1)
    assert found["convolution 1"] < 0.999
