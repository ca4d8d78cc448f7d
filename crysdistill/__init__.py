"""Small-data property predictors from crystal encoders pretrained without labels.

The names in `__all__` are imported on first use, so that the command starts without
loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "corpus.build": ("build",),
    "graphs.batch": ("CrystalBatch", "make_batch"),
    "graphs.neighbors": ("GraphSettings",),
    "overlap": ("find_overlap",),
    "splits": ("SplitSettings",),
    "store.store": ("Store",),
    "structures.crystal": ("Crystal",),
    "teachers": ("make_teacher",),
    "training.distill": ("DistillConfig", "distill"),
    "training.finetune": ("FinetuneConfig", "finetune"),
    "training.fit": ("FitConfig", "fit"),
    "training.inference": ("embed", "predict"),
    "training.pretrain": ("PretrainConfig", "pretrain"),
    "training.settings": (
        "AugmentSettings",
        "FreezeSettings",
        "HeadSettings",
        "OptimizerSettings",
        "TrainerSettings",
    ),
    "training.train": ("TrainConfig", "train"),
    "transfer.targets": ("Target",),
    "transfer.weights": ("load_encoder", "load_predictor", "read_header"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    """Import a name in `__all__` from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted(__all__)
