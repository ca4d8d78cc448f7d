"""Measure steps on a GPU and print the table: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import lightning as L
import numpy as np
import torch

from benchmarks.gpu.alloys import LABEL, alloy_store
from crysdistill.encoders import Encoder, make_encoder
from crysdistill.objectives import CRYSGNN, make_objective
from crysdistill.store.store import Store
from crysdistill.training.pretraining import PretrainModule
from crysdistill.training.settings import OptimizerSettings
from crysdistill.training.supervised import SupervisedModule
from crysdistill.training.watch.ceilings import Ceilings, measure_ceilings
from crysdistill.transfer.heads import PropertyHead
from crysdistill.transfer.outputs import Outputs
from crysdistill.transfer.predictor import Predictor
from crysdistill.transfer.targets import Normalizer, Target

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
COLUMNS = (
    "what", "batch", "precision", "mode", "crystals/s", "atoms/s", "edges/s",
    "encoder, GB/s", "of the copy ceiling", "peak MiB",
)  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """The amount of measurement.

    Args:
        crystals: of the corpus.
        batches: their sizes.
        modes: `eager`, `compiled`.
        warm_up: steps before the clock starts.
        windows: the number of windows whose median is reported.
        seconds: the least length of a window.
    """

    crystals: int
    batches: tuple[int, ...]
    modes: tuple[str, ...]
    warm_up: int
    windows: int
    seconds: float


WHOLE = Effort(
    13_000, (256, 512, 1024, 2048, 4096, 8192), ("eager", "compiled"), 10, 5, 0.5
)
SMOKE = Effort(80, (16,), ("eager",), 1, 1, 0.0)


def predictor(store: Store) -> SupervisedModule:
    """Return the module to train: 3 convolutions, d = 64, and a head."""
    target = Target(LABEL, "Å³")
    labels, names = store.property(LABEL), np.array(store.material_ids)
    normalizer = Normalizer.fit(target, labels, names)
    encoder = make_encoder("cgcnn", width=64, convolutions=3)
    head = PropertyHead(encoder.width, 128, 1)
    whole = Predictor(encoder, head, Outputs([target], [normalizer]), store.graph)
    return SupervisedModule(whole, OptimizerSettings())


def pretrainer(store: Store) -> PretrainModule:
    """Return the module to pretrain: 5 convolutions, d = 64, CrysGNN's objectives."""
    encoder = make_encoder(
        "cgcnn", width=64, convolutions=5, bias=False, normalize=True
    )
    objectives = {name: make_objective(name, encoder) for name in CRYSGNN}
    for objective in objectives.values():
        objective.prepare(store, np.arange(len(store)))
    weights = dict.fromkeys(objectives, 1 / len(objectives))
    return PretrainModule(encoder, objectives, weights, OptimizerSettings(), 0)


MODULES: dict[str, Callable[[Store], L.LightningModule]] = {
    "training": predictor,
    "pretraining": pretrainer,
}


def measure(
    what: str,
    store: Store,
    device: torch.device,
    batch_size: int,
    precision: str,
    mode: str,
    effort: Effort,
    ceilings: Ceilings | None,
) -> tuple[str, ...]:
    """Return one row of the table.

    A step takes a batch from the store on the device, computes the loss and its
    gradient, and updates the weights.
    """
    torch.manual_seed(0)
    module = MODULES[what](store).to(device)
    encoder = next(part for part in module.modules() if isinstance(part, Encoder))
    objectives = getattr(module, "objectives", {})
    views = {view for one in objectives.values() for view in one.views}
    passes = max(1, len(views))  # passes of the encoder in a step
    if mode == "compiled":
        torch._dynamo.reset()  # compile again for each row, or torch gives up
        encoder.compile(dynamic=True)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, fused=fused)
    rng = np.random.default_rng(0)
    targets = [LABEL] if what == "training" else []
    casting = torch.autocast(device.type, torch.bfloat16)
    sizes = np.zeros(3, np.int64)

    def step(seed: int) -> None:
        batch = store.batch(rng.integers(0, len(store), batch_size), targets)
        sizes[:] += batch.num_graphs, len(batch.batch), batch.edge_index.shape[1]
        optimizer.zero_grad(set_to_none=True)
        with casting if precision == "bf16" else nullcontext():
            loss = module.losses(batch, seed)["loss"]
        loss.backward()
        optimizer.step()

    named = (what, f"{batch_size:,}", precision, mode)
    if fused:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for number in range(effort.warm_up):
            step(number)
        speeds = list(_windows(step, sizes, device, effort))
    except torch.OutOfMemoryError:
        return (*named, "does not fit", "", "", "", "", "")
    crystals, atoms, edges = (statistics.median(s) for s in zip(*speeds, strict=True))
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if fused else 0.0
    work = encoder.work(
        batch_size,
        round(batch_size * atoms / crystals),
        round(batch_size * edges / crystals),
    )
    moved = passes * work.bytes * crystals / batch_size / 1e9 if work else None
    return (
        *named,
        f"{crystals:,.0f}",
        f"{atoms:,.0f}",
        f"{edges:,.0f}",
        f"{moved:,.1f}" if moved else "",
        f"{moved / ceilings.gbytes:.0%}" if moved and ceilings else "",
        f"{peak:,.0f}" if fused else "",
    )


def _windows(
    step: Callable[[int], None],
    sizes: np.ndarray,
    device: torch.device,
    effort: Effort,
) -> Iterator[np.ndarray]:
    """Yield crystals, atoms and edges per second of each window."""
    number, steps = 0, 1
    while number < effort.windows:
        sizes[:] = 0
        _wait_for(device)
        begun = time.perf_counter()
        for seed in range(steps):
            step(seed)
        _wait_for(device)
        seconds = time.perf_counter() - begun
        if seconds < effort.seconds:  # too short to measure
            steps *= 2
            continue
        number += 1
        yield sizes / seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line asks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    parser.add_argument("--write", type=Path, help="also write the table to a file")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here that PyTorch can use; `--device cpu --smoke` runs")
        return 2
    effort = SMOKE if args.smoke else WHOLE
    with tempfile.TemporaryDirectory() as folder:
        host = alloy_store(Path(folder), effort.crystals)
        store = host.to(device)
        lines = []
        for line in table(host, store, device, effort):
            print(line, flush=True)
            lines.append(line)
        if args.write:
            args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def table(
    host: Store, store: Store, device: torch.device, effort: Effort
) -> Iterator[str]:
    """Measure, and yield the table line by line as Markdown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    atoms = len(host.atomic_numbers) / len(host)
    yield (
        f"{name}, PyTorch {torch.__version__}; {len(host):,} alloys of {atoms:.1f} "
        "atoms on average, 12 neighbours, d = 64; the store is on the device."
    )
    ceilings = {
        precision: measure_ceilings(device, name)
        for precision, name in PRECISIONS.items()
    }
    for precision, most in ceilings.items():
        if most:
            yield (
                f"Ceilings in {precision}: copies {most.gbytes:,.0f} GB/s, products "
                f"{most.gflops:,.0f} GFLOP/s."
            )
    yield from ("", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|")
    for what, precision, mode, size in product(
        MODULES, PRECISIONS, effort.modes, effort.batches
    ):
        most = ceilings[precision]
        row = measure(what, store, device, size, precision, mode, effort, most)
        yield "| " + " | ".join(row) + " |"


if __name__ == "__main__":
    sys.exit(main())
