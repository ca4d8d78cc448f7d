"""Assigns the output columns of a head to its targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.ranks import sum_over_ranks, world_size
from crysdistill.transfer.targets import Normalizer, Target


class Outputs:
    """Targets side by side in the output of one head.

    A regression target takes one column of the output, a classification target one for
    each class.

    Args:
        targets: the targets in the order of the columns.
        normalizers: one for each target, fitted on the training crystals.

    Raises:
        InputError: there is no target, a name occurs twice, or a normalizer belongs to
            another task.
    """

    def __init__(
        self, targets: Sequence[Target], normalizers: Sequence[Normalizer]
    ) -> None:
        check_names(targets)
        for target, normalizer in zip(targets, normalizers, strict=True):
            if (target.task == "classification") != bool(normalizer.classes):
                raise InputError(
                    f"`{target.name}` is a target of {target.task} but its normalizer "
                    f"counts {normalizer.classes} classes"
                )
        self.targets = tuple(targets)
        self.normalizers = tuple(normalizers)
        self.sizes = [normalizer.outputs for normalizer in normalizers]

    @property
    def names(self) -> list[str]:
        """The names of the targets."""
        return [target.name for target in self.targets]

    @property
    def size(self) -> int:
        """O, the number of columns of the head."""
        return sum(self.sizes)

    def losses(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each target.

        It is the mean squared error of the transformed and normalised target, or the
        mean negative log-likelihood, over the known labels of all ranks.

        Args:
            output: (B, O), of the head.
            labels: (B, T) in the targets' units, NaN where not known. Labels that
                `Target.check` refuses make the loss NaN or infinite.

        Returns:
            (T,), this rank's share of each loss, 0 without known labels; and (T,), the
            number of known labels on all ranks.
        """
        known = ~torch.isnan(labels)  # (B, T)
        counts = sum_over_ranks(known.sum(dim=0))  # (T,)
        total = [
            (self._errors(t, part, labels[:, t], known[:, t]) * known[:, t]).sum()
            for t, part in enumerate(self._parts(output))
        ]
        return torch.stack(total) / counts.clamp(min=1), counts

    def _errors(self, t: int, part: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """Return the error of each crystal for target `t`, (B,)."""
        target, normalizer = self.targets[t], self.normalizers[t]
        if target.task == "classification":
            classes = labels.nan_to_num().long()  # (B,)
            return F.cross_entropy(part, classes, reduction="none")
        wanted = normalizer.normalize(target.forward(labels))  # (B,)
        # An unknown label adds no error; NaN times 0 would still be NaN.
        return (part[:, 0] - torch.where(known, wanted, part[:, 0])).square()

    def predictions(self, output: Tensor) -> Tensor:
        """Return one number for each target, (B, T).

        It is a value in the target's unit, the probability of class 1 of two classes,
        or the most likely of more classes.
        """
        return torch.stack(
            [self._prediction(t, part) for t, part in enumerate(self._parts(output))],
            dim=1,
        )

    def _prediction(self, t: int, part: Tensor) -> Tensor:
        target, classes = self.targets[t], self.normalizers[t].classes
        if not classes:
            values = self.normalizers[t].denormalize(part[:, 0])
            return target.inverse(values)
        if classes == 2:
            return part.softmax(dim=1)[:, 1]
        return part.argmax(dim=1).to(part.dtype)

    def columns(self, output: Tensor) -> dict[str, Tensor]:
        """Return the columns of a table of predictions, (B,) for each name.

        With more than two classes, the probabilities of all classes follow the most
        likely one as `NAME_0`, `NAME_1`, ...
        """
        found: dict[str, Tensor] = {}
        for t, part in enumerate(self._parts(output)):
            name, classes = self.targets[t].name, self.normalizers[t].classes
            found[name] = self._prediction(t, part)
            if classes > 2:
                shares = part.softmax(dim=1)
                found |= {f"{name}_{c}": shares[:, c] for c in range(classes)}
        return found

    def _parts(self, output: Tensor) -> tuple[Tensor, ...]:
        return output.float().split(self.sizes, dim=1)


def check_names(targets: Sequence[Target]) -> None:
    """Refuse a list of targets that is empty or names one twice.

    Raises:
        InputError: see above.
    """
    if not targets:
        raise InputError("there is no target; name one as `target.name=...`")
    names = [target.name for target in targets]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"`targets` names `{twice[0]}` twice; leave one out")


class Balance(nn.Module):
    """Combines the losses of several targets into one.

    If any target has a weight, the losses are summed with their weights, 1 for targets
    without one. Otherwise each loss has a learned variance sigma^2: a regression adds
    L / (2 sigma^2) + ln sigma, a classification L / sigma^2 + ln sigma. A target
    without known labels in a batch adds nothing. The loss of a single target is kept.

    Source: A. Kendall, Y. Gal and R. Cipolla, CVPR 2018, arXiv:1705.07115, Eqs. 7 and
    10.

    Args:
        targets: the targets of the losses.
    """

    halves: Tensor

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__()
        given = [target.weight for target in targets]
        self.fixed: list[float] | None = None
        if len(targets) == 1 or any(weight is not None for weight in given):
            self.fixed = [1.0 if weight is None else weight for weight in given]
            return
        self.log_variances = nn.Parameter(torch.zeros(len(targets)))  # ln sigma^2
        halves = [1.0 if t.task == "classification" else 0.5 for t in targets]
        self.register_buffer("halves", torch.tensor(halves), persistent=False)

    def forward(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Return this rank's share of the total loss.

        Args:
            losses: (T,), this rank's shares, as `Outputs.losses` returns them.
            counts: (T,), the number of known labels on all ranks.
        """
        if self.fixed is not None:
            return (losses * losses.new_tensor(self.fixed)).sum()
        weighted = self.halves * torch.exp(-self.log_variances) * losses  # (T,)
        known = (counts > 0).to(losses.dtype)
        # The second term is divided equally among the ranks.
        return (weighted + 0.5 * self.log_variances * known / world_size()).sum()
