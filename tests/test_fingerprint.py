"""The fingerprint objective: known answers, plain loops, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crysdistill.errors import InputError
from crysdistill.graphs.batch import distances, make_batch
from crysdistill.objectives import Clean, Fingerprint, MaskedAtoms
from crysdistill.objectives.fingerprint import WEIGHTS, fingerprints
from crysdistill.structures.elements import cgcnn92
from tests.conftest import from_structure, random_crystal, structures
from tests.toy_batches import embedded


def made(width: int = 8, **settings) -> Fingerprint:
    torch.manual_seed(0)
    return Fingerprint(width, **settings)


def fingerprint(objective: Fingerprint, batch) -> torch.Tensor:
    return fingerprints(batch, objective.radii, objective.element_weights)


def test_equals_plain_loops():
    objective = made(radii=4, longest=4.0)
    batch = make_batch([random_crystal(0, 3), random_crystal(1, 2)])
    table = cgcnn92()
    # Blocks of the element vector: electronegativity, radius, valence, volume.
    blocks = ((26, 10), (36, 10), (46, 12), (82, 10))
    assert len(blocks) == len(WEIGHTS)
    expected = np.zeros((batch.num_nodes, 4, 5))
    for (j, i), d in zip(batch.edge_index.T.tolist(), distances(batch), strict=True):
        z = int(batch.atomic_numbers[j])
        weights = [1.0]
        for start, width in blocks:
            bins = table[z, start : start + width]
            weights.append(float(bins @ (np.arange(width) + 0.5) / width))
        for r, radius in enumerate((1.0, 2.0, 3.0, 4.0)):
            value = math.exp(-((float(d) - radius) ** 2))
            expected[i, r] += value * np.array(weights)
    np.testing.assert_allclose(
        fingerprint(objective, batch), expected.reshape(-1, 20), atol=1e-4
    )


def test_counts_the_neighbours_of_copper():
    objective = made(radii=2, longest=2.553)  # the second shell is at 3.61 Å
    batch = make_batch([from_structure("Cu", structures()["fcc-Cu"])])
    shell = fingerprint(objective, batch).view(-1, 2, 5)[:, 1, 0]
    torch.testing.assert_close(shell, torch.full((4,), 12.0), atol=1e-2, rtol=0)


def test_does_not_depend_on_the_cell():
    objective = made()
    structure = structures()["SrTiO3"]
    supercell = structure.copy()
    supercell.make_supercell([2, 1, 1])
    batch = make_batch([from_structure("a", s) for s in (structure, supercell)])
    rows = fingerprint(objective, batch)
    mean = [rows[batch.batch == b].mean(0) for b in (0, 1)]
    torch.testing.assert_close(mean[0], mean[1], atol=1e-4, rtol=1e-4)


def test_loss_and_number_of_known_predictions():
    objective = made(radii=3, mask_fraction=0.0)
    assert objective.views == (Clean(),)
    batch = make_batch([random_crystal(0), random_crystal(1)])
    wanted = fingerprint(objective, batch).sqrt()

    class Says(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, atoms):
            return self.answer

    seen = (embedded(batch, torch.zeros(len(wanted), 8), torch.zeros(2, 8)),)
    mean = wanted.mean(dim=0).expand_as(wanted)

    def share(answer):
        """The unexplained share of the variance, by plain loops."""
        parts = []
        for d in range(wanted.shape[1]):
            wrong = sum(
                float(a - b) ** 2
                for a, b in zip(answer[:, d], wanted[:, d], strict=True)
            )
            spread = sum(float(b - mean[0, d]) ** 2 for b in wanted[:, d])
            parts.append(wrong / (spread + 1e-3 * len(wanted)))
        return sum(parts) / len(parts)

    for answer, loss, r2 in (
        (wanted, 0.0, 1.0),
        (mean, share(mean), 0.0),
        (wanted + 0.5, share(wanted + 0.5), None),
    ):
        objective.decoder = Says(answer)
        assert objective(seen, batch, 0).item() == pytest.approx(
            loss, rel=1e-3, abs=1e-6
        )
        objective.reset()
        objective.update(seen, batch, 0)
        numbers = objective.compute()
        assert numbers["fingerprint_r2_chance"] == 0.0
        if r2 is not None:
            assert numbers["fingerprint_r2"] == pytest.approx(r2, abs=1e-3)


def test_hides_elements_by_default_but_asks_for_the_true_ones():
    objective = made()
    assert objective.views == (MaskedAtoms(0.15),)
    batch = make_batch([random_crystal(0), random_crystal(1)])
    view = objective.views[0](batch, 0)
    atoms = torch.randn(batch.num_nodes, 8)
    one, other = (
        objective((embedded(seen, atoms, torch.zeros(2, 8)),), batch, 0)
        for seen in (view, batch)
    )
    assert one == other


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"radii": 1}, "`radii` is 1 but must be at least 2"),
        ({"longest": 0.5}, r"`longest` is 0\.5 but must be more than 1 Å"),
        (
            {"mask_fraction": 2.0},
            r"`mask_fraction` is 2\.0 but must be between 0 and 1",
        ),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(InputError, match=text):
        Fingerprint(8, **settings)
