"""Gradual unfreezing: block by block an encoder begins to learn, from the top down."""

from __future__ import annotations

from torch import nn

from crysdistill.errors import InputError
from crysdistill.transfer.freezing import FrozenBlocks
from crysdistill.transfer.predictor import Predictor


class Thawing(FrozenBlocks):
    """Blocks that do not learn yet, beside those that never do.

    All gradients are computed, since processes that train together agree at the start
    on which they add up; those of blocks that wait are then left out of the step.

    Source: J. Howard and S. Ruder, ACL 2018, doi:10.18653/v1/P18-1031.

    Args:
        frozen: what never learns, with the policy for batch norms of both.
        waiting: the others, in the order in which they begin to learn.
        epochs: from one to the next; the first waits as long.
    """

    def __init__(
        self, frozen: FrozenBlocks, waiting: list[nn.Module], epochs: int
    ) -> None:
        super().__init__([], frozen.convolutions, frozen.batch_norm)
        self.always = frozen
        self.waiting = waiting
        self.epochs = epochs
        self.go_to(0)

    def go_to(self, epoch: int) -> None:
        """Let the blocks learn whose turn has come in an epoch.

        `Predictor.train` must follow, for those that are no longer in eval mode.
        """
        self._still = self.waiting[epoch // self.epochs :]
        self.blocks = [*self.always.blocks, *self._still]

    def hold(self) -> None:
        """Forget the gradients of blocks that wait, before a step uses them."""
        for block in self._still:
            for parameter in block.parameters():
                parameter.grad = None

    def release(self) -> None:
        """Make all blocks trainable."""
        self.always.release()
        self.waiting = []
        self.go_to(0)
        self.convolutions = None


def thaw(predictor: Predictor, every: int, epochs: int) -> Thawing:
    """Let a predictor begin with its encoder frozen.

    Args:
        predictor: changed in place; what is frozen in it stays so.
        every: epochs from one block to the next.
        epochs: of the run.

    Raises:
        InputError: the run ends before the last block learns.
    """
    frozen = predictor.frozen
    never = {id(block) for block in frozen.blocks}
    order = [
        b for b in reversed(list(predictor.encoder.blocks())) if id(b) not in never
    ]
    if every * len(order) >= epochs:
        raise InputError(
            f"`freeze.thaw` is {every} but the last of {len(order)} blocks would begin "
            f"to learn after {every * len(order)} of {epochs} epochs; set it to "
            f"{max(1, (epochs - 1) // len(order))}, or enlarge `trainer.epochs`"
        )
    predictor.frozen = thawing = Thawing(frozen, order, every)
    predictor.train(predictor.training)
    return thawing
