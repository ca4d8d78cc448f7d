"""Training on labels: from scratch, distilled from a teacher, or fine-tuned."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import rich
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.markup import escape
from torch import Tensor
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import BinaryAUROC

from crysdistill.store.origins import joint_licence
from crysdistill.splits import Split, make_split
from crysdistill.store.store import Store
from crysdistill.encoders import Encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.ranks import alone, on_first_rank, rank
from crysdistill.schema import dump_config
from crysdistill.training.engine import fit, shared_loss
from crysdistill.training.launch import check_same, joined
from crysdistill.training.loader import ROOM, BatchLoader, free_memory
from crysdistill.training.means import EpochMeans
from crysdistill.training.optimizers import make_optimizer
from crysdistill.training.plans import (
    DistillConfig,
    FinetuneConfig,
    LabelledConfig,
    TrainConfig,
)
from crysdistill.training.runs import RunDirectory, open_run
from crysdistill.training.settings import OptimizerSettings
from crysdistill.transfer.distillation import Distillation, Teacher, random_teacher
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.seen import seen
from crysdistill.transfer.targets import Normalizer
from crysdistill.transfer.teacher_cache import TeacherCache, load_or_cache
from crysdistill.transfer.weights import (
    Provenance,
    WeightsHeader,
    load_encoder,
    read_header,
    save_weights,
)


class SupervisedModule(L.LightningModule):
    """A predictor, and where there is one, the teacher's part of the loss.

    Args:
        predictor: what learns.
        optimizer: how weights move.
        distillation: compares atom embeddings with the teacher's.
        teacher: those embeddings, of all training crystals.
        encoder_lr: learning rate of the encoder, as a share of the head's.
    """

    def __init__(
        self,
        predictor: Predictor,
        optimizer: OptimizerSettings,
        distillation: Distillation | None = None,
        teacher: TeacherCache | None = None,
        encoder_lr: float = 1.0,
    ) -> None:
        super().__init__()
        self.predictor = predictor
        self.distillation = distillation
        self.teacher = teacher
        self.encoder_lr = encoder_lr
        self.optimizer_settings = optimizer
        classifies = predictor.target.task == "classification"
        self.metric_name, self.mode = ("auc", "max") if classifies else ("mae", "min")
        self.val_metric = BinaryAUROC() if classifies else MeanAbsoluteError()
        self.train_means, self.val_means = EpochMeans(), EpochMeans()

    def on_fit_start(self) -> None:
        """Let the teacher's embeddings be where the student's are, if they fit."""
        teacher = self.teacher
        if teacher and teacher.embeddings.nbytes < ROOM * free_memory(self.device):
            self.teacher = teacher.to(self.device)

    def losses(self, batch: CrystalBatch, seed: int) -> dict[str, Tensor]:
        """Return what is learned from, as `loss`, and its parts.

        It is (1 - alpha) * property loss + alpha * embedding loss.
        """
        atoms, crystals = self.predictor.embed(batch)
        output = self.predictor.head(crystals, batch.rows)
        loss = self.predictor.loss(output, batch.targets)
        losses = {"property": loss}
        if self.distillation is not None and self.teacher is not None:
            known = self.teacher.gather(batch.rows, len(atoms))  # (N, F)
            known = known.to(atoms.device, non_blocking=True)
            losses["embedding"] = self.distillation(atoms, known, batch)
            loss = self.distillation.total(loss, losses["embedding"])
        return {**losses, "loss": loss}

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, as `shared_loss` has it."""
        losses = self.losses(batch, 0)
        self.train_means.add(losses, batch)
        return shared_loss(losses["loss"])

    def on_train_epoch_end(self) -> None:
        """Log the losses of the epoch."""
        means = self.train_means.compute()
        self.log_dict({f"train_{name}": mean for name, mean in means.items()})

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Add a validation batch to the number that chooses the epoch."""
        output = self.predictor(batch)
        loss = self.predictor.loss(output, batch.targets)
        self.val_means.add({"loss": loss}, batch)
        value = self.predictor.interpret(output)
        truth = batch.targets[:, 0]
        if self.metric_name == "auc":
            truth = truth.long()
        self.val_metric.update(value, truth)

    def on_validation_epoch_end(self) -> None:
        """Log the validation numbers."""
        name = f"val_{self.metric_name}"
        self.log(name, self.val_metric.compute(), prog_bar=True)
        self.log("val_loss", self.val_means.compute().get("loss", float("nan")))
        self.val_metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what an epoch has found so far."""
        checkpoint["train_means"] = self.train_means.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.train_means.restore(checkpoint["train_means"], self.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return optimizer and schedule."""
        steps = int(self.trainer.estimated_stepping_batches)
        per_epoch = max(1, steps // (self.trainer.max_epochs or 1))
        settings = self.optimizer_settings
        encoder = list(self.predictor.encoder.parameters())
        inside = {id(p) for p in encoder}
        rest = [p for p in self.parameters() if id(p) not in inside]
        groups = [(rest, settings.lr), (encoder, settings.lr * self.encoder_lr)]
        return make_optimizer(groups, settings, steps, per_epoch)


def train(config: TrainConfig) -> Path:
    """Train a predictor from scratch; return the path of its weights file."""
    return _run(config, "train")


def distill(config: DistillConfig) -> Path:
    """Train a predictor that a teacher helps; return the path of its weights file."""
    return _run(config, "distill")


def finetune(config: FinetuneConfig) -> Path:
    """Train a predictor from pretrained weights; return its weights file's path."""
    return _run(config, "finetune")


def _run(config: LabelledConfig, verb: str) -> Path:
    """Train, choose the epoch on validation, look at the test set once."""
    with ExitStack() as held:  # the run directory, to the end
        return _train(config, verb, held)


def _train(config: LabelledConfig, verb: str, held: ExitStack) -> Path:
    """Prepare, learn on all ranks, judge on the first."""
    store = Store.open(config.dataset)
    name = config.target.name
    labels = store.property(name)
    config.target.check(labels, store.material_ids)
    before = _before(config)
    _, overlap = seen(before, store.structures_hash)
    with joined(config.trainer) as trainer:
        check_same("dataset", store.hash)
        split = on_first_rank(lambda: make_split(store, config.split, labels))
        _check_classes(config, labels, split)
        ids = np.array(store.material_ids)
        train = split.train
        normalizer = Normalizer.fit(config.target, labels[train], ids[train])
        L.seed_everything(config.seed, verbose=False)
        predictor = _predictor(config, store, normalizer)
        teacher = None
        if isinstance(config, DistillConfig):
            teacher = on_first_rank(partial(_teacher, config, store, split))
        size, budget = trainer.batch_size, trainer.edge_budget
        loaders = (
            BatchLoader(store, train, size, [name], True, config.seed, budget),
            BatchLoader(store, split.val, size, [name], edge_budget=budget),
        )
        # Only now, so that a mistake in the configuration leaves no folder behind.
        text = dump_config(config)
        run = held.enter_context(
            open_run(config.out, text, config.resume, config.overwrite)
        )
        table = run.path / "split.csv"
        on_first_rank(lambda: split.write(table, store.material_ids))
        module = _module(config, predictor, teacher, store, run, split)
        unlabelled = int(np.isnan(labels).sum())
        rich.print(
            f"{verb}: {name} from {len(train):,} crystals, {len(split.val):,} to "
            f"choose the epoch, {len(split.test):,} to judge"
            + (f"; {unlabelled:,} have no `{name}`" if unlabelled else "")
        )
        rich.print(_weights_line(module.predictor))
        rich.print(f"overlap: {escape(overlap)}")
        fit(
            module,
            *loaders,
            run,
            trainer,
            monitor=f"val_{module.metric_name}",
            mode=module.mode,
            seed=config.seed,
        )
        first = rank() == 0
    if not first:  # the first alone judges and writes
        return run.weights
    results = _judge(module, store, split, run, config, overlap)
    provenance = _provenance(config, store, before)
    save_weights(run.weights, module.predictor, provenance=provenance)
    unit = f" {config.target.unit}" if module.metric_name == "mae" else ""
    said = {
        subset: f"{module.metric_name.upper()} {results[subset]:.4g}{unit.rstrip()}"
        for subset in ("val", "test")
        if subset in results
    }
    rich.print(f"{said['val']} on validation, {said.get('test', 'none')} on test")
    run.print_tree()
    return run.weights


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


def _check_classes(config: LabelledConfig, labels: np.ndarray, split: Split) -> None:
    """Refuse subsets of one class: no AUC is defined there, and zero would be wrong."""
    if config.target.task != "classification":
        return
    for subset in ("train", "val", "test"):
        known = np.unique(labels[getattr(split, subset)])
        if len(known) == 1:
            raise InputError(
                f"all `{subset}` crystals have `{config.target.name}` {known[0]:g}; "
                "enlarge that subset, change `split.seed` or set `split.stratify=true`"
            )


def _predictor(
    config: LabelledConfig, store: Store, normalizer: Normalizer
) -> Predictor:
    """Make the predictor, from pretrained weights where there are some."""
    if isinstance(config, FinetuneConfig):
        source = _pretrained(config.weights, store)
        encoder = make_encoder(
            source.name, **{**source.settings, "normalize": config.normalize}
        )
        encoder.load_state_dict(source.state_dict())
    elif isinstance(config, TrainConfig):
        encoder = make_encoder(**{"cutoff": store.graph.cutoff, **config.encoder})
    else:
        raise TypeError(f"{type(config).__name__} is no plan of a run")
    task = config.target.task
    head = PropertyHead(
        encoder.width, config.head.hidden, config.head.layers, task=task
    )
    predictor = Predictor(encoder, head, config.target, normalizer, store.graph)
    if isinstance(config, FinetuneConfig):
        predictor.freeze(config.freeze.convolutions, config.freeze.batch_norm)
    return predictor


def _module(
    config: LabelledConfig,
    predictor: Predictor,
    teacher: Teacher | None,
    store: Store,
    run: RunDirectory,
    split: Split,
) -> SupervisedModule:
    """Join the predictor with the teacher's side of the loss, where there is one."""
    if teacher is None or not isinstance(config, DistillConfig):
        lr = config.encoder_lr if isinstance(config, FinetuneConfig) else 1.0
        return SupervisedModule(predictor, config.optimizer, encoder_lr=lr)
    path = run.path / "teacher.safetensors"
    rows = torch.from_numpy(split.train)
    batches = BatchLoader(store, split.train, 256)

    def answers() -> TeacherCache:
        return load_or_cache(path, teacher, rows, batches, store.hash)

    # The first rank computes them, the others then find the file.
    on_first_rank(lambda: len(answers()))
    with alone():
        cache = answers()
    distillation = Distillation(
        predictor.encoder.width,
        teacher.width,
        config.alpha,
        projector=config.projector,
    )
    return SupervisedModule(predictor, config.optimizer, distillation, cache)


def _pretrained(path: Path, store: Store) -> Encoder:
    """Load an encoder that learned on the kind of graph that the dataset holds."""
    graph = read_header(path).graph
    if graph != store.graph:
        raise InputError(
            f"{path} learned on another graph than {store.path} holds; build that "
            f"again with `--mode {graph.mode} --cutoff {graph.cutoff} "
            f"--max-neighbors {graph.max_neighbors}`"
        )
    return load_encoder(path)


def _before(config: LabelledConfig) -> WeightsHeader | None:
    """Return what the pretrained weights say of themselves, where there are some."""
    if isinstance(config, FinetuneConfig):
        return read_header(config.weights)
    if isinstance(config, DistillConfig) and config.teacher != "random":
        return read_header(Path(config.teacher))
    return None


def _provenance(
    config: LabelledConfig, store: Store, before: WeightsHeader | None
) -> Provenance:
    """Hand on what the pretrained weights say of themselves."""
    earlier = before.provenance if before else Provenance()
    return replace(
        earlier,
        licence=joint_licence([earlier.licence, store.licence]),
        # Clean of other datasets says nothing about this one.
        overlap=seen(before, store.structures_hash)[0],
        origin=f"{config.out}: labels of {store.path.name}",
    )


def _teacher(config: DistillConfig, store: Store, split: Split) -> Teacher:
    """Return the teacher that the configuration names."""
    if config.teacher != "random":
        return Teacher(_pretrained(Path(config.teacher), store), store.graph)
    settings = {"cutoff": store.graph.cutoff, **config.teacher_encoder}
    return random_teacher(
        {key: value for key, value in settings.items() if key != "name"},
        config.seed + 1,  # not the student's own weights
        settings["name"],
        store.graph,
        BatchLoader(store, split.train, 256),
    )


@torch.no_grad()
def _judge(
    module: SupervisedModule,
    store: Store,
    split: Split,
    run: RunDirectory,
    config: LabelledConfig,
    overlap: str,
) -> dict[str, Any]:
    """Predict the test set, once, with the weights that validation chose."""
    name = config.target.name
    results: dict[str, Any] = {
        "target": name,
        "unit": config.target.unit,
        "metric": module.metric_name,
        "labels": len(split.train),
        "seed": config.seed,
        "dataset": store.hash,
        "overlap": overlap,
        "split": split.hash(store.material_ids),
        "split_by": split.made_by,
        **module.predictor.frozen_report(),
    }
    module.eval()
    for subset in ("val", "test"):
        rows = getattr(split, subset)
        if not len(rows):
            continue
        loader = BatchLoader(store, rows, 256, [name])
        predictions = torch.cat([module.predictor.predict(batch) for batch in loader])
        truth = torch.from_numpy(store.property(name)[rows]).float()
        if module.metric_name == "auc":
            results[subset] = float(BinaryAUROC()(predictions, truth.long()))
        else:
            results[subset] = float((predictions - truth).abs().mean())
        if subset == "test":
            columns = (rows.tolist(), truth.tolist(), predictions.tolist())
            run.write_csv(
                "predictions.csv",
                ["material_id", "truth", "prediction"],
                (
                    (store.material_ids[row], true, predicted)
                    for row, true, predicted in zip(*columns, strict=True)
                ),
            )
    run.write_json("results.json", results)
    return results
