"""The published CGCNN program's training, epoch after epoch, in plain PyTorch.

This is our own re-implementation of its main loop. Every crystal's arrays are made on
first access and kept (an unbounded `lru_cache`). A `DataLoader` without workers
collates them. There are a normaliser and meters, and every epoch has a validation pass
and a checkpoint. It runs in its own process, which loads only the element table of the
package:

    python -m benchmarks.published_training ARRAYS.npz EPOCHS THREADS BATCH
    python -m benchmarks.published_training FOLDER EPOCHS THREADS BATCH

The first form begins with everything in memory, the second with CIF files. The program
prints the seconds of each epoch and its peak memory as JSON.
"""

from __future__ import annotations

import csv
import functools
import json
import resource
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pymatgen.core import Structure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from benchmarks.published import PublishedCGCNN, published_gaussians, published_graph
from crysdistill.structures.elements import cgcnn92

Item = tuple[tuple[Tensor, Tensor, Tensor], Tensor, str]


class PaddedCrystals(Dataset[Item]):
    """Crystals with known neighbours; tensors are made once and kept.

    Args:
        path: a file from `datasets.write_padded`.
    """

    def __init__(self, path: Path) -> None:
        file = np.load(path)
        self.arrays = {name: file[name] for name in file}
        self.elements = cgcnn92()

    def __len__(self) -> int:
        return len(self.arrays["offsets"]) - 1

    @functools.cache  # noqa: B019 - as published
    def __getitem__(self, row: int) -> Item:
        atoms = slice(*self.arrays["offsets"][row : row + 2])
        u = published_gaussians(self.arrays["distance"][atoms])  # (n, 12, 41)
        inputs = (
            torch.from_numpy(self.elements[self.arrays["numbers"][atoms]]),
            torch.from_numpy(u).float(),
            torch.from_numpy(self.arrays["neighbor"][atoms]).long(),
        )
        return inputs, torch.tensor([self.arrays["targets"][row]]), str(row)


class CifFolder(Dataset[Item]):
    """A folder of `ID.cif` and `id_prop.csv`; each is read once and kept.

    Args:
        folder: its path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "id_prop.csv").open() as file:
            self.labels = list(csv.reader(file))
        self.elements = cgcnn92()

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cache  # noqa: B019 - as published
    def __getitem__(self, row: int) -> Item:
        name, label = self.labels[row]
        structure = Structure.from_file(self.folder / f"{name}.cif")
        numbers = [site.specie.number for site in structure]
        neighbor, distance = published_graph(structure)
        inputs = (
            torch.from_numpy(self.elements[numbers]),
            torch.from_numpy(published_gaussians(distance)).float(),
            torch.from_numpy(neighbor).long(),
        )
        return inputs, torch.tensor([float(label)]), name


def collate(items: list[Item]) -> tuple[tuple[Any, ...], Tensor, list[str]]:
    """Concatenate crystals, and list the atoms of each."""
    elements, edges, neighbors, crystals, targets, names = [], [], [], [], [], []
    base = 0
    for (x, u, neighbor), target, name in items:
        elements.append(x)
        edges.append(u)
        neighbors.append(neighbor + base)
        crystals.append(torch.arange(base, base + len(x)))
        targets.append(target)
        names.append(name)
        base += len(x)
    inputs = (torch.cat(elements), torch.cat(edges), torch.cat(neighbors), crystals)
    return inputs, torch.stack(targets), names


class Meter:
    """The running mean of a number."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: Tensor, count: int) -> None:
        """Add a batch."""
        self.total += float(value) * count
        self.count += count


class Program:
    """Model, optimizer and normaliser of a run."""

    def __init__(self, sample: Iterable[Item]) -> None:
        targets = torch.stack([target for _, target, _ in sample])
        self.mean, self.std = targets.mean(), targets.std()
        self.model = PublishedCGCNN()
        self.criterion = nn.MSELoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)

    def epoch(self, loader: Iterable[Any], train: bool) -> tuple[Meter, Meter]:
        """Pass over a loader once, with or without training."""
        losses, errors = Meter(), Meter()
        self.model.train(train)
        with torch.set_grad_enabled(train):
            for inputs, target, _ in loader:
                output = self.model(*inputs)
                loss = self.criterion(output, (target - self.mean) / self.std)
                error = (output.detach() * self.std + self.mean - target).abs().mean()
                losses.update(loss.detach(), len(target))
                errors.update(error, len(target))
                if train:
                    self.optimizer.zero_grad()
                    loss.backward()
                    self.optimizer.step()
        return losses, errors


def main() -> None:
    """Train, and print the times and the peak memory."""
    source, epochs, threads, size = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    dataset: PaddedCrystals | CifFolder
    if source.is_dir():
        dataset = CifFolder(source)
        order = np.random.default_rng(0).permutation(len(dataset))
        train, val = np.split(order, [round(0.8 * len(order))])
        val = val[: round(0.1 * len(order))]
    else:
        dataset = PaddedCrystals(source)
        train, val = dataset.arrays["train"], dataset.arrays["val"]
    options: Any = {"batch_size": size, "num_workers": 0, "collate_fn": collate}
    loaders = [
        DataLoader(dataset, sampler=SubsetRandomSampler(rows.tolist()), **options)
        for rows in (train, val)
    ]
    program = Program([dataset[row] for row in train[:500].tolist()])
    if isinstance(dataset, PaddedCrystals):
        for row in (*train.tolist(), *val.tolist()):  # warm up all caches, and torch
            dataset[row]
        program.epoch(islice(loaders[0], 2), train=True)
    checkpoint = source.parent / "published-checkpoint.pt"
    seconds, processor = [], []
    for epoch in range(epochs):
        begun, busy = time.perf_counter(), time.process_time()
        program.epoch(loaders[0], train=True)
        _, errors = program.epoch(loaders[1], train=False)
        state = {
            "epoch": epoch,
            "state_dict": program.model.state_dict(),
            "optimizer": program.optimizer.state_dict(),
        }
        torch.save(state, checkpoint)
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - busy)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"epochs": seconds, "processor": processor, "peak": peak}
    print(json.dumps({**told, "mae": errors.total / errors.count}))


if __name__ == "__main__":
    main()
