"""The best predictor for some labels: makes candidates and chooses by validation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich
import torch
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from crysdistill.encoders import Encoder, find_encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.schema import dump_config
from crysdistill.splits import Split, make_split
from crysdistill.store.formulas import Formulas
from crysdistill.store.origins import joint_licence
from crysdistill.store.store import Store
from crysdistill.training.across import (
    OtherStore,
    choose_tested,
    find_shared,
    open_other,
)
from crysdistill.training.engine import device_of
from crysdistill.training.finetune import FinetuneConfig, finetune
from crysdistill.training.judging import (
    one_column,
    outputs_for,
    results_of,
    spoken,
    subsets_of,
    tested,
    write_predictions,
)
from crysdistill.training.labelled import LabelledConfig
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.overlap import (
    find_seen,
    overlap_line,
    with_labelled,
    word_of,
)
from crysdistill.training.pretrained import load_pretrained
from crysdistill.training.probe import (
    COMPOSITION,
    UNTRAINED,
    Probed,
    advice,
    probe,
)
from crysdistill.training.runs import RunDirectory, open_run
from crysdistill.training.selection import choose_shares
from crysdistill.training.settings import (
    AcrossSettings,
    EncoderChoice,
    SplitSettings,
)
from crysdistill.training.train import TrainConfig, train
from crysdistill.transfer.frozen import FrozenPredictor
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.scores import Scores
from crysdistill.transfer.seen import with_teachers
from crysdistill.transfer.shipped import shipped
from crysdistill.transfer.side_by_side import SideBySide
from crysdistill.transfer.spread import Watched
from crysdistill.transfer.stack import Stack, weighted
from crysdistill.transfer.weights import (
    AnyPredictor,
    Provenance,
    WeightsHeader,
    load_predictor,
    read_header,
    save_weights,
)

TOGETHER = "all together"
"""The name of all given weights side by side."""


@dataclass(kw_only=True)
class FitConfig(LabelledConfig):
    """The best predictor for some labels, of any kind.

    Candidates are a network from scratch, one that starts from pretrained weights, a
    Gaussian process on frozen embeddings, one on the composition, and the weighted mean
    of these that predicts the validation crystals best. Validation chooses one, and
    only that one predicts the test crystals, once.

    Args:
        weights: pretrained encoders, by file or by the name of one in the package. A
            probe chooses one of them to start from, and one to freeze, or all of them
            side by side. None takes all of the package that read the dataset's graph,
            but none that a foreign model taught. If empty, networks are trained only
            from scratch.
        encoder: of the network from scratch; by default that of the first weights.
        repeats: networks of each kind, with different seeds; their mean predicts.
    """

    out: Path = Path("runs/fit")
    weights: list[Path] | None = None
    encoder: EncoderChoice = field(default_factory=lambda: {"name": "cgcnn"})
    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise InputError(f"`repeats` is {self.repeats} but must be at least 1")
        if self.weights is not None:  # names of the package are texts
            self.weights = [Path(path) for path in self.weights]
        names = [str(path) for path in self.weights or ()]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"`weights` names {twice[0]} twice; leave one out")


@dataclass(frozen=True)
class Candidate:
    """A predictor that might be chosen.

    Args:
        name: its name in tables and messages.
        predictor: fitted to the training crystals.
        score: the validation error; see `Scores`.
        metrics: the validation metric of each target.
        answers: the raw outputs (n, O) for the validation crystals.
    """

    name: str
    predictor: AnyPredictor
    score: float
    metrics: dict[str, float]
    answers: Tensor


def fit(config: FitConfig) -> Path:
    """Make every candidate, choose one, judge it; return its weights file's path.

    With `resume=true`, networks that an interrupted run has trained are reused.

    Raises:
        InputError: the dataset, the weights or a setting cannot be used.
    """
    store = Store.open(config.dataset)
    for target in config.all_targets:
        target.check(store.property(target.name), store.material_ids)
    other = open_other(config.test, config.all_targets, store)
    paths = _named(_chosen_from(config, store))
    encoders = {name: load_pretrained(path, store) for name, path in paths.items()}
    names = [target.name for target in config.all_targets]
    labels = np.stack([store.property(name) for name in names], axis=1)  # (B, T)
    split = make_split(store, config.split, one_column(labels))
    text = dump_config(config)
    with open_run(config.out, text, config.resume, config.overwrite, parts=True) as run:
        split.write(run.path / "split.csv", store.material_ids)
        # Read the split as every network will, in the same order: all have one scale.
        split = make_split(store, _same_split(run), one_column(labels))
        outputs = outputs_for(config.all_targets, labels, split, store.material_ids)
        rich.print(
            escape(
                f"fit: {', '.join(names)} from {len(split.train):,} crystals, "
                f"{len(split.val):,} to choose by, {len(split.test):,} to judge"
            )
        )
        if other is not None:
            shared = find_shared(other, store, split)
            other = choose_tested(other, shared, config.test.keep_shared, outputs)
            rich.print(escape(other.remark))
        work = _Work(config, store, split, outputs, run, paths, other)
        if len(encoders) > 1:
            encoders[TOGETHER] = SideBySide(list(encoders.values()))
        looked = work.probe(encoders)
        best = next((one.name for one in looked if one.name in paths), None)
        work.advise(looked, best)
        frozen = next((one.name for one in looked if one.name in encoders), None)
        made = work.candidates(encoders, best, frozen)
        candidates = sorted([*made, *work.mean_of(made)], key=lambda one: one.score)
        chosen = candidates[0]
        work.show(candidates)
        return work.finish(chosen, candidates, looked, best, frozen)


def _same_split(run: RunDirectory) -> SplitSettings:
    """Return the settings that read the split of this run again."""
    return SplitSettings(file=str(run.path / "split.csv"))


def _chosen_from(config: FitConfig, store: Store) -> Sequence[Path]:
    """Return the given weights, or else those of the package that can be used.

    They read the graph of the dataset. No foreign model taught them, of whose crystals
    nobody knows whether they are in the dataset.
    """
    if config.weights is not None:
        return config.weights
    headers = {name: read_header(path) for name, path in shipped().items()}
    return [
        Path(name)
        for name, header in headers.items()
        if header.graph == store.graph and not header.provenance.taught_by
    ]


def _named(weights: Sequence[Path]) -> dict[str, Path]:
    """Return weights by the name of their file or run; by their path if ambiguous."""
    short = [p.parent.name if p.stem == "weights" else p.stem for p in weights]
    taken = [*short, COMPOSITION, UNTRAINED, TOGETHER]
    return {
        name if taken.count(name) == 1 else str(path): path
        for name, path in zip(short, weights, strict=True)
    }


class _Work:
    """The state of one fit.

    Args:
        config: the user's configuration.
        store: the dataset.
        split: of its crystals.
        outputs: the targets to predict.
        run: the directory for all results.
        weights: the pretrained encoders by name.
        other: the crystals to test on in another store.
    """

    def __init__(
        self,
        config: FitConfig,
        store: Store,
        split: Split,
        outputs: Outputs,
        run: RunDirectory,
        weights: dict[str, Path],
        other: OtherStore | None,
    ) -> None:
        self.config, self.store, self.split = config, store, split
        self.outputs, self.run, self.weights = outputs, run, weights
        self.other = other
        self.device = device_of(config.trainer)

    # ------------------------------------------------------------ the look ahead

    def probe(self, encoders: dict[str, Encoder]) -> list[Probed]:
        """Cross-validate readouts on all but the test crystals."""
        rows = np.concatenate([self.split.train, self.split.val])
        torch.manual_seed(self.config.seed)
        asked: dict[str, Encoder | None] = {COMPOSITION: None}
        asked[UNTRAINED] = make_encoder(graph=self.store.graph, **self._architecture())
        return probe(
            self.store,
            rows,
            self.outputs,
            {**asked, **encoders},
            self.device,
            self.config.seed,
        )

    def advise(self, looked: Sequence[Probed], best: str | None) -> None:
        """Print the probe's results, and what to expect from pretrained weights."""
        rich.print(
            self._table("frozen embeddings of", "Cross-validated on the labels", looked)
        )
        rich.print(escape(advice(looked, best)))

    # --------------------------------------------------------------- candidates

    def candidates(
        self, encoders: dict[str, Encoder], best: str | None, frozen: str | None
    ) -> list[Candidate]:
        """Return each predictor of its own kind, judged on validation.

        Args:
            encoders: by name.
            best: the name of the encoder to start from; None for none.
            frozen: the name of the encoder to freeze; None for none.
        """
        made: dict[str, AnyPredictor] = {"scratch": self._networks("scratch", None)}
        if best is not None and frozen is not None:
            made["fine-tuned"] = self._networks("finetuned", self.weights[best])
            made["frozen"] = self._readout(encoders[frozen])
        made[COMPOSITION] = self._readout(None)
        return [self._judged(name, predictor) for name, predictor in made.items()]

    def mean_of(self, made: Sequence[Candidate]) -> Iterator[Candidate]:
        """Yield the mean of candidates that predicts validation best, if of several."""
        asked = self._batches(self.split.val)
        labels = torch.cat([batch.targets for batch in asked]).cpu()
        answers = {one.name: one.answers for one in made}
        shares = choose_shares(answers, labels, self.outputs)
        if len(shares) > 1:
            parts = {one.name: one.predictor for one in made if one.name in shares}
            name = " + ".join(f"{share:.0%} {one}" for one, share in shares.items())
            mean = weighted([(parts[one], share) for one, share in shares.items()])
            yield self._judged(name, mean)

    def _readout(self, encoder: Encoder | None) -> FrozenPredictor:
        batches = self._batches(self.split.train)
        known = FrozenPredictor.read(encoder, batches)
        return FrozenPredictor.fit(
            encoder, known, self.outputs, self.store.graph, self.config.seed
        )

    def _networks(self, kind: str, weights: Path | None) -> AnyPredictor:
        """Train the missing networks of one kind; return all as one predictor."""
        config, made = self.config, []
        seeds = range(config.seed, config.seed + config.repeats)
        shown = config.trainer.progress
        for seed in track(seeds, f"training, {kind}", disable=not shown):
            folder = self.run.path / f"{kind}-{seed}"
            shared = {f.name: getattr(config, f.name) for f in fields(LabelledConfig)}
            shared |= {
                "out": folder,
                "seed": seed,
                "split": _same_split(self.run),
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
        config = self.config
        if not self.weights or config.encoder != {"name": "cgcnn"}:
            return config.encoder
        given = read_header(next(iter(self.weights.values()))).encoder
        settings = find_encoder(given["name"]).for_properties(given["settings"])
        return {"name": given["name"], **settings}

    def _judged(self, name: str, predictor: AnyPredictor) -> Candidate:
        predictor.to(self.device)
        scores, answers, _ = tested(predictor, self._batches(self.split.val))
        metrics = scores.compute()
        return Candidate(name, predictor, metrics.pop("score"), metrics, answers)

    def _batches(self, rows: np.ndarray) -> BatchLoader:
        loader = BatchLoader(self.store, rows, 256, self.outputs.names)
        place([loader], self.device)
        return loader

    # ------------------------------------------------------------------- the end

    def show(self, candidates: Sequence[Candidate]) -> None:
        """Print the validation results, the best first, and write them as a table."""
        rich.print(self._table("candidate", "On the validation crystals", candidates))
        rows = [
            {"candidate": one.name, "score": one.score, **one.metrics}
            for one in candidates
        ]
        pd.DataFrame(rows).to_csv(self.run.path / "candidates.csv", index=False)

    def _table(
        self, first: str, title: str, found: Sequence[Probed | Candidate]
    ) -> Table:
        """Return a table of the metric of each target, a row for each of `found`."""
        table = Table(first, title=title)
        kinds = Scores(self.outputs).kinds
        for target, kind in zip(self.outputs.targets, kinds, strict=True):
            unit = f" ({target.unit})" if target.unit and kind == "mae" else ""
            table.add_column(escape(f"{target.name}, {kind}{unit}"), justify="right")
        for one in found:
            cells = (f"{one.metrics[name]:.4g}" for name in self.outputs.names)
            table.add_row(escape(one.name), *cells)
        return table

    def finish(
        self,
        chosen: Candidate,
        candidates: Sequence[Candidate],
        looked: Sequence[Probed],
        best: str | None,
        frozen: str | None,
    ) -> Path:
        """Judge the chosen candidate on the test crystals; write everything."""
        run, store, split, outputs = self.run, self.store, self.split, self.outputs
        found = {"val": {**chosen.metrics, "score": chosen.score}}
        subsets = subsets_of(store, split, outputs.names, self.other)
        del subsets["val"]  # judged before
        for name, subset in subsets.items():
            batches = subset.batches(self.device)
            watched = Watched(chosen.predictor)
            scores, output, labels = tested(watched, batches)
            found[name] = scores.compute()
            if name == "test":
                write_predictions(run, subset, outputs, labels, output, watched.sd())
        kinds = Scores(outputs).kinds
        header = self._learned(best, frozen)
        overlap = find_seen(header, store, split, outputs.names, self.other)
        results = {
            "labels": len(split.train),
            "seed": self.config.seed,
            "dataset": store.hash,
            **overlap,
            "split": split.hash(store.material_ids),
            "split_by": split.made_by,
            **({"test_set": self.other.facts()} if self.other else {}),
            "chosen": chosen.name,
            "candidates": {one.name: one.score for one in candidates},
            "probe": {one.name: one.score for one in looked},
            **results_of(outputs, kinds, found),
        }
        run.write_json("results.json", results)
        nothing = Provenance(formulas=Formulas(), used=())
        earlier = header.provenance if header else nothing
        kind = header.kind if header else "encoder"
        provenance = replace(
            with_labelled(earlier, kind, store, split, outputs.names),
            licence=joint_licence([earlier.licence, store.licence]),
            overlap=word_of(overlap),
            origin=f"{self.config.out}: labels of {store.path.name}",
        )
        save_weights(run.weights, chosen.predictor, provenance=provenance)
        rich.print(escape(f"chosen: {chosen.name}"))
        for line in spoken(outputs, kinds, found):
            rich.print(escape(line))
        rich.print(escape(overlap_line(overlap)))
        run.print_tree()
        return run.weights

    def _learned(self, best: str | None, frozen: str | None) -> WeightsHeader | None:
        """Return the header of the weights that were used, with all they have seen."""
        if best is None:
            return None
        first = read_header(self.weights[best])
        names = list(self.weights) if frozen == TOGETHER else [frozen or best]
        others = [read_header(self.weights[name]) for name in names if name != best]
        return replace(first, provenance=with_teachers(first.provenance, others))
