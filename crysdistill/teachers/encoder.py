"""An encoder of this package as a teacher."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import torch

from crysdistill.encoders import Encoder
from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.teachers.teacher import Answer, Teacher
from crysdistill.transfer.seen import Learned
from crysdistill.transfer.weights import load_encoder, read_header


class EncoderTeacher(Teacher):
    """A frozen encoder: eval mode, no gradients, fixed buffers.

    Differs from the published CrysGNN code, whose teacher stays in training mode. There
    its answers depend on the rest of the batch, and its running statistics drift
    towards the downstream data.

    Args:
        encoder: the encoder; it is copied, so a student may start from the same
            weights.
        graph: the graph that the encoder was trained on.
        learned: where its weights come from; None for random weights.
        name: the teacher's name in messages; by default the encoder's own.
    """

    graph: GraphSettings

    def __init__(
        self,
        encoder: Encoder,
        graph: GraphSettings,
        learned: Learned | None = None,
        name: str = "",
    ) -> None:
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.graph = graph
        self.learned = learned
        self.name = name or encoder.name
        self.atom_width = encoder.width
        self.crystal_width = encoder.crystal_width

    @torch.no_grad()
    def __call__(self, batch: CrystalBatch) -> Answer:
        """Return the embeddings of atoms and crystals."""
        if self.encoder.training:
            self.encoder.eval()
        found = self.encoder(batch)
        return Answer(found.atoms, found.crystals)

    def to(self, device: str | torch.device) -> EncoderTeacher:
        """Move to a device, in place."""
        self.encoder.to(device)
        return self

    def train(self, mode: bool = True) -> EncoderTeacher:
        """Do nothing: a teacher does not train."""
        return self

    def eval(self) -> EncoderTeacher:
        """Do nothing: a teacher is in eval mode."""
        return self

    def fingerprint(self) -> str:
        """Return a hash of weights, architecture and graph settings, 64 hex digits."""
        facts = [self.encoder.name, self.encoder.settings, self.graph.to_dict()]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def encoder_teacher(path: Path) -> EncoderTeacher:
    """Return the encoder of a weights file as a teacher; a predictor's file works too.

    Raises:
        InputError: the file cannot be used; the text says why.
    """
    header = read_header(path)
    return EncoderTeacher(load_encoder(path), header.graph, header, path.name)
