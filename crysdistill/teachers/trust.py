"""How much each answer of an ensemble counts: less where its members disagree."""

from __future__ import annotations

import torch
from torch import Tensor

from crysdistill.teachers.answers import Block, TeacherAnswers


def trust(spread: Tensor) -> Tensor:
    """Return a weight for each answer, (n, F), with mean 1 in each column.

    The weight is that of a target with Gaussian noise, the inverse of its variance. The
    variance is taken as s^2 + m, with the spread s of the members for this crystal and
    the mean m of s^2 over all crystals:

        w = 1 / (1 + s^2 / m), divided by its mean.

    The floor m stands for the error that the members share, which no spread shows. It
    is also needed because the spread of a few members is itself uncertain: without a
    floor, crystals on which three members agree by chance would rule the loss. With it
    no answer weighs more than twice as much as one with the usual spread.

    Source: the spread of an ensemble as uncertainty, B. Lakshminarayanan et al.,
    NeurIPS 2017, arXiv:1612.01474; squared errors over the variance, A. Kendall and
    Y. Gal, NeurIPS 2017, arXiv:1703.04977, Eq. 5.

    Differs from the papers: the variance is known and not learned, and has a floor.

    Args:
        spread: (n, F) standard deviations between members. A column of zeros gives
            equal weights.
    """
    square = spread.double().square()
    usual = square.mean(dim=0)  # (F,)
    usual = torch.where(usual > 0, usual, torch.ones_like(usual))
    weight = 1 / (1 + square / usual)
    return (weight / weight.mean(dim=0)).float()


def weighed(answers: TeacherAnswers) -> TeacherAnswers:
    """Return answers with a weight for each number, from answers with spreads.

    Args:
        answers: for crystals, (F' numbers, and then the spread of each).
    """
    both = answers.crystals
    if both is None:
        raise RuntimeError("a teacher with spreads must answer for crystals")
    width = both.width // 2
    spread = both.gather(answers.rows, len(answers))[:, width:]
    weights = torch.zeros(len(both.first), width)
    weights[answers.rows] = trust(spread)
    return TeacherAnswers(
        answers.rows,
        answers.atoms,
        Block(both.values[:, :width], both.first, both.counts),
        Block(weights, both.first, both.counts),
    )
