"""What every encoder must do: all registered encoders are tested."""

from __future__ import annotations

import copy
import inspect
import random
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core import Structure

from crysdistill.encoders import ENCODERS, Encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, make_batch
from crysdistill.graphs.batch import replace as with_tensors
from crysdistill.graphs.neighbors import MODES, GraphSettings
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.inference import embed, predict
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.settings import (
    FreezeSettings,
    OptimizerSettings,
    SplitSettings,
    TrainerSettings,
)
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.freezing import freeze
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import load_encoder, load_predictor, save_weights
from tests.conftest import from_structure, random_crystal, structures
from tests.together import together
from tests.toy_stores import labelled, write_store

EVERY = pytest.mark.parametrize("name", ENCODERS)
SHORT = TrainerSettings(
    epochs=2, batch_size=9, accelerator="cpu", progress=False, threads=1
)
PLAIN = OptimizerSettings(name="sgd", lr=0.1, schedule="constant")
DENSITY = Target("density", "1/Å³")


def graph_of(name: str, cutoff: float = 6.0) -> GraphSettings:
    """The preferred graph of an encoder, with few neighbours for speed."""
    return GraphSettings(cutoff, 8, ENCODERS[name].NEEDS.graphs[0])


def small(name: str, graph: GraphSettings | None = None, **more) -> Encoder:
    torch.manual_seed(0)
    graph = graph or graph_of(name)
    return make_encoder(name, graph, **{**ENCODERS[name].SMALL, **more})


def seasoned(name: str, graph: GraphSettings | None = None, **more) -> Encoder:
    """An encoder in eval mode, whose batch norms have running statistics."""
    graph = graph or graph_of(name)
    encoder = small(name, graph, **more)
    encoder.train()
    with torch.no_grad():
        for first in (0, 20, 40):
            crystals = [random_crystal(seed, 3) for seed in range(first, first + 9)]
            encoder(make_batch(crystals, graph))
    return encoder.eval()


def batch_of(name: str, count: int = 7) -> CrystalBatch:
    crystals = [random_crystal(seed, 1 + seed % 5) for seed in range(count)]
    return make_batch(crystals, graph_of(name))


def outputs(encoder: Encoder, batch: CrystalBatch) -> list[torch.Tensor]:
    found = encoder(batch)
    return [found.atoms, found.crystals]


# ------------------------------------------------------------------------- declarations


@EVERY
def test_what_it_declares(name):
    kind, encoder, batch = ENCODERS[name], small(name), batch_of(name)
    assert kind.name == name
    assert kind.NEEDS.graphs
    assert set(kind.NEEDS.graphs) <= set(MODES)
    assert set(kind.PUBLISHED) <= set(inspect.signature(kind).parameters)
    assert set(kind.SMALL) <= set(inspect.signature(kind).parameters)
    assert encoder.settings.keys() == inspect.signature(kind).parameters.keys()
    found = encoder(batch, layers=True)
    assert found.atoms.shape == (batch.num_nodes, encoder.width)
    assert found.crystals.shape == (batch.num_graphs, encoder.crystal_width)
    assert len(found.layers) == 1 + len(encoder.blocks().convolutions)
    assert all(len(layer) == batch.num_nodes for layer in found.layers)
    assert torch.equal(found.layers[-1], found.atoms)
    assert encoder(batch).layers == ()
    if found.edges is not None:
        assert len(found.edges) >= batch.num_edges
    if found.state is not None:
        assert len(found.state) == batch.num_graphs
    words = inspect.getdoc(kind)
    assert "doi:" in words or "arXiv:" in words
    assert "Differs from the paper" in words


@EVERY
def test_a_graph_that_it_cannot_read_is_refused_with_the_command(name):
    for mode in MODES:
        graph = GraphSettings(5.0, 8, mode)
        if mode in ENCODERS[name].NEEDS.graphs:
            assert make_encoder(name, graph, **ENCODERS[name].SMALL).name == name
            continue
        with pytest.raises(
            InputError,
            match=rf"encoder `{name}` reads graphs of mode .*, but my.h5 holds mode "
            rf"{mode}; build one with `crysdistill build my.h5 -o NEW.h5 --graph",
        ):
            make_encoder(name, graph, source="my.h5")


@EVERY
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(InputError, match=f"encoder `{name}` has no setting `widht`"):
        make_encoder(name, widht=8)


@EVERY
def test_blocks_hold_every_weight_once(name):
    encoder = small(name)
    in_blocks = [id(p) for block in encoder.blocks() for p in block.parameters()]
    assert len(in_blocks) == len(set(in_blocks))
    assert set(in_blocks) == {id(p) for p in encoder.parameters()}
    assert len(encoder.blocks().convolutions) >= 1


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_every_weight_learns(name, training):
    """In eval mode, even a bias before a batch norm has an effect."""
    encoder, batch = seasoned(name).train(training), batch_of(name, 12)
    found = encoder(batch)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator)).sum()
        for x in (found.atoms, found.crystals)
    )
    loss.backward()
    idle = [n for n, p in encoder.named_parameters() if p.grad is None]
    assert not idle
    still = [n for n, p in encoder.named_parameters() if not p.grad.abs().max() > 0]
    assert training or not still
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


@EVERY
def test_settings_rebuild_it(name):
    encoder = seasoned(name)
    again = ENCODERS[name](**encoder.settings)
    again.load_state_dict(encoder.state_dict())
    again.eval()
    batch = batch_of(name)
    for mine, theirs in zip(
        outputs(encoder, batch), outputs(again, batch), strict=True
    ):
        assert torch.equal(mine, theirs)


def drawn(name: str, seed: int) -> dict:
    """Draw a value for each parameter whose type lists the choices."""
    kind, draw = ENCODERS[name], random.Random(seed)
    hints = typing.get_type_hints(kind.__init__)
    found = dict(kind.SMALL)
    for key in inspect.signature(kind).parameters:
        choices = typing.get_args(hints[key])
        if typing.get_origin(hints[key]) is typing.Literal:
            found[key] = draw.choice(choices)
        elif hints[key] is bool:
            found[key] = draw.random() < 0.5
    return found


@EVERY
def test_settings_compose(name):
    """Random combinations work, or a message refuses them."""
    batch, works = batch_of(name), 0
    for seed in range(12):
        settings = drawn(name, seed)
        try:
            encoder = make_encoder(name, graph_of(name), **settings)
        except InputError:
            continue
        works += 1
        found = encoder(batch)
        (found.atoms.sum() + found.crystals.sum()).backward()
        assert torch.isfinite(found.crystals).all(), settings
        assert encoder.eval()(batch).crystals.shape == found.crystals.shape
        in_blocks = sum(p.numel() for b in encoder.blocks() for p in b.parameters())
        assert in_blocks == sum(p.numel() for p in encoder.parameters()), settings
    assert works >= 6


# ------------------------------------------------------------------------- invariances


def variants(structure: Structure) -> list[Structure]:
    shuffled = Structure.from_sites(list(reversed(structure.sites)))
    moved = structure.copy()
    moved.translate_sites(list(range(len(moved))), [0.13, 0.29, 0.41])
    supercell = structure.copy()
    supercell.make_supercell([2, 1, 1])
    primitive = structure.get_primitive_structure()
    return [structure, shuffled, moved, supercell, primitive]


@EVERY
@pytest.mark.parametrize("structure", ["NaCl", "diamond", "SrTiO3", "TiO2", "hcp-Mg"])
def test_crystals_do_not_depend_on_how_they_are_written(name, structure):
    """Atom order, origin, supercell, primitive or conventional cell."""
    graph = graph_of(name)
    if graph.mode not in ("shells", "radius"):
        pytest.skip(f"mode {graph.mode} cuts shells")
    written = variants(structures()[structure])
    batch = make_batch([from_structure("x", one) for one in written], graph)
    with torch.no_grad():
        found = seasoned(name)(batch).crystals
    scale = found.abs().max().item()
    torch.testing.assert_close(
        found, found[:1].expand_as(found), atol=3e-5 * max(1, scale), rtol=1e-4
    )


@EVERY
def test_atoms_follow_their_order(name):
    one = random_crystal(4, 6)
    order = np.array([3, 0, 5, 1, 4, 2])
    other = Crystal("o", one.atomic_numbers[order], one.frac_coords[order], one.cell)
    with torch.no_grad():
        first, second = (
            seasoned(name)(make_batch([c], graph_of(name))).atoms for c in (one, other)
        )
    torch.testing.assert_close(second, first[order], atol=3e-5, rtol=1e-4)


@EVERY
def test_nothing_turns_with_the_crystal(name):
    one = random_crystal(3)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = Crystal("t", one.atomic_numbers, one.frac_coords, one.cell @ rotation.T)
    with torch.no_grad():
        found = seasoned(name)(make_batch([one, turned], graph_of(name)))
    torch.testing.assert_close(
        found.crystals[0], found.crystals[1], atol=3e-5, rtol=1e-4
    )


@EVERY
def test_a_crystal_does_not_depend_on_its_company(name):
    encoder, batch = seasoned(name), batch_of(name)
    crystals = [random_crystal(seed, 1 + seed % 5) for seed in range(7)]
    with torch.no_grad():
        together = encoder(batch).crystals
        alone = [encoder(make_batch([c], graph_of(name))).crystals for c in crystals]
    torch.testing.assert_close(torch.cat(alone), together, atol=3e-5, rtol=1e-4)


@EVERY
def test_another_crystal_is_another(name):
    """Otherwise the invariances above would prove nothing."""
    crystals = [random_crystal(seed, 4) for seed in (1, 2)]
    stretched = Crystal(
        "s",
        crystals[0].atomic_numbers,
        crystals[0].frac_coords,
        crystals[0].cell * 1.05,
    )
    with torch.no_grad():
        found = seasoned(name)(make_batch([*crystals, stretched], graph_of(name)))
    a, b, c = found.crystals
    assert (a - b).abs().max() > 1e-3
    assert (a - c).abs().max() > 1e-4


@EVERY
def test_composition_is_read_only_where_it_is_declared(name):
    """Distant atoms change the composition but no local environment."""
    if ENCODERS[name].NEEDS.composition:
        pytest.skip("reads the composition")
    near, far = random_crystal(5, 3), random_crystal(6, 3)
    with torch.no_grad():
        found = seasoned(name)(make_batch([near, far], graph_of(name))).atoms[:3]
        swapped = seasoned(name)(make_batch([near, near], graph_of(name))).atoms[:3]
    torch.testing.assert_close(found, swapped, atol=3e-5, rtol=1e-4)


# ------------------------------------------------------------------------ edge cases


@EVERY
def test_an_empty_rank(name):
    encoder, batch = small(name), batch_of(name)
    empty = with_tensors(
        batch,
        atomic_numbers=batch.atomic_numbers[:0],
        frac_coords=batch.frac_coords[:0],
        cell=batch.cell[:0],
        edge_index=batch.edge_index[:, :0],
        edge_shift=batch.edge_shift[:0],
        batch=batch.batch[:0],
        ptr=batch.ptr[:1],
        neighbor_ptr=batch.neighbor_ptr[:1],
        rows=batch.rows[:0],
        num_nodes=0,
    )
    found = encoder.train()(empty)
    assert found.atoms.shape == (0, encoder.width)
    assert found.crystals.shape == (0, encoder.crystal_width)
    (found.atoms.sum() + found.crystals.sum()).backward()
    for weight in encoder.parameters():
        assert weight.grad is None or not weight.grad.abs().max() > 0


@EVERY
def test_one_atom_and_551(name):
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*3 * [np.arange(9)]), -1).reshape(-1, 3)[:551]
    frac = (grid + 0.2 * rng.random((551, 3))) / 9
    large = Crystal("large", rng.choice([8, 14], 551), frac, np.eye(3) * 24.0)
    one = random_crystal(0, 1)
    with torch.no_grad():
        found = seasoned(name)(make_batch([one, large], graph_of(name)))
    assert torch.isfinite(found.crystals).all()
    assert len(found.atoms) == 552


@EVERY
def test_double_precision(name):
    encoder, batch = seasoned(name), batch_of(name)
    wide = with_tensors(
        batch, frac_coords=batch.frac_coords.double(), cell=batch.cell.double()
    )
    twin = copy.deepcopy(encoder).double()
    found = twin(wide)
    assert found.atoms.dtype == found.crystals.dtype == torch.float64
    for mine, exact in zip(outputs(encoder, batch), outputs(twin, wide), strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(
            mine, exact.float(), atol=3e-5 * max(1, scale), rtol=1e-4
        )


@EVERY
def test_masked_atoms_are_embedded(name):
    batch = batch_of(name)
    numbers = batch.atomic_numbers.clone()
    numbers[::2] = 0
    found = small(name)(with_tensors(batch, atomic_numbers=numbers))
    assert torch.isfinite(found.crystals).all()


# ------------------------------------------------------------------------- freezing


@EVERY
def test_what_is_frozen_stays(name):
    encoder, batch = small(name), batch_of(name, 12)
    blocks = list(encoder.blocks())
    frozen = freeze(encoder, 1)
    encoder.train()
    frozen.enforce()
    kept = [copy.deepcopy(block.state_dict()) for block in blocks]
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    found = encoder(batch)
    (found.atoms.square().sum() + found.crystals.square().sum()).backward()
    optimizer.step()

    def moved(block, before) -> bool:
        return any(
            not torch.equal(value, before[key])
            for key, value in block.state_dict().items()
        )

    changed = [moved(*pair) for pair in zip(blocks, kept, strict=True)]
    assert changed == [False, False] + [True] * (len(blocks) - 2)
    freeze(encoder, "all", before=frozen)
    assert not any(p.requires_grad for p in encoder.parameters())


# ------------------------------------------------------------------------- the verbs


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """One store for each mode that some encoder prefers."""
    folder = tmp_path_factory.mktemp("stores")
    modes = dict.fromkeys(graph_of(name) for name in ENCODERS)
    return {
        graph.mode: write_store(
            folder / f"{graph.mode}.h5", labelled(30), graph, symmetry="fast"
        )
        for graph in modes
    }


def store_of(name: str, stores: dict[str, Path]) -> Path:
    return stores[graph_of(name).mode]


def config_of(name: str, dataset: Path, out: Path, **more) -> TrainConfig:
    settings = {
        "dataset": dataset,
        "target": DENSITY,
        "out": out,
        "encoder": {"name": name, **ENCODERS[name].SMALL},
        "split": SplitSettings(train=18, val=6, test=6),
        "trainer": SHORT,
        **more,
    }
    return TrainConfig(**settings)


@EVERY
def test_from_pretraining_to_predictions(name, stores, tmp_path):
    """Pretrain; teach, be taught, fine-tune, freeze; save, load, predict, embed."""
    store = store_of(name, stores)
    encoder = {"name": name, **ENCODERS[name].SMALL}
    pretrained = pretrain(
        PretrainConfig(
            corpus=store,
            out=tmp_path / "pretrain",
            encoder=encoder,
            objectives={"node_features": {}, "fingerprint": {}},
            held_out=0.2,
            trainer=SHORT,
        )
    )
    tuned = finetune(
        FinetuneConfig(
            dataset=store,
            target=DENSITY,
            out=tmp_path / "finetune",
            weights=pretrained,
            freeze=FreezeSettings(convolutions=1),
            split=SplitSettings(train=18, val=6, test=6),
            trainer=SHORT,
        )
    )
    before, after = load_encoder(pretrained), load_encoder(tuned)
    for mine, theirs in zip(
        list(before.blocks())[:2], list(after.blocks())[:2], strict=True
    ):
        for key, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key
    student = {"name": "cgcnn", "width": 6, "convolutions": 2}
    taught = distill(
        DistillConfig(
            dataset=store,
            target=DENSITY,
            out=tmp_path / "teach",
            teacher=str(pretrained),
            encoder=student,
            projector=True,
            split=SplitSettings(train=18, val=6, test=6),
            trainer=SHORT,
        )
    )
    learner = distill(
        DistillConfig(
            dataset=store,
            target=DENSITY,
            out=tmp_path / "taught",
            teacher=str(taught),
            encoder=encoder,
            projector=True,
            split=SplitSettings(train=18, val=6, test=6),
            trainer=SHORT,
        )
    )
    predictor = load_predictor(learner)
    table = pd.read_csv(
        predict(learner, [store], tmp_path / "p.csv", progress=False),
    )
    opened = Store.open(store)
    expected = predictor.predict(opened.batch(range(len(opened))))
    assert np.allclose(table["density"], expected.numpy(), rtol=1e-4, atol=1e-5)
    vectors = pd.read_parquet(
        embed(learner, [store], tmp_path / "e.parquet", progress=False)
    )
    assert vectors.shape == (30, 1 + predictor.encoder.crystal_width)
    save_weights(tmp_path / "again.safetensors", predictor)
    again = load_predictor(tmp_path / "again.safetensors")
    assert torch.equal(
        again.predict(opened.batch([0, 1])), predictor.predict(opened.batch([0, 1]))
    )


@pytest.mark.slow
@EVERY
def test_two_processes_learn_what_one_learns(name, stores, tmp_path):
    """One epoch only, since rounding may decide between equally good epochs."""
    store = store_of(name, stores)
    once = replace(SHORT, epochs=1)
    nothing = OptimizerSettings(name="sgd", lr=1e-12, schedule="constant")
    still = config_of(name, store, tmp_path / "still", trainer=once, optimizer=nothing)
    start = dict(load_encoder(train(still)).named_parameters())
    config = config_of(name, store, tmp_path / "one", trainer=once, optimizer=PLAIN)
    one = dict(load_encoder(train(config)).named_parameters())
    config.out = tmp_path / "two"
    found = together(2, train, config)
    assert found == [config.out / "weights.safetensors"] * 2, found
    two = dict(load_encoder(found[0]).named_parameters())
    moved = max(float((one[key] - start[key]).detach().abs().max()) for key in one)
    assert moved > 1e-4
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-3 * moved)
