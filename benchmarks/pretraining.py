"""A pretraining step with the four objectives of CrysGNN, and its cost per atom.

The published form is `published_pretraining.py`. Ours is the step of `pretrain`, in its
default form and in the form of `published: true`. The four losses of the latter are
first compared with the published ones.
"""

from __future__ import annotations

import ctypes
import gzip
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import torch
from torch import Tensor

from benchmarks.published import published_gaussians
from benchmarks.published_pretraining import CLASSES, PublishedPretraining
from benchmarks.timing import Row, data, take_turns
from crysdistill.corpus.build import build
from crysdistill.encoders import CGCNN
from crysdistill.graphs.batch import CrystalBatch, GraphSettings, distances
from crysdistill.objectives import CRYSGNN, make_objective
from crysdistill.store.store import Store
from crysdistill.structures.elements import cgcnn92
from crysdistill.structures.symmetry import crystal_system
from crysdistill.training.pretraining import PretrainModule
from crysdistill.training.settings import OptimizerSettings

BATCH = 128
"""Crystals in a batch, as in the published program."""

LARGE = 400
"""All crystals of the corpus with more atoms are used."""

SIZES = ((9, 11), (48, 52), (190, 210), (440, 1000))
"""Ranges of crystal sizes, in atoms, whose cost per atom is compared."""

ATOMS = 3000
"""About how many atoms a batch of that comparison has."""


def measure() -> Iterator[Row]:
    """Compare steps on the same crystals of the corpus, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder))
        rows = _with_all_neighbors(store)
        yield _growth(store, rows)
        # A sample like the corpus; this store has too many of the largest crystals.
        usual = rows[np.diff(store.atom_offsets)[rows] <= LARGE]
        chosen = np.random.default_rng(0).choice(usual, BATCH, replace=False)
        yield from _steps(store.batch(chosen))


def _store(folder: Path) -> Store:
    """Build a store of every hundredth crystal of the corpus and all the largest."""
    source = folder / "slice.jsonl"
    with (
        gzip.open(data() / "mp_corpus" / "structures.jsonl.gz") as lines,
        source.open("wb") as file,
    ):
        for number, line in enumerate(lines):
            # A line with that many atoms is at least that long.
            large = len(line) > 25 * LARGE and (
                len(orjson.loads(line)["species"]) > LARGE
            )
            if large or number % 100 == 0:
                file.write(line)
    graph = GraphSettings(mode="nearest")
    build([source], folder / "corpus.h5", graph=graph, progress=False)
    return Store.open(folder / "corpus.h5")


def _with_all_neighbors(store: Store) -> np.ndarray:
    """Return crystals with twelve edges at every atom and a known space group."""
    atoms, edges = np.diff(store.atom_offsets), np.diff(store.edge_offsets)
    whole = edges == store.graph.max_neighbors * atoms
    return np.flatnonzero(whole & (store.space_groups[:, 0] > 0))


# -------------------------------------------------------------------------- steps


def _steps(batch: CrystalBatch) -> Iterator[Row]:
    inputs = _published_inputs(batch)
    torch.manual_seed(0)
    theirs = PublishedPretraining()
    same, mine = _ours(published=True), _ours(published=False)
    _copy_weights(theirs, same)
    _compare(theirs(*inputs), same.losses(batch, 0))

    def published() -> None:
        theirs.zero_grad()
        torch.stack(list(theirs(*inputs).values())).mean().backward()

    def ours(module: PretrainModule) -> Callable[[], None]:
        def step() -> None:
            module.zero_grad()
            module.losses(batch, 0)["loss"].backward()

        return step

    candidates = {"published": published, "same": ours(same), "mine": ours(mine)}
    seconds = take_turns(candidates, repeats=3)
    peaks = {name: peak(step) for name, step in candidates.items()}
    atoms = (batch.ptr[1:] - batch.ptr[:-1]).double()
    what = (
        f"{batch.num_graphs} crystals, {batch.num_nodes:,} atoms, "
        f"{int(atoms.square().sum()):,} pairs"
    )
    for name, form, goal in (
        ("mine", "our form", ">= 10x"),
        ("same", "the published losses", ""),
    ):
        yield Row(
            f"pretraining step, four objectives, {form}: {what}",
            f"{batch.num_graphs / seconds['published']:,.0f} crystals/s",
            f"{batch.num_graphs / seconds[name]:,.0f} crystals/s",
            seconds["published"] / seconds[name],
            goal,
        )
        yield Row(
            f"peak memory of that step, {form}",
            f"{peaks['published']:,.0f} MB",
            f"{peaks[name]:,.0f} MB",
            peaks["published"] / peaks[name],
            "",
        )


def _published_inputs(batch: CrystalBatch) -> tuple[object, ...]:
    """Return the arrays that the published program has in memory before a step."""
    n = batch.num_nodes
    neighbor = batch.edge_index[0].view(n, -1)
    d = distances(batch).double().numpy().reshape(n, -1)
    crystals, adjacency = [], []
    for first, end in zip(batch.ptr.tolist(), batch.ptr.tolist()[1:], strict=False):
        size = end - first
        slots = torch.arange(size).unsqueeze(1) * size + neighbor[first:end] - first
        times = torch.bincount(slots.flatten(), minlength=size * size)
        adjacency.append(times.clamp(max=CLASSES - 1).view(size, size))
        crystals.append(torch.arange(first, end))
    systems = torch.from_numpy(crystal_system(batch.space_groups.numpy())).long()
    return (
        torch.from_numpy(cgcnn92())[batch.atomic_numbers],
        torch.from_numpy(published_gaussians(d)).float(),
        neighbor,
        crystals,
        adjacency,
        batch.space_groups - 1,
        systems,
    )


def _ours(published: bool) -> PretrainModule:
    """Return the module that `pretrain` trains, in one of its two forms."""
    encoder = CGCNN(convolutions=5, bias=False, normalize=True)
    objectives = {
        name: make_objective(name, encoder, published=published) for name in CRYSGNN
    }
    weights = dict.fromkeys(CRYSGNN, 0.25)
    return PretrainModule(encoder, objectives, weights, OptimizerSettings(), 0)


def _copy_weights(published: PublishedPretraining, ours: PretrainModule) -> None:
    """Copy the weights of the published layout to ours."""
    encoder, objectives = ours.encoder, ours.named()
    encoder.embedding.load_state_dict(published.embedding.state_dict())
    for theirs, mine in zip(published.convolutions, encoder.convolutions, strict=True):
        for k, part in enumerate(("gate", "core")):
            half = slice(64 * k, 64 * (k + 1))
            linear = getattr(mine, part).linear
            linear.weight.data.copy_(theirs.linear.weight[half])
            linear.bias.data.copy_(theirs.linear.bias[half])
    for theirs, mine in (
        (published.pairs, objectives["connectivity"].bilinear),
        (published.mix, objectives["connectivity"].mix),
        (published.features, objectives["node_features"].decoder),
        (published.space_group, objectives["space_group"].decoder),
    ):
        mine.load_state_dict(theirs.state_dict())


def _compare(theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Print both programs' losses, and stop if they differ.

    Raises:
        SystemExit: they differ by more than 1e-5 of a loss.
    """
    for name, loss in theirs.items():
        a, b = loss.item(), mine[name].item()
        print(f"{name}: published {a:.6f}, ours {b:.6f}", flush=True)
        if abs(a - b) > 1e-5 * abs(a):
            raise SystemExit(f"the two losses of {name} do not agree to 1e-5")


def peak(step: Callable[[], None]) -> float:
    """Return the most memory that a step adds to this process, in MB.

    Raises:
        SystemExit: this system does not report peak memory.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory left by earlier steps does not count
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError) as error:
        raise SystemExit(f"peak memory cannot be measured here: {error}") from None
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0]) / 1024


# ------------------------------------------------------------------------- growth


@dataclass(frozen=True)
class _Sized:
    """A batch of crystals of about one size, and its step."""

    batch: CrystalBatch
    step: Callable[[], None]


def _growth(store: Store, rows: np.ndarray) -> Row:
    """Compare the cost per atom in small and in large crystals."""
    module = _ours(published=False)
    atoms = np.diff(store.atom_offsets)
    sized: dict[str, _Sized] = {}
    for least, most in SIZES:
        some = rows[(atoms[rows] >= least) & (atoms[rows] <= most)]
        # The largest are few, so their batch repeats them.
        order = np.resize(np.random.default_rng(0).permutation(some), ATOMS)
        total = atoms[order].cumsum()
        batch = store.batch(order[: max(2, int((total <= ATOMS).sum()))])

        def step(batch: CrystalBatch = batch) -> None:
            module.zero_grad()
            module.losses(batch, 0)["loss"].backward()

        mean = round(batch.num_nodes / batch.num_graphs)
        sized[f"{mean}"] = _Sized(batch, step)
    seconds = take_turns({name: each.step for name, each in sized.items()}, repeats=5)
    cost = {
        name: 1e6 * seconds[name] / each.batch.num_nodes for name, each in sized.items()
    }
    for name, value in cost.items():
        print(f"crystals of {name} atoms: {value:.0f} µs per atom", flush=True)
    names = list(cost)
    return Row(
        f"cost of a pretraining step per atom: crystals of {', '.join(names)} atoms",
        "",
        ", ".join(f"{value:.0f} µs" for value in cost.values()),
        cost[names[-1]] / cost[names[0]],
        "about 1",
    )
