"""What training crystals look like in a step: a little otherwise each time."""

from __future__ import annotations

from crysdistill.objectives.views import Chain, MovedAtoms, Strained, View
from crysdistill.training.settings import AugmentSettings


def augmentation(settings: AugmentSettings) -> View | None:
    """Return the view of training crystals; None where they stay as they are.

    Neighbours stay who they are. How far atoms move is drawn for each crystal.
    """
    views: list[View] = []
    if settings.strain is not None:
        views.append(Strained(settings.strain, name="augment"))
    if settings.moved is not None:
        views.append(MovedAtoms(settings.moved, drawn=True, name="augment"))
    return Chain(views) if views else None
