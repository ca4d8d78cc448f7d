"""The electrostatics of formal charges as a teacher."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.store.store import Store
from crysdistill.teachers.chgnet import structures_of
from crysdistill.teachers.formal_charges import formal_charges, formulas_of
from crysdistill.teachers.teacher import Answer, Teacher

_VERSION = 1  # of the answers; count up when they change
_DIGITS = 8.0  # of the Ewald sum; answers are kept with seven
_MOST = 100.0  # V; cations of charge 6 and 7 in oxides lie at some 70
_PROBE = 1e-9  # e, the charge that measures the potential at a neutral atom


class EwaldTeacher(Teacher):
    """Formal charges, and the potentials and the energy that they cause.

    An atom has two numbers: its formal charge in e (`formal_charges`), and the
    electrostatic potential in V that all other charges of the infinite crystal cause at
    its place. Cations lie at negative potentials.

    A crystal has one number, minus the root of minus its Ewald energy in eV/atom. That
    energy is the mean over its atoms of half of charge times potential.

    Energies grow with the square of the charges: that of WO3 is fifteen times that of
    NaCl, so a few crystals would rule a standardised column. Potentials and the root
    grow as the charges do. The few positive energies are given as their root.

    Charges that follow from the composition alone can be wrong: in a stack of MoS2 and
    WTe2 they give neighbouring layers opposite charges, with potentials of 240 V.
    Potentials are therefore cut at 100 V; else 1 atom in 250 would have an eighth of
    their variance.

    Crystals without formal charges, such as elements and most alloys, are unknown
    (`knows`). These numbers have learned nothing from any crystal. A crystal of 20
    atoms takes some 15 ms on one core.

    Source: P. P. Ewald, Ann. Phys. 369, 253 (1921), doi:10.1002/andp.19213690304, as
    pymatgen's `EwaldSummation` computes it; a uniform dielectric with infinite constant
    surrounds the crystal.

    Args:
        model: none; there is one way.

    Raises:
        InputError: `model` is given.
    """

    SLOW = True

    def __init__(self, model: str = "") -> None:
        if model:
            raise InputError(f"`ewald` has no model {model!r}; name it alone, as ewald")
        self.name = "Ewald sum of formal charges"
        self.atom_width = 2
        self.crystal_width = 1

    def fingerprint(self) -> str:
        """Return a hash of pymatgen's release and of the numbers made with it."""
        from pymatgen.core import __version__

        text = f"ewald, pymatgen {__version__}, version {_VERSION}"
        return hashlib.sha256(text.encode()).hexdigest()

    def knows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Return which crystals have formal charges."""
        every = formulas_of(store.atom_offsets, store.atomic_numbers)
        asked = [every[row] for row in rows.tolist()]
        known = {formula: formal_charges(formula) is not None for formula in set(asked)}
        return np.array([known[formula] for formula in asked], dtype=bool)

    def prepare(self, store: Store, rows: np.ndarray) -> None:
        """Refuse crystals without formal charges.

        Raises:
            InputError: there are such crystals; the text counts and names them.
        """
        bad = rows[~self.knows(store, rows)]
        if len(bad):
            names = ", ".join(store.material_ids[row] for row in bad[:3])
            raise InputError(
                f"{len(bad):,} of {len(rows):,} crystals have no formal charges that "
                f"add up to zero ({names}{', ...' if len(bad) > 3 else ''}); leave "
                "them out of the store, or pretrain with the objective `teacher`, "
                "which asks only about the others"
            )

    def __call__(self, batch: CrystalBatch) -> Answer:
        """Answer for the structures of a batch; its edges are not used."""
        from pymatgen.analysis.ewald import EwaldSummation

        atoms, crystals = [], []
        ptr, every = batch.ptr.cpu().numpy(), batch.atomic_numbers.cpu().numpy()
        formulas = formulas_of(ptr, every)
        of_each = np.split(every, ptr[1:-1])
        for structure, numbers, formula in zip(
            structures_of(batch), of_each, formulas, strict=True
        ):
            known = formal_charges(formula)
            if known is None:
                raise RuntimeError("call `prepare` before asking")
            charges = np.array([known[z] for z in numbers.tolist()])  # (n,)
            probes = np.where(charges == 0, _PROBE, charges)
            structure.add_site_property("charge", probes.tolist())
            pairs = EwaldSummation(structure, acc_factor=_DIGITS).total_energy_matrix
            potentials = 2 * pairs.sum(axis=1) / probes
            energy = (charges * potentials).mean() / 2
            cut = np.clip(potentials, -_MOST, _MOST)
            atoms.append(np.column_stack((charges, cut)))
            crystals.append(np.copysign(np.sqrt(abs(energy)), energy))
        device = batch.rows.device
        return Answer(
            torch.from_numpy(np.concatenate(atoms)).float().to(device),  # (N, 2)
            torch.tensor(crystals, dtype=torch.float32, device=device)[:, None],
        )
