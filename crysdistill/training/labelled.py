"""The common base of all runs on labels: split, scale of the labels, judging."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import rich
import torch
from rich.markup import escape

from crysdistill.encoders import Encoder
from crysdistill.errors import InputError
from crysdistill.ranks import on_first_rank
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
from crysdistill.training.augmentation import augmentation
from crysdistill.training.engine import device_of
from crysdistill.training.judging import (
    Subset,
    by_constant,
    one_column,
    outputs_for,
    results_of,
    spoken,
    subsets_of,
    tested,
    write_predictions,
)
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.overlap import (
    find_seen,
    overlap_line,
    with_labelled,
    word_of,
)
from crysdistill.training.run import Learning, Plan, RunConfig
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import (
    AcrossSettings,
    AugmentSettings,
    HeadSettings,
    SplitSettings,
    TrainerSettings,
)
from crysdistill.training.statistics import find_statistics
from crysdistill.training.supervised import SupervisedModule
from crysdistill.transfer.heads import CLASSIFIER_DROPOUT, PropertyHead
from crysdistill.transfer.outputs import Outputs, check_names
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.ridge import fit_last_layer
from crysdistill.transfer.seen import Learned
from crysdistill.transfer.targets import Target
from crysdistill.transfer.weights import Provenance, save_weights


@dataclass(kw_only=True)
class LabelSettings:
    """What is to be learned from labels, on which crystals, and where it is judged.

    Args:
        dataset: a store with the properties.
        target: the property: `name`, `unit`, `task`, `transform`.
        targets: several of them, instead of `target`; a crystal need not have labels
            for all.
        split: which crystals train, choose and judge.
        test: a test set in another store.
    """

    dataset: Path
    target: Target | None = None
    targets: list[Target] = field(default_factory=list)
    split: SplitSettings = field(default_factory=SplitSettings)
    test: AcrossSettings = field(default_factory=AcrossSettings)

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


@dataclass(kw_only=True)
class LabelledConfig(LabelSettings, RunConfig):
    """The settings of all networks that learn from labels.

    Args:
        head: hidden layers on top of the encoder.
        augment: how training crystals are changed in each step.
    """

    head: HeadSettings = field(default_factory=HeadSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)


Config = TypeVar("Config", bound=LabelledConfig)


class LabelledPlan(Plan[Config]):
    """Train on some crystals, choose the epoch on others, and judge on the rest.

    Subclasses provide the encoder, and may add a second loss.
    """

    data = "dataset"
    store: Store
    split: Split
    other: OtherStore | None
    overlap: dict[str, Any]

    # --------------------------------------------- what subclasses may override

    @abstractmethod
    def encoder(self, store: Store) -> Encoder:
        """Return the encoder to start with."""

    def before(self) -> Learned | None:
        """Return what is known of the pretrained weights or the teacher, if any."""
        return None

    def module(self, predictor: Predictor) -> SupervisedModule:
        """Return the module to train."""
        return SupervisedModule(predictor, self.config.optimizer)

    def head_start(self) -> Literal["ridge", "random"]:
        """Return the default of `head.start`."""
        return "random"

    def notes(self) -> dict[str, Any]:
        """Return further entries for `results.json`."""
        return {}

    def taught_by(self) -> Provenance | None:
        """Return the provenance of the teacher, if there is one."""
        return None

    # --------------------------------------------------------------- the plan

    def open(self) -> Store:
        """Open the dataset and look at its labels."""
        store = self.store = Store.open(self.config.dataset)
        for target in self.config.all_targets:
            target.check(store.property(target.name), store.material_ids)
        self.other = open_other(self.config.test, self.config.all_targets, store)
        return store

    def prepare(self, store: Store, trainer: TrainerSettings) -> Learning:
        """Split, fit the scale of the labels, make the predictor and its batches."""
        config, names = self.config, [t.name for t in self.config.all_targets]
        labels = self.labels()
        self.split = on_first_rank(
            lambda: make_split(store, config.split, one_column(labels))
        )
        train = self.split.train
        outputs = outputs_for(
            config.all_targets, labels, self.split, store.material_ids
        )
        self._choose_tested(outputs)
        self.overlap = find_seen(self.before(), store, self.split, names, self.other)
        module = self.module(self._predictor(store, outputs))
        module.augment, module.seed = augmentation(config.augment), config.seed
        size, budget = trainer.batch_size, trainer.edge_budget
        number = module.scores.chooses
        return Learning(
            module=module,
            train=BatchLoader(store, train, size, names, True, config.seed, budget),
            val=BatchLoader(store, self.split.val, size, names, edge_budget=budget),
            monitor=f"val_{number}",
            mode="max" if number in ("auc", "accuracy") else "min",
        )

    def _choose_tested(self, outputs: Outputs) -> None:
        """Leave crystals of the training part out of a test set in another store."""
        other, keep = self.other, self.config.test.keep_shared
        if other is not None:
            shared = on_first_rank(lambda: find_shared(other, self.store, self.split))
            self.other = choose_tested(other, shared, keep, outputs)

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
        """Write the split; print the targets and the numbers of crystals."""
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
        if self.other is not None:
            rich.print(escape(self.other.remark))
        if len(targets) > 1:
            for target, count in zip(targets, known[split.train].sum(0), strict=True):
                rich.print(escape(f"  {target.name}: {count:,} labels to learn from"))
        predictor = learning.module.predictor
        assert isinstance(predictor, Predictor)  # noqa: S101 - for the type checker
        rich.print(_weights_line(predictor))
        if (self.config.head.start or self.head_start()) == "ridge":
            self._start_head(predictor)
            rich.print("the head begins with a fit to the training labels")
        rich.print(escape(overlap_line(self.overlap)))

    @torch.no_grad()
    def _start_head(self, predictor: Predictor) -> None:
        """Fit the last layer to the encoder's embeddings of the training crystals.

        Batch norms that are not frozen first take the statistics of these crystals, as
        they do in training; otherwise the first step would change the predictions.
        """

        def fit() -> dict[str, torch.Tensor]:
            device = device_of(self.config.trainer)
            predictor.to(device)
            names = predictor.outputs.names
            loader = BatchLoader(self.store, self.split.train, 256, names)
            place([loader], device)
            find_statistics(predictor, loader, predictor)
            found = [(predictor.embed(b).crystals.cpu(), b.targets) for b in loader]
            embeddings, labels = (torch.cat(p) for p in zip(*found, strict=True))
            predictor.to("cpu")
            fit_last_layer(predictor.head, predictor.outputs, embeddings, labels.cpu())
            return predictor.state_dict()

        predictor.load_state_dict(on_first_rank(fit))
        predictor.train()

    @torch.no_grad()
    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Predict the test set once, with the weights that validation chose."""
        module = learning.module
        assert isinstance(module, SupervisedModule)  # noqa: S101 - for the type checker
        config, split, store = self.config, self.split, self.store
        results: dict[str, Any] = {
            "labels": len(split.train),
            "seed": config.seed,
            "dataset": store.hash,
            **self.overlap,
            "split": split.hash(store.material_ids),
            "split_by": split.made_by,
            **({"test_set": self.other.facts()} if self.other else {}),
            **module.predictor.frozen_report(),
            **self.notes(),
        }
        found = {
            name: self._predict(module, name, run if name == "test" else None)
            for name in self._subsets()
        }
        if "test" in found:
            found["constant"] = by_constant(
                module.predictor.outputs, store, split, self._subsets()["test"]
            )
        results |= results_of(module.predictor.outputs, module.scores.kinds, found)
        run.write_json("results.json", results)
        provenance = self._provenance(store)
        module.to("cpu")
        save_weights(run.weights, module.predictor, provenance=provenance)
        for line in spoken(module.predictor.outputs, module.scores.kinds, found):
            rich.print(escape(line))

    def _subsets(self) -> dict[str, Subset]:
        """Return the crystals to judge on, by the name of their number."""
        names = [target.name for target in self.config.all_targets]
        return subsets_of(self.store, self.split, names, self.other)

    def _predict(
        self, module: SupervisedModule, name: str, run: RunDirectory | None = None
    ) -> dict[str, float]:
        """Return the numbers of a subset; write its predictions into a run."""
        subset = self._subsets()[name]
        device = device_of(self.config.trainer)
        module.to(device).eval()
        predictor = module.predictor
        scores, output, labels = tested(predictor, subset.batches(device))
        if run is not None:
            write_predictions(run, subset, predictor.outputs, labels, output)
        return scores.compute()

    def _provenance(self, store: Store) -> Provenance:
        """Return the provenance, including that of pretrained weights and teachers."""
        before, taught = self.before(), self.taught_by()
        nothing = Provenance(formulas=Formulas(), used=())
        earlier = before.provenance if before else taught or nothing
        licences = [earlier.licence, store.licence]
        origin = f"{self.config.out}: labels of {store.path.name}"
        if taught is not None:
            licences.append(taught.licence)
            origin += f"; taught by {taught.origin}" if taught.origin else ""
        kind = before.kind if before else "encoder"
        names = [target.name for target in self.config.all_targets]
        return replace(
            with_labelled(earlier, kind, store, self.split, names),
            licence=joint_licence(licences),
            # Being clean of other datasets does not mean clean of this one.
            overlap=word_of(self.overlap),
            origin=origin,
        )


def _weights_line(predictor: Predictor) -> str:
    """Return a line with the numbers of learning and frozen weights."""
    report = predictor.frozen_report()
    line = f"{report['trainable_parameters']:,} weights learn"
    if report["frozen_parameters"]:
        line += (
            f", {report['frozen_parameters']:,} are frozen; batch norms there: "
            f"{report['batch_norm']}"
        )
    return line
