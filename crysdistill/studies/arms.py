"""The arms of a comparison: the methods under test, and their controls."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from crysdistill.encoders import find_encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.labelled import LabelledConfig
from crysdistill.training.settings import FreezeSettings
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.weights import read_header


@dataclass(frozen=True)
class Arm:
    """One way of making a predictor.

    Args:
        name: the name in tables.
        about: a description in one line.
        run: trains with the shared configuration and the pretrained weights.
    """

    name: str
    about: str
    run: Callable[[TrainConfig, Path], Path]


def _shared(
    config: TrainConfig, kind: type[LabelledConfig] = TrainConfig
) -> dict[str, Any]:
    """Return the fields that another kind of run shares; nested ones stay objects."""
    return {field.name: getattr(config, field.name) for field in fields(kind)}


def _scratch(config: TrainConfig, weights: Path) -> Path:
    return train(config)


def _scratch_large(config: TrainConfig, weights: Path) -> Path:
    encoder = read_header(weights).encoder
    kind = find_encoder(encoder["name"])
    # As `finetune` does by default.
    settings = kind.for_properties(encoder["settings"])
    return train(replace(config, encoder={"name": kind.name, **settings}))


def _distilled(config: TrainConfig, weights: Path) -> Path:
    return distill(DistillConfig(**_shared(config), teacher=str(weights)))


def _random_teacher(config: TrainConfig, weights: Path) -> Path:
    encoder = read_header(weights).encoder
    settings = {"name": encoder["name"], **encoder["settings"]}
    shared = _shared(config)
    return distill(DistillConfig(**shared, teacher="random", teacher_encoder=settings))


def _finetuned(config: TrainConfig, weights: Path) -> Path:
    return finetune(FinetuneConfig(**_shared(config, LabelledConfig), weights=weights))


def _frozen(convolutions: int | str) -> Callable[[TrainConfig, Path], Path]:
    def run(config: TrainConfig, weights: Path) -> Path:
        freeze = FreezeSettings(convolutions=convolutions)  # type: ignore[arg-type]
        shared = _shared(config, LabelledConfig)
        return finetune(FinetuneConfig(**shared, weights=weights, freeze=freeze))

    return run


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("scratch", "trained on the labels alone", _scratch),
        Arm(
            "scratch-large",
            "trained on the labels alone, with the architecture of `finetuned`",
            _scratch_large,
        ),
        Arm("distilled", "learns from a pretrained teacher as well", _distilled),
        Arm(
            "random-teacher",
            "learns from a teacher with random weights as well (control)",
            _random_teacher,
        ),
        Arm("finetuned", "starts from the pretrained weights", _finetuned),
    )
}
"""Arms by name; there are also `frozen-0`, `frozen-1`, ... and `frozen-all`."""


def make_arm(name: str) -> Arm:
    """Return an arm by its name.

    Raises:
        InputError: there is no such arm.
    """
    if name in ARMS:
        return ARMS[name]
    match = re.fullmatch(r"frozen-(\d+|all)", name)
    if match is None:
        raise InputError(
            f"unknown arm {name!r}; choose of {', '.join(ARMS)}, frozen-0, frozen-1, "
            f"..., frozen-all{did_you_mean(name, ARMS)}"
        )
    count = match[1]
    about = (
        "starts from the pretrained weights; the whole encoder stays as it is"
        if count == "all"
        else f"starts from the pretrained weights; embedding and {count} convolutions "
        "stay"
    )
    return Arm(name, about, _frozen(count if count == "all" else int(count)))
