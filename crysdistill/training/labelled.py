"""What all runs on labels have in common: their split, their scale, their judgement."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import rich
import torch
from rich.markup import escape

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.ranks import on_first_rank
from crysdistill.splits import Split, make_split
from crysdistill.store.origins import joint_licence
from crysdistill.store.store import Store
from crysdistill.training.engine import device_of
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.run import Learning, Plan, RunConfig
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import HeadSettings, SplitSettings, TrainerSettings
from crysdistill.training.supervised import SupervisedModule
from crysdistill.transfer.heads import CLASSIFIER_DROPOUT, PropertyHead
from crysdistill.transfer.outputs import Outputs, check_names
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.scores import WORDS, Scores
from crysdistill.transfer.seen import Learned, seen
from crysdistill.transfer.targets import Normalizer, Target
from crysdistill.transfer.weights import Provenance, save_weights


@dataclass(kw_only=True)
class LabelledConfig(RunConfig):
    """What all runs on labels share.

    Args:
        dataset: a store with the properties.
        target: the property: `name`, `unit`, `task`, `transform`.
        targets: several of them, in the place of `target`; a crystal need not have the
            labels of all.
        head: hidden layers on top of the encoder.
        split: which crystals train, choose and judge.
    """

    dataset: Path
    target: Target | None = None
    targets: list[Target] = field(default_factory=list)
    head: HeadSettings = field(default_factory=HeadSettings)
    split: SplitSettings = field(default_factory=SplitSettings)

    def __post_init__(self) -> None:
        if self.target is not None and self.targets:
            raise InputError(
                "`target` and `targets` are both given; put all into `targets`"
            )
        if self.target is None and not self.targets:
            raise InputError(
                "`target.name` is missing; give it in the config or as "
                "`target.name=...`, or several as `targets`"
            )
        check_names(self.all_targets)

    @property
    def all_targets(self) -> list[Target]:
        """The targets, one or several."""
        return self.targets or ([self.target] if self.target else [])


Config = TypeVar("Config", bound=LabelledConfig)


class LabelledPlan(Plan[Config]):
    """Learn a predictor on some crystals, choose its epoch on others, judge on third.

    Subclasses say where the encoder comes from, and may add a second loss.
    """

    data = "dataset"

    store: Store
    split: Split
    overlap: str

    # ------------------------------------------------- what subclasses may say

    @abstractmethod
    def encoder(self, store: Store) -> Encoder:
        """Return the encoder to begin with."""

    def before(self) -> Learned | None:
        """Return what is known of weights or a teacher, where there are some."""
        return None

    def module(self, predictor: Predictor) -> SupervisedModule:
        """Return what learns."""
        return SupervisedModule(predictor, self.config.optimizer)

    def taught_by(self) -> Provenance | None:
        """Return where a second source of knowledge comes from, where there is one."""
        return None

    # --------------------------------------------------------------- the plan

    def open(self) -> Store:
        """Open the dataset and look at its labels."""
        store = self.store = Store.open(self.config.dataset)
        for target in self.config.all_targets:
            target.check(store.property(target.name), store.material_ids)
        self.overlap = seen(self.before(), store.structures_hash)[1]
        return store

    def prepare(self, store: Store, trainer: TrainerSettings) -> Learning:
        """Split, fit the scale of the labels, make the predictor and its batches."""
        config, names = self.config, [t.name for t in self.config.all_targets]
        labels = self.labels()
        self.split = on_first_rank(
            lambda: make_split(store, config.split, _one_column(labels))
        )
        train, ids = self.split.train, np.array(store.material_ids)
        normalizers = [
            Normalizer.fit(target, labels[train, t], ids[train])
            for t, target in enumerate(config.all_targets)
        ]
        outputs = Outputs(config.all_targets, normalizers)
        _check_subsets(outputs, labels, self.split)
        module = self.module(self._predictor(store, outputs))
        size, budget = trainer.batch_size, trainer.edge_budget
        number = module.scores.chooses
        return Learning(
            module=module,
            train=BatchLoader(store, train, size, names, True, config.seed, budget),
            val=BatchLoader(store, self.split.val, size, names, edge_budget=budget),
            monitor=f"val_{number}",
            mode="max" if number in ("auc", "accuracy") else "min",
        )

    def labels(self) -> np.ndarray:
        """Return all labels, (B, T) float64, NaN where not known."""
        columns = [self.store.property(t.name) for t in self.config.all_targets]
        return np.stack(columns, axis=1)

    def _predictor(self, store: Store, outputs: Outputs) -> Predictor:
        encoder = self.encoder(store)
        only_classes = all(one.classes for one in outputs.normalizers)
        settings = {
            "dropout": CLASSIFIER_DROPOUT if only_classes else 0.0,
            **encoder.HEAD,
            **self.config.head.given(),
        }
        head = PropertyHead(encoder.crystal_width, outputs=outputs.size, **settings)
        return Predictor(encoder, head, outputs, store.graph)

    def begin(self, learning: Learning, run: RunDirectory) -> None:
        """Write the split, and say what is learned from how much."""
        store, split = self.store, self.split
        table = run.path / "split.csv"
        on_first_rank(lambda: split.write(table, store.material_ids))
        verb = type(self).__name__.removesuffix("Plan").lower()
        targets = self.config.all_targets
        known = ~np.isnan(self.labels())  # (B, T)
        unlabelled = int((~known.any(axis=1)).sum())
        names = ", ".join(target.name for target in targets)
        lacks = f"no `{names}`" if len(targets) == 1 else "no label"
        rich.print(
            escape(
                f"{verb}: {names} from {len(split.train):,} crystals, "
                f"{len(split.val):,} to choose the epoch, {len(split.test):,} to judge"
                + (f"; {unlabelled:,} have {lacks}" if unlabelled else "")
            )
        )
        if len(targets) > 1:
            for target, count in zip(targets, known[split.train].sum(0), strict=True):
                rich.print(escape(f"  {target.name}: {count:,} labels to learn from"))
        predictor = learning.module.predictor
        assert isinstance(predictor, Predictor)  # noqa: S101 - for the type checker
        rich.print(_weights_line(predictor))
        rich.print(f"overlap: {escape(self.overlap)}")

    @torch.no_grad()
    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Predict the test set, once, with the weights that validation chose."""
        module = learning.module
        assert isinstance(module, SupervisedModule)  # noqa: S101 - for the type checker
        config, split, store = self.config, self.split, self.store
        results: dict[str, Any] = {
            "labels": len(split.train),
            "seed": config.seed,
            "dataset": store.hash,
            "overlap": self.overlap,
            "split": split.hash(store.material_ids),
            "split_by": split.made_by,
            **module.predictor.frozen_report(),
        }
        found = {
            subset: self._predict(module, subset, run)
            for subset in ("val", "test")
            if len(getattr(split, subset))
        }
        results |= _results(module.predictor.outputs, module.scores.kinds, found)
        run.write_json("results.json", results)
        provenance = self._provenance(store)
        module.to("cpu")
        save_weights(run.weights, module.predictor, provenance=provenance)
        for line in _spoken(module.predictor.outputs, module.scores.kinds, found):
            rich.print(escape(line))

    def _predict(
        self, module: SupervisedModule, subset: str, run: RunDirectory
    ) -> dict[str, float]:
        """Return the numbers of a subset; write the predictions of the test set."""
        predictor, store = module.predictor, self.store
        rows = getattr(self.split, subset)
        device = device_of(self.config.trainer)
        module.to(device).eval()
        loader = BatchLoader(store, rows, 256, predictor.outputs.names)
        place([loader], device)
        scores = Scores(predictor.outputs).to(device)
        outputs, labels = [], []
        for batch in loader:
            outputs.append(predictor.answer(batch))
            labels.append(batch.targets)
            scores.update(outputs[-1], labels[-1])
        if subset == "test":
            found = predictor.outputs.predictions(torch.cat(outputs)).cpu()  # (B, T)
            self._write(run, rows, torch.cat(labels).cpu(), found)
        return scores.compute()

    def _write(
        self,
        run: RunDirectory,
        rows: np.ndarray,
        truth: torch.Tensor,
        found: torch.Tensor,
    ) -> None:
        """Write truth and prediction of the test crystals, a pair for each target."""
        names = [target.name for target in self.config.all_targets]
        several = len(names) > 1
        header = ["material_id"]
        for name in names:
            before = f"{name}_" if several else ""
            header += [f"{before}truth", f"{before}prediction"]
        pairs = torch.stack((truth, found), dim=2).flatten(1).tolist()  # (B, 2 T)
        ids = self.store.material_ids
        lines = (
            [ids[row], *("" if np.isnan(x) else x for x in numbers)]
            for row, numbers in zip(rows.tolist(), pairs, strict=True)
        )
        run.write_csv("predictions.csv", header, lines)

    def _provenance(self, store: Store) -> Provenance:
        """Hand on what pretrained weights and teachers say of themselves."""
        before, taught = self.before(), self.taught_by()
        earlier = before.provenance if before else taught or Provenance()
        licences = [earlier.licence, store.licence]
        origin = f"{self.config.out}: labels of {store.path.name}"
        if taught is not None:
            licences.append(taught.licence)
            origin += f"; taught by {taught.origin}" if taught.origin else ""
        return replace(
            earlier,
            licence=joint_licence(licences),
            # Clean of other datasets says nothing about this one.
            overlap=seen(before, store.structures_hash)[0],
            origin=origin,
        )


def _one_column(labels: np.ndarray) -> np.ndarray:
    """Return one label for each crystal that has any, for splits: (B, T) to (B,)."""
    if labels.shape[1] == 1:
        return labels[:, 0]
    known = ~np.isnan(labels)
    filled = np.where(known[:, 0], labels[:, 0], np.nanmean(labels[:, 0]))
    return np.where(known.any(axis=1), filled, np.nan)


def _check_subsets(outputs: Outputs, labels: np.ndarray, split: Split) -> None:
    """Refuse subsets that cannot judge a target, and classes that nobody can learn."""
    for t, target in enumerate(outputs.targets):
        classes = outputs.normalizers[t].classes
        for subset in ("val", "test"):
            rows = getattr(split, subset)
            if len(rows) and np.isnan(labels[rows, t]).all():
                raise InputError(
                    f"no `{subset}` crystal has a label `{target.name}`; enlarge that "
                    "subset, change `split.seed`, or leave the target out"
                )
        if not classes:
            continue
        for subset in ("train", "val", "test"):
            known = labels[getattr(split, subset), t]
            found = np.unique(known[~np.isnan(known)])
            if len(found) and found.max() >= classes:
                raise InputError(
                    f"`{subset}` has class {found.max():g} of `{target.name}`, which "
                    "no training crystal has; set `split.stratify=true`, or give more "
                    "labels"
                )
            # No AUC is defined there, and zero would be wrong.
            if len(found) == 1 and classes == 2:
                raise InputError(
                    f"all `{subset}` crystals have `{target.name}` {found[0]:g}; "
                    "enlarge that subset, change `split.seed` or set "
                    "`split.stratify=true`"
                )


def _results(
    outputs: Outputs, kinds: list[str], found: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Return the numbers for `results.json`: of one target, or of each."""
    if len(outputs.targets) == 1:
        target = outputs.targets[0]
        numbers = {subset: values[target.name] for subset, values in found.items()}
        about = {"target": target.name, "unit": target.unit, "metric": kinds[0]}
        return {**about, **numbers}
    each = {
        target.name: {
            "unit": target.unit,
            "metric": kind,
            **{subset: values[target.name] for subset, values in found.items()},
        }
        for target, kind in zip(outputs.targets, kinds, strict=True)
    }
    scores = {subset: values["score"] for subset, values in found.items()}
    names = ", ".join(outputs.names)
    about = {"target": names, "unit": "", "metric": "score"}
    return {**about, **scores, "targets": each}


def _spoken(
    outputs: Outputs, kinds: list[str], found: dict[str, dict[str, float]]
) -> list[str]:
    """Return a line for each target with its numbers."""
    lines = []
    for target, kind in zip(outputs.targets, kinds, strict=True):
        unit = f" {target.unit}" if kind == "mae" and target.unit else ""
        said = {
            subset: f"{WORDS[kind]} {values[target.name]:.4g}{unit}"
            for subset, values in found.items()
        }
        name = f"{target.name}: " if len(kinds) > 1 else ""
        lines.append(
            f"{name}{said['val']} on validation, {said.get('test', 'none')} on test"
        )
    return lines


def _weights_line(predictor: Predictor) -> str:
    """Say how many weights learn and how many are frozen."""
    report = predictor.frozen_report()
    line = f"{report['trainable_parameters']:,} weights learn"
    if report["frozen_parameters"]:
        line += (
            f", {report['frozen_parameters']:,} are frozen; batch norms there: "
            f"{report['batch_norm']}"
        )
    return line
