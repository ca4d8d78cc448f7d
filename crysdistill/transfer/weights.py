"""The weights file: what leaves a run, and all that is needed to use it.

One safetensors file. Its metadata entry `crysdistill` holds JSON: what kind of model
it is, how to build it, what graph it reads, what it predicts and in which unit, and
where it comes from. Loading one executes no code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from crysdistill import __version__
from crysdistill.encoders import Encoder, find_encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.files import write_whole
from crysdistill.graphs.batch import GraphSettings
from crysdistill.store.checks import DatasetCheck
from crysdistill.structures.elements import ELEMENT_TABLES
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.older_weights import upgrade
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.targets import Normalizer, Target

FORMAT = 2
"""Of the metadata. Older ones are converted when they are read."""

_ENTRY = "crysdistill"
_KINDS = ("encoder", "predictor")
_OVERLAPS = ("clean", "transductive", "unknown")
_Built = TypeVar("_Built")


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, and what may be done with them.

    Args:
        corpus: the hash of the store that the encoder learned from.
        overlap: whether that corpus was cleared of the crystals that judged the
            predictor (`clean`), was not (`transductive`), or `unknown`.
        licence: of the weights, which the sources of the corpus decide.
        origin: the run or the published file, in words.
        checks: the datasets that the corpus was compared with.

    Raises:
        InputError: `overlap` is none of the three.
    """

    corpus: str = ""
    overlap: Literal["clean", "transductive", "unknown"] = "unknown"
    licence: str = ""
    origin: str = ""
    checks: list[DatasetCheck] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.overlap not in _OVERLAPS:
            raise InputError(
                f"`overlap` is {self.overlap!r} but must be one of "
                f"{', '.join(_OVERLAPS)}{did_you_mean(str(self.overlap), _OVERLAPS)}"
            )
        # From JSON they come as plain values.
        checks = [c if isinstance(c, DatasetCheck) else DatasetCheck(**c)
                  for c in self.checks]  # fmt: skip
        object.__setattr__(self, "checks", checks)

    @property
    def excluded(self) -> list[str]:
        """The `structures_hash` of every dataset that the corpus is clean of."""
        return [check.dataset for check in self.checks if not check.kept]


@dataclass(frozen=True)
class WeightsHeader:
    """What a weights file says of itself.

    Args:
        kind: `encoder`, or `predictor` for one with a head.
        encoder: `name` and `settings`, which rebuild it.
        graph: the graph that it reads.
        provenance: where it comes from.
        version: of crysdistill, which wrote the file.
        head: the head's settings; None for an encoder.
        targets: what is predicted; none for an encoder.
        normalizers: the scale of each target.
    """

    kind: Literal["encoder", "predictor"]
    encoder: Mapping[str, Any]
    graph: GraphSettings
    provenance: Provenance
    version: str
    head: Mapping[str, Any] | None = None
    targets: tuple[Target, ...] = ()
    normalizers: tuple[Normalizer, ...] = ()

    @property
    def target(self) -> Target | None:
        """What is predicted; of several targets the first, None for an encoder."""
        return self.targets[0] if self.targets else None

    @property
    def normalizer(self) -> Normalizer | None:
        """The scale of `target`."""
        return self.normalizers[0] if self.normalizers else None


# ---------------------------------------------------------------------- writing


def save_weights(
    path: str | Path,
    model: Encoder | Predictor,
    graph: GraphSettings | None = None,
    provenance: Provenance | None = None,
) -> Path:
    """Write an encoder or a predictor to a weights file.

    The file appears complete or not at all.

    Args:
        path: where; its folder must exist.
        model: what to write; it stays where it is.
        graph: the graph that an encoder reads; a predictor knows its own.
        provenance: where the weights come from.

    Raises:
        InputError: the graph of an encoder is not given, or that of a predictor is.
    """
    path = Path(path)
    encoder: Encoder
    head: dict[str, Any] = {}
    if isinstance(model, Predictor):
        if graph is not None:
            raise InputError("`graph` is given but a predictor has its own")
        encoder, graph, kind = model.encoder, model.graph, "predictor"
        head = {
            "head": model.head.settings,
            "targets": [target.to_dict() for target in model.outputs.targets],
            "normalizers": [one.to_dict() for one in model.outputs.normalizers],
        }
    else:
        if graph is None:
            raise InputError("`graph` is missing: say which graph the encoder reads")
        encoder, kind = model, "encoder"
    header = {
        "format": FORMAT,
        "kind": kind,
        "version": __version__,
        "encoder": {"name": encoder.name, "settings": encoder.settings},
        "graph": graph.to_dict(),
        "provenance": asdict(provenance or Provenance()),
        **head,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in _container(model).state_dict().items()
    }
    about = {_ENTRY: json.dumps(header, sort_keys=True)}
    write_whole(path, save(tensors, metadata=about))
    return path


def _container(model: Encoder | Predictor) -> nn.Module:
    """Return a module whose tensors have the names that the file uses."""
    return model if isinstance(model, Predictor) else nn.ModuleDict({"encoder": model})


# ---------------------------------------------------------------------- reading


def read_header(path: str | Path) -> WeightsHeader:
    """Read what a weights file says of itself, without its tensors.

    Raises:
        InputError: the file is absent, cut short, no weights file, or of another
            format.
    """
    path = Path(path)
    text = _metadata(path).get(_ENTRY)
    if text is None:
        raise InputError(
            f"{path} is a safetensors file but not a weights file of crysdistill "
            f"(it has no `{_ENTRY}` entry)"
        )
    try:
        facts = json.loads(text)
        written = facts["format"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: the `{_ENTRY}` entry is not readable") from None
    if written not in range(1, FORMAT + 1):
        raise InputError(
            f"{path} has format {written} but crysdistill {__version__} reads formats "
            f"1 to {FORMAT}; use the version that wrote it ({facts.get('version')}) or "
            "a later one"
        )
    for key in ("kind", "version", "encoder", "graph", "provenance"):
        if key not in facts:
            raise InputError(f"{path}: the `{_ENTRY}` entry lacks `{key}`")
    if facts["kind"] not in _KINDS:
        raise InputError(
            f"{path} holds `{facts['kind']}`, which is neither of {', '.join(_KINDS)}"
        )
    facts = upgrade(facts)
    return WeightsHeader(
        kind=facts["kind"],
        encoder=facts["encoder"],
        graph=_build(GraphSettings, facts["graph"], path, "graph"),
        provenance=_build(Provenance, facts["provenance"], path, "provenance"),
        version=facts["version"],
        head=facts.get("head"),
        targets=_all(Target, facts, path, "targets"),
        normalizers=_all(Normalizer, facts, path, "normalizers"),
    )


def load_encoder(path: str | Path) -> Encoder:
    """Load the encoder of a weights file, that of a predictor too, in eval mode.

    Raises:
        InputError: the file cannot be used; the text says why.
    """
    path = Path(path)
    header = read_header(path)
    encoder = _make_encoder(path, header)
    tensors = _tensors(path)
    own = {name: t for name, t in tensors.items() if name.startswith("encoder.")}
    fill(_container(encoder), own, str(path))
    return encoder.eval()


def load_predictor(path: str | Path) -> Predictor:
    """Load a predictor, in eval mode.

    Raises:
        InputError: the file cannot be used, or holds an encoder without a head.
    """
    path = Path(path)
    header = read_header(path)
    if header.kind != "predictor":
        raise InputError(
            f"{path} holds an encoder without a head, which cannot predict; make a "
            "predictor from it with `crysdistill finetune`"
        )
    if not (header.head and header.targets and header.normalizers):
        raise InputError(
            f"{path}: a predictor needs `head`, `targets` and `normalizers` in its "
            f"`{_ENTRY}` entry"
        )
    with torch.random.fork_rng(devices=[]):
        head = _build(PropertyHead, header.head, path, "head")
    try:
        outputs = Outputs(header.targets, header.normalizers)
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: `targets`: {error}") from None
    predictor = Predictor(_make_encoder(path, header), head, outputs, header.graph)
    fill(predictor, _tensors(path), str(path))
    return predictor.eval()


def _metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, telling apart what can be wrong.

    The library reports most of these as one kind of error. The layout is eight bytes
    with the length of a JSON header, the header, and the tensors at its offsets.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the weights file in it")
    if not path.exists():
        raise InputError(f"{path}: no such file")
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


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file whose header is in order."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is damaged ({error}); copy or write it again"
        ) from None


def _build(kind: type[_Built], values: Any, path: Path, name: str) -> _Built:
    """Call a class with the values of a file, in whose name errors speak."""
    try:
        return kind(**values)
    except TypeError as error:
        known = (
            [field.name for field in fields(kind)]  # type: ignore[arg-type]
            if hasattr(kind, "__dataclass_fields__")
            else []
        )
        expected = f"; it takes {', '.join(known)}" if known else ""
        raise InputError(
            f"{path}: `{name}` does not fit crysdistill {__version__} ({error})"
            f"{expected}"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: `{name}`: {error}") from None


def _all(
    kind: type[_Built], facts: Mapping[str, Any], path: Path, name: str
) -> tuple[_Built, ...]:
    """Build what a predictor's file has one of for each target."""
    return tuple(_build(kind, values, path, name) for values in facts.get(name, ()))


def _make_encoder(path: Path, header: WeightsHeader) -> Encoder:
    """Build the encoder that a header describes, with weights still to be filled."""
    name = header.encoder.get("name")
    settings = header.encoder.get("settings", {})
    elements = settings.get("elements")
    if elements is not None and elements not in ELEMENT_TABLES:
        raise InputError(
            f"{path}: unknown element table {elements!r}; crysdistill "
            f"{__version__} knows {', '.join(ELEMENT_TABLES)}"
        )
    try:
        # Weights are drawn and then replaced: no reason to disturb the caller's.
        with torch.random.fork_rng(devices=[]):
            return find_encoder(str(name))(**settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except TypeError as error:
        raise InputError(
            f"{path}: the settings of encoder `{name}` do not fit crysdistill "
            f"{__version__} ({error})"
        ) from None


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put tensors into a module that needs exactly these.

    Args:
        module: changed in place.
        tensors: by the names of `module.state_dict()`.
        source: the file, for messages.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or is an
            element table that differs from the one of this version.
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
