"""Predictors of this package as a teacher: their mean, and how far they agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch, GraphSettings
from crysdistill.store.store import Store
from crysdistill.teachers.frozen import asked, frozen_teachers
from crysdistill.teachers.teacher import Answer, Foreign, Teacher
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.seen import with_teachers
from crysdistill.transfer.spread import disagreement
from crysdistill.transfer.weights import (
    AnyPredictor,
    WeightsHeader,
    load_predictor,
    read_header,
)

ENSEMBLE = "ensemble"
"""The name of this teacher, before the colon."""

_NAME = "weights.safetensors"  # in the folder of a run


class EnsembleTeacher(Teacher):
    """The mean prediction of several predictors; their spread says how much it counts.

    A crystal has one number for each target: the mean over members of the transformed
    property, or of the probability of class 1. A target with more classes has the
    probability of each. A student learns a number with less weight where the members
    differ more (`crysdistill.teachers.trust`). One predictor alone has no spread, and
    all its answers count alike.

    Members may be of any kind: networks, frozen encoders with readouts, what `fit`
    wrote. They may have learned from different crystals, and start from different
    weights. If they know the labels of crystals on which the student is tested, the
    results of the student say so (`crysdistill.transfer.same_store`).

    Source: a student of an ensemble, G. Hinton et al., 2015, arXiv:1503.02531; the mean
    of equally weighted members, B. Lakshminarayanan et al., NeurIPS 2017,
    arXiv:1612.01474.

    Differs from the papers: the student learns the mean by its squared error, and
    members do not predict a variance.

    Args:
        where: a weights file; a folder, for its `weights.safetensors` or, if it has
            none, those in the folders below; or a pattern of either, as in
            `runs/member-*`.

    Raises:
        InputError: there is no predictor, one comes twice, or they differ in their
            targets, units, classes or graph.
    """

    graph: GraphSettings

    def __init__(self, where: str = "") -> None:
        files = members(where)
        headers = [read_header(file) for file in files]
        self.members = [load_predictor(file).requires_grad_(False) for file in files]
        self._digests = [_digest(file) for file in files]
        for file, member, digest in zip(
            files, self.members, self._digests, strict=True
        ):
            first = self._digests.index(digest)
            if files[first] != file:
                raise InputError(
                    f"{file} holds the same weights as {files[first]}; leave one out"
                )
            _compare(files[0], self.members[0], file, member)
        self.outputs = self.members[0].outputs
        self.graph = self.members[0].graph
        self.crystal_width = sum(map(_columns, self.outputs.sizes))
        self.spreads = len(files) > 1
        several = f" ({len(files)} predictors)" if self.spreads else ""
        self.name = f"{where}{several}"
        self.learned = _learned(headers)

    def __call__(self, batch: CrystalBatch) -> Answer:
        """Return the mean over members and, of several members, the spread."""
        found = torch.stack(
            [expected(one.outputs, one.answer(batch)) for one in self.members]
        )  # (M, B, F')
        mean = found.mean(dim=0)
        if not self.spreads:
            return Answer(None, mean)
        shares = torch.full((len(found),), 1 / len(found), device=found.device)
        return Answer(None, torch.cat([mean, disagreement(found, shares)], dim=1))

    def knows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Return which crystals every frozen teacher in a member knows."""
        known = np.ones(len(rows), dtype=bool)
        each = {one.teacher.fingerprint(): one for one in frozen_teachers(self.members)}
        for one in each.values():
            known &= one.teacher.knows(store, rows)
        return known

    @contextmanager
    def ready_for(
        self, store: Store, rows: np.ndarray, **settings: Any
    ) -> Iterator[None]:
        """Ask the frozen teachers in members once, and hold their answers.

        Members that read another graph than the store's ask them for each batch.
        """
        # There, other processes answer, and what is held stays in this one.
        here = self.members if self.graph == store.graph else []
        with asked(here, store, rows, **settings):
            yield

    def to(self, device: str | torch.device) -> EnsembleTeacher:
        """Move to a device, in place."""
        for member in self.members:
            member.to(device)
        return self

    def fingerprint(self) -> str:
        """Return a hash of all members' files."""
        text = " ".join(["ensemble", *sorted(self._digests)])
        return hashlib.sha256(text.encode()).hexdigest()


def expected(outputs: Outputs, answer: Tensor) -> Tensor:
    """Return what a predictor expects of crystals, (B, F').

    These are transformed values, which do not depend on the scale that a predictor has
    from its own training labels; and probabilities.

    Args:
        outputs: of the predictor.
        answer: (B, O), its raw output.
    """
    found = []
    parts = answer.float().split(outputs.sizes, dim=1)
    for part, scale in zip(parts, outputs.normalizers, strict=True):
        if scale.classes:
            shares = part.softmax(dim=1)  # of two, one tells all
            found.append(shares[:, -_columns(scale.outputs) :])
        else:
            found.append(scale.denormalize(part))
    return torch.cat(found, dim=1)


def _columns(outputs: int) -> int:
    """Return the numbers that a target with this many raw outputs has here."""
    return 1 if outputs == 2 else outputs


def members(where: str) -> list[Path]:
    """Return the weights files that a text names, in the order of their paths."""
    if not where:
        raise InputError(
            "`ensemble` names no predictors; give a weights file, a folder of runs or "
            "a pattern, as in `ensemble:runs/members`"
        )
    # A pattern may be absolute, which `Path.glob` refuses.
    named = [where] if Path(where).exists() else glob(where, recursive=True)  # noqa: PTH207
    if not named:
        raise InputError(
            f"{where} is no file or folder, and none fits it as a pattern; give the "
            "weights of a predictor, or a folder of runs"
        )
    found = {
        file
        for path in map(Path, named)
        for file in (_runs_in(path) if path.is_dir() else [path])
    }
    if not found:
        raise InputError(
            f"{where} holds no {_NAME}; give a folder of runs, or a pattern such as "
            f"`ensemble:{where}/*.safetensors`"
        )
    return sorted(found)


def _runs_in(folder: Path) -> Iterator[Path]:
    """Yield the weights of every run, but not those of the networks in a `fit`."""
    own = folder / _NAME
    if own.exists():
        yield own
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():  # links may lead in circles
            yield from _runs_in(path)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _compare(first: Path, one: AnyPredictor, second: Path, other: AnyPredictor) -> None:
    """Refuse two members that do not predict the same from the same graph."""
    theirs, mine = _predicts(one.outputs), _predicts(other.outputs)
    if theirs != mine:
        raise InputError(
            f"{second} predicts {mine} but {first} predicts {theirs}; an ensemble has "
            "the same targets: leave one of them out"
        )
    if one.graph != other.graph:
        raise InputError(
            f"{second} reads the graph {_described(other.graph)} but {first} reads "
            f"{_described(one.graph)}; name them as two teachers, each with its graph"
        )


def _predicts(outputs: Outputs) -> str:
    """Return in words all that members must have in common."""
    said = []
    for target, scale in zip(outputs.targets, outputs.normalizers, strict=True):
        facts = [target.unit] if target.unit else []
        facts += [target.transform] if target.transform != "none" else []
        facts += [f"{scale.classes} classes"] if scale.classes else []
        said.append(f"{target.name} ({', '.join(facts)})" if facts else target.name)
    return ", ".join(said)


def _described(graph: GraphSettings) -> str:
    facts = graph.to_dict()
    return f"({', '.join(f'{name} {value}' for name, value in facts.items())})"


def _learned(headers: Sequence[WeightsHeader]) -> Foreign:
    """Return what is known of all members together."""
    first, *others = headers
    known = with_teachers(first.provenance, others)
    origins = dict.fromkeys(one.provenance.origin for one in headers)
    strangers = dict.fromkeys(one.provenance.taught_by for one in headers)
    corpora = [one.provenance.corpus for one in headers]
    together = replace(
        known,
        corpus=next(filter(None, corpora), ""),
        origin=" and ".join(filter(None, origins)),
        taught_by="; ".join(filter(None, strangers)),
    )
    kinds = {one.kind for one in headers}
    return Foreign(together, kinds.pop() if len(kinds) == 1 else "stack")
