"""`python -m pretrain.crysgnn corpus.h5` pretrains CrysGNN as it was published.

Five convolutions learn to reconstruct the element vectors, the connectivity, the space
group and the crystal system of every crystal, with equal weights. Nothing is masked,
and all ordered pairs of atoms count. Build the corpus with `--graph cgcnn` for the
published graph:

    crysdistill build cifs/ -o corpus.h5 --graph cgcnn
    python -m pretrain.crysgnn corpus.h5 trainer.epochs=20 exclude=[dataset.h5]

`KEY=VALUE` overrides `configs/pretrain-crysgnn.yaml`; `--smoke` runs every step on a
few alloys that it makes itself.

Source: K. Das et al., AAAI 37, 7323 (2023), doi:10.1609/aaai.v37i6.25892.

Differs from the publication:
- We keep the epoch with the smallest loss on held-out crystals of the corpus. The
  publication used the smallest training loss, and reported no number beside the loss.
- Crystals are drawn from a seed, and space groups are found once, by `build`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import rich
import torch
from rich.table import Table

from crysdistill.configs import load_config
from crysdistill.corpus.build import build
from crysdistill.demo import demo_sets
from crysdistill.errors import InputError
from crysdistill.graphs.batch import GraphSettings
from crysdistill.objectives import make_objective
from crysdistill.training.pretrain import PretrainConfig, pretrain
from crysdistill.transfer.weights import load_encoder

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pretrain-crysgnn.yaml"

PUBLISHED_PARAMETERS = 162_162
"""Parameters of encoder and decoders, as the published code counts them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain; print the number of parameters and the held-out numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "a store of crystals, built with `--graph cgcnn`"
    parser.add_argument("corpus", nargs="?", type=Path, help=text)
    text = "values that override the configuration, such as `trainer.epochs=5`"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)
    text = "a few alloys, one epoch, a temporary folder"
    parser.add_argument("--smoke", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.corpus is None and not args.smoke:
        parser.error("give a corpus, or `--smoke`")
    torch.set_flush_denormal(True)  # tails of Gaussians slow a CPU down
    try:
        if not args.smoke:
            run(args.corpus, args.overrides)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            small = ["trainer.epochs=2", "trainer.batch_size=32", "held_out=0.2"]
            run(_alloys(out), [f"out={out / 'run'}", "trainer.progress=false", *small])
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def run(corpus: Path, overrides: Sequence[str]) -> Path:
    """Pretrain on a store and print the tables; return the weights file.

    Args:
        corpus: the store.
        overrides: values that override the configuration.
    """
    given = [f"corpus={corpus}", *overrides]
    weights = pretrain(load_config(CONFIG, given, PretrainConfig))
    results = json.loads(weights.with_name("results.json").read_text())
    rich.print(parameter_table(weights))
    above = compare_with_chance(results["numbers"])
    rich.print(f"above chance: {', '.join(above) or 'nothing'}")
    rich.print("published: no held-out number for any of the four")
    return weights


def parameter_table(weights: Path) -> Table:
    """Count the parameters of the encoder and its four published decoders.

    Args:
        weights: the weights file. It does not hold the decoders, so they are made
            again to count them.
    """
    encoder = load_encoder(weights)
    names = ("node_features", "connectivity", "space_group", "crystal_system")
    parts = {"encoder": encoder} | {
        name: make_objective(name, encoder, published=True) for name in names
    }
    table = Table("part", "parameters", "published", title="CrysGNN")
    total = 0
    for name, part in parts.items():
        count = sum(p.numel() for p in part.parameters())
        total += count
        table.add_row(name.replace("_", " "), f"{count:,}", "")
    table.add_section()
    table.add_row("together", f"{total:,}", f"{PUBLISHED_PARAMETERS:,}")
    return table


def compare_with_chance(numbers: dict[str, float]) -> list[str]:
    """Return the names of held-out numbers above their chance level.

    Args:
        numbers: the numbers of the run, `x` and `x_chance`.
    """
    return [
        name.replace("_", " ")
        for name, value in numbers.items()
        if value > numbers.get(f"{name}_chance", float("inf"))
    ]


def _alloys(folder: Path) -> Path:
    """Build a store of a few alloys."""
    corpus, _ = demo_sets(seed=0, corpus_size=150, dataset_size=1)
    source = folder / "alloys.json"
    entries = {c.material_id: c.to_pymatgen().as_dict() for c in corpus}
    source.write_text(json.dumps(entries))
    graph = GraphSettings(mode="cgcnn")
    store = folder / "corpus.h5"
    return build([source], store, graph=graph, workers=1, progress=False).store


if __name__ == "__main__":
    raise SystemExit(main())
