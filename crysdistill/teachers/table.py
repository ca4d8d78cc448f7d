r"""A table of embeddings, of any model, as a teacher.

A table holds a model's embeddings: a vector for each atom, one for each crystal, or
both. `crysdistill embed WEIGHTS SOURCE -o TABLE --level atoms` writes one for an
encoder of this package; any other model needs a short script. A table is a safetensors,
HDF5 or Parquet file.

**safetensors and HDF5** files hold arrays and are mapped into memory (chunked HDF5
arrays are read instead). R is the number of crystals, A that of all their atoms:

- `material_ids`: the R names as UTF-8 bytes, one a line (uint8); HDF5 may have strings;
- `crystals`: (R, F') floats, one vector for each crystal;
- `atoms`: (A, F) floats, those of the first crystal, then of the second, ...;
- `ptr`: (R + 1,) int64, the first atom of each crystal, and A; required with `atoms`;
- `atomic_numbers`: (A,) integers; required with `atoms`;
- `frac_coords`: (A, 3) floats; with them, atoms may be in any order;
- `layer0`, `layer1`, ...: as `atoms`, one block for each layer of the model.

**Parquet** has a row for each crystal: `material_id`; `atomic_numbers`, a list; `atoms`
(and `layer0`, ...), a list of atoms x F numbers, atom after atom; `frac_coords`, a list
of atoms x 3 numbers; and for the crystal either the columns `e0`, `e1`, ..., as `embed`
writes them, or `crystals`, a list of F' numbers.

Two text entries record the source of a table: `origin` (the model and its training
data) and `licence` (its SPDX identifier). Both are copied into the weights of every
student. They are the metadata of a safetensors file, attributes of an HDF5 file, or
metadata of a Parquet schema.

A script for another model, whose `model(structure)` returns (atoms, F):

    import numpy as np
    from safetensors.numpy import save_file
    from crysdistill.store.store import Store

    store = Store.open("dataset.h5")
    crystals = list(store.crystals())
    atoms = [model(crystal.to_pymatgen()) for crystal in crystals]
    save_file(
        {
            "material_ids": np.frombuffer(
                "\n".join(c.material_id for c in crystals).encode(), np.uint8
            ),
            "ptr": np.cumsum([0, *(len(a) for a in atoms)]),
            "atomic_numbers": np.concatenate([c.atomic_numbers for c in crystals]),
            "frac_coords": np.concatenate([c.frac_coords for c in crystals]),
            "atoms": np.concatenate(atoms).astype(np.float32),
        },
        "table.safetensors",
        {"origin": "MODEL, trained on ...", "licence": "MIT"},
    )
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.store.origins import check_licence
from crysdistill.store.store import Store
from crysdistill.teachers.answers import Block, TeacherAnswers
from crysdistill.teachers.matching import Match, match_atoms, match_ids
from crysdistill.teachers.tables import open_table
from crysdistill.teachers.tables.layout import ABOUT, LAYER, ranges
from crysdistill.teachers.teacher import Answer, Foreign, Teacher
from crysdistill.transfer.weights import Provenance, recorded_apart


class TableTeacher(Teacher):
    """Looks up the answers for the crystals of a store.

    Args:
        path: the table.
        store: the store with the crystals that the teacher will answer for.
        layer: the layer that answers for atoms; None takes `atoms`, or the last layer
            if the table has no `atoms`.

    Raises:
        InputError: the table cannot be read, or has no such layer.
    """

    def __init__(self, path: Path, store: Store, layer: int | None = None) -> None:
        self.table = open_table(path)
        self.store = store
        self.name = path.name
        self._atoms = self._block(layer)
        widths = self.table.widths
        self.atom_width = widths[self._atoms] if self._atoms else None
        self.crystal_width = widths.get("crystals")
        self.learned = _learned(path, self.table.about)
        self._told = False
        self._last: TeacherAnswers | None = None

    def _block(self, layer: int | None) -> str | None:
        """Return the block that answers for atoms, if there is one."""
        layers = sorted(int(m[1]) for n in self.table.widths if (m := LAYER.match(n)))
        if layer is not None and layer not in layers:
            has = f"the layers {layers[0]} to {layers[-1]}" if layers else "no layers"
            raise InputError(f"{self.table.path} has no layer {layer}; it has {has}")
        if layer is None and "atoms" in self.table.widths:
            return "atoms"
        if layer is None and layers:
            layer = layers[-1]
        return None if layer is None else f"layer{layer}"

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Find the crystals in the table.

        Raises:
            InputError: the table lacks some, has other atoms, or holds a number that is
                not finite.
        """
        bad = self.at_hand(rows).find_bad()
        if bad is not None:
            raise InputError(
                f"{self.table.path} has numbers of {store.material_ids[bad]} that are "
                "not finite; mend the table, or leave that crystal out of the store"
            )

    def knows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Return which crystals are in the table, by their names."""
        return np.isin(np.array(store.material_ids)[rows], self.table.ids)

    def at_hand(self, rows: np.ndarray) -> TeacherAnswers:
        """Return the vectors of some crystals; those in mapped files are not copied.

        Raises:
            InputError: the table lacks some, or has other atoms.
        """
        rows = np.asarray(rows, np.int64)
        if self._last is not None and np.array_equal(self._last.rows, rows):
            return self._last
        found = match_ids(self.table, self.store, rows)
        atoms = crystals = None
        if self._atoms is not None:
            atoms = self._atom_block(self._atoms, found, rows)
        if self.crystal_width is not None:
            values, first = self.table.take("crystals", found)
            ones = np.ones(len(rows), np.int64)
            crystals = self._spread(values, first, ones, rows)
        self._last = TeacherAnswers(torch.from_numpy(rows), atoms, crystals)
        return self._last

    def _atom_block(self, name: str, found: np.ndarray, rows: np.ndarray) -> Block:
        """Return the vectors of atoms, in the order of the store."""
        match = match_atoms(self.table, found, self.store, rows)
        values, first = self.table.take(name, found)
        counts = np.asarray(self.table.counts)[found]
        block = self._spread(values, first, counts, rows)
        if match.moved:
            order = torch.arange(len(values))
            theirs = np.repeat(first, counts) + match.order  # (N,)
            order[ranges(first, counts)] = torch.from_numpy(theirs)
            block.order = order
        if not self._told:
            self._tell(match, len(rows))
        return block

    def _spread(
        self, values: Tensor, first: np.ndarray, counts: np.ndarray, rows: np.ndarray
    ) -> Block:
        """Return vectors by row of the store."""
        all_first = torch.full((len(self.store),), -1)
        all_counts = torch.zeros(len(self.store), dtype=torch.int64)
        all_first[rows] = torch.from_numpy(np.asarray(first, np.int64))
        all_counts[rows] = torch.from_numpy(counts)
        return Block(values, all_first, all_counts)

    def _tell(self, match: Match, crystals: int) -> None:
        """Print, once, which atoms were reordered and which could not be checked."""
        self._told = True
        if match.moved:
            print(
                f"{self.name}: atoms of {match.moved:,} of {crystals:,} crystals put "
                "into the store's order"
            )
        if match.trusted:
            print(
                f"{self.name} has no `frac_coords`: {match.trusted:,} of {crystals:,} "
                "crystals have several atoms of an element; they are assumed to be in "
                "the store's order"
            )

    def __call__(self, batch: CrystalBatch) -> Answer:
        """Look up the crystals of a batch by their rows."""
        rows = batch.rows.cpu()
        answers = self.at_hand(np.unique(rows.numpy()))
        device = batch.rows.device
        return Answer(
            None if answers.atoms is None else answers.gather_atoms(rows).to(device),
            None
            if answers.crystals is None
            else answers.gather_crystals(rows).to(device),
        )

    def fingerprint(self) -> str:
        """Return a hash of the file and of the layer."""
        digest = xxhash.xxh3_128()
        with self.table.path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
        text = f"table {digest.hexdigest()} {self._atoms}"
        return hashlib.sha256(text.encode()).hexdigest()


def _learned(path: Path, about: Mapping[str, str]) -> Foreign:
    """Return what a table records of the model that made it."""
    if ABOUT in about:
        try:
            facts = json.loads(about[ABOUT])
            values = {**facts["provenance"], **recorded_apart(facts)}
            return Foreign(Provenance(**values), facts["kind"])
        except (ValueError, KeyError, TypeError, InputError):
            raise InputError(
                f"{path}: the record of its weights cannot be read; write it again "
                "with `crysdistill embed`"
            ) from None
    licence = about.get("licence", "")
    try:
        check_licence(licence)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    origin = about.get("origin") or f"the table {path.name}, of unknown origin"
    return Foreign(Provenance(licence=licence, origin=origin))
