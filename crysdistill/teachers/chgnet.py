"""CHGNet, a universal potential, as a teacher; an extra: `crysdistill[chgnet]`.

Its wheel contains its weights, so it needs no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crysdistill.errors import BadStructure, InputError, did_you_mean, not_installed
from crysdistill.graphs.batch import CrystalBatch, distances
from crysdistill.store.store import Store
from crysdistill.structures.elements import symbols
from crysdistill.teachers.teacher import Answer, Foreign, Teacher
from crysdistill.transfer.weights import Provenance

if TYPE_CHECKING:
    from pymatgen.core import Structure

MODELS = {
    "0.3.0": "MPtrj",
    "r2scan": "MPtrj, then MP-r2SCAN",
    "0.2.0": "MPtrj",
}
"""The models in the wheel, the default first, and their training data."""

ELEMENTS = 94
"""The highest atomic number for which CHGNet has an embedding."""

_REACH = 6.0  # Å; every atom needs a neighbour within it
_AT_ONCE = 512  # crystals whose neighbours are checked at a time
_TOGETHER = 32  # crystals in a forward pass; more need gigabytes
_WIDTH = 64
_LICENCE = "BSD-3-Clause-LBNL AND CC-BY-4.0"
"""The licence of the code and its weights, and that of Materials Project data."""


class CHGNetTeacher(Teacher):
    """CHGNet's embeddings of atoms and crystals.

    An atom has 65 numbers. 64 are its embedding before the last convolution, from which
    CHGNet predicts magnetic moments. The last is its site energy in eV, including the
    energy of the element. A crystal has the 64 numbers of CHGNet's own readout, as a
    mean over atoms; CHGNet itself takes the sum, which grows with the cell.

    CHGNet was trained on relaxations of the Materials Project: energies, forces,
    stresses and magnetic moments. A test set may be among these data; that of a task
    about Materials Project energies surely is.

    Source: B. Deng et al., Nat. Mach. Intell. 5, 1031 (2023),
    doi:10.1038/s42256-023-00716-3, and the code published with it.

    Args:
        model: one of `MODELS`.

    Raises:
        InputError: `model` is unknown, or CHGNet is not installed.
    """

    SLOW = True

    def __init__(self, model: str = "") -> None:
        model = model or next(iter(MODELS))
        if model not in MODELS:
            raise InputError(
                f"unknown CHGNet {model!r}; choose one of {', '.join(MODELS)}"
                f"{did_you_mean(model, MODELS)}"
            )
        if importlib.util.find_spec("chgnet") is None:
            raise not_installed("chgnet", "chgnet")
        self.model = model
        self.name = f"CHGNet {model}"
        self.atom_width = _WIDTH + 1
        self.crystal_width = _WIDTH
        self._device = "cpu"
        data = f"trained on {MODELS[model]}: relaxations of the Materials Project"
        self.learned = Foreign(
            Provenance(licence=_LICENCE, origin=f"{self.name}, {data}")
        )

    def fingerprint(self) -> str:
        """Return a hash of the release and the model, which determine the weights."""
        release = importlib.metadata.version("chgnet")
        return hashlib.sha256(f"chgnet {release} {self.model}".encode()).hexdigest()

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Refuse crystals with elements that CHGNet has never seen.

        Raises:
            InputError: there are such crystals; the text counts and names them.
        """
        heavy = np.flatnonzero(store.atomic_numbers > ELEMENTS)
        if not len(heavy):
            return
        owners = np.searchsorted(store.atom_offsets, heavy, side="right") - 1
        bad = np.intersect1d(owners, rows)
        if len(bad):
            wrong = np.unique(store.atomic_numbers[heavy[np.isin(owners, bad)]])
            found = ",".join(symbols()[z] for z in wrong)
            names = ", ".join(store.material_ids[row] for row in bad[:3])
            raise InputError(
                f"{len(bad):,} of {len(rows):,} crystals have elements that CHGNet "
                f"does not know ({names}{', ...' if len(bad) > 3 else ''}); leave them "
                f"out with `crysdistill build {store.path} -o NEW.h5 --without {found}`"
            )

    def knows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Return which crystals have only known elements and no isolated atom."""
        heavy = np.cumsum(np.r_[0, store.atomic_numbers > ELEMENTS])
        ends = store.atom_offsets
        known = heavy[ends[rows + 1]] == heavy[ends[rows]]  # (R,)
        for first in range(0, len(rows), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            known[part] &= ~_lonely(store.batch(rows[part]))
        return known

    def to(self, device: str | torch.device) -> CHGNetTeacher:
        """Compute on a device from now on."""
        self._device = str(device)
        return self

    def __call__(self, batch: CrystalBatch) -> Answer:
        """Answer for the structures of a batch; its edges are not used."""
        model = _load(self.model, self._device)
        structures = structures_of(batch)
        graphs = []
        for k, structure in enumerate(structures):
            try:
                graphs.append(model.graph_converter(structure))
            except ValueError:
                raise BadStructure(
                    f"{batch.material_ids[k]}: CHGNet finds no neighbour of an atom "
                    "within 6 Å; leave that crystal out of the store"
                ) from None
        # CHGNet turns a tensor with gradients into a number; torch warns about that.
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore", UserWarning)
            found = model.predict_graph(
                graphs,
                task="e",
                return_site_energies=True,
                return_atom_feas=True,
                return_crystal_feas=True,
                batch_size=min(len(graphs), _TOGETHER),
            )
        answers: Sequence[dict[str, np.ndarray]] = (
            [found] if isinstance(found, dict) else found
        )
        atoms = [
            np.column_stack((one["atom_fea"], one["site_energies"])) for one in answers
        ]
        crystals = [
            one["crystal_fea"] / len(one["site_energies"]) for one in answers
        ]  # (64,) each
        device = batch.rows.device
        return Answer(
            torch.from_numpy(np.concatenate(atoms)).to(device),  # (N, 65)
            torch.from_numpy(np.stack(crystals)).to(device),  # (B, 64)
        )


def _lonely(batch: CrystalBatch) -> np.ndarray:
    """Return which crystals have an atom with no neighbour within reach, (B,)."""
    d = distances(batch)  # (E,)
    if "padding" in batch:
        d = d.masked_fill(batch.padding, torch.inf)
    nearest = d.new_full((batch.num_nodes,), torch.inf)
    nearest = nearest.scatter_reduce(0, batch.edge_index[1], d, "amin")  # (N,)
    found = np.zeros(batch.num_graphs, dtype=bool)
    found[batch.batch[nearest > _REACH].numpy()] = True
    return found


@lru_cache(maxsize=2)
def _load(model: str, device: str) -> Any:
    """Load a model, without the messages that CHGNet prints."""
    from chgnet.model.model import CHGNet

    with contextlib.redirect_stdout(io.StringIO()):
        return CHGNet.load(model_name=model, use_device=device, verbose=False).eval()


def structures_of(batch: CrystalBatch) -> list[Structure]:
    """Return the crystals of a batch as pymatgen's structures, in its order."""
    from pymatgen.core import Lattice, Structure

    cells = batch.cell.double().cpu().numpy()  # (B, 3, 3)
    frac = batch.frac_coords.double().cpu().numpy()  # (N, 3)
    numbers, ptr = batch.atomic_numbers.tolist(), batch.ptr.tolist()
    return [
        Structure(Lattice(cell), numbers[first:end], frac[first:end])
        for cell, first, end in zip(cells, ptr[:-1], ptr[1:], strict=True)
    ]
