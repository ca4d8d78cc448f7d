"""How sure a predictor is: a standard deviation beside each prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from crysdistill.graphs.batch import CrystalBatch
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.readouts import GaussianProcess
from crysdistill.transfer.stack import Stack

if TYPE_CHECKING:
    from crysdistill.transfer.weights import AnyPredictor

LEAST = 3
"""The fewest networks whose spread says anything."""

COVERED = 0.6827
"""The share of a normal distribution within one standard deviation."""

_FEWEST = 10  # crystals to which a factor is fitted


class Answers(Protocol):
    """Predicts batches."""

    outputs: Outputs

    def answer(self, batch: CrystalBatch) -> Tensor:
        """Return the raw output (B, O)."""


class Watched:
    """A predictor that keeps how sure it is of what it answers.

    A stack of `LEAST` or more networks gives the spread of their answers. A Gaussian
    process has a standard deviation of its own, which includes the noise of the labels.
    All other predictors give none, and classes have none. In a mean of unlike
    predictors the spread says more about their kinds than about doubt.

    Args:
        predictor: answers in the end.
    """

    def __init__(self, predictor: AnyPredictor) -> None:
        self.outputs = predictor.outputs
        self._predictor = predictor
        self._found: list[Tensor] = []

    def answer(self, batch: CrystalBatch) -> Tensor:
        """Return the raw output (B, O) of the predictor."""
        predictor, outputs = self._predictor, self.outputs
        if isinstance(predictor, Stack) and _are_networks(predictor):
            members = torch.stack([m.answer(batch) for m in predictor.predictors()])
            shares = predictor.shares[:, None, None]
            answers = [outputs.predictions(member) for member in members]
            self._keep(disagreement(torch.stack(answers), predictor.shares))
            return (shares * members).sum(dim=0)
        if isinstance(predictor, FrozenPredictor):
            output, deviation = _with_deviation(predictor, batch)
            high, low = (outputs.predictions(output + s * deviation) for s in (1, -1))
            self._keep((high - low).abs() / 2)
            return output
        return predictor.answer(batch)

    def _keep(self, sd: Tensor) -> None:
        sd[:, [bool(one.classes) for one in self.outputs.normalizers]] = torch.nan
        self._found.append(sd.cpu())

    def sd(self) -> Tensor | None:
        """Return the standard deviations of all answers, (B, T) in the targets' units.

        They are NaN for classes; None if it does not know any.
        """
        found = torch.cat(self._found) if self._found else None
        return None if found is None or found.isnan().all() else found


def _are_networks(stack: Stack) -> bool:
    """Return whether a stack has enough members, and all are networks."""
    members = stack.predictors()
    alike = not any(isinstance(member, FrozenPredictor) for member in members)
    return alike and len(members) >= LEAST


def disagreement(answers: Tensor, shares: Tensor) -> Tensor:
    """Return the standard deviation between members, (B, T).

    Args:
        answers: (M, B, T), of each member.
        shares: (M,), the weight of each, with the sum 1.
    """
    weight = shares[:, None, None]
    middle = (weight * answers).sum(dim=0)
    variance = (weight * (answers - middle).square()).sum(dim=0)
    return (variance / (1 - shares.square().sum())).sqrt()


def fit_factor(sd: Tensor, errors: Tensor) -> float | None:
    """Return by what to multiply deviations so that they cover their share of errors.

    Args:
        sd: (B,) standard deviations.
        errors: (B,) of crystals that were not trained on; NaN where not known.

    Returns:
        The factor with which one deviation covers `COVERED` of the errors; None for
        fewer than ten crystals.
    """
    known = ~(sd.isnan() | errors.isnan()) & (sd > 0)
    if int(known.sum()) < _FEWEST:
        return None
    return float((errors[known].abs() / sd[known]).double().quantile(COVERED))


@torch.no_grad()
def _with_deviation(
    predictor: FrozenPredictor, batch: CrystalBatch
) -> tuple[Tensor, Tensor]:
    """Return output and deviations, (B, O) each on the scale of learning."""
    x = predictor.scaled(batch)
    outputs, deviations = [], []
    for readout in predictor.readouts:
        output = readout(x)
        outputs.append(output)
        if isinstance(readout, GaussianProcess):
            deviations.append(readout.deviation(x))
        else:
            deviations.append(torch.zeros_like(output))
    return torch.cat(outputs, dim=1), torch.cat(deviations, dim=1)
