"""`python -m pretrain.shipped CORPUS --data FOLDER` makes the weights of the package.

It pretrains the encoders that come with the package (`crysdistill/shipped/`), each on
crystals that are in none of the development tasks of `pretrain.tasks`:

- `label-free`: the targets of `bank`, on all crystals of at most 40 atoms.
- `label-free-large`: the same, of an encoder with width 96 and four convolutions.
- `taught`: the labels of `mp36k`, together with `bank`. It starts from `label-free`.
- `taught-by-chgnet`: CHGNet's answers for 18,000 crystals of at most 20 atoms. This one
  needs the package `chgnet`.

    python -m pretrain.shipped mp_corpus/ --data data/ --licence CC-BY-4.0

FOLDER holds the tasks, each as a source of `build`. After an interruption, run it
again: it goes on. `OUT/shipped/` then holds a weights file and a card of each. The
files carry the formulas of all crystals of the stores, also of those held out; except
`taught-by-chgnet`, because nobody knows the formulas that CHGNet has seen.
`--names` makes only some of them; `--smoke` runs every step on a few alloys that it
makes itself.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich

from crysdistill import PretrainConfig, TrainerSettings, build, pretrain
from crysdistill.corpus.filters import Filters
from crysdistill.encoders import ENCODERS
from crysdistill.files import write_whole
from crysdistill.transfer.card import write_card
from pretrain.evidence import CHGNET
from pretrain.tasks import (
    ALLOYS,
    alloys,
    clean_corpus,
    corpus_parser,
    run_on_corpus,
    task_stores,
)

MOST_ATOMS = 40
"""The largest crystals that the encoders learn from; larger ones cost most of an
epoch."""

LABELLED = "mp36k"
"""The folder whose labels teach `taught`."""

LABELS = [
    {"name": "formation_energy_per_atom", "unit": "eV/atom"},
    {"name": "band_gap", "unit": "eV"},
    {"name": "fermi_energy", "unit": "eV"},
]


@dataclass(frozen=True)
class Recipe:
    """How one encoder is pretrained.

    Args:
        labelled: whether it learns from the labelled crystals instead of the corpus.
        encoder: `name` and settings; None if it starts from other weights.
        objectives: by name, with their settings.
        epochs: passes over the crystals.
        start: the name of the recipe whose weights it starts from; None for random
            weights.
    """

    labelled: bool
    encoder: Mapping[str, Any] | None
    objectives: Mapping[str, Mapping[str, Any]]
    epochs: int
    start: str | None = None


RECIPES = {
    "label-free": Recipe(
        labelled=False,
        encoder={"name": "cgcnn", "width": 64, "convolutions": 3},
        objectives={"bank": {"weight": 1.0}},
        epochs=6,
    ),
    "label-free-large": Recipe(
        labelled=False,
        encoder={"name": "cgcnn", "width": 96, "convolutions": 4},
        objectives={"bank": {"weight": 1.0}},
        epochs=6,
    ),
    "taught": Recipe(
        labelled=True,
        encoder=None,
        objectives={
            "properties": {"weight": 1.0, "targets": LABELS},
            "bank": {"weight": 1.0},
        },
        epochs=8,
        start="label-free",
    ),
    "taught-by-chgnet": Recipe(
        labelled=False,
        encoder={"name": "cgcnn", "width": 64, "convolutions": 3},
        objectives={"teacher": {"weight": 1.0, "teachers": ["chgnet"], **CHGNET}},
        epochs=20,
    ),
}
"""The encoders of the package by name, in the order in which they are made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Build the stores, pretrain the encoders, and write weights and cards."""
    parser = corpus_parser(__doc__, "runs/shipped")
    add = parser.add_argument
    add("--licence", default="", metavar="SPDX", help="of CORPUS and FOLDER")
    add("--names", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    return run_on_corpus(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    stores = task_stores(args.data, args.out)
    corpus = clean_corpus(
        args.corpus, args.out, MOST_ATOMS, stores.values(), args.licence
    )
    others = [path for name, path in stores.items() if name != LABELLED]
    labelled = args.out / f"labelled-{MOST_ATOMS}.h5"
    if not labelled.exists():
        build(
            [args.data / LABELLED],
            labelled,
            filters=Filters(max_atoms=MOST_ATOMS),
            symmetry=None,
            exclude=sorted(others),
            licence=args.licence,
        )
    for name in args.names:
        make(name, RECIPES, corpus, labelled, args.out)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Make all encoders in small, of alloys."""
    corpus, labelled = alloys(folder)
    small = {"name": "cgcnn", **ENCODERS["cgcnn"].SMALL}
    target = ALLOYS["alloys"].target.to_dict()
    # A teacher that needs no package of its own.
    instead = {"targets": [target], "teachers": ["random"]}
    recipes = {
        name: Recipe(
            labelled=recipe.labelled,
            encoder=recipe.encoder and small,
            objectives={
                kind: {key: instead.get(key, value) for key, value in given.items()}
                for kind, given in recipe.objectives.items()
            },
            epochs=1,
            start=recipe.start,
        )
        for name, recipe in RECIPES.items()
    }
    for name in recipes:
        make(name, recipes, corpus, labelled, folder)


def make(
    name: str, recipes: Mapping[str, Recipe], corpus: Path, labelled: Path, out: Path
) -> Path:
    """Make one encoder, and what it starts from; return its weights file.

    Args:
        name: of a recipe.
        recipes: all recipes.
        corpus: the store without labels.
        labelled: the store with the labels of `LABELS`.
        out: the folder of all runs.
    """
    recipe, folder = recipes[name], out / name
    weights = folder / "weights.safetensors"
    if not weights.exists():
        start = recipe.start
        settings = {} if recipe.encoder is None else {"encoder": dict(recipe.encoder)}
        if "encoder" in settings:
            settings["encoder"]["normalize"] = True
        pretrain(
            PretrainConfig(
                corpus=labelled if recipe.labelled else corpus,
                out=folder,
                objectives={k: dict(v) for k, v in recipe.objectives.items()},
                weights=start and make(start, recipes, corpus, labelled, out),
                trainer=TrainerSettings(
                    epochs=recipe.epochs, batch_size=128, threads=1
                ),
                resume=folder.exists(),
                **settings,
            )
        )
    return _ship(name, weights, out / "shipped")


def _ship(name: str, weights: Path, folder: Path) -> Path:
    """Write a weights file and its card under its name; return the file."""
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}.safetensors"
    data = weights.read_bytes()
    write_whole(target, data)
    card = write_card(weights).replace("weights.safetensors", name)
    digest = hashlib.sha256(data).hexdigest()
    write_whole(target.with_suffix(".md"), f"{card}\nSHA-256: `{digest}`\n".encode())
    rich.print(f"{target}: {len(data):,} bytes")
    return target


if __name__ == "__main__":
    raise SystemExit(main())
