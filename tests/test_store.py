"""Stores: data survive a round trip, compact, memory-mapped and checked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crysdistill.corpus.build import build
from crysdistill.corpus.shards import pack_edges
from crysdistill.errors import BadStructure, InputError
from crysdistill.graphs.batch import GraphSettings, distances, make_batch
from crysdistill.graphs.neighbors import Neighbors, find_neighbors
from crysdistill.store.layout import SCHEMA
from crysdistill.store.store import Store
from crysdistill.store.unpacking import unpack_edges
from crysdistill.structures.crystal import Crystal
from tests.conftest import random_crystal
from tests.toy_stores import labelled, open_store, write_store

GRAPHS = [
    GraphSettings(),
    GraphSettings(cutoff=6.0, max_neighbors=5, mode="nearest"),
    GraphSettings(cutoff=7.0, max_neighbors=40, mode="cgcnn"),
    GraphSettings(mode="cgcnn"),
    GraphSettings(cutoff=6.0, mode="radius"),
]


def in_float32(crystal: Crystal) -> Crystal:
    """The crystal in the precision of a store."""
    return replace(
        crystal,
        frac_coords=crystal.frac_coords.astype(np.float32).astype(np.float64),
        cell=crystal.cell.astype(np.float32).astype(np.float64),
    )


def odd_names(crystals: list[Crystal]) -> list[Crystal]:
    names = ["Tränenstein 💎", "a,b", 'say "x"', "mp-1", "日本", "line two", " é "]
    return [
        replace(c, material_id=n)
        for c, n in zip(crystals, names[: len(crystals)], strict=True)
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[list[Crystal], Store]:
    crystals = labelled(12)
    crystals[3] = replace(crystals[3], properties={"density": 0.5})
    crystals[4] = replace(crystals[4], properties={})
    path = tmp_path_factory.mktemp("store") / "s.h5"
    return crystals, open_store(path, crystals, symmetry="fast")


class TestWhatIsWrittenComesBack:
    def test_crystals_to_float32(self, kept):
        crystals, store = kept
        assert len(store) == len(crystals)
        for wrote, read in zip(crystals, store.crystals(), strict=True):
            assert read.material_id == wrote.material_id
            assert np.array_equal(read.atomic_numbers, wrote.atomic_numbers)
            expected = in_float32(wrote)
            assert np.array_equal(read.frac_coords, expected.frac_coords)
            assert np.array_equal(read.cell, expected.cell)
            assert read.properties == wrote.properties  # not rounded

    def test_what_is_not_known_is_nan(self, kept):
        crystals, store = kept
        assert store.property_names == ("density", "class")
        for name in store.property_names:
            expected = [c.properties.get(name, np.nan) for c in crystals]
            assert np.array_equal(store.property(name), expected, equal_nan=True)
        targets = store.batch([2, 3, 4], ["class", "density"]).targets
        assert torch.equal(
            torch.isnan(targets), torch.tensor([[0, 0], [1, 0], [1, 1]]) > 0
        )

    def test_offsets(self, kept):
        crystals, store = kept
        sizes = [len(c.atomic_numbers) for c in crystals]
        assert store.atom_offsets.tolist() == [0, *np.cumsum(sizes).tolist()]
        edges = [
            len(find_neighbors(c.frac_coords, c.cell, store.graph).neighbor)
            for c in crystals
        ]
        assert store.edge_offsets.tolist() == [0, *np.cumsum(edges).tolist()]
        assert len(store.atomic_numbers) == sum(sizes)

    def test_symmetry(self, kept):
        _, store = kept
        assert store.space_groups.shape == (12, 2)
        assert store.space_groups.min() >= 1
        assert store.facts["symmetry"]["engine"].startswith("moyopy")
        assert torch.equal(
            store.batch(range(12)).space_groups,
            torch.from_numpy(store.space_groups[:, 0].astype(np.int64)),
        )

    def test_names_of_any_language(self, tmp_path):
        crystals = odd_names(labelled(7))
        store = open_store(tmp_path / "s.h5", crystals)
        assert store.material_ids == [c.material_id for c in crystals[:6]] + ["é"]
        names = [store.material_ids[row] for row in store.batch([4, 0]).rows]
        assert names == ["日本", "Tränenstein 💎"]

    def test_a_store_is_a_source(self, kept, tmp_path):
        _, store = kept
        build(
            [store.path],
            tmp_path / "t.h5",
            graph=store.graph,
            workers=1,
            progress=False,
        )
        again = Store.open(tmp_path / "t.h5")
        assert again.material_ids == store.material_ids
        a, b = store.batch(range(12)), again.batch(range(12))
        for key in ("frac_coords", "cell", "atomic_numbers", "edge_index"):
            assert torch.equal(a[key], b[key]), key
        assert np.array_equal(
            store.property("class"), again.property("class"), equal_nan=True
        )


TENSORS = (
    "atomic_numbers",
    "frac_coords",
    "cell",
    "edge_index",
    "edge_shift",
    "batch",
    "ptr",
    "neighbor_ptr",
    "targets",
)


class NothingIsReadBack(TorchDispatchMode):
    """Refuses reads of sizes and numbers that make a host wait for its device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        for reads in ("local_scalar", "nonzero", "masked_select", "unique"):
            assert reads not in name, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


class TestBatches:
    @pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.mode}-{g.cutoff}")
    def test_equal_those_made_from_crystals(self, tmp_path, graph):
        crystals = [in_float32(c) for c in labelled(12)]
        store = open_store(tmp_path / "s.h5", crystals, graph=graph)
        rows = np.random.default_rng(0).permutation(len(crystals))
        rows = [*rows.tolist(), 3, 3]
        made = make_batch([crystals[r] for r in rows], graph, ["density"])
        read = store.batch(rows, ["density"])
        for name in TENSORS:
            assert read[name].dtype == made[name].dtype, name
            assert torch.equal(read[name], made[name]), name
        if graph.mode == "cgcnn":
            assert torch.equal(read.padding, made.padding)
            assert read.padding.any() == (graph.max_neighbors == 40)
        else:
            assert "padding" not in read
        slowly = store._gather_by_torch(np.array(rows), torch.tensor(rows), {})
        for name in TENSORS[:-1]:
            assert torch.equal(slowly[name], read[name]), name
        if graph.mode == "cgcnn":
            assert torch.equal(slowly.padding, read.padding)
        assert torch.equal(distances(read), distances(made))
        assert read.padding_distance == made.padding_distance
        assert read.num_graphs == made.num_graphs == len(rows)
        assert [store.material_ids[row] for row in rows] == made.material_ids
        assert read.rows.tolist() == rows

    def test_rows_may_come_as_anything(self, kept):
        _, store = kept
        expected = store.batch([5, 1])
        for rows in ((5, 1), np.array([5, 1], np.int32), torch.tensor([5, 1])):
            assert torch.equal(store.batch(rows).frac_coords, expected.frac_coords)

    @pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.mode}-{g.cutoff}")
    def test_a_device_is_never_waited_for(self, tmp_path, graph):
        store = open_store(tmp_path / "s.h5", labelled(6), graph=graph)
        rows = np.array([4, 0, 4])
        with NothingIsReadBack():
            about = {"targets": store._values([0, 1], torch.from_numpy(rows))}
            store._gather_by_torch(rows, torch.from_numpy(rows), about)
            with pytest.raises(AssertionError, match="local_scalar"):
                torch.ones(1).item()
            with pytest.raises(AssertionError, match="nonzero"):
                torch.ones(1).nonzero()

    def test_a_batch_of_nothing(self, kept):
        _, store = kept
        for batch in (
            store.batch([], ["density"]),
            store._gather_by_torch(np.empty(0, np.int64), torch.empty(0).long(), {}),
        ):
            assert (batch.num_graphs, batch.num_nodes, batch.num_edges) == (0, 0, 0)
        assert store.batch([], ["density"]).targets.shape == (0, 1)
        assert store.batch([2]).targets.shape == (1, 0)

    @pytest.mark.parametrize("row", [-1, 12])
    def test_a_row_that_is_not_there(self, kept, row):
        _, store = kept
        with pytest.raises(IndexError, match="a row is not in 0 to 11"):
            store.batch([0, row])

    def test_a_batch_is_its_own_copy(self, kept):
        _, store = kept
        store.batch(range(12)).frac_coords.zero_()
        store.batch(range(12)).cell.zero_()
        store.verify()

    def test_the_device_store_makes_the_same(self, kept):
        _, store = kept
        moved = store.to("cpu")
        assert torch.equal(
            moved.batch([3, 2]).edge_index, store.batch([3, 2]).edge_index
        )
        assert moved.hash == store.hash


# ------------------------------------------------------------------------ packing


def unpacked(graph: Neighbors, atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    code, low, bits = pack_edges(graph, atoms)
    return unpack_edges(
        torch.from_numpy(code).int(),
        torch.from_numpy(low[None]).to(torch.int8),
        torch.from_numpy(bits[None]).int(),
        torch.tensor([len(code)]),
    )


def graph_of(neighbor, shifts) -> Neighbors:
    neighbor = np.array(neighbor, np.int64)
    return Neighbors(
        neighbor,
        np.array(shifts, np.int64),
        np.ones(len(neighbor)),
        np.array([len(neighbor)]),
    )


class TestPacking:
    @pytest.mark.parametrize("atoms", [1, 2, 3, 9, 255, 256, 300, 5000])
    @pytest.mark.parametrize("span", [0, 1, 3, 20])
    def test_round_trip(self, atoms, span):
        rng = np.random.default_rng(atoms + span)
        neighbor = rng.integers(0, atoms, 200)
        neighbor[:2] = 0, atoms - 1
        shifts = rng.integers(-span, span + 1, (200, 3))
        found, shift = unpacked(graph_of(neighbor, shifts), atoms)
        assert np.array_equal(found.numpy(), neighbor)
        assert np.array_equal(shift.numpy(), shifts)

    def test_translations_far_from_zero(self):
        shifts = [[-128, 127, 5], [-125, 120, 6]]
        found, shift = unpacked(graph_of([0, 1], shifts), 2)
        assert (found.tolist(), shift.tolist()) == ([0, 1], shifts)

    def test_31_bits_are_the_most(self):
        widest = [[0, 0, 0], [127, 127, 127]]  # 21 bits
        found, shift = unpacked(graph_of([0, 1023], widest), 1024)
        assert (found.tolist(), shift.tolist()) == ([0, 1023], widest)
        message = "needs 21 bits for lattice translations of 1025 atoms; use a reduced"
        with pytest.raises(BadStructure, match=message):
            pack_edges(graph_of([0, 1024], widest), 1025)

    def test_a_thin_cell_is_refused(self):
        with pytest.raises(BadStructure, match="a reduced cell or a smaller `cutoff`"):
            pack_edges(graph_of([0, 0], [[0, 0, 0], [128, 0, 0]]), 1)

    def test_a_thin_cell_is_listed(self, tmp_path):
        thin = Crystal(
            "thin",
            np.array([2], np.uint8),
            np.zeros((1, 3)),
            np.diag([0.6, 30.0, 30.0]),
        )
        graph = GraphSettings(cutoff=60.0, max_neighbors=10_000)
        with pytest.raises(AssertionError, match="its cell needs"):
            write_store(tmp_path / "s.h5", [thin, labelled(1)[0]], graph=graph)
        assert Store.open(tmp_path / "s.h5").material_ids == ["random-0"]

    def test_one_atom_with_far_images(self, tmp_path):
        one = Crystal(
            "one", np.array([29], np.uint8), np.zeros((1, 3)), np.diag([1.2, 9.0, 9.0])
        )
        graph = GraphSettings(cutoff=20.0, max_neighbors=400)
        store = open_store(tmp_path / "s.h5", [one], graph=graph)
        made, read = make_batch([in_float32(one)], graph), store.batch([0])
        assert torch.equal(read.edge_shift, made.edge_shift)
        assert read.edge_shift.abs().max() >= 16

    @pytest.mark.parametrize(("atoms", "dtype"), [(9, np.uint16), (300, np.int32)])
    def test_codes_are_as_wide_as_they_must_be(self, tmp_path, atoms, dtype):
        side = np.ceil(atoms ** (1 / 3))
        grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)
        many = Crystal(
            "many",
            np.full(atoms, 14, np.uint8),
            (grid[:atoms] + 0.1) / side,
            np.eye(3) * side * 2.5,
        )
        crystals = [in_float32(many), in_float32(random_crystal(0))]
        # Far neighbours need translations in every direction: 9 + 3 x 3 bits.
        graph = GraphSettings(cutoff=25.0, max_neighbors=2000 if atoms == 300 else 12)
        store = open_store(tmp_path / "s.h5", crystals, graph=graph)
        with h5py.File(store.path) as file:
            assert file["graphs/edge_codes"].dtype == dtype
            expected = np.int32 if atoms == 300 else np.uint8
            assert file["graphs/neighbor_counts"].dtype == expected
        made, read = make_batch(crystals, graph), store.batch([0, 1])
        assert torch.equal(read.edge_index, made.edge_index)
        assert torch.equal(read.edge_shift, made.edge_shift)

    def test_sixteen_bits_are_unsigned(self, tmp_path):
        """Codes from 32768 on would be negative in torch's int16."""
        grid = np.stack(np.meshgrid(*[np.arange(5)] * 3), axis=-1).reshape(-1, 3)
        crystal = Crystal(
            "grid", np.full(125, 14, np.uint8), (grid + 0.1) / 5, np.eye(3) * 6.0
        )
        crystal = in_float32(crystal)
        graph = GraphSettings(cutoff=7.5, max_neighbors=1000)
        store = open_store(tmp_path / "s.h5", [crystal], graph=graph)
        with h5py.File(store.path) as file:
            codes = file["graphs/edge_codes"]
            assert codes.dtype == np.uint16
            assert codes[:].max() > 32768
        made = make_batch([crystal], graph)
        assert torch.equal(store.batch([0]).edge_index, made.edge_index)


def test_bytes_of_9_atoms_with_12_neighbours(tmp_path):
    """Structure, graph and labels take under 500; with fingerprints, 15 per edge."""

    def sizes(count: int) -> tuple[int, int]:
        crystals = [random_crystal(seed, atoms=9) for seed in range(count)]
        graph = GraphSettings(mode="nearest")
        path = write_store(tmp_path / f"{count}.h5", crystals, graph=graph)
        assert np.diff(Store.open(path).edge_offsets).tolist() == [108] * count
        with h5py.File(path) as file:
            fingerprints = file["fingerprints/values"].nbytes
        whole = path.stat().st_size
        return whole, whole - fingerprints

    (most, core), (least, least_core) = sizes(150), sizes(50)
    assert (core - least_core) / 100 < 500
    assert core / 150 < 500 + 16_000 / 150
    assert (most - least) / 100 / 108 < 15


# ------------------------------------------------------------------- mapping and checks


def offset_of(path: Path, name: str) -> int:
    with h5py.File(path) as file:
        return file[name].id.get_offset()


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(at)
        file.write(data)


class TestIntegrity:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        return write_store(tmp_path / "s.h5", labelled(20))

    def test_arrays_are_mapped(self, path):
        store = Store.open(path)
        for name in ("structures/frac_coords", "graphs/edge_codes"):
            at = offset_of(path, name)
            before = store._arrays[name].clone()
            overwrite(path, at, b"\x01\x02")
            assert not torch.equal(store._arrays[name], before), name

    @pytest.mark.parametrize(
        "name", ["structures/frac_coords", "graphs/edge_codes", "properties/values"]
    )
    def test_opening_finds_corruption_and_names_the_part(self, path, name):
        mapped = Store.open(path)
        overwrite(path, offset_of(path, name) + 3, b"\xa7")
        message = f"`{name}` is corrupted.*build the store again or restore it from a"
        with pytest.raises(InputError, match=message):
            Store.open(path)
        with pytest.raises(InputError, match=message):
            mapped.verify()  # the file changed after it was mapped
        assert len(Store.open(path, verify=False)) == 20

    def test_a_change_in_its_description_is_found(self, path):
        with h5py.File(path, "r+") as file:
            file.attrs["facts"] = file.attrs["facts"].replace("shells", "cgcnn")
        with pytest.raises(InputError, match="its description is corrupted"):
            Store.open(path)

    def test_every_array_has_a_checksum(self, path):
        store = Store.open(path)
        assert set(store.facts["checksums"]) == set(store._arrays)
        with h5py.File(path, "r+") as file:
            del file["symmetry/space_groups"]
        with pytest.raises(InputError, match="`symmetry/space_groups` is missing or"):
            Store.open(path)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
    def test_cut_short(self, path, share):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(
            InputError, match=r"s\.h5: (cut short|not a readable store)"
        ):
            Store.open(path)

    def test_absent(self, path):
        with pytest.raises(
            InputError, match=r"t\.h5: no such store; did you mean `s\.h"
        ):
            Store.open(path.with_name("t.h5"))
        with pytest.raises(InputError, match=r"no such store$"):
            Store.open(path.parent / "nowhere" / "s.h5")

    def test_a_folder(self, path):
        with pytest.raises(InputError, match="not a store; build it first: `crysd"):
            Store.open(path.parent)

    def test_not_a_store(self, path):
        path.write_text("hello")
        with pytest.raises(InputError, match="not a readable store"):
            Store.open(path)

    def test_another_hdf5_file(self, path):
        with h5py.File(path, "w") as file:
            file["x"] = [1]
        with pytest.raises(
            InputError, match="an HDF5 file, but not a crysdistill store"
        ):
            Store.open(path)

    def test_a_newer_schema(self, path):
        with h5py.File(path, "r+") as file:
            file.attrs["schema"] = SCHEMA + 1
        message = (
            f"schema {SCHEMA + 1}, but this version reads schema {SCHEMA}; install a "
            "newer crysdistill, or build it again from its sources"
        )
        with pytest.raises(InputError, match=message):
            Store.open(path)

    def test_a_store_of_schema_1_is_written_anew_by_build(self, path):
        """Schema 1 had no fingerprints, and hashes for checksums."""
        before = Store.open(path)
        with h5py.File(path, "r+") as file:
            del file["fingerprints"]
            facts = json.loads(file.attrs["facts"])
            del facts["checksums"]
            facts["hashes"] = {
                f"{group}/{name}": hashlib.sha256(array[()].tobytes()).hexdigest()
                for group in file
                for name, array in file[group].items()
            }
            file.attrs["schema"] = 1
            file.attrs["facts"] = json.dumps(facts)
            del file.attrs["checksum"]
        message = rf"of schema 1, but .*; `crysdistill build {path} -o NEW\.h5` writes"
        with pytest.raises(InputError, match=message):
            Store.open(path)
        anew = path.with_name("new.h5")
        build([path], anew, graph=before.graph, symmetry=None, progress=False)
        after = Store.open(anew)
        assert after.material_ids == before.material_ids
        assert torch.equal(after.batch(range(20)).cell, before.batch(range(20)).cell)
        assert np.array_equal(after.property("density"), before.property("density"))
        overwrite(path, offset_of(path, "structures/cells") + 3, b"\xa7")
        with pytest.raises(InputError, match="`structures/cells` is corrupted"):
            build([path], anew, overwrite=True, progress=False)

    def test_unknown_property(self, path):
        store = Store.open(path)
        message = "no property `densty`; it has: density, class; did you mean `density`"
        for ask in (store.property, lambda name: store.batch([0], [name])):
            with pytest.raises(InputError, match=message):
                ask("densty")

    def test_the_hash_tells_graphs_and_contents_apart(self, tmp_path):
        crystals = labelled(5)
        hashes = {
            open_store(tmp_path / "a.h5", crystals).hash,
            open_store(tmp_path / "b.h5", crystals, graph=GRAPHS[0]).hash,
            open_store(tmp_path / "c.h5", crystals[::-1]).hash,
        }
        assert len(hashes) == 3
        assert open_store(tmp_path / "d.h5", crystals).hash in hashes

    def test_facts_are_plain(self, path):
        facts = Store.open(path).facts
        assert json.loads(json.dumps(facts)) == facts
        assert sum(facts["sources"].values()) == 20


def test_a_build_of_nothing_leaves_no_store(tmp_path):
    (tmp_path / "cifs").mkdir()
    (tmp_path / "cifs" / "bad.cif").write_text("no")
    report = build([tmp_path / "cifs"], tmp_path / "s.h5", workers=1, progress=False)
    assert (report.built, len(report.rejections)) == (0, 1)
    assert not (tmp_path / "s.h5").exists()
    assert report.quarantine.exists()


def test_an_empty_batch(tmp_path):
    batch = open_store(tmp_path / "s.h5", labelled(3)).batch([])
    assert (batch.num_graphs, batch.num_nodes, batch.num_edges) == (0, 0, 0)
