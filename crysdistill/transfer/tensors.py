"""Reads safetensors files, explains unusable ones, and loads tensors into modules."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crysdistill import __version__
from crysdistill.errors import InputError
from crysdistill.transfer.shipped import located, shipped


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; report precisely what is wrong with it.

    The library reports most problems as the same error. The layout is eight bytes with
    the length of the JSON header, the header, and the tensors at its offsets.
    """
    path = located(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the weights file in it")
    if not path.exists():
        known = ", ".join(shipped())
        hint = f"; the weights of the package are {known}" if known else ""
        raise InputError(f"{path}: no such file{hint if path.parent == Path() else ''}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        opening = file.read(1)
        # A pickle starts with 0x80, but so may the length of a header.
        pickled = start[:1] == b"\x80" and opening != b"{"
        if start[:4] == b"PK\x03\x04" or pickled:
            raise InputError(
                f"{path} is a PyTorch checkpoint, not a weights file; import a "
                "published CGCNN checkpoint with `crysdistill import-cgcnn`, or take "
                "`weights.safetensors` from the folder of the run"
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if opening != b"{" or length > 100_000_000:
            raise InputError(f"{path} is not a weights file")
        text = opening + file.read(length - 1)
    cut = InputError(f"{path} is cut short; copy or write it again")
    if len(text) < length:
        raise cut
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path} is not a weights file") from None
    if 8 + length + end > size:
        raise cut
    return metadata


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file with a sound header."""
    try:
        return load_file(located(path))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is damaged ({error}); copy or write it again"
        ) from None


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors into a module that needs exactly these.

    Args:
        module: changed in place.
        tensors: by the names of `module.state_dict()`.
        source: the file, for messages.

    Raises:
        InputError: a tensor is missing, unexpected or of another shape, or an element
            table differs from that of this version.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("other shape", shapes),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{source} holds weights of another architecture; {'; '.join(problems)}"
        )
    for table in (name for name in own if name.endswith("element_table")):
        if not torch.equal(own[table], tensors[table].to(own[table])):
            raise InputError(
                f"{source}: the element table differs from the one in crysdistill "
                f"{__version__}; its predictions would not be those of the trained "
                "model"
            )
    module.load_state_dict(dict(tensors))
