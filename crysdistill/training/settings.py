"""The settings of runs: the dataclasses behind `configs/` and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from crysdistill.encoders import ENCODERS
from crysdistill.errors import InputError
from crysdistill.schema import Choice
from crysdistill.splits import SplitSettings

__all__ = [
    "AcrossSettings",
    "AugmentSettings",
    "EncoderChoice",
    "FreezeSettings",
    "HeadSettings",
    "OptimizerSettings",
    "SplitSettings",
    "TrainerSettings",
]


@dataclass
class PublishedSettings:
    """The settings that all encoders share.

    Args:
        published: start from the settings of the published code instead of the defaults
            here.
    """

    published: bool = False


def _published(name: str, shared: PublishedSettings) -> Mapping[str, Any]:
    """Return the published settings of an encoder if `published` is set."""
    return ENCODERS[name].PUBLISHED if shared.published else {}


EncoderChoice = Annotated[
    dict[str, Any],
    Choice(ENCODERS, shared=PublishedSettings, defaults=_published),
]
"""The type of a key that names an encoder and holds its settings."""


def _positive(settings: object, *names: str) -> None:
    """Refuse values that are not positive."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"`{name}` is {value} but must be positive")


@dataclass
class OptimizerSettings:
    """The optimizer and its schedule.

    Args:
        name: the optimizer.
        lr: learning rate; the highest one of the schedule.
        weight_decay: of all parameters.
        momentum: of `sgd`.
        schedule: `constant`; `cosine` to zero; `onecycle` (rise over the first tenth,
            then cosine; L. N. Smith and N. Topin, 2019, doi:10.1117/12.2520589); or
            `milestones`.
        milestones: epochs after which `milestones` divides the rate by ten.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 0.003
    weight_decay: float = 0.0001
    momentum: float = 0.9
    schedule: Literal["constant", "cosine", "onecycle", "milestones"] = "onecycle"
    milestones: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _positive(self, "lr")


@dataclass
class TrainerSettings:
    """How long to train, on which devices, and when to stop.

    Args:
        epochs: passes over the training crystals.
        batch_size: crystals in a batch of all devices together.
        edge_budget: the most edges in a batch of all devices together; it replaces
            `batch_size` for crystals of very different sizes.
        accumulate: batches whose gradients are added up for each step.
        patience: stop after this many epochs without a better validation number.
        clip: largest norm of the gradient; None does not clip.
        accelerator: `cpu`, `gpu`, or `auto`.
        devices: GPUs, or CPU processes, of each node; None takes as many as `torchrun`
            or `srun` started, or one.
        num_nodes: machines; None takes as many as `torchrun` or `srun` use, or one.
        precision: as Lightning names it: `32-true`, `bf16-mixed`, ...
        compile: compile the encoder with torch.compile; worthwhile on GPUs.
        deterministic: choose GPU algorithms that repeat bit for bit.
        threads: CPU threads of each process; None leaves torch's choice.
        average: the weights that are validated and kept: `none` for those of the step;
            `ema`, their exponential moving average; or `swa`, their mean over the last
            steps. With an average, batch norms see the training crystals once more
            before each validation.
        average_span: a share of the run's steps: `swa` averages over that last share,
            and the memory of `ema` falls to 1 / e within it.
        progress: whether to show a progress bar.
        ceilings: whether to compare the run's speed with the machine's limits at the
            end.
        checkpoint_minutes: time between checkpoints within an epoch; None writes them
            only at its end.
        checkpoint_every: also write a checkpoint each time after this many steps, and
            after every epoch, however short.
        keep_checkpoints: how many of the last checkpoints to keep.
    """

    epochs: int = 100
    batch_size: int = 64
    edge_budget: int | None = None
    accumulate: int = 1
    patience: int | None = None
    clip: float | None = 10.0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | None = None
    num_nodes: int | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    compile: bool = False
    deterministic: bool = False
    threads: int | None = None
    average: Literal["none", "ema", "swa"] = "none"
    average_span: float = 0.1
    progress: bool = True
    ceilings: bool = False
    checkpoint_minutes: float | None = 10.0
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _positive(
            self,
            "epochs",
            "batch_size",
            "edge_budget",
            "accumulate",
            "patience",
            "clip",
            "devices",
            "num_nodes",
            "threads",
            "checkpoint_minutes",
            "checkpoint_every",
            "keep_checkpoints",
            "average_span",
        )
        if self.average_span > 1:
            raise InputError(
                f"`average_span` is {self.average_span} but must be at most 1"
            )


@dataclass
class HeadSettings:
    """The head that turns a crystal embedding into properties.

    None takes the value that the encoder was published with, or else that of CGCNN.

    Args:
        hidden: width of its hidden layers.
        layers: the number of hidden layers; 0 for a single Linear.
        activation: the function after each hidden layer.
        first: whether the activation also comes before the first layer.
        dropout: the share of values dropped after the first hidden layer; None means
            0.5 if all targets are classes, or else 0.
        start: `ridge` fits the last layer to the training labels before training
            (ridge regression, or logistic for classes; A. Kumar et al., 2022,
            arXiv:2202.10054); `random` does not. None means `ridge` with
            `interpolate`, or else `random`.
    """

    hidden: int | None = None
    layers: int | None = None
    activation: Literal["softplus", "shifted_softplus", "relu", "silu"] | None = None
    first: bool | None = None
    dropout: float | None = None
    start: Literal["ridge", "random"] | None = None

    def __post_init__(self) -> None:
        _positive(self, "hidden")

    def given(self) -> dict[str, Any]:
        """Return the settings of the layers that are not None."""
        given = {key: value for key, value in asdict(self).items() if key != "start"}
        return {key: value for key, value in given.items() if value is not None}


@dataclass
class AugmentSettings:
    """How training crystals are changed in each step; their labels stay the same.

    Args:
        moved: Å, the standard deviation of random steps of the atoms; None moves none.
        strain: the largest component of a random strain; None strains nothing.
    """

    moved: float | None = None
    strain: float | None = None

    def __post_init__(self) -> None:
        for name, most, unit in (("moved", 1.0, " Å"), ("strain", 0.3, "")):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise InputError(
                    f"`augment.{name}` is {value} but must be above 0 and at most "
                    f"{most:g}{unit}"
                )


@dataclass
class FreezeSettings:
    """Which part of a pretrained encoder keeps its weights.

    Args:
        convolutions: freeze the embedding and this many convolutions (`all` for the
            whole encoder); None freezes nothing.
        batch_norm: whether the statistics of frozen batch norms stay (`frozen`) or
            follow the new data (`adaptive`).
        thaw: start with the whole encoder frozen, and release one more block each time
            after this many epochs, from the top down to those that stay frozen; None
            lets all learn from the start (J. Howard and S. Ruder, ACL 2018,
            doi:10.18653/v1/P18-1031).
    """

    convolutions: int | Literal["all"] | None = None
    batch_norm: Literal["frozen", "adaptive"] = "frozen"
    thaw: int | None = None

    def __post_init__(self) -> None:
        if self.thaw is not None and self.thaw < 1:
            raise InputError(f"`freeze.thaw` is {self.thaw} but must be at least 1")
        if self.thaw is not None and self.convolutions == "all":
            raise InputError(
                "`freeze.thaw` has nothing to thaw where `freeze.convolutions` is "
                "`all`; leave one of them out"
            )


@dataclass
class AcrossSettings:
    """A test set in another store, such as experiments after training on DFT.

    Args:
        dataset: the store to test on, with the same graph; None tests on crystals of
            the split.
        properties: the property there for each target, in their order and in the same
            units; empty if the names are the same.
        keep_shared: also test on crystals that the training or validation set holds too
            (same id or structure), and say so in the results; they are left out
            otherwise.
    """

    dataset: Path | None = None
    properties: tuple[str, ...] = ()
    keep_shared: bool = False

    def __post_init__(self) -> None:
        if self.dataset is not None:
            return
        for name in ("properties", "keep_shared"):
            if getattr(self, name):
                raise InputError(
                    f"`test.{name}` needs `test.dataset`, the store to test on"
                )
