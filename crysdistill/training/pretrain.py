"""Pretraining: an encoder learns from many crystals, mostly without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich
from rich.markup import escape
from torch import nn

from crysdistill.encoders import Encoder, make_encoder
from crysdistill.errors import InputError
from crysdistill.objectives import OBJECTIVES, Objective, make_objective
from crysdistill.overlap.exclusion import SAME, check_exclude_kinds
from crysdistill.ranks import on_first_rank
from crysdistill.schema import Choices
from crysdistill.store.checks import (
    DatasetCheck,
    find_check,
    statement,
)
from crysdistill.store.formulas import Formulas
from crysdistill.store.origins import licence_remark
from crysdistill.store.store import Store
from crysdistill.store.used import join_used, used_rows
from crysdistill.training.cleaning import EXCLUDED, Cleaned, clean_rows
from crysdistill.training.engine import device_of
from crysdistill.training.loader import BatchLoader, place
from crysdistill.training.pretrained import load_pretrained
from crysdistill.training.pretraining import (
    PretrainModule,
    Weighting,
    evaluate,
    numbers_table,
)
from crysdistill.training.probe_page import draw_probes
from crysdistill.training.run import Learning, Plan, RunConfig, execute
from crysdistill.training.runs import RunDirectory
from crysdistill.training.settings import EncoderChoice, TrainerSettings
from crysdistill.training.small_tasks import (
    PROBED,
    Probes,
    ProbeSettings,
    SmallTask,
    SmallTasks,
)
from crysdistill.transfer.seen import (
    Learned,
    overlap_in_words,
    with_teachers,
    word_of_corpus,
)
from crysdistill.transfer.weights import Provenance, read_header, save_weights


@dataclass
class ObjectiveSettings:
    """The settings that all objectives share.

    Args:
        weight: of its loss in the sum.
        published: start from CrysGNN's settings instead of the defaults here.
    """

    weight: float = 1.0
    published: bool = False


def _published_defaults(name: str, shared: Any) -> Mapping[str, Any]:
    """Return CrysGNN's settings of an objective if `published` is set."""
    return OBJECTIVES[name].PUBLISHED if shared.published else {}


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run.

    Args:
        corpus: a store of crystals; only objectives that need labels read them.
        encoder: `name` and the settings of that encoder.
        weights: start from a pretrained encoder, by file or by the name of one in the
            package, instead of from random weights; `encoder` does not count then.
        objectives: by name, each with a `weight` and its settings;
            `published: true` starts from CrysGNN's settings.
        weighting: `fixed`, the weighted sum of the losses; or `balanced`, their
            geometric mean with the weights as powers, which does not depend on the
            scales of the losses.
        exclude: datasets (stores, or what `build` reads); corpus crystals that are also
            in them are left out.
        exclude_kinds: kinds of pairs for which crystals are left out: `id`,
            `structure`, `prototype`, `formula`. If empty, all are kept and the weights
            are marked `transductive`.
        held_out: the share of the corpus on which the encoder is judged.
        subset: learn from only this many crystals of the corpus.
        probes: small tasks that are evaluated after every epoch. With any, they choose
            the epoch (`probe_error`) instead of the loss.
    """

    corpus: Path
    out: Path = Path("runs/pretrain")
    encoder: EncoderChoice = field(
        default_factory=lambda: {
            "name": "cgcnn",
            "normalize": True,
        }
    )
    weights: Path | None = None
    objectives: Annotated[
        dict[str, dict[str, Any]],
        Choices(
            OBJECTIVES,
            ("encoder_width", "crystal_width"),
            ObjectiveSettings,
            _published_defaults,
        ),
    ] = field(default_factory=lambda: {"bank": {"weight": 1.0}})
    weighting: Weighting = "fixed"
    exclude: list[Path] = field(default_factory=list)
    exclude_kinds: list[str] = field(default_factory=lambda: list(SAME))
    held_out: float = 0.05
    subset: int | None = None
    probes: list[ProbeSettings] = field(default_factory=list)
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(epochs=12, batch_size=128)
    )

    def __post_init__(self) -> None:
        if not self.objectives:
            raise InputError("`objectives` is empty; name at least one")
        if not 0 < self.held_out < 1:
            raise InputError(
                f"`held_out` is {self.held_out} but must be between 0 and 1"
            )
        if self.subset is not None and self.subset < 1:
            raise InputError(f"`subset` is {self.subset} but must be at least 1")
        check_exclude_kinds(self.exclude_kinds)


class PretrainPlan(Plan[PretrainConfig]):
    """Learn from the corpus without the crystals of the datasets to exclude."""

    data = "corpus"

    store: Store
    checks: list[DatasetCheck]
    cleaned: Cleaned
    held_out: np.ndarray
    tasks: SmallTasks | None = None
    controls: dict[str, dict[str, float]]

    def open(self) -> Store:
        """Open the corpus, and refuse objectives that need data it lacks."""
        self.store = Store.open(self.config.corpus)
        _check_symmetry(self.store, self.config)
        return self.store

    def prepare(self, store: Store, trainer: TrainerSettings) -> Learning:
        """Clean the corpus, hold crystals out; make encoder, objectives, batches."""
        config = self.config
        self.cleaned = on_first_rank(
            lambda: clean_rows(
                store,
                config.exclude,
                config.exclude_kinds,
                run=config.out if config.resume else None,
                progress=config.trainer.progress,
            )
        )
        self.checks = self.cleaned.checks
        train, self.held_out = _hold_out(self.cleaned.rows, config)
        if config.weights is not None:
            encoder = load_pretrained(config.weights, store)
        else:
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
                f"`objectives` can learn from {len(train)} crystals of {store.path} "
                "but need at least two; choose other objectives, or a larger corpus"
            )
        judged = _spoken_of(self.held_out, objectives)
        if len(judged) > 1:  # otherwise keep all: other numbers can still be computed
            self.held_out = judged
        if config.probes:
            tasks = [SmallTask.open(one, store) for one in config.probes]
            self.tasks = SmallTasks(tasks, store, self.held_out)
        size, budget = trainer.batch_size, trainer.edge_budget
        return Learning(
            module=PretrainModule(
                encoder,
                objectives,
                weights,
                config.optimizer,
                config.seed,
                config.weighting,
            ),
            train=BatchLoader(store, train, size, columns, True, config.seed, budget),
            val=BatchLoader(store, self.held_out, size, columns, edge_budget=budget),
            monitor="val_loss" if self.tasks is None else PROBED,
            mode="min",
            callbacks=[] if self.tasks is None else [Probes(self.tasks, encoder)],
        )

    def begin(self, learning: Learning, run: RunDirectory) -> None:
        """Print the sizes of model and data, and let objectives compute slow parts."""
        assert isinstance(learning.module, PretrainModule)  # noqa: S101 - type checker
        if (record := self.cleaned.record) is not None:
            on_first_rank(lambda: run.write_json(EXCLUDED, record))
        encoder = learning.module.encoder
        rich.print(
            f"pretraining {_count(encoder):,} weights "
            f"({_count(learning.module):,} with decoders) on "
            f"{len(learning.train.rows):,} crystals, judged on {len(self.held_out):,}; "
            f"overlap: {escape(overlap_in_words(self._provenance(learning)))}"
        )
        self._probe_controls(encoder)
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

    def _probe_controls(self, encoder: Encoder) -> None:
        """Print the probe errors of an untrained encoder and of the composition.

        Also warn if the corpus may hold crystals of the small tasks, which would make
        their errors too low.
        """
        if self.tasks is None:
            return
        tasks = self.tasks
        self.controls = on_first_rank(
            lambda: {
                "composition": tasks.look_at_composition(),
                "untrained": tasks.look(encoder),
            }
        )
        for name, numbers in self.controls.items():
            rich.print(f"probes of {name}: {numbers[PROBED]:.3f} x the median's error")
        for task in tasks.tasks:
            check = find_check(self.checks, task.store.structures_hash)
            if check is None or check.kept:
                rich.print(
                    escape(
                        f"probe of {task.name}: the corpus may hold its crystals; "
                        f"`exclude=[{task.store.path}]` leaves them out"
                    )
                )

    def _provenance(self, learning: Learning) -> Provenance:
        """Return the provenance of the weights: the corpus, and that of teachers."""
        module, store, checks = learning.module, self.store, self.checks
        assert isinstance(module, PretrainModule)  # noqa: S101 - for the type checker
        # The held-out crystals choose the epoch.
        rows = np.union1d(learning.train.rows, self.held_out)
        names = dict.fromkeys(c for o in module.named().values() for c in o.columns)
        used = [used_rows(store, rows, names, True)]
        # Probes choose it too. That tells so little that only their own store counts.
        for task in self.tasks.tasks if self.tasks else ():
            seen = np.concatenate([task.train, task.val])
            used.append(used_rows(task.store, seen, [task.name], False))
        own = Provenance(
            store.hash,
            licence=store.licence,
            checks=checks,
            origin=f"{self.config.out}: {statement(checks, labels=bool(names))}",
            formulas=Formulas.of(store, rows),
            used=join_used(used),
        )
        own = replace(own, overlap=word_of_corpus(own))
        learned: list[Learned] = [
            one for o in module.named().values() for one in o.learned
        ]
        if self.config.weights is not None:
            learned.append(read_header(self.config.weights))
        return with_teachers(own, learned)

    def judge(self, learning: Learning, run: RunDirectory) -> None:
        """Evaluate the best weights on the held-out crystals, and write them."""
        module, store = learning.module, self.store
        assert isinstance(module, PretrainModule)  # noqa: S101 - for the type checker
        provenance = self._provenance(learning)
        size = min(self.config.trainer.batch_size, 512)
        loader = BatchLoader(store, self.held_out, size, learning.val.targets)
        device = device_of(self.config.trainer)
        place([loader], device)
        numbers = evaluate(module.to(device), loader)
        probed: dict[str, Any] = {}
        if self.tasks is not None:
            probed = {**self.controls, "pretrained": self.tasks.look(module.encoder)}
            draw_probes(
                run.path / "metrics.csv", run.path / "probes.png", self.controls
            )
        run.write_json(
            "results.json",
            {
                "numbers": numbers,
                **({"probes": probed} if probed else {}),
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


def _check_symmetry(store: Store, config: PretrainConfig) -> None:
    """Refuse objectives that need space groups if the corpus has none."""
    names = ["space_group", "crystal_system"]
    asked = [name for name in names if name in config.objectives]
    if config.objectives.get("surrogate", {}).get("classes") == "space_group":
        asked.append("surrogate")
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
    """Return the rows from which at least one objective can learn."""
    return rows[np.any([o.speaks_of(rows) for o in objectives.values()], axis=0)]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
