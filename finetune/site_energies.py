"""`python -m finetune.site_energies DATASET` shows which elements suit which site.

CGCNN with a linear pooling predicts the energy of a perovskite as a sum of
contributions of its atoms. Averaged over all perovskites with an element on the A or on
the B site, they say where that element is stable.

    python -m finetune.site_energies perovskites.h5 --target heat_of_formation

Prints the errors with linear pooling and with hidden layers beside the paper's, and the
most and least stable elements of both sites. Writes all of them to `sites.csv`, and
both periodic tables to `sites.svg`. `--smoke` runs every step on a few perovskites that
it makes itself. After an interruption, run the same command again to continue.

How sites are told apart: in a cubic cell of length a, B has 6 anions at a/2, and A has
12 at a/sqrt(2). So the cation whose six nearest anions are nearer on average is B, if
the averages differ by at least 10 % (41 % in a cubic cell). Crystals where they do not,
and cells other than A, B and three of O, N, S, F, are left out and counted.

Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018),
doi:10.1103/PhysRevLett.120.145301, Fig. 3.

Differs from the paper:
- The property is `--target`, such as the heat of formation of a cell. The paper has the
  energy above hull per atom, which is not in the dataset that we have.
- The last atom embeddings are pooled; the paper has hidden layers before its pooling.
- We use AdamW with one cycle of the learning rate, and `--epochs` epochs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import rich
import torch
from matplotlib import colormaps
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table

from crysdistill import (
    Crystal,
    HeadSettings,
    SplitSettings,
    Store,
    Target,
    TrainConfig,
    TrainerSettings,
    build,
    load_predictor,
    train,
)
from crysdistill.errors import InputError
from crysdistill.structures.elements import atomic_numbers_by_symbol, symbols
from crysdistill.studies.recipe import results_of_run, run_recipe
from crysdistill.studies.store_page import table_place

HEADS = {
    "linear pooling": HeadSettings(layers=0, first=False),
    "hidden layers": HeadSettings(),
}
"""The two heads. With the first, a prediction is a sum over atoms."""

PUBLISHED = {"linear pooling": 0.130, "hidden layers": 0.099}
"""Test MAE of the energy above hull in eV/atom, on 3,787 of 18,928 perovskites."""

ANIONS = ("O", "N", "S", "F")
LEAST_RATIO = 1.1
LEAST_CRYSTALS = 5


@dataclass(frozen=True)
class Sites:
    """The A and B sites of a store, (P,) each.

    Args:
        rows: the crystals.
        a: which of the crystal's atoms is on the A site.
        b: which is on the B site.
        left_out: the number of crystals whose sites cannot be told apart.
    """

    rows: np.ndarray
    a: np.ndarray
    b: np.ndarray
    left_out: int


def main(argv: Sequence[str] | None = None) -> int:
    """Train both heads; print errors and site energies beside the paper's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dataset", nargs="?", type=Path, help="a store of perovskites with a property")
    add("--target", default="heat_of_formation", help="an energy of a whole cell, eV")
    add("--labels", type=int, help="training crystals; 60 %% of all if absent")
    add("--convolution", default="eq4", choices=("eq4", "eq5", "published"))
    add("--seeds", type=int, default=1, help="number of repeats; energies are averaged")
    add("--epochs", type=int, default=100, help="passes over the labels")
    add("--out", type=Path, default=Path("runs/site_energies"), help="a folder")
    add("--smoke", action="store_true", help="a few crystals, in a temporary folder")
    return run_recipe(parser, argv, _full, _small)


def _full(args: argparse.Namespace) -> None:
    """Run it on what the user gave."""
    val = 0.2 if args.labels is None else max(1, args.labels // 4)
    base = TrainConfig(
        dataset=args.dataset,
        target=Target(args.target, "eV"),
        encoder={"name": "cgcnn", "convolution": args.convolution},
        split=SplitSettings(train=args.labels or 0.6, val=val, test=0.2),
        trainer=TrainerSettings(epochs=args.epochs, progress=False),
    )
    run(base, range(args.seeds), args.out)


def _small(args: argparse.Namespace, folder: Path) -> None:
    """Run every step on a few crystals."""
    run(_made_up(folder), range(1), folder, keeps=False)


def run(
    base: TrainConfig, seeds: Sequence[int], out: Path, keeps: bool = True
) -> pd.DataFrame:
    """Run the missing runs, print the tables, and return one row for each element.

    Args:
        base: the dataset, target, split and schedule of all runs.
        seeds: of split and weights.
        out: the folder for everything.
        keeps: whether that folder is kept, so that it is printed.
    """
    store = Store.open(base.dataset)
    sites = find_sites(store)
    errors: dict[str, list[float]] = {name: [] for name in HEADS}
    energies = []
    for seed, name in itertools.product(seeds, HEADS):
        what = f"{base.encoder.get('convolution', 'published')}-{base.split.train:g}"
        kind = f"{what}-{base.trainer.epochs}-epochs-{name.replace(' ', '-')}-{seed}"
        split = replace(base.split, seed=seed)
        folder = out / "runs" / kind
        config = replace(base, head=HEADS[name], split=split, seed=seed, out=folder)
        errors[name].append(float(results_of_run(train, config)["test"]))
        if name == "linear pooling":
            energies.append(contributions(folder / "weights.safetensors", store))
    found = by_element(store, sites, np.mean(energies, axis=0))
    rich.print(_errors_table(errors))
    rich.print(_sites_table(found, sites))
    found.to_csv(out / "sites.csv", index=False)
    draw(found, out / "sites.svg")
    if keeps:
        rich.print(f"runs, sites.csv and sites.svg: {out}")
    return found


def find_sites(store: Store) -> Sites:
    """Tell the A and B sites of all perovskites in a store apart."""
    anions = [atomic_numbers_by_symbol()[symbol] for symbol in ANIONS]
    images = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
    rows = np.flatnonzero(np.diff(store.atom_offsets) == 5)
    atoms = store.atom_offsets[rows][:, None] + np.arange(5)  # (P, 5)
    is_anion = np.isin(store.atomic_numbers[atoms], anions)  # (P, 5)
    chosen = is_anion.sum(axis=1) == 3
    rows, atoms, is_anion = rows[chosen], atoms[chosen], is_anion[chosen]
    order = np.argsort(is_anion, axis=1, kind="stable")  # both cations come first
    frac = store.frac_coords[np.take_along_axis(atoms, order, axis=1)]  # (P, 5, 3)
    steps = frac[:, None, 2:] - frac[:, :2, None]  # (P, 2, 3, 3)
    steps = steps[:, :, :, None] + images  # (P, 2, 3, 27, 3)
    lengths = np.linalg.norm(steps @ store.cells[rows][:, None, None], axis=-1)
    near = np.sort(lengths.reshape(len(rows), 2, 81), axis=2)[:, :, :6].mean(axis=2)
    clear = near.max(axis=1) >= LEAST_RATIO * near.min(axis=1)
    if not clear.any():
        raise InputError(
            f"{store.path}: no cell of A, B and three of {', '.join(ANIONS)}; give a "
            "store of perovskites"
        )
    farther = near.argmax(axis=1)[:, None]
    a, b = (np.take_along_axis(order, c, axis=1)[:, 0] for c in (farther, 1 - farther))
    left_out = len(store) - int(clear.sum())
    return Sites(rows[clear], a[clear], b[clear], left_out)


@torch.no_grad()
def contributions(weights: Path, store: Store) -> np.ndarray:
    """Return what each atom adds to its crystal's prediction, (N,).

    Args:
        weights: of a predictor whose head is linear; its crystal embeddings are the
            means of its atom embeddings.
        store: the crystals.
    """
    predictor = load_predictor(weights).eval()
    found = []
    for begin in range(0, len(store), 512):
        batch = store.batch(range(begin, min(begin + 512, len(store))))
        each = predictor.head(predictor.embed(batch).atoms)[:, 0]  # (N,)
        atoms = batch.ptr.diff()[batch.batch]  # (N,)
        found.append(predictor.normalizer.denormalize(each) / atoms)
    return torch.cat(found).numpy()


def by_element(store: Store, sites: Sites, energies: np.ndarray) -> pd.DataFrame:
    """Return the mean contribution of each element on each site.

    Args:
        store: the crystals.
        sites: their sites.
        energies: (N,) contributions of all atoms of the store.
    """
    parts = []
    for name, place in (("A", sites.a), ("B", sites.b)):
        atoms = store.atom_offsets[sites.rows] + place
        table = pd.DataFrame(
            {"number": store.atomic_numbers[atoms], "energy": energies[atoms]}
        )
        grouped = table.groupby("number")["energy"]
        found = grouped.agg(crystals="size", mean="mean", std="std").reset_index()
        parts.append(found.assign(site=name))
    found = pd.concat(parts, ignore_index=True)
    found["element"] = [symbols()[number] for number in found["number"]]
    columns = ["site", "element", "number", "crystals", "mean", "std"]
    return found[columns].sort_values(["site", "mean"], ignore_index=True)


def _errors_table(errors: dict[str, list[float]]) -> Table:
    """Return our errors beside the published ones."""
    table = Table(title="Test MAE")
    for head in ("head", "eV per cell", "eV/atom", "published, above hull, eV/atom"):
        table.add_column(head, justify="left" if head == "head" else "right")
    for name, values in errors.items():
        mean = float(np.mean(values))
        table.add_row(name, f"{mean:.3f}", f"{mean / 5:.4f}", f"{PUBLISHED[name]:.3f}")
    return table


def _sites_table(found: pd.DataFrame, sites: Sites) -> Table:
    """Return the ends of both rankings beside what the paper says of them."""
    said = {
        "A": ("large elements; groups 1-3 and 13-15", "small ones, as Be, B, Si"),
        "B": ("groups 4, 5 and 6", ""),
    }
    table = Table(title="Mean contribution to the energy of a cell, eV")
    for head in ("site", "", "ours", "published"):
        table.add_column(head)
    for site, texts in said.items():
        ranked = found[(found["site"] == site) & (found["crystals"] >= LEAST_CRYSTALS)]
        for text, word, part in zip(
            texts, ("most stable", "least"), (ranked.head(8), ranked[::-1].head(8)),
            strict=True,
        ):  # fmt: skip
            pairs = zip(part["element"], part["mean"], strict=True)
            ours = ", ".join(f"{symbol} {mean:.2f}" for symbol, mean in pairs)
            table.add_row(site, word, ours, text)
    table.caption = (
        f"{len(sites.rows):,} crystals; the sites of {sites.left_out:,} others cannot "
        "be told apart"
    )
    return table


def draw(found: pd.DataFrame, path: Path) -> None:
    """Draw a periodic table for each site; blue is stable, red is not."""
    figure = Figure(figsize=(9, 10), layout="constrained")
    for ax, site in zip(figure.subplots(2), ("A", "B"), strict=True):
        part = found[found["site"] == site]
        middle = float(part["mean"].median())
        norm, colours = CenteredNorm(middle), colormaps["RdBu_r"]
        norm.autoscale_None(part["mean"])
        means = dict(zip(part["number"], part["mean"], strict=True))
        for number, row, column in _places():
            known = number in means
            fill = colours(norm(means[number])) if known else "white"
            box = (column + 0.03, row + 0.03)
            ax.add_patch(Rectangle(box, 0.94, 0.94, fc=fill, ec="0.75", lw=0.7))
            strong = known and abs(norm(means[number]) - 0.5) > 0.3
            ink = "white" if strong else "black" if known else "0.6"
            style = {"ha": "center", "color": ink}
            ax.text(column + 0.5, row + 0.5, symbols()[number], fontsize=9, **style)
            if known:
                text = f"{means[number]:.2f}"
                ax.text(column + 0.5, row + 0.83, text, fontsize=6, **style)
        ax.set(xlim=(0, 18), ylim=(9.4, 0), aspect="equal")
        ax.set_title(f"{site} site: mean contribution, eV", loc="left", fontsize=11)
        ax.set_axis_off()
    figure.savefig(path)


def _places() -> Iterator[tuple[int, float, int]]:
    """Yield each element with its row and column in the periodic table."""
    for number in range(1, 101):
        yield number, *table_place(number)


def _made_up(folder: Path) -> TrainConfig:
    """Return a small study of cubic perovskites whose labels are sums over sites."""
    rng = np.random.default_rng(0)
    numbers = atomic_numbers_by_symbol()
    frac = np.array([[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    pairs = itertools.product(("Ca", "Sr", "Ba", "La", "Pb"), ("Ti", "Zr", "V", "Nb"))
    crystals = []
    for (a, b), anion in itertools.product(pairs, ("O", "N", "F")):
        species = [numbers[symbol] for symbol in (a, b, anion, anion, anion)]
        label = -0.02 * species[0] + 0.03 * species[1] + 0.1 * species[2]
        crystals.append(
            Crystal(
                material_id=f"{a}{b}{anion}3",
                atomic_numbers=np.array(species, np.uint8),
                frac_coords=frac,
                cell=np.eye(3) * rng.uniform(3.8, 4.2),
                properties={"heat_of_formation": label},
            )
        )
    store = build(
        crystals, folder / "made-up.h5", symmetry=None, workers=1, progress=False
    ).store
    return TrainConfig(
        dataset=store,
        target=Target("heat_of_formation", "eV"),
        encoder={"name": "cgcnn", "convolution": "eq4", "width": 8, "convolutions": 2},
        split=SplitSettings(train=36, val=12, test=12),
        trainer=TrainerSettings(epochs=2, batch_size=12, progress=False),
    )


if __name__ == "__main__":
    raise SystemExit(main())
