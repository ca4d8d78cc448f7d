"""Short runs on small crystals, and their files."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file

from crysdistill.encoders import ENCODERS
from crysdistill.objectives import CRYSGNN
from crysdistill.training.finetune import FinetuneConfig
from crysdistill.training.fit import FitConfig
from crysdistill.training.labelled import LabelledConfig
from crysdistill.training.pretrain import PretrainConfig
from crysdistill.training.settings import (
    HeadSettings,
    OptimizerSettings,
    SplitSettings,
    TrainerSettings,
)
from crysdistill.training.supervised import SupervisedModule
from crysdistill.training.train import TrainConfig
from crysdistill.transfer.targets import Target
from tests.toy_stores import SMALL_ENCODER

DENSITY = Target("density", "1/Å³")
SHORT = TrainerSettings(epochs=3, batch_size=8, accelerator="cpu", progress=False)


def training_config(dataset: Path, out: Path) -> TrainConfig:
    """A run of three epochs of three steps, on 40 crystals."""
    return TrainConfig(
        dataset=dataset,
        target=DENSITY,
        out=out,
        encoder=SMALL_ENCODER,
        head=HeadSettings(hidden=8),
        split=SplitSettings(train=24, val=8, test=8),
        trainer=SHORT,
    )


def command(config: TrainConfig, *more: str) -> list[str]:
    """Return the verb and the arguments of a run; its settings are those of `SHORT`."""
    given = {
        "dataset": config.dataset,
        "target.name": "density",
        "target.unit": "1/Å³",
        "out": config.out,
        **{f"encoder.{name}": value for name, value in config.encoder.items()},
        "head.hidden": 8,
        "split.train": 24,
        "split.val": 8,
        "split.test": 8,
        "trainer.epochs": config.trainer.epochs,
        "trainer.checkpoint_every": config.trainer.checkpoint_every or "null",
        "trainer.keep_checkpoints": config.trainer.keep_checkpoints,
        "trainer.batch_size": 8,
        "trainer.accelerator": "cpu",
        "trainer.progress": "false",
    }
    words = [f"{name}={value}" for name, value in given.items()]
    return ["train", *words, *more]


def fit_config(dataset: Path, out: Path, **more) -> FitConfig:
    """A fit of two epochs, on 60 crystals."""
    return FitConfig(
        **{
            "dataset": dataset,
            "target": DENSITY,
            "out": out,
            "encoder": {"name": "cgcnn", **ENCODERS["cgcnn"].SMALL},
            "split": SplitSettings(train=36, val=12, test=12),
            "trainer": TrainerSettings(
                epochs=2, batch_size=12, accelerator="cpu", progress=False, threads=1
            ),
            **more,
        }
    )


def pretraining_config(corpus: Path, out: Path, **more) -> PretrainConfig:
    settings = {
        "encoder": {**SMALL_ENCODER, "bias": False, "normalize": True},
        "objectives": {name: {"weight": 0.25} for name in CRYSGNN},
        "trainer": SHORT,
        "held_out": 0.2,
        **more,
    }
    return PretrainConfig(corpus=corpus, out=out, **settings)


def shared(config: TrainConfig, kind: type = TrainConfig) -> dict:
    return {field.name: getattr(config, field.name) for field in fields(kind)}


def tuning(config: TrainConfig, weights: Path, **more) -> FinetuneConfig:
    return FinetuneConfig(**shared(config, LabelledConfig), weights=weights, **more)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(first: Path, second: Path) -> bool:
    a, b = weights_of(first), weights_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def history(run: Path, name: str) -> list[float]:
    return [float(r[name]) for r in rows(run / "metrics.csv") if r.get(name)]


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


PLAIN = OptimizerSettings(name="sgd", lr=0.02, schedule="constant", momentum=0.0)


class Watched(SupervisedModule):
    """Records its weights after each step, and those in validation."""

    steps: list[dict[str, torch.Tensor]]
    seen: list[dict[str, torch.Tensor]]

    def _copy(self) -> dict[str, torch.Tensor]:
        return {n: t.detach().clone() for n, t in self.predictor.state_dict().items()}

    def on_train_start(self):
        super().on_train_start()
        Watched.steps, Watched.seen = [], []

    def on_train_batch_end(self, *rest):
        Watched.steps.append(self._copy())

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        Watched.seen.append(self._copy())
