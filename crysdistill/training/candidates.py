"""The candidates of `fit`: predictors of several kinds for the same labels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from crysdistill.encoders import Encoder, find_encoder, make_encoder
from crysdistill.splits import Split
from crysdistill.store.store import Store
from crysdistill.teachers.frozen import FrozenTeacher
from crysdistill.training.engine import device_of
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.judging import tested
from crysdistill.training.labelled import LabelledConfig
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.probe import COMPOSITION, UNTRAINED, Probed, probe
from crysdistill.training.runs import RunDirectory
from crysdistill.training.selection import choose_shares
from crysdistill.training.settings import (
    AcrossSettings,
    EncoderChoice,
    SplitSettings,
)
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.side_by_side import SideBySide
from crysdistill.transfer.stack import Stack, weighted
from crysdistill.transfer.weights import AnyPredictor, load_predictor, read_header

TOGETHER = "all together"
"""The name of all given weights and teachers side by side."""

ALL_WEIGHTS = "all weights"
"""The name of all given weights side by side, if teachers are given too."""


@dataclass(frozen=True)
class Candidate:
    """A predictor that might be chosen.

    Args:
        name: its name in tables and messages.
        predictor: fitted to the training crystals.
        score: the validation error; see `Scores`.
        metrics: the validation metric of each target.
        answers: the raw outputs (n, O) for the validation crystals.
        sources: the names of the weights and teachers that it was made from.
    """

    name: str
    predictor: AnyPredictor
    score: float
    metrics: dict[str, float]
    answers: Tensor
    sources: frozenset[str]


@dataclass(frozen=True)
class Given:
    """What the candidates are made from, beside labels.

    Args:
        weights: the files of pretrained encoders by name; networks start from them.
        own: these encoders by name, and all of them side by side.
        foreign: frozen teachers by name.
        everything: all of both side by side, if there are both; else empty.
    """

    weights: Mapping[str, Path]
    own: Mapping[str, Encoder]
    foreign: Mapping[str, Encoder]
    everything: Mapping[str, Encoder]

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Path],
        own: Mapping[str, Encoder],
        foreign: Mapping[str, Encoder],
    ) -> Given:
        """Put encoders side by side.

        Args:
            weights: files by name.
            own: the encoder in each file.
            foreign: frozen teachers by name.
        """
        several, everything = dict(own), {}
        if len(own) > 1:
            name = ALL_WEIGHTS if foreign else TOGETHER
            several[name] = SideBySide(list(own.values()))
        if foreign and len(own) + len(foreign) > 1:
            everything[TOGETHER] = SideBySide([*own.values(), *foreign.values()])
        return cls(weights, several, foreign, everything)

    @property
    def teachers(self) -> dict[str, FrozenTeacher]:
        """The frozen teachers by name, typed."""
        return {
            name: one
            for name, one in self.foreign.items()
            if isinstance(one, FrozenTeacher)
        }

    @property
    def encoders(self) -> dict[str, Encoder]:
        """All that can be frozen, by name."""
        return {**self.own, **self.foreign, **self.everything}


class Workshop:
    """Makes candidates, and judges them on the validation crystals.

    Args:
        config: settings of all networks; its `out` and its split are not used.
        encoder: the encoder of the network from scratch.
        repeats: networks of each kind, with different seeds.
        store: the dataset.
        split: of its crystals.
        outputs: the targets to predict.
        run: the directory for all results.
        given: pretrained encoders and teachers.
    """

    def __init__(
        self,
        config: LabelledConfig,
        encoder: EncoderChoice,
        repeats: int,
        store: Store,
        split: Split,
        outputs: Outputs,
        run: RunDirectory,
        given: Given,
    ) -> None:
        self.config, self.encoder, self.repeats = config, encoder, repeats
        self.store, self.split, self.outputs = store, split, outputs
        self.run, self.given = run, given
        self.device = device_of(config.trainer)

    def probe(self) -> list[Probed]:
        """Cross-validate readouts on all but the test crystals."""
        rows = np.concatenate([self.split.train, self.split.val])
        torch.manual_seed(self.config.seed)
        asked: dict[str, Encoder | None] = {COMPOSITION: None}
        asked[UNTRAINED] = make_encoder(graph=self.store.graph, **self._architecture())
        return probe(
            self.store,
            rows,
            self.outputs,
            {**asked, **self.given.encoders},
            self.device,
            self.config.seed,
        )

    def make(self, best: str | None, frozen: str | None) -> list[Candidate]:
        """Return each predictor of its own kind, judged on validation.

        Args:
            best: the name of the weights to start from; None for none.
            frozen: the name of our own encoders to freeze; None for none.
        """
        given = self.given
        made = [self._judged("scratch", self._networks("scratch", None), ())]
        if best is not None and frozen is not None:
            tuned = self._networks("finetuned", given.weights[best])
            made.append(self._judged("fine-tuned", tuned, [best]))
            own = [frozen] if frozen in given.weights else given.weights
            made.append(self._judged("frozen", self._readout(given.own[frozen]), own))
        for name, encoder in given.foreign.items():
            made.append(self._judged(name, self._readout(encoder), [name]))
        for name, encoder in given.everything.items():
            every = [*given.weights, *given.foreign]
            made.append(self._judged(name, self._readout(encoder), every))
        made.append(self._judged(COMPOSITION, self._readout(None), ()))
        return made

    def mean_of(self, made: Sequence[Candidate]) -> Iterator[Candidate]:
        """Yield the mean of candidates that predicts validation best, if of several."""
        asked = self._batches(self.split.val)
        labels = torch.cat([batch.targets for batch in asked]).cpu()
        answers = {one.name: one.answers for one in made}
        shares = choose_shares(answers, labels, self.outputs)
        if len(shares) > 1:
            parts = {one.name: one for one in made if one.name in shares}
            name = " + ".join(f"{share:.0%} {one}" for one, share in shares.items())
            mean = weighted([(parts[one].predictor, x) for one, x in shares.items()])
            sources = frozenset[str]().union(*(one.sources for one in parts.values()))
            yield self._judged(name, mean, sources)

    def _readout(self, encoder: Encoder | None) -> FrozenPredictor:
        batches = self._batches(self.split.train)
        known = FrozenPredictor.read(encoder, batches)
        return FrozenPredictor.fit(
            encoder, known, self.outputs, self.store.graph, self.config.seed
        )

    def _networks(self, kind: str, weights: Path | None) -> AnyPredictor:
        """Train the missing networks of one kind; return all as one predictor."""
        config, made = self.config, []
        seeds = range(config.seed, config.seed + self.repeats)
        shown = config.trainer.progress
        for seed in track(seeds, f"training, {kind}", disable=not shown):
            folder = self.run.path / f"{kind}-{seed}"
            shared = {f.name: getattr(config, f.name) for f in fields(LabelledConfig)}
            shared |= {
                "out": folder,
                "seed": seed,
                "split": same_split(self.run),
                "test": AcrossSettings(),  # only the chosen candidate is tested
                "trainer": replace(config.trainer, progress=False),
                "resume": True,
                "overwrite": False,
            }
            if not (folder / "results.json").exists():
                # Its output repeats files in its folder, and this run has its own bar.
                with contextlib.redirect_stdout(io.StringIO()):
                    if weights is None:
                        train(TrainConfig(**shared, encoder=self._architecture()))
                    else:
                        finetune(FinetuneConfig(**shared, weights=weights))
            made.append(load_predictor(folder / "weights.safetensors"))
        members = [one for one in made if not isinstance(one, Stack)]
        return members[0] if len(members) == 1 else Stack(members)

    def _architecture(self) -> dict[str, Any]:
        """Return the encoder of a network from scratch."""
        weights = self.given.weights
        if not weights or self.encoder != {"name": "cgcnn"}:
            return self.encoder
        known = read_header(next(iter(weights.values()))).encoder
        settings = find_encoder(known["name"]).for_properties(known["settings"])
        return {"name": known["name"], **settings}

    def _judged(
        self, name: str, predictor: AnyPredictor, sources: Iterable[str]
    ) -> Candidate:
        predictor.to(self.device)
        scores, answers, _ = tested(predictor, self._batches(self.split.val))
        metrics = scores.compute()
        score = metrics.pop("score")
        return Candidate(name, predictor, score, metrics, answers, frozenset(sources))

    def _batches(self, rows: np.ndarray) -> BatchLoader:
        loader = BatchLoader(self.store, rows, 256, self.outputs.names)
        place([loader], self.device)
        return loader


def same_split(run: RunDirectory) -> SplitSettings:
    """Return the settings that read the split of a run again."""
    return SplitSettings(file=str(run.path / "split.csv"))
