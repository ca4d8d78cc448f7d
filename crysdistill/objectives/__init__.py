"""Objectives: one way of pretraining per file, from embeddings to a loss."""

from __future__ import annotations

import inspect
from typing import Any

from crysdistill.encoders.encoder import Encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.objectives.bank import Bank
from crysdistill.objectives.barlow import Barlow
from crysdistill.objectives.connectivity import Connectivity
from crysdistill.objectives.crystal_system import CrystalSystem
from crysdistill.objectives.denoising import Denoising
from crysdistill.objectives.fingerprint import Fingerprint
from crysdistill.objectives.infomax import Infomax
from crysdistill.objectives.joint_embedding import JointEmbedding
from crysdistill.objectives.node_features import NodeFeatures
from crysdistill.objectives.objective import Embedded, Objective
from crysdistill.objectives.properties import Properties
from crysdistill.objectives.simsiam import SimSiam
from crysdistill.objectives.space_group import SpaceGroup
from crysdistill.objectives.surrogate import Surrogate
from crysdistill.objectives.teacher import FromTeachers
from crysdistill.objectives.vicreg import VICReg
from crysdistill.objectives.views import (
    Chain,
    Clean,
    DroppedEdges,
    MaskedAtoms,
    MovedAtoms,
    Rebuilt,
    Strained,
    Supercell,
    View,
)

OBJECTIVES: dict[str, type[Objective]] = {
    "node_features": NodeFeatures,
    "connectivity": Connectivity,
    "space_group": SpaceGroup,
    "crystal_system": CrystalSystem,
    "fingerprint": Fingerprint,
    "bank": Bank,
    "denoising": Denoising,
    "barlow": Barlow,
    "vicreg": VICReg,
    "simsiam": SimSiam,
    "infomax": Infomax,
    "joint_embedding": JointEmbedding,
    "surrogate": Surrogate,
    "properties": Properties,
    "teacher": FromTeachers,
}
"""Objectives by the name that configurations and weights files use."""

CRYSGNN = ("node_features", "connectivity", "space_group", "crystal_system")
"""The objectives of CrysGNN."""

__all__ = [
    "CRYSGNN",
    "OBJECTIVES",
    "Bank",
    "Barlow",
    "Chain",
    "Clean",
    "Connectivity",
    "CrystalSystem",
    "Denoising",
    "DroppedEdges",
    "Embedded",
    "Fingerprint",
    "FromTeachers",
    "Infomax",
    "JointEmbedding",
    "MaskedAtoms",
    "MovedAtoms",
    "NodeFeatures",
    "Objective",
    "Properties",
    "Rebuilt",
    "SimSiam",
    "SpaceGroup",
    "Strained",
    "Supercell",
    "Surrogate",
    "VICReg",
    "View",
    "make_objective",
]


def make_objective(
    name: str, encoder: Encoder, *, published: bool = False, **settings: Any
) -> Objective:
    """Return a new objective with random weights.

    Args:
        name: one of `OBJECTIVES`.
        encoder: gives the widths and the elements; the objective sees its embeddings.
        published: whether to start from CrysGNN's settings instead of ours.
        settings: replace single settings of that start.

    Raises:
        InputError: the name or a setting is unknown, or a value is out of range.
    """
    if name not in OBJECTIVES:
        raise InputError(
            f"unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}"
            f"{did_you_mean(name, OBJECTIVES)}"
        )
    kind = OBJECTIVES[name]
    named = inspect.signature(kind).parameters
    widths = {"encoder_width": encoder.width, "crystal_width": encoder.crystal_width}
    known = [key for key in named if key not in widths]
    for key in settings:
        if key not in known:
            raise InputError(
                f"unknown key `objectives.{name}.{key}`; choose one of "
                f"{', '.join(known)}{did_you_mean(key, known)}"
            )
    given: dict[str, Any] = {k: width for k, width in widths.items() if k in named}
    if "elements" in named and encoder.elements is not None:
        given["elements"] = encoder.elements
    if published:
        given |= kind.PUBLISHED
    return kind(**(given | settings))
