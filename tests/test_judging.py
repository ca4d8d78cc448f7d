"""What a guess that does not look at the crystal is worth, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from crysdistill.splits import Split
from crysdistill.training.judging import Subset, by_constant, spoken
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.scores import Scores
from crysdistill.transfer.targets import Normalizer, Target

GAP = Target("gap", "eV")
MODULUS = Target("modulus", "GPa", transform="log10")
METAL = Target("metal", task="classification")
KIND = Target("kind", task="classification")


@dataclass
class Labels:
    """Stands for a store with labels."""

    values: dict[str, list[float]]

    def property(self, name: str) -> np.ndarray:
        return np.array(self.values[name])


STORE = Labels({
    "gap": [0.0, 0.0, 3.0, np.nan, 1.0, 5.0],
    "modulus": [1.0, 10.0, 100.0, np.nan, 20.0, np.nan],
    "metal": [1.0, 1.0, 0.0, np.nan, 0.0, 1.0],
    "kind": [2.0, 0.0, 2.0, np.nan, 2.0, 1.0],
})  # fmt: skip
SPLIT = Split(np.arange(3), np.array([3]), np.array([4, 5]))


@pytest.mark.parametrize(
    ("target", "classes", "value"),
    [
        (GAP, 0, (1 + 5) / 2),  # the median of 0, 0 and 3 is 0
        (MODULUS, 0, 10.0),  # in the unit, not on the logarithm
        (METAL, 2, 0.5),
        (KIND, 3, 0.5),  # most are of class 2, and so is one of two
    ],
)
def test_the_best_guess(target, classes, value):
    labels = STORE.property(target.name)[:3]
    scale = Normalizer(classes=classes) if classes else Normalizer.fit(target, labels)
    outputs = Outputs([target], [scale])
    found = by_constant(outputs, STORE, SPLIT, Subset(STORE, SPLIT.test, [target.name]))
    assert found[target.name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("target", "classes", "test", "guess", "line"),
    [
        (GAP, 0, 0.1275, 0.108, "no better than always the median of the training "
         "labels: MAE 0.108 eV"),
        (GAP, 0, 0.1, 0.108, "for comparison, always the median of the training "
         "labels: MAE 0.108 eV"),
        (METAL, 2, 0.4, 0.5, "no better than always the same probability: AUC 0.5"),
        (KIND, 3, 0.7, 0.5, "for comparison, always the most common class: "
         "accuracy 0.5"),
    ],
)  # fmt: skip
def test_how_it_is_told(target, classes, test, guess, line):
    outputs = Outputs([target], [Normalizer(classes=classes)])
    numbers = {"val": test, "test": test, "constant": guess}
    found = {name: {target.name: value} for name, value in numbers.items()}
    first, second = spoken(outputs, Scores(outputs).kinds, found)
    assert first.endswith("on test")
    assert second == line
    del found["constant"]
    assert spoken(outputs, Scores(outputs).kinds, found) == [first]
