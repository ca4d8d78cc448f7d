"""Checkpoints of the published CGCNN code as predictors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crysdistill.encoders import CGCNN
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.transfer.heads import CLASSIFIER_DROPOUT, PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.tensors import fill
from crysdistill.transfer.weights import Provenance

PUBLISHED_GRAPH = GraphSettings(cutoff=8.0, max_neighbors=12, mode="cgcnn")
"""The graph that the published code reads."""

PUBLISHED_TARGETS = {
    "formation_energy_per_atom": Target("formation_energy_per_atom", "eV/atom"),
    "final_energy_per_atom": Target("final_energy_per_atom", "eV/atom"),
    "band_gap": Target("band_gap", "eV"),
    "efermi": Target("efermi", "eV"),
    # Their labels are logarithms, and so are their predictions.
    "bulk_moduli": Target("bulk_modulus_log10", "log10(GPa)"),
    "shear_moduli": Target("shear_modulus_log10", "log10(GPa)"),
    "poisson_ratio": Target("poisson_ratio"),
    "metal_semi": Target("is_metal", task="classification"),
}
"""Targets of the eight published models by the name in their `data_options`."""

_NAMES = (
    (r"embedding\.", "encoder.embedding."),
    (r"convs\.(\d+)\.fc_full\.", r"encoder.convolutions.\1.{part}.linear."),
    (r"convs\.(\d+)\.bn1\.", r"encoder.convolutions.\1.{part}_norm."),
    (r"convs\.(\d+)\.bn2\.", r"encoder.convolutions.\1.atom_norm."),
    (r"conv_to_fc\.", "head.first."),
    (r"fcs\.(\d+)\.", r"head.middle.\1."),
    (r"fc_out\.", "head.last."),
)


def import_cgcnn(path: str | Path) -> Predictor:
    """Read a checkpoint of the published CGCNN code, without executing its pickle.

    The eight checkpoints published with the code are recognised by the label that they
    were trained on, and get its unit. Other checkpoints are named after their file.

    Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
    doi:10.1103/PhysRevLett.120.145301, and the code published with it.

    Args:
        path: a `.pth.tar` file with the entries `state_dict`, `normalizer`, `args`.

    Returns:
        A predictor in eval mode that reads the published graph, `PUBLISHED_GRAPH`.

    Raises:
        InputError: the file does not exist, is no checkpoint, or is a checkpoint of
            another model.
    """
    path = Path(path)
    checkpoint = _load(path)
    try:
        args = dict(checkpoint["args"])
        state = dict(checkpoint["state_dict"])
        encoder = CGCNN(
            width=int(args["atom_fea_len"]), convolutions=int(args["n_conv"])
        )
        task = _task(args)
        classes = 2 if task == "classification" else 0
        head = PropertyHead(
            encoder.width,
            int(args["h_fea_len"]),
            int(args["n_h"]),
            outputs=classes or 1,
            dropout=CLASSIFIER_DROPOUT if classes else 0.0,
        )
        normalizer = Normalizer(
            mean=float(checkpoint["normalizer"]["mean"]),
            std=float(checkpoint["normalizer"]["std"]),
            classes=classes,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a checkpoint of the published CGCNN code: its `args`, "
            f"`state_dict` or `normalizer` is missing or incomplete ({error})"
        ) from None
    outputs = Outputs([_target(path, args, task)], [normalizer])
    predictor = Predictor(encoder, head, outputs, PUBLISHED_GRAPH)
    tensors = _rename(path, state)
    own = predictor.state_dict()
    # The checkpoint lacks the element table. Before PyTorch 0.4.1 it also lacks the
    # number of batches that batch norms have seen; they do not use it.
    for name, tensor in own.items():
        if name.endswith(("element_table", "num_batches_tracked")):
            tensors.setdefault(name, tensor)
    fill(predictor, tensors, str(path))
    return predictor.eval()


def published_provenance(path: str | Path, predictor: Predictor) -> Provenance:
    """Return the provenance of an imported checkpoint, for a weights file.

    The checkpoint does not list its training crystals, so the overlap with other data
    is unknown. The eight published models have the licence of their code; users choose
    the licence of their own models.

    Args:
        path: the checkpoint.
        predictor: the predictor that `import_cgcnn` returned.
    """
    published = predictor.target in PUBLISHED_TARGETS.values()
    return Provenance(
        licence="MIT" if published else "",
        origin=f"imported from {Path(path).name}"
        + (" of the published CGCNN code" if published else ""),
    )


def _load(path: Path) -> dict[str, Any]:
    """Load a checkpoint of tensors, plain values and numpy scalars; nothing else."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the checkpoint in it")
    # One of the eight holds its best score as a numpy scalar, and refers to the
    # function that restores it by the name it had in numpy 1.
    restore = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        (restore, "numpy.core.multiarray.scalar"),
        (restore, "numpy._core.multiarray.scalar"),
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
    ]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            # Other pickle protocols: either they load, or the file is refused below.
            warnings.simplefilter("ignore", UserWarning)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can raise almost any exception.
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise InputError(
                f"{path} holds a Python object ({foreign[1]}), which is not loaded "
                "because loading may execute code; save tensors and plain values only"
            ) from None
        raise InputError(
            f"{path} is not a readable PyTorch checkpoint; it may be cut short"
        ) from None
    if not isinstance(checkpoint, dict):
        raise InputError(
            f"{path} is not a checkpoint of the published CGCNN code: it holds a "
            f"{type(checkpoint).__name__}"
        )
    return checkpoint


def _task(args: dict[str, Any]) -> Literal["regression", "classification"]:
    """Return the task; refuse tasks that the published code does not have."""
    task = args["task"]
    if task == "classification":
        return "classification"
    if task == "regression":
        return "regression"
    raise InputError(f"`task` is {task!r} but must be regression or classification")


def _target(
    path: Path, args: dict[str, Any], task: Literal["regression", "classification"]
) -> Target:
    """Return the target of a known label, or one named after the file."""
    options = args.get("data_options") or [""]
    known = PUBLISHED_TARGETS.get(str(options[-1]))
    if known is not None and known.task == task:
        return known
    return Target(path.name.split(".")[0], task=task)


def _rename(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the published code to the names of this package.

    The published code has one tensor for gate and core, the gate's half first; it is
    split into two.
    """
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES:
            if re.match(pattern, name):
                ours = re.sub(f"^{pattern}", replacement, name)
                break
        else:
            raise InputError(
                f"{path} is not a checkpoint of the published CGCNN code: it has no "
                f"place for `{name}`"
            )
        if "{part}" not in ours:
            renamed[ours] = tensor
        elif tensor.ndim == 0:  # the number of batches seen
            renamed |= {ours.format(part=part): tensor for part in ("gate", "core")}
        else:
            halves = zip(("gate", "core"), tensor.chunk(2), strict=True)
            renamed |= {ours.format(part=part): half for part, half in halves}
    return renamed
