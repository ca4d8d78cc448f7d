"""A predictor that averages several others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.predictor import Predictor, answered


class Stack(nn.Module):
    """The weighted mean of its members' outputs.

    The mean is taken on the scale of learning: of transformed targets, and of logits.

    Args:
        members: predictors of the same targets, fitted on the same labels.
        shares: the weight of each member, scaled to sum to 1; None means equal shares.

    Raises:
        InputError: there is no member, or they differ in targets, scale or graph.
    """

    shares: Tensor

    def __init__(
        self,
        members: Sequence[Predictor | FrozenPredictor],
        shares: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise InputError("a stack has no members; give at least one predictor")
        first = members[0]
        for other in members[1:]:
            for name, own, its in (
                ("targets", first.outputs.targets, other.outputs.targets),
                ("scales", first.outputs.normalizers, other.outputs.normalizers),
                ("graphs", first.graph, other.graph),
            ):
                if own != its:
                    raise InputError(
                        f"the members of a stack have different {name}; train all on "
                        "the same labels of the same dataset"
                    )
        equal = [1 / len(members)] * len(members)
        given = torch.tensor(equal if shares is None else list(shares))
        if len(given) != len(members) or (given < 0).any() or given.sum() <= 0:
            raise InputError(
                f"`shares` are {list(shares or ())} but must be {len(members)} numbers "
                "that are not negative and not all zero"
            )
        self.members = nn.ModuleList(members)
        self.register_buffer("shares", given / given.sum())
        self.outputs = first.outputs
        self.graph = first.graph

    def predictors(self) -> list[Predictor | FrozenPredictor]:
        """Return its members, typed as predictors."""
        found = list(self.members)
        return [one for one in found if isinstance(one, Predictor | FrozenPredictor)]

    def forward(self, batch: CrystalBatch) -> Tensor:
        """Return the mean of the members' outputs, (B, O)."""
        return torch.stack(
            [
                share * member(batch)
                for share, member in zip(self.shares, self.members, strict=True)
            ]
        ).sum(dim=0)

    def answer(self, batch: CrystalBatch) -> Tensor:
        """Return the raw output (B, O) with all members in eval mode."""
        return answered(self, batch)


def weighted(
    parts: Sequence[tuple[Predictor | FrozenPredictor | Stack, float]],
) -> Stack:
    """Return the weighted mean of predictors, of which some are means themselves.

    Args:
        parts: predictors and their shares.
    """
    members: list[Predictor | FrozenPredictor] = []
    shares: list[float] = []
    for part, share in parts:
        if isinstance(part, Stack):
            members += part.predictors()
            shares += (share * part.shares).tolist()
        else:
            members.append(part)
            shares.append(share)
    return Stack(members, shares)
