"""Augmentation: small random changes of the training crystals in each step."""

from __future__ import annotations

from crysdistill.objectives.views import Chain, MovedAtoms, Strained, View
from crysdistill.training.settings import AugmentSettings


def augmentation(settings: AugmentSettings) -> View | None:
    """Return the view that changes training crystals; None without augmentation.

    Neighbour lists do not change. The size of the steps is drawn for each crystal.
    """
    views: list[View] = []
    if settings.strain is not None:
        views.append(Strained(settings.strain, name="augment"))
    if settings.moved is not None:
        views.append(MovedAtoms(settings.moved, drawn=True, name="augment"))
    return Chain(views) if views else None
