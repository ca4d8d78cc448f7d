"""The best predictor for some labels: makes candidates and chooses by validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import rich
from rich.markup import escape
from rich.table import Table

from crysdistill.errors import InputError
from crysdistill.schema import dump_config
from crysdistill.splits import Split, make_split
from crysdistill.store.formulas import Formulas
from crysdistill.store.origins import joint_licence
from crysdistill.store.store import Store
from crysdistill.teachers.frozen import FrozenTeacher, asked
from crysdistill.training.across import (
    OtherStore,
    choose_tested,
    find_shared,
    open_other,
)
from crysdistill.training.candidates import (
    ALL_WEIGHTS,
    TOGETHER,
    Candidate,
    Given,
    Workshop,
    same_split,
)
from crysdistill.training.judging import (
    by_constant,
    one_column,
    outputs_for,
    results_of,
    spoken,
    subsets_of,
    tested,
    write_predictions,
)
from crysdistill.training.labelled import LabelledConfig
from crysdistill.training.overlap import (
    find_seen,
    overlap_line,
    with_labelled,
    word_of,
)
from crysdistill.training.pretrained import load_pretrained
from crysdistill.training.probe import COMPOSITION, UNTRAINED, Probed, advice
from crysdistill.training.runs import RunDirectory, open_run
from crysdistill.training.settings import EncoderChoice
from crysdistill.transfer.frozen import check_enough
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.scores import Scores
from crysdistill.transfer.seen import Learned, with_teachers
from crysdistill.transfer.shipped import LARGE, shipped
from crysdistill.transfer.spread import Watched
from crysdistill.transfer.weights import Provenance, read_header, save_weights


@dataclass(kw_only=True)
class FitConfig(LabelledConfig):
    """The best predictor for some labels, of any kind.

    Candidates are a network from scratch, one that starts from pretrained weights,
    Gaussian processes on frozen embeddings, on the answers of teachers and on the
    composition, and the weighted mean of these that predicts the validation crystals
    best. Validation chooses one, and only that one predicts the test crystals, once.

    Args:
        weights: pretrained encoders, by file or by the name of one in the package. A
            probe chooses one of them to start from, and one to freeze, or all of them
            side by side. None takes all small ones of the package that read the
            dataset's graph, but none that a foreign model taught. If empty, networks
            are trained only from scratch.
        teachers: foreign models to freeze beside the weights: `chgnet`, `dftd4` or
            `ewald`. The predictor then asks them about every new crystal.
        encoder: of the network from scratch; by default that of the first weights.
        repeats: networks of each kind, with different seeds; their mean predicts.
    """

    out: Path = Path("runs/fit")
    weights: list[Path] | None = None
    teachers: list[str] = field(default_factory=list)
    encoder: EncoderChoice = field(default_factory=lambda: {"name": "cgcnn"})
    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise InputError(f"`repeats` is {self.repeats} but must be at least 1")
        if self.weights is not None:  # names of the package are texts
            self.weights = [Path(path) for path in self.weights]
        given = {"weights": [str(path) for path in self.weights or ()]}
        given["teachers"] = self.teachers
        for key, names in given.items():
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise InputError(f"`{key}` names {twice[0]} twice; leave one out")


def fit(config: FitConfig) -> Path:
    """Make every candidate, choose one, judge it; return its weights file's path.

    With `resume=true`, networks that an interrupted run has trained are reused.

    Raises:
        InputError: the dataset, the weights, a teacher or a setting cannot be used.
    """
    store = Store.open(config.dataset)
    for target in config.all_targets:
        target.check(store.property(target.name), store.material_ids)
    other = open_other(config.test, config.all_targets, store)
    paths = _named(_chosen_from(config, store), config.teachers)
    own = {name: load_pretrained(path, store) for name, path in paths.items()}
    foreign = {name: FrozenTeacher(name) for name in config.teachers}
    names = [target.name for target in config.all_targets]
    labels = np.stack([store.property(name) for name in names], axis=1)  # (B, T)
    split = make_split(store, config.split, one_column(labels))
    for target, known in zip(config.all_targets, labels[split.train].T, strict=True):
        check_enough(target.name, known)
    text = dump_config(config)
    with open_run(config.out, text, config.resume, config.overwrite, parts=True) as run:
        split.write(run.path / "split.csv", store.material_ids)
        # Read the split as every network will, in the same order: all have one scale.
        split = make_split(store, same_split(run), one_column(labels))
        outputs = outputs_for(config.all_targets, labels, split, store.material_ids)
        unlabelled = int(np.isnan(labels).all(axis=1).sum())
        rich.print(
            escape(
                f"fit: {', '.join(names)} from {len(split.train):,} crystals, "
                f"{len(split.val):,} to choose by, {len(split.test):,} to judge"
                + (f"; {unlabelled:,} have no label" if unlabelled else "")
            )
        )
        if other is not None:
            shared = find_shared(other, store, split)
            other = choose_tested(other, shared, config.test.keep_shared, outputs)
            rich.print(escape(other.remark))
        shop = Workshop(
            config, config.encoder, config.repeats, store, split, outputs, run,
            Given.of(paths, own, foreign),
        )  # fmt: skip
        rows = np.concatenate([split.train, split.val, split.test])
        progress = config.trainer.progress
        with asked(
            foreign.values(), store, rows,
            fallback=run.path, device=shop.device, progress=progress,
        ):  # fmt: skip
            return _Fit(config, store, split, outputs, run, other, shop).run_all()


def _chosen_from(config: FitConfig, store: Store) -> Sequence[Path]:
    """Return the given weights, or else those of the package that can be used.

    They read the graph of the dataset. No foreign model taught them, of whose crystals
    nobody knows whether they are in the dataset. And they are not large: a large
    encoder takes twice the time, and was not better on average.
    """
    if config.weights is not None:
        return config.weights
    headers = {name: read_header(path) for name, path in shipped().items()}
    return [
        Path(name)
        for name, header in headers.items()
        if header.graph == store.graph
        and not header.provenance.taught_by
        and not name.endswith(LARGE)
    ]


def _named(weights: Sequence[Path], teachers: Sequence[str]) -> dict[str, Path]:
    """Return weights by the name of their file or run; by their path if ambiguous."""
    short = [p.parent.name if p.stem == "weights" else p.stem for p in weights]
    taken = [*short, *teachers, COMPOSITION, UNTRAINED, TOGETHER, ALL_WEIGHTS]
    return {
        name if taken.count(name) == 1 else str(path): path
        for name, path in zip(short, weights, strict=True)
    }


class _Fit:
    """One fit: what to expect, the candidates, the choice, and its judgement.

    Args:
        config: the user's configuration.
        store: the dataset.
        split: of its crystals.
        outputs: the targets to predict.
        run: the directory for all results.
        other: the crystals to test on in another store.
        shop: makes the candidates.
    """

    def __init__(
        self,
        config: FitConfig,
        store: Store,
        split: Split,
        outputs: Outputs,
        run: RunDirectory,
        other: OtherStore | None,
        shop: Workshop,
    ) -> None:
        self.config, self.store, self.split = config, store, split
        self.outputs, self.run, self.other = outputs, run, other
        self.shop = shop

    def run_all(self) -> Path:
        """Look ahead, make candidates, choose one and judge it; see `fit`."""
        given = self.shop.given
        looked = self.shop.probe()
        best = next((one.name for one in looked if one.name in given.weights), None)
        title = "Cross-validated on the labels"
        rich.print(self._table("frozen embeddings of", title, looked))
        rich.print(escape(advice(looked, best)))
        frozen = next((one.name for one in looked if one.name in given.own), None)
        if best is not None:
            rich.print(escape(f"`fine-tuned` starts from {best}; `frozen` is {frozen}"))
        made = self.shop.make(best, frozen)
        every = sorted([*made, *self.shop.mean_of(made)], key=lambda one: one.score)
        self._show(every)
        return self._finish(every, looked)

    def _show(self, candidates: Sequence[Candidate]) -> None:
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

    def _finish(
        self, candidates: Sequence[Candidate], looked: Sequence[Probed]
    ) -> Path:
        """Judge the best candidate on the test crystals; write everything.

        Args:
            candidates: the best first.
            looked: the probe's results.
        """
        run, store, split, outputs = self.run, self.store, self.split, self.outputs
        chosen = candidates[0]
        before = self._learned(chosen)
        found = self._judge(chosen)
        kinds = Scores(outputs).kinds
        overlap = find_seen(before, store, split, outputs.names, self.other)
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
        nothing = Provenance(formulas=Formulas(), used=())
        earlier = before.provenance if before else nothing
        kind = before.kind if before else "encoder"
        provenance = replace(
            with_labelled(earlier, kind, store, split, outputs.names),
            licence=joint_licence([earlier.licence, store.licence]),
            overlap=word_of(overlap),
            origin=f"{self.config.out}: labels of {store.path.name}",
        )
        save_weights(run.weights, chosen.predictor, provenance=provenance)
        run.write_json("results.json", results)  # last: it says that the run is done
        rich.print(escape(f"chosen: {chosen.name}"))
        for line in spoken(outputs, kinds, found):
            rich.print(escape(line))
        rich.print(escape(overlap_line(overlap)))
        needed = sorted(chosen.sources & self.shop.given.foreign.keys())
        if needed:
            rich.print(f"to predict, it asks {', '.join(needed)} about every crystal")
        run.print_tree()
        return run.weights

    def _judge(self, chosen: Candidate) -> dict[str, dict[str, float]]:
        """Return the metrics of every subset; write the predictions of the test set."""
        found = {"val": {**chosen.metrics, "score": chosen.score}}
        names, device = self.outputs.names, self.shop.device
        subsets = subsets_of(self.store, self.split, names, self.other)
        del subsets["val"]  # judged before
        for name, subset in subsets.items():
            elsewhere = subset.store is not self.store
            with asked(
                [chosen.predictor], subset.store, subset.rows,
                fallback=self.run.path / "test" if elsewhere else self.run.path,
                device=device,
                progress=self.config.trainer.progress,
            ):  # fmt: skip
                watched = Watched(chosen.predictor)
                scores, output, labels = tested(watched, subset.batches(device))
            found[name] = scores.compute()
            if name == "test":
                sd = watched.sd()
                write_predictions(self.run, subset, self.outputs, labels, output, sd)
                found["constant"] = by_constant(
                    self.outputs, self.store, self.split, subset
                )
        return found

    def _learned(self, chosen: Candidate) -> Learned | None:
        """Return what the weights and teachers of a candidate have seen together."""
        given = self.shop.given
        own = [read_header(path) for name, path in given.weights.items()
               if name in chosen.sources]  # fmt: skip
        teachers = [one.teacher.learned for name, one in given.teachers.items()
                    if name in chosen.sources]  # fmt: skip
        others = [one for one in (*own[1:], *teachers) if one is not None]
        if not own and not others:
            return None
        kind = own[0].kind if own else "encoder"
        first = own[0].provenance if own else Provenance(formulas=Formulas(), used=())
        return _Joined(kind, with_teachers(first, others))


@dataclass(frozen=True)
class _Joined:
    """What several models have seen together; see `Learned`."""

    kind: str
    provenance: Provenance
