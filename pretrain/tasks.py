"""`python -m pretrain.tasks CORPUS --data FOLDER` builds the stores of comparisons.

These are the development tasks, nine properties with few labels, which choose our
defaults; and a corpus without the crystals of any task, by id and by structure.
`pretrain.evidence` and `pretrain.scaling` find them in the same `--out`, or build them.

    python -m pretrain.tasks mp_corpus/ --data data/

FOLDER holds the tasks (`TASKS`), each as a source of `build`. After an interruption,
run it again: it goes on. A store that exists is not built again, even from another
CORPUS. `--smoke` builds both of a few alloys that it makes itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich

from crysdistill import Store, Target, build
from crysdistill.corpus.filters import Filters
from crysdistill.demo import demo_sets
from crysdistill.studies.recipe import at_least_one, run_recipe


@dataclass(frozen=True)
class Task:
    """A property with few labels.

    Args:
        folder: the folder of its crystals, under `--data`.
        target: the property.
    """

    folder: str
    target: Target


TASKS = {
    "phonons": Task("phonons", Target("last_phdos_peak", "1/cm")),
    "bulk modulus": Task(
        "elasticity", Target("bulk_modulus_vrh", "GPa", transform="log10")
    ),
    "shear modulus": Task(
        "elasticity", Target("shear_modulus_vrh", "GPa", transform="log10")
    ),
    "gap (HSE)": Task("gap_hse", Target("band_gap_hse", "eV")),
    "exp. formation energy": Task(
        "formation_energy_experimental",
        Target("formation_energy_experimental", "eV/atom"),
    ),
    "perovskites": Task("perovskites", Target("heat_of_formation", "eV/atom")),
    "formation energy": Task("mp36k", Target("formation_energy_per_atom", "eV/atom")),
    "gap (PBE)": Task("mp36k", Target("band_gap", "eV")),
    "Fermi energy": Task("mp36k", Target("fermi_energy", "eV")),
}
"""The development tasks, which choose our defaults."""

MOST_ATOMS = "most atoms of a corpus crystal"
"""What `--max-atoms` means."""

ALLOYS = {"alloys": Task("dataset", Target("formation_energy", "eV/atom"))}
"""The task of a small run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Build the stores, and print how many crystals they hold."""
    parser = corpus_parser(__doc__)
    add = parser.add_argument
    add("--max-atoms", type=at_least_one, default=40, help=MOST_ATOMS)
    add("--licence", default="", metavar="SPDX", help="of CORPUS, if it names none")
    return run_on_corpus(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Build it of what the user gave."""
    stores = task_stores(args.data, args.out)
    corpus = clean_corpus(
        args.corpus, args.out, args.max_atoms, stores.values(), args.licence
    )
    for path in (*stores.values(), corpus):
        rich.print(f"{path}: {len(Store.open(path)):,} crystals")


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Build both of a few crystals."""
    for path in alloys(folder):
        rich.print(f"{path.name}: {len(Store.open(path)):,} crystals")


def corpus_parser(
    about: str | None, out: str = "runs/evidence"
) -> argparse.ArgumentParser:
    """Return a parser of a corpus, the folder of the tasks, `--out` and `--smoke`.

    Args:
        about: the docstring of the recipe.
        out: the folder if none is given.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    add = parser.add_argument
    add("corpus", nargs="?", type=Path, metavar="CORPUS", help="crystals, no labels")
    add("--data", type=Path, metavar="FOLDER", help="folder of the tasks")
    add("--out", type=Path, default=Path(out), help="a folder")
    add("--smoke", action="store_true", help="a few alloys, in a temporary folder")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that comparisons share, for `from_settings` of `evidence`.

    Args:
        parser: from `corpus_parser`.
    """
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    counts = {
        "--labels": (500, "training labels of each task"),
        "--seeds": (3, "number of repeats"),
        "--pretrain-epochs": (6, "passes over the corpus"),
        "--epochs": (60, "passes over the labels"),
        "--max-atoms": (40, MOST_ATOMS),
        "--workers": (1, "runs at a time"),
    }
    for name, (default, meaning) in counts.items():
        add(name, type=at_least_one, default=default, help=meaning)


def run_on_corpus(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    full: Callable[[argparse.Namespace], Any],
    small: Callable[[argparse.Namespace, Path], Any],
) -> int:
    """Run a recipe that needs a corpus and the folder of the tasks; see `run_recipe`.

    Args:
        parser: from `corpus_parser`, with further arguments.
        argv: the arguments; None takes those of the process.
        full: runs it on what the user gave.
        small: runs it in a temporary folder.
    """
    needs, called = ("corpus", "data"), "a corpus and `--data FOLDER`"
    return run_recipe(parser, argv, full, small, needs=needs, called=called)


def task_stores(data: Path, out: Path) -> dict[str, Path]:
    """Build the stores of all tasks in the folder, unless they exist.

    Build all of them, even if not requested, so that the corpus is clean of all.

    Args:
        data: the folder of their sources.
        out: the folder of the stores.

    Raises:
        InputError: a source cannot be read.
    """
    found = {}
    for folder in sorted({task.folder for task in TASKS.values()}):
        path = out / f"{folder}.h5"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            build([data / folder], path, symmetry=None)
        found[folder] = path
    return found


def clean_corpus(
    source: Path, out: Path, most: int, datasets: Iterable[Path], licence: str = ""
) -> Path:
    """Build the corpus without the crystals of any task, unless it exists.

    Args:
        source: the crystals of the corpus.
        out: the folder of the store.
        most: the most atoms of a crystal.
        datasets: the stores of all tasks.
        licence: SPDX identifier, for a source that names none.

    Raises:
        InputError: the source cannot be read.
    """
    path = out / f"corpus-{most}.h5"
    if not path.exists():
        build(
            [source],
            path,
            filters=Filters(max_atoms=most),
            exclude=sorted(datasets),
            licence=licence,
        )
    return path


def alloys(folder: Path, corpus_size: int = 60) -> tuple[Path, Path]:
    """Build the dataset of `ALLOYS`, and a corpus without its crystals.

    Args:
        folder: where to.
        corpus_size: the number of crystals of the corpus.
    """
    corpus, crystals = demo_sets(seed=0, corpus_size=corpus_size, dataset_size=60)
    plain: dict[str, Any] = {"symmetry": None, "workers": 1, "progress": False}
    dataset = build(crystals, folder / "dataset.h5", **plain).store
    clean = build(corpus, folder / "corpus.h5", exclude=[dataset], **plain).store
    return clean, dataset


if __name__ == "__main__":
    raise SystemExit(main())
