"""`python -m finetune.distil_small_data dataset.h5 crysgnn.safetensors` distils.

A CGCNN of three convolutions learns a property from a fifth, two fifths and three
fifths of a dataset, alone and with the atom embeddings of a pretrained teacher. The
control beside it is a teacher with random weights: what it gives as well is no
knowledge.

    python -m pretrain.crysgnn corpus.h5 exclude=[dataset.h5]
    python -m finetune.distil_small_data dataset.h5 \
        runs/pretrain-crysgnn/weights.safetensors --target bulk_modulus --unit GPa

Prints the test errors beside those of the paper. `--smoke` shows the whole on a few
alloys that it makes itself. Run again after an interruption, it goes on where it was.

Source: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892, on JARVIS
data: the band gap from the MBJ potential (eV), bulk and shear modulus (GPa).

Differs from the paper:
- Several seeds with one split each; there, one seed and the order of the file.
- The epoch is chosen on validation, and test crystals are predicted once; there, the
  epoch with the least test error was chosen.
- The teacher is in eval mode, and may be pretrained without the dataset's crystals.
- AdamW with one cycle of the learning rate, and as many epochs as `--epochs` says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import rich
import torch
from rich.table import Table

from crysdistill.configs import load_config
from crysdistill.demo import demo_sets
from crysdistill.corpus.build import build
from crysdistill.errors import InputError
from crysdistill.studies.compare import CompareConfig, compare
from crysdistill.studies.report import console_table
from crysdistill.training.pretraining import PretrainConfig, pretrain
from crysdistill.training.settings import SplitSettings, TrainerSettings
from crysdistill.training.supervised import TrainConfig
from crysdistill.transfer import Target

SHARES = (0.2, 0.4, 0.6)
"""Of the dataset, to learn from; a tenth chooses the epoch, the rest judges."""

PUBLISHED = {
    "band gap MBJ (eV)": ((0.588, 0.453), (0.532, 0.419), (0.449, 0.364)),
    "bulk modulus (GPa)": ((16.91, 16.26), (14.81, 14.46), (14.23, 14.05)),
    "shear modulus (GPa)": ((13.89, 12.50), (12.04, 11.54), (11.75, 11.31)),
}
"""Test MAE of CGCNN alone and distilled, by property, for each of `SHARES`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Distil at three numbers of labels, and print the errors beside the paper's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, help="a store with the property")
    add("weights", nargs="?", type=Path, help="of the pretrained teacher")
    add("--target", default="target", help="the label's column")
    add("--unit", default="", help="of the label")
    add("--seeds", type=int, default=3, help="how many repeats")
    add("--epochs", type=int, default=100, help="passes over the labels")
    add("--workers", type=int, default=1, help="runs at a time")
    add("--out", type=Path, default=Path("runs/distil_small_data"), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    args = parser.parse_args(argv)
    if not args.smoke and args.weights is None:
        parser.error("give a dataset and a weights file, or `--smoke`")
    torch.set_flush_denormal(True)  # tails of Gaussians slow a CPU down
    try:
        if args.smoke:
            with tempfile.TemporaryDirectory() as folder:
                run(_alloys(Path(folder)))
            return 0
        trainer = TrainerSettings(epochs=args.epochs)
        target = Target(args.target, args.unit)
        base = TrainConfig(dataset=args.dataset, target=target, trainer=trainer)
        run(
            CompareConfig(
                weights=args.weights,
                base=base,
                out=args.out,
                arms=["scratch", "distilled", "random-teacher"],
                seeds=list(range(args.seeds)),
                workers=args.workers,
            )
        )
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def run(config: CompareConfig) -> pd.DataFrame:
    """Compare at each share, print the tables, and return one row for each run.

    Args:
        config: arms, seeds and what all share; its split is set here.
    """
    found = []
    for share in SHARES:
        split = SplitSettings(train=share, val=0.1, test=0.9 - share)
        out = config.out / f"{share:.0%}".replace("%", "-percent")
        base = replace(config.base, split=split)
        results = compare(replace(config, base=base, out=out))
        found.append(results.assign(share=share))
    table = pd.concat(found, ignore_index=True)
    table.to_csv(config.out / "results.csv", index=False)
    rich.print(console_table(table.drop(columns="share")))
    rich.print(beside_published(table))
    return table


def beside_published(results: pd.DataFrame) -> Table:
    """Return the change that a teacher makes, beside the published ones.

    Args:
        results: one row for each run, with its `share`.
    """
    shown = ("scratch", "distilled", "random-teacher")
    table = Table("test MAE", *(f"{share:.0%} of the labels" for share in SHARES))
    mean = results.groupby(["arm", "share"])["value"].mean()
    unit, name = results["unit"].iloc[0], results["target"].iloc[0]
    for arm in shown:
        cells = []
        for share in SHARES:
            change = mean[arm, share] / mean["scratch", share] - 1
            more = "" if arm == "scratch" else f" ({change:+.1%})"
            cells.append(f"{mean[arm, share]:.4g}{more}")
        table.add_row(f"{name} ({unit}), {arm}", *cells)
    for name, pairs in PUBLISHED.items():
        table.add_section()
        table.add_row(f"published: {name}, scratch", *(f"{a:.4g}" for a, _ in pairs))
        cells = [f"{b:.4g} ({b / a - 1:+.1%})" for a, b in pairs]
        table.add_row(f"published: {name}, distilled", *cells)
    return table


def _alloys(folder: Path) -> CompareConfig:
    """Return a small comparison, with a teacher that has seen a few alloys."""
    stores = {}
    sets = demo_sets(seed=0, corpus_size=100, dataset_size=60)
    for name, crystals in zip(("corpus", "dataset"), sets, strict=True):
        entries = [
            {
                "material_id": crystal.material_id,
                "structure": crystal.to_pymatgen().as_dict(),
                **crystal.properties,
            }
            for crystal in crystals
        ]
        source = folder / f"{name}.json"
        source.write_text(json.dumps(entries))
        out = folder / f"{name}.h5"
        stores[name] = build([source], out, workers=1, progress=False).store
    given = [f"corpus={stores['corpus']}", f"exclude=[{stores['dataset']}]"]
    given += [f"out={folder / 'pretrain'}", "trainer.progress=false"]
    weights = pretrain(load_config(None, [*given, "trainer.epochs=1"], PretrainConfig))
    base = TrainConfig(
        dataset=stores["dataset"],
        target=Target("formation_energy", "eV/atom"),
        trainer=TrainerSettings(epochs=2, batch_size=16),
    )
    return CompareConfig(
        weights=weights,
        base=base,
        out=folder / "study",
        arms=["scratch", "distilled", "random-teacher"],
        seeds=[0, 1],
    )


if __name__ == "__main__":
    raise SystemExit(main())
