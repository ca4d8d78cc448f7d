"""A checkpoint of the published CGCNN code as a teacher."""

from __future__ import annotations

from pathlib import Path

from crysdistill.teachers.encoder import EncoderTeacher
from crysdistill.teachers.teacher import Foreign
from crysdistill.transfer.published import import_cgcnn, published_provenance


def published_teacher(path: Path) -> EncoderTeacher:
    """Return the encoder of a published checkpoint, on the graph that it learned on.

    Raises:
        InputError: the file is no such checkpoint; the text says why.
    """
    predictor = import_cgcnn(path)
    learned = Foreign(published_provenance(path, predictor))
    return EncoderTeacher(predictor.encoder, predictor.graph, learned, path.name)
