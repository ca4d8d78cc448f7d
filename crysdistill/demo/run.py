"""The demo: every step in a few minutes, on a corpus that the package makes itself."""

from __future__ import annotations

import csv
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import rich

from crysdistill import __version__
from crysdistill.corpus.build import build
from crysdistill.demo import PROPERTIES, demo_sets, prototype_of
from crysdistill.errors import InputError
from crysdistill.overlap import find_overlap
from crysdistill.store.store import Store
from crysdistill.structures.crystal import Crystal
from crysdistill.studies.collect import epochs, report_study
from crysdistill.studies.study import StudyConfig, study
from crysdistill.studies.tables import console_table
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.training.settings import TrainerSettings

TARGET = {"name": "formation_energy", "unit": PROPERTIES["formation_energy"]}
ARMS = ["scratch", "distilled", "random-teacher", "finetuned"]
CONTROLS = ["mean", "forest"]


@dataclass(frozen=True)
class DemoSize:
    """The size of a demo.

    Args:
        corpus: the number of unlabelled crystals.
        dataset: the number of labelled crystals.
        labels: the number of them that a predictor learns from.
        seeds: repeats of every arm.
        pretrain_epochs: passes over the corpus.
        epochs: passes over the labels.
    """

    corpus: int = 5000
    dataset: int = 2000
    labels: int = 50
    seeds: int = 5
    pretrain_epochs: int = 8
    epochs: int = 60


def demo(
    out: str | Path = "runs/demo",
    *,
    size: DemoSize | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a corpus, pretrain, distil, fine-tune, compare, and report.

    The crystals are alloys of seven metals on the structure types of the AFLOW library;
    the labels are EMT formation energies. Test crystals have structure types that no
    training crystal has. After an interruption, another call continues the demo.

    Args:
        out: the folder for all files.
        size: the size of the demo.
        workers: processes; all cores if None.
        overwrite: whether to replace an earlier demo.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder holds something else.
    """
    started = time.monotonic()
    size, out = size or DemoSize(), Path(out)
    workers = workers or os.cpu_count() or 1
    _prepare(out, size, overwrite)
    _step(1, f"making {size.corpus:,} alloys, and EMT labels for {size.dataset:,} more")
    paths = {name: out / f"{name}.h5" for name in ("corpus", "dataset")}
    made: dict[str, list[Crystal]] = {}
    if not all(path.exists() for path in paths.values()):
        corpus, dataset = demo_sets(0, size.corpus, size.dataset, workers)
        made = {"corpus": corpus, "dataset": dataset}
    _step(2, "building the stores")
    stores = {}
    for name, path in paths.items():
        if not path.exists():
            report = build(made[name], path, workers=workers)
            rich.print(
                f"{report.built:,} crystals, {len(report.rejections)} quarantined"
            )
        stores[name] = Store.open(path)
    _step(3, "which corpus crystals are also in the dataset?")
    overlap = find_overlap(stores["corpus"], stores["dataset"])
    rich.print(overlap.table())
    _step(4, "pretraining on the corpus, without labels")
    weights = out / "pretrain" / "weights.safetensors"
    if not weights.exists():
        pretrain(_pretraining(out, size))
    _step(5, f"comparing predictors that learn from {size.labels} labels")
    config = _comparison(out, size, weights, stores["dataset"], workers)
    results = study(config)
    _step(6, "reporting")
    path = _report(out, config, stores, time.monotonic() - started)
    rich.print(console_table(results))
    print(f"\nreport:  {path}\nweights: {weights}")  # a path may hold [..]
    rich.print("\nNext, on your own crystals:")
    for line in _next_steps():
        print(f"  {line}")  # not by rich, which takes [..] for markup
    return path


def _prepare(out: Path, size: DemoSize, overwrite: bool) -> None:
    """Make the folder, or recognise that of an interrupted demo."""
    mark = out / "demo.json"
    wanted = orjson.dumps({"version": __version__, **size.__dict__})
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise InputError(
            f"{out} holds something other than a demo; give another `--out`"
        )
    if mark.exists() and (overwrite or mark.read_bytes() != wanted):
        if not overwrite:
            raise InputError(
                f"{out} holds a demo of another size or version; give another `--out` "
                "or `--overwrite`"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.write_bytes(wanted)


def _step(number: int, text: str) -> None:
    rich.print(f"\n[bold]{number}/6[/bold] {text}")


def _pretraining(out: Path, size: DemoSize) -> PretrainConfig:
    return PretrainConfig(
        corpus=out / "corpus.h5",
        out=out / "pretrain",
        exclude=[out / "dataset.h5"],
        # The student's architecture, so that one network learns with and without help.
        encoder={"name": "cgcnn", "convolutions": 3},
        objectives={"fingerprint": {"weight": 1.0}},
        trainer=TrainerSettings(epochs=size.pretrain_epochs, batch_size=128),
        # An interrupted run continues from its last checkpoint.
        resume=(out / "pretrain" / "config.yaml").exists(),
    )


def _comparison(
    out: Path, size: DemoSize, weights: Path, dataset: Store, workers: int
) -> StudyConfig:
    split = out / "split.csv"
    if not split.exists():
        _write_split(split, dataset.material_ids)
    return StudyConfig(
        base={
            "dataset": out / "dataset.h5",
            "target": TARGET,
            "split": {"file": str(split)},
            "trainer": {"epochs": size.epochs, "batch_size": 32},
        },
        weights=weights,
        out=out / "study",
        axes={"arm": ARMS, "labels": [size.labels], "seed": list(range(size.seeds))},
        controls=CONTROLS,
        workers=workers,
    )


def _write_split(path: Path, material_ids: Sequence[str]) -> None:
    """Keep a fifth of the structure types for testing, a twentieth for validation."""
    types = sorted({prototype_of(name) for name in material_ids})
    order = np.random.default_rng(1).permutation(len(types))
    subset = {}
    for rank, number in enumerate(order):
        share = rank / len(types)
        subset[types[number]] = (
            "test" if share < 0.2 else "val" if share < 0.25 else "train"
        )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "subset"])
        writer.writerows((n, subset[prototype_of(n)]) for n in material_ids)


def _report(
    out: Path, config: StudyConfig, stores: dict[str, Store], seconds: float
) -> Path:
    """Write the report of the study, with facts about the demo."""
    pretraining = orjson.loads((out / "pretrain" / "results.json").read_bytes())
    return report_study(
        config.out,
        out / "report.html",
        title="Does pretraining help with few labels?",
        pretraining=epochs(out / "pretrain" / "metrics.csv"),
        next_steps=_next_steps(),
        facts={
            "corpus": f"{len(stores['corpus']):,} alloys without labels",
            "dataset": f"{len(stores['dataset']):,} alloys with EMT labels; test "
            "crystals have structure types that no training crystal has",
            "overlap": pretraining["overlap"],
            "duration": seconds,
        },
    )


def _next_steps() -> list[str]:
    return [
        "crysdistill build MY_UNLABELLED_CIFS/ -o corpus.h5",
        "crysdistill build MY_LABELLED_FOLDER/ -o dataset.h5",
        "crysdistill pretrain corpus=corpus.h5 'exclude=[dataset.h5]'",
        "crysdistill finetune dataset=dataset.h5 target.name=target "
        "weights=runs/pretrain/weights.safetensors",
        "crysdistill predict runs/finetune/weights.safetensors NEW/ -o predictions.csv",
    ]
