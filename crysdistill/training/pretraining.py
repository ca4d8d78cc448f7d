"""Pretraining: an encoder learns from crystals without labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import rich
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.markup import escape
from rich.table import Table
from torch import nn

from crysdistill.store.checks import (
    DatasetCheck,
    find_check,
    join_checks,
    read_checks,
    statement,
    status,
)
from crysdistill.overlap.exclusion import (
    SAME,
    check_exclude_kinds,
    find_exclusion,
)
from crysdistill.overlap.sides import open_sides
from crysdistill.store.origins import licence_remark
from crysdistill.store.store import Store
from crysdistill.encoders import ENCODERS, Encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.objectives import (
    CRYSGNN,
    OBJECTIVES,
    Clean,
    Embedded,
    Objective,
    View,
    make_objective,
)
from crysdistill.ranks import on_first_rank, rank
from crysdistill.schema import Choice, Choices, dump_config
from crysdistill.training.engine import (
    batches_before,
    fit,
    shared_loss,
    step_seed,
)
from crysdistill.training.launch import check_same, joined
from crysdistill.training.loader import BatchLoader
from crysdistill.training.means import EpochMeans
from crysdistill.training.optimizers import make_optimizer
from crysdistill.training.runs import open_run
from crysdistill.training.settings import OptimizerSettings, TrainerSettings
from crysdistill.transfer.weights import Provenance, save_weights


@dataclass
class ObjectiveSettings:
    """What every objective can be told besides its own settings.

    Args:
        weight: of its loss in the sum.
        published: start from CrysGNN's settings and not from ours.
    """

    weight: float = 1.0
    published: bool = False


def _published_defaults(name: str, shared: Any) -> Mapping[str, Any]:
    """Return CrysGNN's settings of an objective where they are asked for."""
    return OBJECTIVES[name].PUBLISHED if shared.published else {}


@dataclass
class PretrainConfig:
    """A pretraining run.

    Args:
        corpus: a store of crystals; labels in it are not read.
        out: the run directory.
        encoder: `name` and the settings of that encoder.
        objectives: by name, each with a `weight` and its settings;
            `published: true` starts from CrysGNN's settings.
        shared_view: show every objective the masked crystals, for one pass of the
            encoder instead of two.
        exclude: datasets (stores, or what `build` reads); corpus crystals that also
            stand in them are left out.
        exclude_kinds: of the pairs for which they are: `id`, `structure`, `prototype`,
            `formula`; with none all are kept, and the weights say `transductive`.
        held_out: the share of the corpus on which the encoder is judged.
        subset: learn from so many crystals of the corpus only.
        optimizer: how weights move.
        trainer: how long and on what.
        seed: of weights, order, masks and the held-out slice.
        resume: go on with an interrupted run.
        overwrite: delete what an earlier run left.
    """

    corpus: Path
    out: Path = Path("runs/pretrain")
    encoder: Annotated[dict[str, Any], Choice(ENCODERS)] = field(
        default_factory=lambda: {
            "name": "cgcnn",
            "convolutions": 5,
            "bias": False,
            "normalize": True,
        }
    )
    objectives: Annotated[
        dict[str, dict[str, Any]],
        Choices(OBJECTIVES, ("encoder_width",), ObjectiveSettings, _published_defaults),
    ] = field(default_factory=lambda: {name: {"weight": 0.25} for name in CRYSGNN})
    shared_view: bool = True
    exclude: list[Path] = field(default_factory=list)
    exclude_kinds: list[str] = field(default_factory=lambda: list(SAME))
    held_out: float = 0.05
    subset: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(epochs=20, batch_size=128)
    )
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.objectives:
            raise InputError("`objectives` is empty; name at least one")
        if not 0 < self.held_out < 1:
            raise InputError(
                f"`held_out` is {self.held_out} but must be between 0 and 1"
            )
        check_exclude_kinds(self.exclude_kinds)


class PretrainModule(L.LightningModule):
    """An encoder and the weighted objectives that teach it.

    Args:
        encoder: what learns.
        objectives: by name.
        weights: of each objective's loss.
        optimizer: how weights move.
        seed: of the views.
    """

    def __init__(
        self,
        encoder: Encoder,
        objectives: dict[str, Objective],
        weights: dict[str, float],
        optimizer: OptimizerSettings,
        seed: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objectives = nn.ModuleDict(objectives)
        self.weights = weights
        self.optimizer_settings = optimizer
        self.seed = seed
        self.train_means, self.val_means = EpochMeans(), EpochMeans()

    def embed(self, batch: CrystalBatch, seed: int) -> dict[View, Embedded]:
        """Encode each distinct view of the objectives once."""
        embedded: dict[View, Embedded] = {}
        for objective in self._named().values():
            view = objective.view
            if view not in embedded:
                shown = view(batch, seed)
                atoms = self.encoder(shown)
                embedded[view] = Embedded(shown, atoms, self.encoder.pool(atoms, shown))
        return embedded

    def _named(self) -> dict[str, Objective]:
        return dict(self.objectives.items())  # type: ignore[arg-type]

    def losses(self, batch: CrystalBatch, seed: int) -> dict[str, torch.Tensor]:
        """Return the loss of each objective and, as `loss`, their weighted sum."""
        embedded = self.embed(batch, seed)
        losses = {
            name: objective(embedded[objective.view], batch, seed)
            for name, objective in self._named().items()
        }
        total = torch.stack(
            [self.weights[name] * loss for name, loss in losses.items()]
        )
        return {**losses, "loss": total.sum()}

    def training_step(self, batch: CrystalBatch, batch_idx: int) -> torch.Tensor:
        """Return the weighted loss of a batch, as `shared_loss` has it."""
        seed = step_seed(self.seed, batches_before(self.trainer, batch_idx))
        losses = self.losses(batch, seed)
        self.train_means.add(losses, batch)
        return shared_loss(losses["loss"])

    def on_train_epoch_end(self) -> None:
        """Log the losses of the epoch."""
        means = self.train_means.compute()
        self.log_dict({f"train_{name}": mean for name, mean in means.items()})

    def validation_step(self, batch: CrystalBatch, batch_idx: int) -> None:
        """Add a held-out batch to the numbers; its masks are the same every epoch."""
        embedded = self.embed(batch, self.seed)
        losses = {}
        for name, objective in self._named().items():
            seen = embedded[objective.view]
            losses[name] = objective(seen, batch, self.seed)
            objective.update(seen, batch, self.seed)
        losses["loss"] = torch.stack(
            [self.weights[name] * losses[name] for name in self._named()]
        ).sum()
        self.val_means.add(losses, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the losses and numbers of all held-out batches."""
        means = self.val_means.compute()
        self.log_dict({f"val_{name}": mean for name, mean in means.items()})
        for objective in self._named().values():
            self.log_dict(objective.compute())
            objective.reset()

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
        groups = [(list(self.parameters()), self.optimizer_settings.lr)]
        return make_optimizer(groups, self.optimizer_settings, steps, per_epoch)


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain an encoder and return the path of its weights file.

    Raises:
        InputError: the corpus or a setting cannot be used.
    """
    with ExitStack() as held:  # the run directory, to the end
        return _pretrain(config, held)


def _pretrain(config: PretrainConfig, held: ExitStack) -> Path:
    """Prepare, learn on all ranks, judge on the first."""
    store = Store.open(config.corpus)
    _check_symmetry(store, config)
    with joined(config.trainer) as trainer:
        check_same("corpus", store.hash)
        rows, checks = on_first_rank(lambda: _clean_rows(store, config))
        train, held_out = _hold_out(rows, config)
        L.seed_everything(config.seed, verbose=False)
        module = _module(config, store, train)
        size, budget = trainer.batch_size, trainer.edge_budget
        loaders = (
            BatchLoader(
                store, train, size, shuffle=True, seed=config.seed, edge_budget=budget
            ),
            BatchLoader(store, held_out, size, edge_budget=budget),
        )
        # Only now, so that a mistake in the configuration leaves no folder behind.
        text = dump_config(config)
        run = held.enter_context(
            open_run(config.out, text, config.resume, config.overwrite)
        )
        rich.print(
            f"pretraining {_count(module.encoder):,} weights ({_count(module):,} with "
            f"decoders) on {len(train):,} crystals, judged on {len(held_out):,}; "
            f"overlap: {escape(statement(checks))}"
        )
        fit(
            module,
            *loaders,
            run,
            trainer,
            monitor="val_loss",
            mode="min",
            seed=config.seed,
        )
        first = rank() == 0
    if not first:  # the first alone judges and writes
        return run.weights
    size = min(config.trainer.batch_size, 512)
    numbers = evaluate(module, BatchLoader(store, held_out, size))
    run.write_json(
        "results.json",
        {
            "numbers": numbers,
            "corpus": store.hash,
            "overlap": statement(checks),
            "checks": [check.to_dict() for check in checks],
            "licence": store.licence,
        },
    )
    provenance = Provenance(
        store.hash,
        status(checks),
        licence=store.licence,
        checks=checks,
        origin=f"{config.out}: {statement(checks)}",
    )
    save_weights(run.weights, module.encoder, store.graph, provenance)
    rich.print(numbers_table(numbers))
    rich.print(f"licence of the weights: {licence_remark(store.licence)}")
    run.print_tree()
    return run.weights


def _module(config: PretrainConfig, store: Store, train: np.ndarray) -> PretrainModule:
    """Make the encoder and its objectives."""
    encoder = make_encoder(**_with_cutoff(config.encoder, store))
    objectives, weights = _objectives(config, encoder)
    for objective in objectives.values():
        counts = np.bincount(store.space_groups[train, 0], minlength=231)
        objective.prepare(torch.from_numpy(counts))
    return PretrainModule(encoder, objectives, weights, config.optimizer, config.seed)


def _with_cutoff(encoder: dict[str, Any], store: Store) -> dict[str, Any]:
    """Let the Gaussians end where the store's edges end, unless told otherwise."""
    return {"cutoff": store.graph.cutoff, **encoder}


def _clean_rows(
    store: Store, config: PretrainConfig
) -> tuple[np.ndarray, list[DatasetCheck]]:
    """Return the corpus rows to learn from, and what is known of datasets in them."""
    rows = np.arange(len(store))
    before = read_checks(store.facts)
    if not config.exclude:
        return rows, before
    options: dict[str, Any] = {
        "workers": config.trainer.threads,
        "progress": config.trainer.progress,
    }
    sides = []
    for side in open_sides(config.exclude, **options):
        known = find_check(before, side.crystals.structures_hash)
        if known and not known.kept and set(config.exclude_kinds) <= set(known.kinds):
            rich.print(escape(f"{config.corpus} was built without {side.name}"))
        else:
            rich.print(
                escape(f"looking for crystals of {side.path} in {config.corpus}")
            )
            sides.append(side)
    found = find_exclusion(store, sides, kinds=config.exclude_kinds, **options)
    rows = np.setdiff1d(rows, list(found.rows))
    return rows, join_checks(before, found.checks)


def _check_symmetry(store: Store, config: PretrainConfig) -> None:
    """Refuse objectives that would have nothing to say."""
    asked = [n for n in ("space_group", "crystal_system") if n in config.objectives]
    if asked and not store.space_groups[:, 0].any():
        without = " ".join(f"objectives.{name}=false" for name in asked)
        raise InputError(
            f"{config.corpus} holds no space groups (`--no-symmetry`); build it again "
            f"with them, or leave them out: {without}"
        )


def _hold_out(
    rows: np.ndarray, config: PretrainConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to learn from and rows to judge on."""
    order = np.random.default_rng(config.seed).permutation(rows)
    count = max(2, round(config.held_out * len(rows)))
    train = order[count:]
    if config.subset is not None:
        train = train[: config.subset]
    if len(train) < 2:
        raise InputError(
            f"{config.corpus} leaves {len(train)} crystals to learn from; use a larger "
            "corpus, a smaller `held_out`, or fewer datasets in `exclude`"
        )
    return np.sort(train), np.sort(order[:count])


def _objectives(
    config: PretrainConfig, encoder: Encoder
) -> tuple[dict[str, Objective], dict[str, float]]:
    """Make the objectives and read off their weights."""
    objectives, weights = {}, {}
    for name, given in config.objectives.items():
        settings = dict(given)
        weights[name] = float(settings.pop("weight", 1.0))
        if "elements" in inspect.signature(OBJECTIVES[name]).parameters:
            settings.setdefault("elements", encoder.elements)
        objectives[name] = make_objective(name, encoder.width, **settings)
    views = {o.view for o in objectives.values() if o.view != Clean()}
    if config.shared_view and len(views) == 1:
        for objective in objectives.values():
            objective.view = next(iter(views))
    return objectives, weights


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def evaluate(module: PretrainModule, loader: BatchLoader) -> dict[str, float]:
    """Return the numbers of all objectives on a loader's crystals."""
    module.eval()
    for batch in loader:
        shown = batch.to(module.device)
        embedded = module.embed(shown, module.seed)
        for objective in module._named().values():
            objective.update(embedded[objective.view], shown, module.seed)
    numbers: dict[str, float] = {}
    for objective in module._named().values():
        numbers |= objective.compute()
        objective.reset()
    return numbers


def numbers_table(numbers: dict[str, float]) -> Table:
    """Return the numbers as a table, each beside its chance level."""
    table = Table("held-out number", "value", "by chance", title="Pretraining")
    for name, value in numbers.items():
        if not name.endswith("_chance"):
            chance = numbers.get(f"{name}_chance")
            shown = "" if chance is None else f"{chance:.3f}"
            table.add_row(name.replace("_", " "), f"{value:.3f}", shown)
    return table
