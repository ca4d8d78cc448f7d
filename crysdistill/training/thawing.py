"""Gradual unfreezing: an encoder starts to learn block by block, from the top down."""

from __future__ import annotations

from torch import nn

from crysdistill.errors import InputError
from crysdistill.transfer.freezing import FrozenBlocks
from crysdistill.transfer.predictor import Predictor


class Thawing(FrozenBlocks):
    """Blocks that do not learn yet, and blocks that never learn.

    All gradients are computed, because parallel processes agree at the start on the
    gradients that they add up. Those of blocks that do not learn yet are then left out
    of the step.

    Source: J. Howard and S. Ruder, ACL 2018, doi:10.18653/v1/P18-1031.

    Args:
        frozen: the blocks that never learn, with the batch-norm policy of all blocks.
        waiting: the other blocks, in the order in which they start to learn.
        epochs: epochs before the first block learns, and from each block to the next.
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
        """Release all blocks that learn in an epoch.

        Call `Predictor.train` afterwards, to take released blocks out of eval mode.
        """
        self._still = self.waiting[epoch // self.epochs :]
        self.blocks = [*self.always.blocks, *self._still]

    def hold(self) -> None:
        """Delete the gradients of blocks that do not learn yet, before a step."""
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
    """Let a predictor start with its encoder frozen.

    Args:
        predictor: changed in place; blocks that are frozen in it stay frozen.
        every: epochs from one block to the next.
        epochs: the number of epochs of the run.

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
