"""The arms of a study: the methods under test, and their controls."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from crysdistill.encoders import find_encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.studies.kinds import Settings, check_key, takes
from crysdistill.training.settings import TrainerSettings
from crysdistill.transfer.weights import load_encoder, read_header

LONGER = 3
"""How many times as long the control `scratch-longer` trains."""

MEMBERS = 5
"""The networks of an ensemble."""

_WORDS = ("like", "repeats")  # keys of an arm of the user that no run has


def _nothing(shared: Settings) -> Settings:
    return {}


@dataclass(frozen=True)
class Arm:
    """One way of making a predictor.

    Args:
        name: the name in tables.
        about: a description in one line.
        kind: the kind of its run; see `KINDS`.
        settings: keys that it sets itself, whatever the study shares.
        adapt: returns further such keys, from the shared settings.
        pretrained: whether the `weights` matter to it: the `weights` themselves, or
            only the `architecture` in their file.
        control: whether it is a control.
        beside: the names of features of arms (see `features`) beside which a study
            adds it by default; empty for no default.
        repeats: networks whose mean predicts.
    """

    name: str
    about: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[Settings], Settings] = _nothing
    pretrained: Literal["", "weights", "architecture"] = ""
    control: bool = False
    beside: tuple[str, ...] = ()
    repeats: int = 1

    def own(self, shared: Settings) -> Settings:
        """Return the keys that it sets itself.

        Args:
            shared: the settings of all arms, with `weights` if there are any.

        Raises:
            InputError: it needs weights, and there are none.
        """
        if self.pretrained and not shared.get("weights"):
            raise InputError(
                f"`weights` is missing, and the arm `{self.name}` needs it; give "
                "`weights=...`"
            )
        return {**self.adapt(shared), **self.settings}

    def taught_by_others(self) -> Arm:
        """Return the arm without the weights of the study, if these are its teacher."""
        if self.adapt is not _teacher:
            return self
        return replace(self, adapt=_nothing, pretrained="")

    @property
    def features(self) -> set[str]:
        """What it does, to which some controls answer."""
        found = {"any"}
        found |= {"ensemble"} if self.repeats > 1 else set()
        if self.pretrained == "weights" and not self.control:
            found |= {"pretrained", self.kind}
        return found

    @property
    def role(self) -> str:
        """What it is to the `weights` as a teacher.

        A `student` learns from them; a `teacher` is what they make of the task
        themselves; "" is neither.
        """
        if self.pretrained != "weights" or self.repeats > 1:
            return ""
        if "weights" in self.settings:  # others than those of the study
            return ""
        if self.kind == "distill":
            return "" if self.control else "student"
        return "teacher" if self.kind in ("finetune", "readout") else ""


# ------------------------------------------------------------- what arms make of keys


def _architecture(shared: Settings) -> Settings:
    """Return the encoder that `finetune` makes of the weights."""
    encoder = read_header(shared["weights"]).encoder
    kind = find_encoder(encoder["name"])
    return {"encoder": {"name": kind.name, **kind.for_properties(encoder["settings"])}}


def _longer(shared: Settings) -> Settings:
    epochs = int(shared.get("trainer.epochs", TrainerSettings().epochs))
    return {"trainer.epochs": LONGER * epochs}


def _teacher(shared: Settings) -> Settings:
    return {"teacher": str(shared["weights"])}


def _random_teacher(shared: Settings) -> Settings:
    encoder = read_header(shared["weights"]).encoder
    settings = {"name": encoder["name"], **encoder["settings"]}
    return {"teacher": "random", "teacher_encoder": settings}


def _weights(shared: Settings) -> Settings:
    return {"weights": str(shared["weights"])}


def _thaw(shared: Settings) -> Settings:
    """Release a block in equal steps; the last one learns for as long as the others."""
    blocks = len(list(load_encoder(shared["weights"]).blocks()))
    epochs = int(shared.get("trainer.epochs", TrainerSettings().epochs))
    return {"freeze.thaw": max(1, (epochs - 1) // (blocks + 1))}


# What `gradual` and `layerwise` do in place of frozen layers.
_THAWED = {"freeze.convolutions": None, "freeze.batch_norm": "frozen"}


def _readout(readout: str, features: str = "onehot") -> dict[str, str]:
    return {"readout": readout, "features": features}


_ALL: tuple[Arm, ...] = (
    Arm("scratch", "trained on the labels alone", "train", control=True,
        beside=("pretrained",)),
    Arm("distilled", "learns from a pretrained teacher as well", "distill",
        adapt=_teacher, pretrained="weights"),
    Arm("finetuned", "starts from the pretrained weights", "finetune",
        pretrained="weights"),
    Arm("gradual", "starts from the pretrained weights, which are released block by "
        "block from the top", "finetune", _THAWED, adapt=_thaw, pretrained="weights"),
    Arm("layerwise", "starts from the pretrained weights; each block learns at 0.7 of "
        "the rate above", "finetune", {"layer_decay": 0.7, **_THAWED},
        pretrained="weights"),
    Arm("stack", "the best of networks, readouts and their means in validation", "fit",
        adapt=lambda shared: {"weights": [str(shared["weights"])]},
        pretrained="weights"),
    Arm("finetuned-ensemble", f"the mean of {MEMBERS} networks like `finetuned`",
        "finetune", pretrained="weights", repeats=MEMBERS),
    # ------------------------------------------------------------------- controls
    Arm("scratch-longer", f"like scratch, with {LONGER} times the epochs", "train",
        adapt=_longer, control=True, beside=("pretrained",)),
    Arm("scratch-larger", "like scratch, with the architecture of `finetuned`", "train",
        adapt=_architecture, pretrained="architecture", control=True,
        beside=("finetune",)),
    Arm("scratch-ensemble", f"the mean of {MEMBERS} networks like `scratch`", "train",
        control=True, beside=("ensemble",), repeats=MEMBERS),
    Arm("stack-scratch", "like stack, without pretrained weights", "fit",
        {"weights": []}, control=True, beside=("fit",)),
    Arm("random-teacher", "learns from a teacher with random weights as well",
        "distill", adapt=_random_teacher, pretrained="architecture", control=True,
        beside=("distill",)),
    Arm("shuffled-teacher", "learns the pretrained teacher's answers for other crystals"
        " as well", "distill", {"shuffled": True}, adapt=_teacher,
        pretrained="weights", control=True, beside=("distill",)),
    Arm("random-encoder-ridge", "ridge on frozen embeddings with random weights",
        "readout", _readout("ridge", "encoder"), adapt=_architecture,
        pretrained="architecture", control=True, beside=("pretrained",)),
    Arm("pretrained-ridge", "ridge on frozen pretrained embeddings", "readout",
        _readout("ridge", "encoder"), adapt=_weights, pretrained="weights",
        control=True, beside=("pretrained",)),
    Arm("fingerprint-ridge", "ridge on a fingerprint of the structure", "readout",
        _readout("ridge", "structure"), control=True, beside=("any",)),
    Arm("forest", "a random forest on Magpie-like statistics of the composition",
        "readout", _readout("forest", "magpie"), control=True, beside=("any",)),
    Arm("forest-onehot", "a random forest on the fractions of the elements", "readout",
        _readout("forest"), control=True, beside=("any",)),
    Arm("boosted", "boosted trees on Magpie-like statistics of the composition",
        "readout", _readout("boosted", "magpie"), control=True, beside=("any",)),
    Arm("boosted-onehot", "boosted trees on the fractions of the elements", "readout",
        _readout("boosted"), control=True, beside=("any",)),
    Arm("mean", "predicts the mean of the training labels", "readout",
        _readout("mean"), control=True, beside=("any",)),
    Arm("median", "predicts the median of the training labels", "readout",
        _readout("median"), control=True, beside=("any",)),
)  # fmt: skip

ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}
"""Arms by name; there are also `frozen-0`, `frozen-1`, ... and `frozen-all`."""


def make_arm(name: str, changes: Mapping[str, Any] | None = None) -> Arm:
    """Return an arm by its name, or one that a study describes.

    Args:
        name: its name.
        changes: the keys that it sets, and `like`, the arm that it changes, and
            `repeats`; None for an arm of ours.

    Raises:
        InputError: there is no such arm, or no such key.
    """
    if changes is None:
        return _ours(name)
    if "like" not in changes:
        raise InputError(
            f"the arm `{name}` must say which arm it changes, as in "
            f"`{name}: {{like: finetuned, encoder_lr: 0.1}}`"
        )
    base = _ours(str(changes["like"]))
    given = {key: value for key, value in changes.items() if key not in _WORDS}
    for key in given:
        check_key(key, f"axes.arm.{name}")
        if not takes(base.kind, key):
            raise InputError(
                f"`axes.arm.{name}.{key}` does not apply to the arm `{base.name}`; "
                "leave it out"
            )
    repeats = _repeats(changes.get("repeats", base.repeats), name)
    said = [f"{key}={value}" for key, value in given.items()]
    said += [f"repeats={repeats}"] if repeats != base.repeats else []
    about = f"{base.about}; {', '.join(said)}" if said else base.about
    if "teacher" in given:
        base = base.taught_by_others()
    return replace(
        base, name=name, about=about, settings={**base.settings, **given},
        repeats=repeats, control=False, beside=(),
    )  # fmt: skip


def _repeats(given: Any, name: str) -> int:
    try:
        repeats = int(given)
    except (TypeError, ValueError):
        repeats = 0
    if repeats < 1:
        raise InputError(
            f"`axes.arm.{name}.repeats` is {given} but must be a number of networks"
        )
    return repeats


def _ours(name: str) -> Arm:
    if name in ARMS:
        return ARMS[name]
    match = re.fullmatch(r"frozen-(\d+|all)", name)
    if match is None:
        raise InputError(
            f"unknown arm {name!r}; choose one of {', '.join(ARMS)}, frozen-0, "
            f"frozen-1, ..., frozen-all{did_you_mean(name, ARMS)}"
        )
    count = match[1]
    about = (
        "starts from the pretrained weights; the whole encoder is frozen"
        if count == "all"
        else f"starts from the pretrained weights; embedding and {count} convolutions "
        "are frozen"
    )
    settings = {"freeze.convolutions": count if count == "all" else int(count)}
    return Arm(name, about, "finetune", settings, pretrained="weights")


def controls_of(arms: Sequence[Arm], wanted: bool | Collection[str]) -> list[Arm]:
    """Return the controls to add to the arms of a study.

    Args:
        arms: its arms.
        wanted: true for all that answer to one of the arms; false for none; or names.

    Raises:
        InputError: there is no such control.
    """
    names = {arm.name for arm in arms}
    if isinstance(wanted, bool):
        done = set[str]().union(*(arm.features for arm in arms)) if wanted else set()
        found: Iterable[Arm] = (arm for arm in _ALL if done & set(arm.beside))
    else:
        found = [_ours(name) for name in wanted]
        for arm in found:
            if not arm.control:
                known = [one.name for one in _ALL if one.control]
                raise InputError(
                    f"`controls` names {arm.name}, which is not a control; choose one "
                    f"of {', '.join(known)}, or put it into `axes.arm`"
                )
    return [arm for arm in found if arm.name not in names]
