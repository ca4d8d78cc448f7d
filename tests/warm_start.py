"""Imports for the server of `forks`, so that its forks need not load them.

No step of training runs here: a process that has computed gradients must not fork.
"""

import tempfile
from pathlib import Path

import pytest  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import crysdistill.cli
import crysdistill.overlap
import crysdistill.training.distill
import crysdistill.training.finetune
import crysdistill.training.inference
import crysdistill.training.pretrain
import crysdistill.training.train  # noqa: F401
from crysdistill.store.store import Store
from tests.toy_stores import labelled, write_store


def _load_compiled_functions() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder) / "s.h5", labelled(4), symmetry="fast")
        Store.open(path).batch([0, 2])


_load_compiled_functions()
