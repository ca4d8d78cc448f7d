"""Targets of a predictor: a property, its unit, and its scale of learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crysdistill.errors import InputError, did_you_mean

TASKS = ("regression", "classification")

MOST_CLASSES = 1000
"""A class number of this or more is refused as a mistake."""


@dataclass(frozen=True, slots=True)
class Transform:
    """A function that transforms a property for learning, and its inverse.

    Args:
        forward: from the unit to the scale of learning.
        inverse: from the scale of learning to the unit.
        accepts: returns for which values `forward` is defined.
        needs: these values in words, for messages.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    accepts: Callable[[np.ndarray], np.ndarray]
    needs: str


def _same(values: Tensor) -> Tensor:
    return values


def _power_of_ten(values: Tensor) -> Tensor:
    return torch.pow(10.0, values)


def _is_positive(values: np.ndarray) -> np.ndarray:
    return values > 0


TRANSFORMS: dict[str, Transform] = {
    "none": Transform(_same, _same, np.isfinite, "finite values"),
    "log10": Transform(torch.log10, _power_of_ten, _is_positive, "positive values"),
}
"""Transforms by the name that configurations and weights files use."""


@dataclass(frozen=True)
class Target:
    """One property to be learned.

    Args:
        name: the column of the labels, and of the predictions.
        unit: of labels and predictions; "" for a plain number.
        task: `regression` or `classification`. Classes are 0, 1, ..., up to the highest
            one of the training crystals.
        transform: one of `TRANSFORMS`; use `log10` for elastic moduli.
        weight: of this target's loss beside those of other targets; None lets training
            balance them.

    Raises:
        InputError: `task` or `transform` is unknown, a classification target has a
            transform, or `weight` is not positive.
    """

    name: str
    unit: str = ""
    task: Literal["regression", "classification"] = "regression"
    transform: Literal["none", "log10"] = "none"
    weight: float | None = None

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, str, Sequence[str]], ...] = (
            ("task", self.task, TASKS),
            ("transform", self.transform, tuple(TRANSFORMS)),
        )
        for name, value, known in choices:
            if value not in known:
                raise InputError(
                    f"`{name}` is {value!r} but must be one of {', '.join(known)}"
                    f"{did_you_mean(str(value), known)}"
                )
        if self.weight is not None and not self.weight > 0:
            raise InputError(f"`weight` is {self.weight} but must be positive")
        if self.task == "classification" and self.transform != "none":
            raise InputError(
                f"`transform` is {self.transform!r} but `{self.name}` is a class; "
                "use `none`"
            )

    def check(
        self, labels: np.ndarray, material_ids: Sequence[str] | None = None
    ) -> None:
        """Refuse labels that cannot be learned; unknown ones (NaN) are accepted.

        `forward` does not check its values, because a training step would have to wait
        for the GPU. Call this once on all labels.

        Args:
            labels: (B,) in the target's unit.
            material_ids: their names for messages; None uses their numbers.

        Raises:
            InputError: a label is infinite, outside the transform's domain, or not a
                class; the text names the material.
        """
        labels = np.asarray(labels, dtype=np.float64)
        if self.task == "classification":
            good = (labels >= 0) & (labels < MOST_CLASSES) & (labels % 1 == 0)
            need = f"but a class must be a whole number from 0 to {MOST_CLASSES - 1}"
        else:
            transform = TRANSFORMS[self.transform]
            good = np.isfinite(labels) & transform.accepts(labels)
            need = f"but `{self.transform}` needs {transform.needs}"
        bad = np.flatnonzero(~good & ~np.isnan(labels))
        if not len(bad):
            return
        first = int(bad[0])
        if np.isinf(labels[first]):
            need = "but a label must be finite"
        which = f"label {first}" if material_ids is None else material_ids[first]
        more = f" (and {len(bad) - 1} more such labels)" if len(bad) > 1 else ""
        raise InputError(f"{which}: {self.name} is {labels[first]} {need}{more}")

    def forward(self, values: Tensor) -> Tensor:
        """Convert values from the unit to the scale of learning; any shape."""
        return TRANSFORMS[self.transform].forward(values)

    def inverse(self, values: Tensor) -> Tensor:
        """Convert values from the scale of learning to the unit; any shape."""
        return TRANSFORMS[self.transform].inverse(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Normalizer:
    """The scale of a target, from its training labels.

    After the transform, values are shifted and scaled to mean 0 and standard deviation
    1. Classes are only counted.

    Args:
        mean: the number that is subtracted.
        std: the number by which values are divided.
        classes: the number of classes; 0 for a regression target.

    Raises:
        InputError: `std` is not positive, a number is not finite, or there is only one
            class.
    """

    mean: float = 0.0
    std: float = 1.0
    classes: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise InputError(f"`mean` is {self.mean} but must be finite")
        if not (math.isfinite(self.std) and self.std > 0):
            raise InputError(f"`std` is {self.std} but must be positive")
        if self.classes < 0 or self.classes == 1:
            raise InputError(
                f"`classes` is {self.classes} but must be 0, or at least 2"
            )

    @property
    def outputs(self) -> int:
        """The number of columns that this target takes in a head's output."""
        return self.classes or 1

    @classmethod
    def fit(
        cls,
        target: Target,
        labels: np.ndarray,
        material_ids: Sequence[str] | None = None,
    ) -> Normalizer:
        """Fit the labels of the training crystals only.

        Classes are counted, not normalised.

        Args:
            target: gives the transform.
            labels: (B,) in the target's unit; NaN is left out.
            material_ids: their names, for messages.

        Raises:
            InputError: `Target.check` refuses a label; there are fewer than two labels
                or all are equal, so there is no scale; or a class below the highest one
                has no label.
        """
        target.check(labels, material_ids)
        known = np.asarray(labels, dtype=np.float64)
        known = known[~np.isnan(known)]
        if not len(known):
            raise InputError(
                f"`{target.name}` has no label among the training crystals"
            )
        if target.task == "classification":
            counts = np.bincount(known.astype(np.int64))
            if not counts.all():
                raise InputError(
                    f"`{target.name}` has class {len(counts) - 1} but no training "
                    f"crystal of class {int(counts.argmin())}; number the classes "
                    "without gaps, or give more labels"
                )
            return cls(classes=max(2, len(counts)))
        values = target.forward(torch.from_numpy(known)).numpy()
        if len(values) == 1:
            raise InputError(
                f"`{target.name}` has 1 label among the training crystals; "
                "give at least two different ones"
            )
        if values.min() == values.max():
            raise InputError(
                f"`{target.name}` is {known[0]} for all {len(known)} training "
                "crystals; give at least two different labels"
            )
        return cls(mean=float(values.mean()), std=float(values.std(ddof=1)))

    def normalize(self, values: Tensor) -> Tensor:
        """Return (values - mean) / std."""
        return (values - self.mean) / self.std

    def denormalize(self, values: Tensor) -> Tensor:
        """Return values * std + mean."""
        return values * self.std + self.mean

    def to_dict(self) -> dict[str, float]:
        """Return the arguments as plain values, for JSON."""
        return asdict(self)
