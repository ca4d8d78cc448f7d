"""Tables of embeddings: written, opened, and matched with the crystals of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.teachers import TableTeacher, answers_for, make_teacher, table
from crysdistill.teachers.tables import writing
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.inference import embed
from crysdistill.transfer.seen import seen
from crysdistill.transfer.weights import (
    Provenance,
    load_encoder,
    read_header,
    save_weights,
)
from tests.test_formulas import many
from tests.toy_runs import history, shared, training_config, weights_of
from tests.toy_stores import (
    SMALL_GRAPH,
    known_by_hash,
    labelled,
    open_store,
    write_store,
)

CRYSTALS = labelled(9)
ENDINGS = (".safetensors", ".h5", ".parquet")
ROWS = np.arange(9)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(tmp_path_factory.mktemp("store") / "s.h5", CRYSTALS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    encoder = CGCNN(width=8, convolutions=2, cutoff=SMALL_GRAPH.cutoff)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    check = DatasetCheck("test.h5", "d0", "0" * 64, ("id",), 5, 2, 2, kept=0)
    # Too many formulas for an attribute of the oldest HDF5 format.
    made = Provenance(
        "c0", licence="CC-BY-4.0", origin="runs/pre", checks=[check],
        formulas=many(30_000),
    )  # fmt: skip
    return save_weights(path, encoder, SMALL_GRAPH, made)


def vectors(crystals: Sequence[Crystal], width: int = 3) -> list[np.ndarray]:
    """A distinct vector for every atom, in the order of each crystal."""
    return [
        np.column_stack([c.frac_coords, c.atomic_numbers] * width)[:, :width]
        + 10 * seed
        for seed, c in enumerate(crystals)
    ]


def write(
    path: Path,
    crystals: Sequence[Crystal],
    atoms: Sequence[np.ndarray] | None = None,
    crystal: np.ndarray | None = None,
    frac_coords: bool = True,
    about: dict[str, str] | None = None,
) -> Path:
    """Write a table as another program would."""
    names = [c.material_id for c in crystals]
    if path.suffix == ".parquet":
        columns: dict[str, Any] = {"material_id": names}
        if atoms is not None:
            columns["atomic_numbers"] = [c.atomic_numbers.tolist() for c in crystals]
            columns["atoms"] = [a.flatten().tolist() for a in atoms]
            if frac_coords:
                columns["frac_coords"] = [c.frac_coords.flatten() for c in crystals]
        if crystal is not None:
            columns["crystals"] = list(crystal)
        made = pa.table(columns)
        pq.write_table(made.replace_schema_metadata(about or {}), path)
        return path
    arrays: dict[str, Any] = {}
    if atoms is not None:
        arrays["atoms"] = np.concatenate(atoms).astype(np.float32)
        arrays["ptr"] = np.cumsum([0, *map(len, atoms)])
        arrays["atomic_numbers"] = np.concatenate([c.atomic_numbers for c in crystals])
        if frac_coords:
            arrays["frac_coords"] = np.concatenate([c.frac_coords for c in crystals])
    if crystal is not None:
        arrays["crystals"] = crystal.astype(np.float32)
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["material_ids"] = names
            for name, x in arrays.items():
                file[name] = x
            file.attrs.update(about or {})
        return path
    arrays["material_ids"] = np.frombuffer("\n".join(names).encode(), np.uint8)
    save_file(arrays, path, about)
    return path


def check(teacher: TableTeacher, store: Store, wanted: dict[str, np.ndarray]) -> None:
    """Compare the answers of a table with the vectors of each crystal, by name."""
    answers = answers_for(teacher, store, ROWS, progress=False)
    for row in (4, 0, 8):
        found = answers.gather_atoms(torch.tensor([row]))
        np.testing.assert_allclose(found, wanted[store.material_ids[row]], rtol=1e-6)
    batch = store.batch([3, 8, 5])
    both = np.concatenate([wanted[store.material_ids[row]] for row in (3, 8, 5)])
    np.testing.assert_allclose(answers.gather_atoms(batch.rows), both, rtol=1e-6)
    np.testing.assert_allclose(teacher(batch).atoms, both, rtol=1e-6)


def by_name(crystals: Sequence[Crystal], values: Sequence[np.ndarray]) -> dict:
    return dict(zip((c.material_id for c in crystals), values, strict=True))


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_in_another_order_with_more_crystals(ending, store, tmp_path, capsys):
    order = labelled(12)[::-1]
    path = write(tmp_path / f"t{ending}", order, vectors(order))
    teacher = make_teacher(path, store)
    assert (teacher.atom_width, teacher.crystal_width) == (3, None)
    check(teacher, store, by_name(order, vectors(order)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_of_crystals(ending, store, tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 5))
    path = write(tmp_path / f"t{ending}", CRYSTALS[::-1], crystal=values)
    teacher = make_teacher(path, store)
    assert (teacher.atom_width, teacher.crystal_width) == (None, 5)
    answers = answers_for(teacher, store, [6, 1], progress=False)
    found = answers.gather_crystals(torch.tensor([6, 1]))
    np.testing.assert_allclose(found, values[[2, 7]], rtol=1e-6)
    with pytest.raises(InputError, match="the teacher does not answer for atoms"):
        answers.gather_atoms(torch.tensor([6]))
    mean, var = answers.statistics("crystals")
    np.testing.assert_allclose(mean, values[[2, 7]].mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, values[[2, 7]].var(0), rtol=1e-5)


def test_columns_of_crystals_stand_in_the_order_of_their_numbers(store, tmp_path):
    values = np.arange(9 * 12, dtype=float).reshape(9, 12)
    frame = pd.DataFrame(values, columns=[f"e{k}" for k in range(12)])
    frame.insert(0, "material_id", [c.material_id for c in CRYSTALS])
    columns = sorted(frame.columns)  # e0, e1, e10, e11, e2, ...
    frame[columns].to_parquet(tmp_path / "t.parquet")
    answers = answers_for(
        make_teacher(tmp_path / "t.parquet", store), store, ROWS, progress=False
    )
    np.testing.assert_array_equal(answers.gather_crystals(torch.arange(9)), values)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_any_floats_will_do(dtype, store, tmp_path):
    path = write(tmp_path / "t.h5", CRYSTALS, vectors(CRYSTALS))
    with h5py.File(path, "a") as file:
        values = file["atoms"][:]
        del file["atoms"]
        file["atoms"] = values.astype(dtype)
    answers = answers_for(make_teacher(path, store), store, ROWS, progress=False)
    found = answers.gather_atoms(torch.arange(9))
    assert found.dtype == torch.float32
    wanted = np.concatenate(vectors(CRYSTALS)).astype(dtype).astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_compressed_arrays_are_read(store, tmp_path):
    path = write(tmp_path / "t.h5", CRYSTALS, vectors(CRYSTALS))
    with h5py.File(path, "a") as file:
        values = file["atoms"][:]
        del file["atoms"]
        file.create_dataset("atoms", data=values, compression="gzip")
    check(make_teacher(path, store), store, by_name(CRYSTALS, vectors(CRYSTALS)))


# ----------------------------------------------------------------------- order of atoms


def shuffled(crystals: Sequence[Crystal]) -> list[Crystal]:
    """The same crystals, with atoms reordered and shifted by lattice vectors."""
    rng = np.random.default_rng(3)
    found = []
    for crystal in crystals:
        order = rng.permutation(len(crystal.atomic_numbers))
        frac = crystal.frac_coords[order] + rng.integers(-2, 3, (len(order), 3))
        numbers = crystal.atomic_numbers[order]
        found.append(replace(crystal, frac_coords=frac, atomic_numbers=numbers))
    return found


@pytest.mark.parametrize("ending", ENDINGS)
def test_atoms_in_another_order_are_put_right(ending, store, tmp_path, capsys):
    moved = shuffled(CRYSTALS)
    values = []
    for crystal in moved:  # the vector identifies its atom in any cell
        inside = crystal.frac_coords - np.floor(crystal.frac_coords)
        values.append(np.column_stack((inside, crystal.atomic_numbers)))
    path = write(tmp_path / f"t{ending}", moved, values)
    answers = answers_for(make_teacher(path, store), store, ROWS, progress=False)
    found = answers.gather_atoms(torch.arange(9))
    batch = store.batch(ROWS)
    np.testing.assert_allclose(found[:, :3], batch.frac_coords, atol=1e-5)
    np.testing.assert_array_equal(found[:, 3], batch.atomic_numbers)
    several = sum(
        not np.array_equal(a.atomic_numbers, b.atomic_numbers)
        or not np.allclose((a.frac_coords - b.frac_coords) % 1 % 0.999, 0, atol=1e-2)
        for a, b in zip(CRYSTALS, moved, strict=True)
    )
    assert 2 < several < 9
    said = f"t{ending}: atoms of {several} of 9 crystals put into the store's order\n"
    assert capsys.readouterr().out == said


def test_atoms_across_the_border_of_the_cell_are_the_same(tmp_path):
    edge = replace(
        CRYSTALS[0],
        frac_coords=np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]),
        atomic_numbers=np.array([8, 8], np.uint8),
    )
    store = open_store(tmp_path / "s.h5", [edge])
    other = replace(edge, frac_coords=np.array([[0.5, 0.5, 0.5], [0.9999, 0, 1]]))
    path = write(tmp_path / "t.h5", [other], [np.array([[1.0], [2.0]])])
    answers = answers_for(make_teacher(path, store), store, [0], progress=False)
    assert answers.gather_atoms(torch.tensor([0])).flatten().tolist() == [2.0, 1.0]


def one_each(numbers: Sequence[int], crystal: Crystal = CRYSTALS[3]) -> Crystal:
    return replace(crystal, atomic_numbers=np.array(numbers, np.uint8))


def test_without_coordinates_elements_that_stand_once_are_matched(tmp_path, capsys):
    store = open_store(tmp_path / "s.h5", [one_each([8, 14, 26, 1])])
    path = write(
        tmp_path / "t.h5",
        [one_each([26, 1, 8, 14])],
        [np.array([[26.0], [1.0], [8.0], [14.0]])],
        frac_coords=False,
    )
    answers = answers_for(make_teacher(path, store), store, [0], progress=False)
    assert answers.gather_atoms(torch.tensor([0])).flatten().tolist() == [8, 14, 26, 1]
    assert (
        "atoms of 1 of 1 crystals put into the store's order" in capsys.readouterr().out
    )


def test_without_coordinates_the_same_order_is_believed_and_said(tmp_path, capsys):
    store = open_store(tmp_path / "s.h5", [one_each([8, 8, 26, 1])])
    path = write(
        tmp_path / "t.h5", [one_each([8, 8, 26, 1])], [np.arange(4.0)[:, None]],
        frac_coords=False,
    )  # fmt: skip
    answers = answers_for(make_teacher(path, store), store, [0], progress=False)
    assert answers.gather_atoms(torch.tensor([0])).flatten().tolist() == [0, 1, 2, 3]
    assert capsys.readouterr().out == (
        "t.h5 has no `frac_coords`: 1 of 1 crystals have several atoms of an element; "
        "they are assumed to be in the store's order\n"
    )


@pytest.mark.parametrize(
    ("crystals", "frac_coords", "text"),
    [
        (
            [one_each([8, 26, 8, 1])],
            False,
            "1 of 1 crystals of .*t.h5 have other elements, or another order of atoms, "
            r"than those of .*s.h5 \(random-3\); write `frac_coords` into the table",
        ),
        (
            [one_each([8, 8, 26, 2])],
            True,
            r"1 of 1 crystals of .*t.h5 have atoms at other places than those of "
            r".*s.h5 \(random-3\); make the table from the structures of .*s.h5",
        ),
        (
            [replace(one_each([8, 8, 26, 1]), frac_coords=CRYSTALS[7].frac_coords)],
            True,
            "have atoms at other places than those",
        ),
        (
            [replace(CRYSTALS[2], material_id="random-3")],
            True,
            "1 of 1 crystals of .*t.h5 have other numbers of atoms than those of",
        ),
    ],
    ids=["order unknown", "elements", "places", "numbers"],
)
def test_other_atoms_are_refused(crystals, frac_coords, text, tmp_path):
    store = open_store(tmp_path / "s.h5", [one_each([8, 8, 26, 1])])
    values = [np.zeros((len(c.atomic_numbers), 1)) for c in crystals]
    path = write(tmp_path / "t.h5", crystals, values, frac_coords=frac_coords)
    with pytest.raises(InputError, match=text):
        answers_for(make_teacher(path, store), store, [0], progress=False)


# ----------------------------------------------------------------------------- refusals


def test_crystals_that_are_missing_are_counted_and_named(store, tmp_path):
    some = CRYSTALS[:4]
    path = write(tmp_path / "t.h5", some, vectors(some))
    teacher = make_teacher(path, store)
    answers_for(teacher, store, [3, 0], progress=False)  # fine without the others
    with pytest.raises(InputError) as caught:
        answers_for(teacher, store, ROWS, progress=False)
    assert str(caught.value) == (
        f"{path} lacks 5 of 9 crystals of {store.path} (random-4, random-5, random-6, "
        "...); add them to it, or leave them out of the store"
    )


def test_a_crystal_that_stands_twice_is_refused(store, tmp_path):
    twice = [*CRYSTALS, CRYSTALS[2]]
    path = write(tmp_path / "t.h5", twice, vectors(twice))
    with pytest.raises(InputError, match="has random-2 twice; leave one of them out"):
        answers_for(make_teacher(path, store), store, ROWS, progress=False)


@pytest.mark.parametrize("ending", ENDINGS)
def test_numbers_that_are_not_finite_are_refused(ending, store, tmp_path):
    values = vectors(CRYSTALS)
    values[5][0, 1] = np.nan
    path = write(tmp_path / f"t{ending}", CRYSTALS, values)
    with pytest.raises(InputError, match="has numbers of random-5 that are not finite"):
        answers_for(make_teacher(path, store), store, ROWS, progress=False)


def spoil(path: Path, **changes: Any) -> Path:
    """Change arrays of an HDF5 table; None removes one."""
    with h5py.File(path, "a") as file:
        for name, value in changes.items():
            if name in file:
                del file[name]
            if value is not None:
                file[name] = value
    return path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"material_ids": None},
            "no table of embeddings, which has `material_ids` and",
        ),
        ({"atoms": None}, "it has neither `atoms` nor `crystals`"),
        ({"ptr": None}, "has `atoms` but lacks `ptr`"),
        ({"atomic_numbers": None}, "has `atoms` but lacks `atomic_numbers`"),
        ({"ptr": np.arange(8)}, "`ptr` must be 10 rising numbers from 0 on"),
        ({"ptr": np.arange(10)}, "`atoms` has 21 atoms but `ptr` ends at 9"),
        ({"frac_coords": np.zeros((4, 3))}, "`frac_coords` has 4 atoms but `ptr` ends"),
        ({"frac_coords": np.zeros(21)}, "`frac_coords` is .* must hold rows of three"),
        ({"atoms": np.zeros(21)}, r"`atoms` is \(21,\) of .* must be a matrix"),
        ({"atoms": np.zeros((21, 2), int)}, "must be a matrix of floating-point"),
        ({"crystals": np.zeros((3, 2))}, "`crystals` has 3 rows but there are 9"),
        ({"material_ids": np.array([255], np.uint8)}, "bytes of names in UTF-8"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(changes, text, store, tmp_path):
    path = write(tmp_path / "t.h5", CRYSTALS, vectors(CRYSTALS))
    with pytest.raises(InputError, match=text):
        make_teacher(spoil(path, **changes), store)


def test_damaged_files_are_refused(store, tmp_path):
    for ending, text in (
        (".h5", "is no readable HDF5 file"),
        (".parquet", "is no readable Parquet file"),
        (".safetensors", "is cut short"),
    ):
        path = write(tmp_path / f"t{ending}", CRYSTALS, vectors(CRYSTALS))
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(InputError, match=text):
            make_teacher(path, store)


def test_parquet_that_does_not_fit_together_is_refused(store, tmp_path):
    path = write(tmp_path / "t.parquet", CRYSTALS, vectors(CRYSTALS))
    whole = pq.read_table(path)
    for name, text in (
        ("material_id", "has no column `material_id`"),
        ("atomic_numbers", "has `atoms` but lacks `atomic_numbers`"),
        ("atoms", "it has neither `atoms` nor `crystals`"),
    ):
        pq.write_table(whole.drop_columns([name]), path)
        with pytest.raises(InputError, match=text):
            make_teacher(path, store)
    short = vectors(CRYSTALS)
    short[6] = short[6][:, :2]
    path = write(tmp_path / "t.parquet", CRYSTALS, short)
    with pytest.raises(InputError, match="`atoms` of random-6 has 6 numbers but must"):
        answers_for(make_teacher(path, store), store, ROWS, progress=False)


# ------------------------------------------------------------------------------ embed


def embedded(weights: Path, store: Store, path: Path, level: str) -> TableTeacher:
    embed(weights, [store.path], path, level=level, batch_size=4, progress=False)
    found = make_teacher(path, store)
    assert isinstance(found, TableTeacher)
    return found


@pytest.mark.parametrize("ending", ENDINGS)
def test_atoms_that_embed_wrote_teach_what_the_encoder_would(
    ending, weights, store, tmp_path, capsys
):
    teacher = embedded(weights, store, tmp_path / f"t{ending}", "atoms")
    answers = answers_for(teacher, store, ROWS, progress=False)
    batch = store.batch([8, 3, 0])
    expected = load_encoder(weights)(batch).atoms.detach()
    found = answers.gather_atoms(batch.rows, batch.num_nodes)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert capsys.readouterr().out == ""  # no atom was moved, so no warning


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_layer_that_embed_wrote_can_teach(ending, weights, store, tmp_path):
    path = tmp_path / f"t{ending}"
    last = embedded(weights, store, path, "layers")
    batch = store.batch([8, 3, 0])
    layers = load_encoder(weights)(batch, layers=True).layers
    assert len(layers) == 3
    for k, expected in enumerate(layers):
        teacher = make_teacher(f"{path}:{k}", store)
        torch.testing.assert_close(
            teacher(batch).atoms, expected.detach(), atol=1e-6, rtol=1e-5
        )
    assert torch.equal(last(batch).atoms, teacher(batch).atoms)
    assert last.fingerprint() == teacher.fingerprint()
    assert make_teacher(f"{path}:0", store).fingerprint() != last.fingerprint()
    with pytest.raises(InputError, match="has no layer 3; it has the layers 0 to 2"):
        make_teacher(f"{path}:3", store)


@pytest.mark.parametrize("ending", ENDINGS)
def test_crystals_that_embed_wrote_teach(ending, weights, store, tmp_path):
    teacher = embedded(weights, store, tmp_path / f"t{ending}", "crystals")
    batch = store.batch([8, 3, 0])
    expected = load_encoder(weights)(batch).crystals.detach()
    torch.testing.assert_close(teacher(batch).crystals, expected, atol=1e-6, rtol=1e-5)
    assert teacher(batch).atoms is None


@pytest.mark.parametrize("ending", ENDINGS)
def test_where_weights_come_from_goes_with_the_table(ending, weights, store, tmp_path):
    """The same as if the student learned from the weights directly."""
    teacher = embedded(weights, store, tmp_path / f"t{ending}", "atoms")
    direct = make_teacher(weights, store)
    assert teacher.provenance == direct.provenance
    for dataset in map(known_by_hash, ("d0", "other")):
        assert seen(teacher.learned, dataset) == seen(direct.learned, dataset)
    assert seen(teacher.learned, known_by_hash("d0"))[0] == "clean"


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_others_say_of_their_model_is_handed_on(ending, store, tmp_path):
    about = {"origin": "MODEL, trained on X", "licence": "MIT"}
    values = vectors(CRYSTALS)
    path = write(tmp_path / f"t{ending}", CRYSTALS, values, about=about)
    made = make_teacher(path, store).provenance
    assert (made.origin, made.licence) == ("MODEL, trained on X", "MIT")
    path = write(tmp_path / f"u{ending}", CRYSTALS, values)
    silent = make_teacher(path, store)
    assert silent.provenance.origin == (f"the table u{ending}, of unknown origin")
    assert seen(silent.learned, store)[0] == "unknown"


def test_words_about_an_origin_that_cannot_be_used_are_refused(store, tmp_path):
    for about, text in (
        ({"licence": "CC BY 4.0"}, "t.h5: `licence` is 'CC BY 4.0' .* `CC-BY-4.0`"),
        ({"crysdistill": '{"kind": "encoder"}'}, "of its weights cannot be read"),
        ({"crysdistill": "{"}, "of its weights cannot be read; write it again"),
    ):
        path = write(tmp_path / "t.h5", CRYSTALS, vectors(CRYSTALS), about=about)
        with pytest.raises(InputError, match=text):
            make_teacher(path, store)


def test_tables_are_written_part_by_part(weights, store, tmp_path, monkeypatch):
    """A Parquet group holds several batches; the last group holds the rest."""
    monkeypatch.setattr(writing, "_GROUP", 5)
    path = tmp_path / "t.parquet"
    embed(weights, [store.path], path, level="atoms", batch_size=2, progress=False)
    groups = pq.ParquetFile(path).metadata
    sizes = [groups.row_group(k).num_rows for k in range(groups.num_row_groups)]
    assert sizes == [6, 3]
    whole = tmp_path / "t.safetensors"
    embed(weights, [store.path], whole, level="atoms", progress=False)
    flat = np.concatenate(pd.read_parquet(path)["atoms"].to_list())
    np.testing.assert_allclose(flat, load_file(whole)["atoms"].flatten(), atol=1e-6)


def test_a_table_appears_whole_or_not_at_all(store, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_join", None)
    for ending in (".parquet", ".csv"):
        with pytest.raises(TypeError):
            embed(weights, [store.path], tmp_path / f"t{ending}", progress=False)
    assert not list(tmp_path.iterdir())


def test_what_no_table_can_hold_is_refused(weights, store, tmp_path):
    with pytest.raises(
        InputError, match=r"a CSV has a row for each crystal; give `atoms` a name that"
    ):
        embed(weights, [store.path], tmp_path / "t.csv", level="atoms")
    with pytest.raises(InputError, match=r"`level` is 'atom' but .* mean `atoms`"):
        embed(weights, [store.path], tmp_path / "t.h5", level="atom")
    odd = open_store(tmp_path / "odd.h5", [replace(CRYSTALS[0], material_id="a\nb")])
    with pytest.raises(InputError, match=r"'a\\nb' has a line break"):
        embed(weights, [odd.path], tmp_path / "t.safetensors", progress=False)


def test_embeddings_of_nothing(weights, tmp_path):
    (tmp_path / "cifs").mkdir()
    (tmp_path / "cifs" / "empty.cif").write_text("")
    for ending in ENDINGS:
        for level in ("atoms", "layers", "crystals"):
            out = tmp_path / f"t{ending}"
            with pytest.raises(InputError, match="none of 1 entries became a crystal"):
                embed(
                    weights, [tmp_path / "cifs"], out, level=level, workers=1,
                    progress=False,
                )  # fmt: skip
            assert not out.exists()


# -------------------------------------------------------------------------- the script


def test_the_script_in_the_documentation_runs(tmp_path, monkeypatch):
    text = str(table.__doc__)
    lines = text[text.index("    import numpy") :].splitlines()
    code = "\n".join(line[4:] for line in lines)
    monkeypatch.chdir(tmp_path)
    store = open_store(tmp_path / "dataset.h5", CRYSTALS)

    def model(structure):
        return structure.frac_coords @ structure.lattice.matrix

    exec(code, {"model": model})
    teacher = make_teacher("table.safetensors", store)
    batch = store.batch(ROWS)
    places = torch.einsum("na,nab->nb", batch.frac_coords, batch.cell[batch.batch])
    torch.testing.assert_close(teacher(batch).atoms, places, atol=1e-4, rtol=1e-4)
    assert teacher.provenance.licence == "MIT"


# ---------------------------------------------------------------------- a whole run


def test_a_table_teaches_what_the_weights_that_made_it_teach(weights, tmp_path):
    dataset = write_store(tmp_path / "d.h5", labelled(40))
    config = training_config(dataset, tmp_path / "run")
    table_path = tmp_path / "t.safetensors"
    embed(weights, [dataset], table_path, level="atoms", progress=False)
    made = [
        distill(
            DistillConfig(
                **{**shared(config), "out": tmp_path / f"by-{path.stem}"},
                teacher=str(path),
                loss="standardized_atoms",
            )
        )
        for path in (weights, table_path)
    ]
    one, other = (weights_of(path) for path in made)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-3)
    assert history(made[1].parent, "train_embedding")[0] > 0.1
    header = read_header(made[1])
    assert header.provenance.licence == "CC-BY-4.0"
    assert header.provenance.origin.endswith("taught by runs/pre")
