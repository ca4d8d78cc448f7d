"""Pretraining: an encoder learns from many crystals, mostly without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich
from rich.markup import escape
from torch import nn

from crysdistill.encoders import Encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.objectives import CRYSGNN, OBJECTIVES, Objective, make_objective
from crysdistill.overlap.exclusion import SAME, check_exclude_kinds, find_exclusion
from crysdistill.overlap.sides import open_sides
from crysdistill.ranks import on_first_rank
from crysdistill.schema import Choices
from crysdistill.store.checks import (
    DatasetCheck,
    find_check,
    join_checks,
    read_checks,
    statement,
    status,
)
from crysdistill.store.origins import licence_remark
from crysdistill.store.store import Store
from crysdistill.training.engine import device_of
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.pretraining import PretrainModule, evaluate, numbers_table
from crysdistill.training.run import Learning, Plan, RunConfig, execute
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import EncoderChoice, TrainerSettings
from crysdistill.transfer.seen import overlap_in_words, with_teachers
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


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run.

    Args:
        corpus: a store of crystals; its labels are read by objectives that ask for
            them, and by no others.
        encoder: `name` and the settings of that encoder.
        objectives: by name, each with a `weight` and its settings;
            `published: true` starts from CrysGNN's settings.
        exclude: datasets (stores, or what `build` reads); corpus crystals that also
            stand in them are left out.
        exclude_kinds: of the pairs for which they are: `id`, `structure`, `prototype`,
            `formula`; with none all are kept, and the weights say `transductive`.
        held_out: the share of the corpus on which the encoder is judged.
        subset: learn from so many crystals of the corpus only.
    """

    corpus: Path
    out: Path = Path("runs/pretrain")
    encoder: EncoderChoice = field(
        default_factory=lambda: {
            "name": "cgcnn",
            "convolutions": 5,
            "bias": False,
            "normalize": True,
        }
    )
    objectives: Annotated[
        dict[str, dict[str, Any]],
        Choices(
            OBJECTIVES,
            ("encoder_width", "crystal_width"),
            ObjectiveSettings,
            _published_defaults,
        ),
    ] = field(default_factory=lambda: {name: {"weight": 0.25} for name in CRYSGNN})
    exclude: list[Path] = field(default_factory=list)
    exclude_kinds: list[str] = field(default_factory=lambda: list(SAME))
    held_out: float = 0.05
    subset: int | None = None
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(epochs=20, batch_size=128)
    )

    def __post_init__(self) -> None:
        if not self.objectives:
            raise InputError("`objectives` is empty; name at least one")
        if not 0 < self.held_out < 1:
            raise InputError(
                f"`held_out` is {self.held_out} but must be between 0 and 1"
            )
        check_exclude_kinds(self.exclude_kinds)


class PretrainPlan(Plan[PretrainConfig]):
    """Learn from the corpus, less what also stands in the datasets to exclude."""

    data = "corpus"

    store: Store
    checks: list[DatasetCheck]
    held_out: np.ndarray

    def open(self) -> Store:
        """Open the corpus, and refuse objectives that would have nothing to say."""
        self.store = Store.open(self.config.corpus)
        _check_symmetry(self.store, self.config)
        return self.store

    def prepare(self, store: Store, trainer: TrainerSettings) -> Learning:
        """Clean the corpus, hold some of it out, make encoder, objectives, batches."""
        config = self.config
        rows, self.checks = on_first_rank(lambda: _clean_rows(store, config))
        train, self.held_out = _hold_out(rows, config)
        encoder = make_encoder(
            graph=store.graph, source=str(store.path), **config.encoder
        )
        objectives, weights = _objectives(config, encoder)
        columns = list(dict.fromkeys(c for o in objectives.values() for c in o.columns))
        for objective in objectives.values():
            objective.prepare(store, train)
            objective.place(columns)
        train = _spoken_of(train, objectives)
        if len(train) < 2:
            raise InputError(
                f"`objectives` have something to say about {len(train)} crystals of "
                f"{store.path} to learn from; they need two"
            )
        judged = _spoken_of(self.held_out, objectives)
        if len(judged) > 1:  # else their numbers are unknown, but not those of others
            self.held_out = judged
        size, budget = trainer.batch_size, trainer.edge_budget
        return Learning(
            module=PretrainModule(
                encoder, objectives, weights, config.optimizer, config.seed
            ),
            train=BatchLoader(store, train, size, columns, True, config.seed, budget),
            val=BatchLoader(store, self.held_out, size, columns, edge_budget=budget),
            monitor="val_loss",
            mode="min",
        )

    def begin(self, learning: Learning, run: RunDirectory) -> None:
        """Say what will be learned from how much, and compute what takes long."""
        assert isinstance(learning.module, PretrainModule)  # noqa: S101 - type checker
        encoder = learning.module.encoder
        rich.print(
            f"pretraining {_count(encoder):,} weights "
            f"({_count(learning.module):,} with decoders) on "
            f"{len(learning.train.rows):,} crystals, judged on {len(self.held_out):,}; "
            f"overlap: {escape(overlap_in_words(self._provenance(learning)))}"
        )
        trainer = self.config.trainer
        for objective in learning.module.named().values():
            objective.begin(
                self.store,
                learning.train.rows,
                self.held_out,
                folder=run.path,
                device=device_of(trainer),
                progress=trainer.progress,
            )

    def _provenance(self, learning: Learning) -> Provenance:
        """Return what the weights learn from: the corpus, and what teachers know."""
        module, store, checks = learning.module, self.store, self.checks
        assert isinstance(module, PretrainModule)  # noqa: S101 - for the type checker
        own = Provenance(
            store.hash,
            status(checks),
            licence=store.licence,
            checks=checks,
            origin=f"{self.config.out}: {statement(checks)}",
        )
        learned = (one for o in module.named().values() for one in o.learned)
        return with_teachers(own, learned)

    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Look at the held-out crystals with the best weights, and write them."""
        module, store = learning.module, self.store
        assert isinstance(module, PretrainModule)  # noqa: S101 - for the type checker
        provenance = self._provenance(learning)
        size = min(self.config.trainer.batch_size, 512)
        loader = BatchLoader(store, self.held_out, size, learning.val.targets)
        device = device_of(self.config.trainer)
        place([loader], device)
        numbers = evaluate(module.to(device), loader)
        run.write_json(
            "results.json",
            {
                "numbers": numbers,
                "corpus": store.hash,
                "overlap": overlap_in_words(provenance),
                "checks": [check.to_dict() for check in provenance.checks],
                "licence": provenance.licence,
            },
        )
        module.to("cpu")
        save_weights(run.weights, module.encoder, store.graph, provenance)
        rich.print(numbers_table(numbers))
        rich.print(f"licence of the weights: {licence_remark(provenance.licence)}")


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain an encoder and return the path of its weights file.

    Raises:
        InputError: the corpus or a setting cannot be used.
    """
    return execute(PretrainPlan(config))


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
        objectives[name] = make_objective(name, encoder, **settings)
    return objectives, weights


def _spoken_of(rows: np.ndarray, objectives: Mapping[str, Objective]) -> np.ndarray:
    """Return the rows of which at least one objective has something to say."""
    return rows[np.any([o.speaks_of(rows) for o in objectives.values()], axis=0)]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
