"""The D4 dispersion model as a teacher; an extra: `crysdistill[dispersion]`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import replace

import numpy as np
import torch
from scipy.constants import physical_constants

from crysdistill.errors import BadStructure, InputError, first_line, not_installed
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.teachers.teacher import Answer, Teacher
from crysdistill.transfer.weights import Provenance

BOHR = physical_constants["Bohr radius"][0] * 1e10
"""Å."""

HARTREE = physical_constants["Hartree energy in eV"][0]
"""eV."""

ATOMS = (
    "coordination number",
    "charge",
    "log C6",
    "log polarizability",
    "dispersion energy",
)
"""The numbers of an atom, in order."""

_VERSION = 1  # of the answers; count up when they change
_REACH = 40.0  # Bohr, of pairs; with dftd4's own 60 Bohr an energy changes by 0.3 %
_TRIPLES = 0.1  # Bohr, of triples: none
_COORDINATION = 30.0  # Bohr, of neighbours that are counted; dftd4's own value


class DispersionTeacher(Teacher):
    """What the D4 model knows of atoms: charges, polarizabilities, dispersion.

    An atom has five numbers:

    - its coordination number in D4, where a bond between unlike elements counts less;
    - its charge from electronegativity equilibration (EEQ), in e. The charges of a
      crystal add up to 0;
    - the logarithm of the C6 coefficient between two such atoms, in Hartree Bohr^6;
    - the logarithm of its static polarizability, in Bohr^3;
    - its dispersion energy in eV: half of that of all pairs it belongs to, with the
      damping for PBE. The energies of a crystal add up to its two-body energy.

    C6 spreads over four orders of magnitude and the polarizability over two, so their
    logarithms are learned.

    A crystal has one number: the logarithm of the polarizability per volume, both in
    Bohr^3, on which the refractive index depends (Clausius and Mossotti). The means of
    the atoms' numbers are left out, because any student can take them.

    The model has parameters for all elements that a store can hold. They were fitted to
    molecules, so no crystal's label is in these answers. A crystal of 20 atoms takes
    some 20 ms on one core, one of 200 atoms 2 s: limit large ones with `max_atoms`.

    Source: E. Caldeweyher et al., J. Chem. Phys. 150, 154122 (2019),
    doi:10.1063/1.5090222; in crystals, Phys. Chem. Chem. Phys. 22, 8499 (2020),
    doi:10.1039/D0CP00502A; and the code published with them, LGPL-3.0-or-later.

    Differs from the paper: energies are of pairs within 21 Å only; energies of three
    atoms would take a hundred times as long.

    Args:
        model: none; there is one model.

    Raises:
        InputError: `model` is given, or dftd4 is not installed.
    """

    SLOW = True

    def __init__(self, model: str = "") -> None:
        if model:
            raise InputError(f"`dftd4` has no model {model!r}; name it alone, as dftd4")
        if importlib.util.find_spec("dftd4") is None:
            raise not_installed("dftd4", "dispersion")
        self.name = f"dftd4 {importlib.metadata.version('dftd4')}"
        self.atom_width = len(ATOMS)
        self.crystal_width = 1

    def fingerprint(self) -> str:
        """Return a hash of the library's release and of the numbers taken from it."""
        return hashlib.sha256(f"{self.name}, version {_VERSION}".encode()).hexdigest()

    @property
    def provenance(self) -> Provenance:
        """A model that has seen no crystal."""
        origin = f"{self.name}, whose parameters were fitted to molecules"
        return replace(super().provenance, origin=origin)

    def __call__(self, batch: CrystalBatch) -> Answer:
        """Answer for the structures of a batch; its edges are not used."""
        cells = batch.cell.double().cpu().numpy()  # (B, 3, 3)
        frac = batch.frac_coords.double().cpu().numpy()  # (N, 3)
        numbers, ptr = batch.atomic_numbers.cpu().numpy(), batch.ptr.tolist()
        atoms, crystals = [], []
        for k, cell in enumerate(cells):
            own = slice(ptr[k], ptr[k + 1])
            try:
                found = properties(numbers[own], frac[own], cell)  # (n, 5)
            except RuntimeError as error:
                raise BadStructure(
                    f"{batch.material_ids[k]}: dftd4 cannot answer "
                    f"({first_line(error)}); leave that crystal out of the store"
                ) from None
            volume = abs(np.linalg.det(cell)) / BOHR**3
            atoms.append(found)
            crystals.append(np.log(np.exp(found[:, 3]).sum() / volume))
        device = batch.rows.device
        return Answer(
            torch.from_numpy(np.concatenate(atoms)).float().to(device),  # (N, 5)
            torch.tensor(crystals, dtype=torch.float32, device=device)[:, None],
        )


def properties(numbers: np.ndarray, frac: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Return the numbers `ATOMS` of the atoms of one crystal, (N, 5).

    Args:
        numbers: (N,) atomic numbers.
        frac: (N, 3) fractional coordinates.
        cell: (3, 3), Å, rows are lattice vectors.

    Raises:
        RuntimeError: dftd4 refuses the crystal.
    """
    from dftd4.interface import DampingParam, DispersionModel

    if np.linalg.det(cell) < 0:
        cell = -cell  # dftd4 errs in left-handed cells; inversion changes no answer
    model = DispersionModel(
        numbers, frac @ cell / BOHR, lattice=cell / BOHR, periodic=np.ones(3, bool)
    )
    model.set_realspace_cutoff(_REACH, _TRIPLES, _COORDINATION)
    found = model.get_properties()
    pairs = model.get_pairwise_dispersion(DampingParam(method="pbe", atm=False))
    return np.column_stack(
        (
            found["coordination numbers"],
            found["partial charges"],
            np.log(np.diagonal(found["c6 coefficients"])),
            np.log(found["polarizabilities"]),
            HARTREE * pairs["additive pairwise energy"].sum(axis=1),
        )
    )
