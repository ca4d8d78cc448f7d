"""The weights file: the result of a run, with all that is needed to use it.

It is one safetensors file. Its metadata entry `crysdistill` holds JSON: the kind of
model, how to build it, the graph it reads, its targets and their units, and its
provenance. Loading a weights file executes no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from crysdistill import __version__
from crysdistill.encoders import Encoder
from crysdistill.errors import InputError, did_you_mean
from crysdistill.files import write_whole
from crysdistill.graphs.batch import GraphSettings
from crysdistill.store.checks import DatasetCheck
from crysdistill.store.formulas import Formulas
from crysdistill.store.used import UNKNOWN, Used, read_used
from crysdistill.structures.elements import ELEMENT_TABLES
from crysdistill.transfer.composed import build_encoder
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.older_weights import upgrade
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.stack import Stack
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.tensors import fill, read_metadata, read_tensors

FORMAT = 2
"""The format of the metadata. Older formats are converted when they are read."""

_ENTRY = "crysdistill"
_KINDS = ("encoder", "predictor", "frozen", "stack")
_OVERLAPS = ("clean", "transductive", "unknown", "leaked")
_Built = TypeVar("_Built")

AnyPredictor = Predictor | FrozenPredictor | Stack
"""A network with a head, readouts of frozen embeddings, or a mean of several."""


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, and their licence.

    Args:
        corpus: the hash of the store that the encoder was pretrained on.
        overlap: `clean` if that corpus was cleared of the crystals that judge the
            predictor, `transductive` if not, `leaked` if their labels were learned too,
            or `unknown`.
        licence: of the weights; it follows from the sources of the corpus.
        origin: the run or the published file, in words.
        checks: the datasets that the corpus was compared with.
        taught_by: teachers with training data that nobody has compared with a dataset,
            in words. The weights may know what these teachers have seen.
        formulas: of all crystals that the weights learned from; None if not known.
        used: these crystals by store and row; `UNKNOWN` stands for those not recorded.

    Raises:
        InputError: `overlap` is none of these words, or the formulas are damaged.
    """

    corpus: str = ""
    overlap: Literal["clean", "transductive", "unknown", "leaked"] = "unknown"
    licence: str = ""
    origin: str = ""
    checks: list[DatasetCheck] = field(default_factory=list)
    taught_by: str = ""
    formulas: Formulas | None = None
    used: tuple[Used, ...] = (UNKNOWN,)

    def __post_init__(self) -> None:
        if self.overlap not in _OVERLAPS:
            raise InputError(
                f"`overlap` is {self.overlap!r} but must be one of "
                f"{', '.join(_OVERLAPS)}{did_you_mean(str(self.overlap), _OVERLAPS)}"
            )
        # Read from JSON, they are plain values.
        checks = [c if isinstance(c, DatasetCheck) else DatasetCheck(**c)
                  for c in self.checks]  # fmt: skip
        object.__setattr__(self, "checks", checks)
        if self.formulas is not None and not isinstance(self.formulas, Formulas):
            object.__setattr__(self, "formulas", Formulas.unpacked(self.formulas))
        object.__setattr__(self, "used", read_used(self.used))

    @property
    def labels_of_corpus(self) -> bool:
        """Whether labels of corpus crystals were learned, as far as recorded."""
        return any(o.labels and o.corpus for o in self.used if o != UNKNOWN)

    @property
    def excluded(self) -> list[str]:
        """The `structures_hash` of every dataset that the corpus is clean of."""
        return [check.dataset for check in self.checks if not check.kept]

    def record(self) -> dict[str, Any]:
        """Return `provenance` and what stands beside it, for JSON."""
        values = asdict(replace(self, formulas=None, used=()))
        # Apart: they are long, and versions that know none of them read the rest.
        del values["formulas"], values["used"]
        found: dict[str, Any] = {"provenance": values}
        if self.overlap == "leaked":  # a word that version 0.1 refuses
            values["overlap"] = "unknown"
            found["overlap"] = self.overlap
        found["used"] = [one.to_dict() for one in self.used]
        if self.formulas is not None:
            found["formulas"] = self.formulas.packed()
        return found


def recorded_apart(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Provenance.record` put beside `provenance`."""
    overlap = {"overlap": facts["overlap"]} if "overlap" in facts else {}
    used = facts.get("used", [UNKNOWN])
    return {"formulas": facts.get("formulas"), "used": used, **overlap}


@dataclass(frozen=True)
class WeightsHeader:
    """The description of a model in its weights file.

    Args:
        kind: `encoder`; `predictor` with a head; `frozen` with readouts; or `stack`, a
            mean of several predictors.
        encoder: `name` and `settings`, which rebuild it; empty without an encoder.
        graph: the graph that the model reads.
        provenance: where the weights come from.
        version: of the crysdistill that wrote the file.
        head: the head's settings; None without a head.
        readouts: name and settings of each; empty for a model with a head.
        members: the description of each predictor in a stack.
        targets: the targets; empty for an encoder.
        normalizers: the scale of each target.
    """

    kind: Literal["encoder", "predictor", "frozen", "stack"]
    encoder: Mapping[str, Any]
    graph: GraphSettings
    provenance: Provenance
    version: str
    head: Mapping[str, Any] | None = None
    readouts: tuple[Mapping[str, Any], ...] = ()
    members: tuple[WeightsHeader, ...] = ()
    targets: tuple[Target, ...] = ()
    normalizers: tuple[Normalizer, ...] = ()

    @property
    def target(self) -> Target | None:
        """The target, or the first of several; None for an encoder."""
        return self.targets[0] if self.targets else None

    @property
    def normalizer(self) -> Normalizer | None:
        """The scale of `target`."""
        return self.normalizers[0] if self.normalizers else None


# ---------------------------------------------------------------------- writing


def save_weights(
    path: str | Path,
    model: Encoder | AnyPredictor,
    graph: GraphSettings | None = None,
    provenance: Provenance | None = None,
) -> Path:
    """Write an encoder or a predictor of any kind to a weights file.

    The file appears complete or not at all.

    Args:
        path: the file to write; its folder must exist.
        model: the model; it stays on its device.
        graph: the graph that an encoder reads; a predictor has its own.
        provenance: where the weights come from.

    Raises:
        InputError: `graph` is missing for an encoder, or given for a predictor.
    """
    path = Path(path)
    if isinstance(model, Encoder):
        if graph is None:
            raise InputError("`graph` is missing: say which graph the encoder reads")
        container: nn.Module = nn.ModuleDict({"encoder": model})
        facts: dict[str, Any] = {"kind": "encoder", "encoder": _recipe(model)}
    else:
        if graph is not None:
            raise InputError("`graph` is given but a predictor has its own")
        container, graph, facts = model, model.graph, _describe(model)
    header = {
        "format": FORMAT,
        "version": __version__,
        "graph": graph.to_dict(),
        **(provenance or Provenance()).record(),
        **facts,
    }
    # Members of a stack may share an encoder; a file holds each tensor of its own.
    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in container.state_dict().items()
    }
    about = {_ENTRY: json.dumps(header, sort_keys=True)}
    write_whole(path, save(tensors, metadata=about))
    return path


def _recipe(encoder: Encoder | None) -> dict[str, Any]:
    """Return the name and settings that rebuild an encoder."""
    return {"name": encoder.name, "settings": encoder.settings} if encoder else {}


def _describe(model: AnyPredictor) -> dict[str, Any]:
    """Return the entries of a header that rebuild a predictor."""
    facts: dict[str, Any] = {
        "targets": [target.to_dict() for target in model.outputs.targets],
        "normalizers": [one.to_dict() for one in model.outputs.normalizers],
    }
    if isinstance(model, Stack):
        members = [_describe(member) for member in model.predictors()]
        return {**facts, "kind": "stack", "encoder": {}, "members": members}
    facts["encoder"] = _recipe(model.encoder)
    if isinstance(model, FrozenPredictor):
        return {**facts, "kind": "frozen", "readouts": model.describe_readouts()}
    return {**facts, "kind": "predictor", "head": model.head.settings}


# ---------------------------------------------------------------------- reading


def read_header(path: str | Path) -> WeightsHeader:
    """Read the description in a weights file, without its tensors.

    Raises:
        InputError: the file does not exist, is cut short, is no weights file, or has
            another format.
    """
    path = Path(path)
    text = read_metadata(path).get(_ENTRY)
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
    return _header(upgrade(facts), path)


def _header(facts: Mapping[str, Any], path: Path) -> WeightsHeader:
    """Return the description of a file, or of one member of a stack."""
    shared = {key: facts[key] for key in ("graph", "provenance", "version")}
    members = [_header({**one, **shared}, path) for one in facts.get("members", ())]
    origin = facts["provenance"]
    if isinstance(origin, dict):
        origin = {**origin, **recorded_apart(facts)}
    return WeightsHeader(
        kind=facts["kind"],
        encoder=facts["encoder"],
        graph=_build(GraphSettings, facts["graph"], path, "graph"),
        provenance=_build(Provenance, origin, path, "provenance"),
        version=facts["version"],
        head=facts.get("head"),
        readouts=tuple(facts.get("readouts", ())),
        members=tuple(members),
        targets=_all(Target, facts, path, "targets"),
        normalizers=_all(Normalizer, facts, path, "normalizers"),
    )


def load_encoder(path: str | Path) -> Encoder:
    """Load the encoder of an encoder's or a predictor's weights file, in eval mode.

    Raises:
        InputError: the file cannot be used; the text says why.
    """
    path = Path(path)
    header = read_header(path)
    if header.members:
        raise InputError(
            f"{path} holds {len(header.members)} predictors that answer together; give "
            "the weights of one of them"
        )
    if not header.encoder:
        raise InputError(f"{path} reads the composition alone and has no encoder")
    tensors = read_tensors(path)
    own = {name: t for name, t in tensors.items() if name.startswith("encoder.")}
    encoder = _make_encoder(path, header.encoder)
    fill(nn.ModuleDict({"encoder": encoder}), own, str(path))
    return encoder.eval()


def load_predictor(path: str | Path) -> AnyPredictor:
    """Load a predictor of any kind, in eval mode.

    Raises:
        InputError: the file cannot be used, or holds an encoder without a head.
    """
    path = Path(path)
    header = read_header(path)
    if header.kind == "encoder":
        raise InputError(
            f"{path} holds an encoder without a head, which cannot predict; make a "
            "predictor from it with `crysdistill finetune`"
        )
    # The random weights are replaced below: leave the caller's random state alone.
    with torch.random.fork_rng(devices=[]):
        predictor = _make_predictor(path, header)
    fill(predictor, read_tensors(path), str(path))
    return predictor.eval()


def _make_predictor(path: Path, header: WeightsHeader) -> AnyPredictor:
    """Build the predictor that a header describes, without its weights."""
    if header.kind == "stack":
        made = [_make_predictor(path, member) for member in header.members]
        members = [one for one in made if not isinstance(one, Stack)]
        return Stack(members)
    missing = not header.head if header.kind == "predictor" else not header.readouts
    if missing or not (header.targets and header.normalizers):
        wanted = "head" if header.kind == "predictor" else "readouts"
        raise InputError(
            f"{path}: a predictor needs `{wanted}`, `targets` and `normalizers` in its "
            f"`{_ENTRY}` entry"
        )
    try:
        outputs = Outputs(header.targets, header.normalizers)
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: `targets`: {error}") from None
    encoder = _make_encoder(path, header.encoder) if header.encoder else None
    if encoder is not None and header.head:
        head = _build(PropertyHead, header.head, path, "head")
        return Predictor(encoder, head, outputs, header.graph)
    try:
        return FrozenPredictor.empty(encoder, header.readouts, outputs, header.graph)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: `readouts` do not fit crysdistill {__version__} ({error})"
        ) from None


def _build(kind: type[_Built], values: Any, path: Path, name: str) -> _Built:
    """Call a class with values from a file; errors name the file."""
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
    """Build the objects that a predictor's file has for each target."""
    return tuple(_build(kind, values, path, name) for values in facts.get(name, ()))


def _make_encoder(path: Path, recipe: Mapping[str, Any]) -> Encoder:
    """Build the encoder that a header describes, without its weights."""
    elements = recipe.get("settings", {}).get("elements")
    if elements is not None and elements not in ELEMENT_TABLES:
        raise InputError(
            f"{path}: unknown element table {elements!r}; crysdistill "
            f"{__version__} knows {', '.join(ELEMENT_TABLES)}"
        )
    try:
        return build_encoder(recipe)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: the settings of encoder `{recipe.get('name')}` do not fit "
            f"crysdistill {__version__} ({error})"
        ) from None
