"""A teacher's answers by row of the store; training gathers its batches from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.transfer.distillation import Level

_ROOM = 0.2  # the share of a device's free memory that answers may take up
_AT_ONCE = 65_536  # vectors that are read in one go for statistics


class Block:
    """Vectors of some crystals: one each, or one for each of their atoms.

    Args:
        values: (all, F), mapped from a file or in memory, on any device.
        first: (R,) int64, where the vectors of each row of the store begin; -1 for a
            row without vectors.
        counts: (R,) int64, how many vectors each row has.
        order: (all,) int64, the place of the k-th vector in `values`; None if the
            atoms are in the store's order.
    """

    def __init__(
        self, values: Tensor, first: Tensor, counts: Tensor, order: Tensor | None = None
    ) -> None:
        self.values = values
        self.first = first
        self.counts = counts
        self.order = order

    @property
    def width(self) -> int:
        """F."""
        return self.values.shape[1]

    def gather(self, rows: Tensor, total: int | None) -> Tensor:
        """Return the vectors of some rows of the store, one after the other.

        Args:
            rows: (B,).
            total: the number of vectors, if known; it saves waiting for the GPU.
        """
        device = self.first.device
        rows = rows.to(device)
        inside = (rows >= 0) & (rows < len(self.first))
        known = torch.where(inside, rows, 0)
        first = self.first[known].where(inside, -1)  # (B,)
        # A GPU would have to finish its queue before it could answer.
        if device.type == "cpu" and (first < 0).any():
            missing = int(rows[first < 0][0])
            raise InputError(
                f"the teacher was not asked about row {missing} of the store; ask it "
                "about all rows that are trained on"
            )
        counts = self.counts[known]  # (B,)
        before = torch.cumsum(counts, 0) - counts
        places = torch.repeat_interleave(first - before, counts, output_size=total)
        places += torch.arange(len(places), device=device)  # (N,)
        if self.order is not None:
            places = self.order[places]
        return self.values.index_select(0, places).float()

    def size(self, rows: Tensor) -> int:
        """Return how many vectors some rows have."""
        return int(self.counts[rows].sum())

    def only(self, rows: Tensor) -> Block:
        """Return the vectors of only these rows, in memory, in the order of `rows`."""
        first, counts = torch.full_like(self.first, -1), self.counts[rows]
        first[rows] = torch.cumsum(counts, 0) - counts
        return Block(self.gather(rows, None), first, self.counts)

    def to(self, device: str | torch.device) -> Block:
        """Return the same block on another device."""
        return Block(
            self.values.to(device),
            self.first.to(device),
            self.counts.to(device),
            None if self.order is None else self.order.to(device),
        )


class TeacherAnswers:
    """A teacher's answers for the crystals of a store.

    Args:
        rows: (R,) rows of the store that the teacher was asked about now; files may
            hold more.
        atoms: its answers for atoms; None if it gives none.
        crystals: its answers for crystals; None if it gives none.
        weights: how much each number of a crystal counts in a student's loss, with
            mean 1 over `rows`; None if all count alike.
    """

    def __init__(
        self,
        rows: Tensor,
        atoms: Block | None,
        crystals: Block | None,
        weights: Block | None = None,
    ) -> None:
        self.rows = rows
        self.atoms = atoms
        self.crystals = crystals
        self.weights = weights

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def atom_width(self) -> int | None:
        """F, of the answers for atoms."""
        return self.atoms.width if self.atoms else None

    @property
    def crystal_width(self) -> int | None:
        """F', of the answers for crystals."""
        return self.crystals.width if self.crystals else None

    @property
    def nbytes(self) -> int:
        """The memory that the answers for `rows` take on a device."""
        every = (self.atoms, self.crystals, self.weights)
        blocks = [block for block in every if block]
        return sum(4 * block.width * block.size(self.rows) for block in blocks)

    def gather_atoms(self, rows: Tensor, atoms: int | None = None) -> Tensor:
        """Return the answers for the atoms of some crystals, (N, F) float32.

        Args:
            rows: (B,) rows of the store, as in `CrystalBatch.rows`.
            atoms: N, if known; it saves waiting for the GPU.

        Raises:
            InputError: the teacher does not answer for atoms, or was not asked about a
                crystal (seen on the CPU only).
        """
        return self._block("atoms").gather(rows, atoms)

    def gather_crystals(self, rows: Tensor) -> Tensor:
        """Return the answers for some crystals, (B, F') float32; see `gather_atoms`."""
        return self._block("crystals").gather(rows, len(rows))

    def gather_weights(self, rows: Tensor) -> Tensor | None:
        """Return how much the answers for some crystals count, (B, F')."""
        return self.weights.gather(rows, len(rows)) if self.weights else None

    def find_bad(self) -> int | None:
        """Return a row whose answer is not finite, or None if all are finite."""
        for block in (self.atoms, self.crystals):
            for rows, x in self._parts(block) if block else ():
                bad = ~torch.isfinite(x).all(dim=1)
                if block and bad.any():
                    owner = torch.repeat_interleave(rows, block.counts[rows])
                    return int(owner[bad][0])
        return None

    def statistics(self, level: Level) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each number over `rows`, (F,) float32 each.

        Args:
            level: `atoms`, over the atoms of all these crystals; or `crystals`.

        Raises:
            InputError: the teacher does not answer at that level.
        """
        block = self._block(level)
        shift, count = torch.zeros(block.width, dtype=torch.float64), 0
        first, second = torch.zeros_like(shift), torch.zeros_like(shift)
        for _, part in self._parts(block):
            x = part.cpu().double()  # (n, F)
            if not count and len(x):
                shift = x.mean(dim=0)  # sums of small numbers stay exact
            x -= shift
            first += x.sum(dim=0)
            second += x.square().sum(dim=0)
            count += len(x)
        mean = first / max(count, 1)
        variance = (second / max(count, 1) - mean.square()).clamp(min=0)  # (F,)
        mean += shift
        # Standardising would blow rounding errors of a constant up to variance 1.
        same = variance <= 1e-12 * mean.square()
        return mean.float(), variance.masked_fill(same, 0.0).float()

    def _parts(self, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `rows` and their vectors, in parts that fit into memory."""
        ends = torch.cumsum(block.counts[self.rows], 0)
        parts = torch.div(ends, _AT_ONCE, rounding_mode="floor")
        for part in torch.unique_consecutive(parts):
            rows = self.rows[parts == part]
            yield rows, block.gather(rows, None)

    def to(self, device: str | torch.device) -> TeacherAnswers:
        """Return the answers for `rows` only, on another device."""

        def moved(block: Block | None) -> Block | None:
            return block.only(self.rows).to(device) if block else None

        return TeacherAnswers(
            self.rows.to(device),
            moved(self.atoms),
            moved(self.crystals),
            moved(self.weights),
        )

    def near(self, device: torch.device) -> TeacherAnswers:
        """Return the answers on a device if they fit there, or else as they are."""
        if device.type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        return self.to(device) if self.nbytes < _ROOM * free else self

    def about(self, rows: np.ndarray) -> TeacherAnswers:
        """Return the answers for some of `rows`."""
        return TeacherAnswers(
            torch.from_numpy(rows), self.atoms, self.crystals, self.weights
        )

    def shuffled(self, seed: int) -> TeacherAnswers:
        """Return the answers for `rows`, each given to another of them.

        Atoms of a crystal get the answers for atoms of the other one, again from its
        first atom on where that has fewer.

        Args:
            seed: of the random cycle through all rows.
        """
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self)))
        owners = torch.empty_like(self.rows)
        owners[order] = self.rows[order.roll(1)]  # one cycle: no crystal keeps its own

        def dealt(block: Block | None) -> Block | None:
            if block is None:
                return None
            parts = []
            for row, owner in zip(self.rows, owners, strict=True):
                found = block.gather(owner[None], None)
                places = torch.arange(int(block.counts[row])) % max(1, len(found))
                parts.append(found[places])
            first, counts = torch.full_like(block.first, -1), block.counts
            own = counts[self.rows]
            first[self.rows] = torch.cumsum(own, 0) - own
            return Block(torch.cat(parts), first, counts)

        return TeacherAnswers(
            self.rows, dealt(self.atoms), dealt(self.crystals), dealt(self.weights)
        )

    def _block(self, level: Level) -> Block:
        block = self.atoms if level == "atoms" else self.crystals
        if block is None:
            raise InputError(f"the teacher does not answer for {level}")
        return block
