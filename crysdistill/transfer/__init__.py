"""From a pretrained encoder to a property: targets, heads, freezing, distillation."""

from __future__ import annotations

from crysdistill.transfer.distillation import (
    DISTILLATION_LOSSES,
    Distillation,
    Teacher,
    atom_loss,
    fit_batch_norms,
    random_teacher,
)
from crysdistill.transfer.freezing import BatchNormPolicy, FrozenStages, freeze
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.published import import_cgcnn, published_provenance
from crysdistill.transfer.targets import TRANSFORMS, Normalizer, Target
from crysdistill.transfer.teacher_cache import (
    TeacherCache,
    cache_embeddings,
    load_or_cache,
)
from crysdistill.transfer.weights import (
    Provenance,
    WeightsHeader,
    load_encoder,
    load_predictor,
    load_teacher,
    read_header,
    save_weights,
)

__all__ = [
    "DISTILLATION_LOSSES",
    "TRANSFORMS",
    "BatchNormPolicy",
    "Distillation",
    "FrozenStages",
    "Normalizer",
    "Predictor",
    "PropertyHead",
    "Provenance",
    "Target",
    "Teacher",
    "TeacherCache",
    "WeightsHeader",
    "atom_loss",
    "cache_embeddings",
    "fit_batch_norms",
    "freeze",
    "import_cgcnn",
    "load_encoder",
    "load_or_cache",
    "load_predictor",
    "load_teacher",
    "published_provenance",
    "random_teacher",
    "read_header",
    "save_weights",
]
