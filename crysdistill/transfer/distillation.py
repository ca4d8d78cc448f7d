"""Knowledge of a frozen teacher as an extra loss for a student."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crysdistill.encoders import Encoder, make_encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, mean_over_atoms
from crysdistill.ranks import sum_over_ranks


class Teacher:
    """An encoder that only answers: eval mode, no gradients, buffers that stay.

    It is no `nn.Module`, so that a module which holds one neither trains it nor
    saves it among its own weights.

    Differs from the published CrysGNN code, whose teacher stays in training mode:
    there its answers depend on the rest of the batch and its running statistics
    drift to the downstream data.

    Args:
        encoder: copied, so that a student may start from the same weights.
        graph: the graph that the encoder was trained on, where known.
    """

    def __init__(self, encoder: Encoder, graph: GraphSettings | None = None) -> None:
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.graph = graph

    @property
    def width(self) -> int:
        """F, of the atom embeddings."""
        return self.encoder.width

    @torch.no_grad()
    def __call__(self, batch: CrystalBatch) -> Tensor:
        """Return atom embeddings, (N, F), without gradients."""
        if self.encoder.training:
            self.encoder.eval()
        return self.encoder(batch)

    def to(self, device: str | torch.device) -> Teacher:
        """Move to a device, in place."""
        self.encoder.to(device)
        return self

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing: a teacher does not train."""
        return self

    def eval(self) -> Teacher:
        """Do nothing: a teacher is in eval mode."""
        return self

    def fingerprint(self) -> str:
        """Return a hash of weights, architecture and graph settings, 64 hex digits."""
        graph = None if self.graph is None else self.graph.to_dict()
        facts = [self.encoder.name, self.encoder.settings, graph]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def random_teacher(
    settings: Mapping[str, Any],
    seed: int,
    name: str = "cgcnn",
    graph: GraphSettings | None = None,
    batches: Iterable[CrystalBatch] = (),
) -> Teacher:
    """Return a teacher that knows nothing: the control of every distillation.

    What a student gains from it is regularisation, not knowledge.

    Args:
        settings: those of the encoder that it stands in for.
        seed: of its weights; the caller's random state is not touched.
        name: the encoder's name.
        graph: the graph it will see.
        batches: crystals to fit the statistics of its batch norms to. Without them
            the activations grow from layer to layer, all atoms look alike, and the
            control is weaker than it should be.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make_encoder(name, **settings)
    fit_batch_norms(encoder, batches)
    return Teacher(encoder, graph)


@torch.no_grad()
def fit_batch_norms(encoder: Encoder, batches: Iterable[CrystalBatch]) -> None:
    """Set the running statistics of batch norms to their averages over `batches`.

    Nothing changes if there are no batches. The encoder is left in eval mode.
    """
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    encoder.train()
    for number, batch in enumerate(batches):
        if number == 0:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over all batches
        encoder(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()


def atom_loss(
    student_atoms: Tensor, teacher_atoms: Tensor, batch: CrystalBatch
) -> Tensor:
    """Return the distance of directions, atom by atom.

    Embeddings are brought to length one; the squared difference is averaged over the
    atoms and the width of a crystal, then over crystals. For an atom it is
    2 (1 - cos) / F, cos being the cosine between student and teacher.

    Source: K. Das et al., CrysGNN, AAAI 37, 7323 (2023),
    doi:10.1609/aaai.v37i6.25892, and the code published with it.

    Args:
        student_atoms: (N, F), projected where the widths differ.
        teacher_atoms: (N, F).
        batch: says which atoms make a crystal.

    Returns:
        A scalar; with several ranks this rank's share of it.
    """
    student = F.normalize(student_atoms.float(), dim=1)  # (N, F)
    teacher = F.normalize(teacher_atoms.float(), dim=1)  # (N, F)
    per_atom = (student - teacher).square().mean(dim=1, keepdim=True)  # (N, 1)
    crystals = sum_over_ranks(torch.full_like(batch.ptr[0], batch.num_graphs))
    return mean_over_atoms(per_atom, batch).sum() / crystals


DISTILLATION_LOSSES: dict[str, Callable[[Tensor, Tensor, CrystalBatch], Tensor]] = {
    "atoms": atom_loss
}
"""Distillation losses by the name that configurations use."""


class Distillation(nn.Module):
    """The embedding loss of a student, its weight, and a projector where one is needed.

    The projector, Linear from the student's width to the teacher's, is trained with
    the student and is no part of it.

    Args:
        student_width: F of the student.
        teacher_width: F of the teacher.
        alpha: the share of the embedding loss: 0 ignores the teacher, 1 the labels.
        loss: one of `DISTILLATION_LOSSES`.
        projector: whether to project even where the widths are equal.

    Raises:
        InputError: `alpha` is out of range or `loss` unknown.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        alpha: float = 0.5,
        loss: str = "atoms",
        projector: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise InputError(f"`alpha` is {alpha} but must be in [0, 1]")
        if loss not in DISTILLATION_LOSSES:
            raise InputError(
                f"unknown distillation loss {loss!r}; choose one of "
                f"{', '.join(DISTILLATION_LOSSES)}"
                f"{did_you_mean(loss, DISTILLATION_LOSSES)}"
            )
        self.alpha = alpha
        self._loss = DISTILLATION_LOSSES[loss]
        self.projector: nn.Module = (
            nn.Linear(student_width, teacher_width)
            if projector or student_width != teacher_width
            else nn.Identity()
        )

    def forward(
        self, student_atoms: Tensor, teacher_atoms: Tensor, batch: CrystalBatch
    ) -> Tensor:
        """Return the embedding loss, a scalar.

        Args:
            student_atoms: (N, student width).
            teacher_atoms: (N, teacher width), of the same atoms in the same order.
            batch: the student's batch.

        Raises:
            InputError: the teacher answered for other atoms.
        """
        projected = self.projector(student_atoms)  # (N, F)
        if projected.shape != teacher_atoms.shape:
            raise InputError(
                f"teacher embeddings are {tuple(teacher_atoms.shape)} but this batch "
                f"needs {tuple(projected.shape)}; they belong to other crystals or to "
                "another teacher"
            )
        return self._loss(projected, teacher_atoms, batch)

    def total(self, property_loss: Tensor, embedding_loss: Tensor) -> Tensor:
        """Return (1 - alpha) * property loss + alpha * embedding loss."""
        return (1 - self.alpha) * property_loss + self.alpha * embedding_loss
