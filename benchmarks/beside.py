"""`python -m benchmarks.beside OLD_CHECKOUT mp36k/`: an epoch of CGCNN, then and now.

Runs of both checkouts take turns of 0.15 s on one thread, so that other work on the
machine slows both alike. Prints the processor seconds of one epoch of training and of
pretraining (CrysGNN's four objectives, the encoder of that release), and their ratio.
An epoch is the difference between a run of one epoch and a longer run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TURN = 0.15  # s
EPOCHS = {"train": 7, "pretrain": 4}
CRYSTALS = {"train": 6000, "pretrain": 4000}
OBJECTIVES = (
    "{node_features: {}, connectivity: {}, space_group: {}, crystal_system: {}}"
)
ENCODER = "{name: cgcnn, convolutions: 5, bias: false, normalize: true}"


def main() -> int:
    """Measure both kinds of run and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("source", type=Path, help="crystals with the label of mp36k")
    args = parser.parse_args()
    trees = {"then": args.old.resolve(), "now": HERE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tree, path in trees.items():
            line = ["build", str(args.source.resolve()), "-o", f"{tree}.h5"]
            _start(path, [*line, "--no-progress"], folder, tree).wait()
        for kind, epochs in EPOCHS.items():
            one = _take_turns(trees, kind, 1, folder)
            more = _take_turns(trees, kind, 1 + epochs, folder)
            spent = {tree: (more[tree] - one[tree]) / epochs for tree in trees}
            print(
                f"{kind}: {spent['then']:.2f} s then, {spent['now']:.2f} s now, "
                f"ratio {spent['now'] / spent['then']:.3f}",
                flush=True,
            )
    return 0


def _start(tree: Path, line: list[str], folder: Path, name: str) -> subprocess.Popen:
    """Start a command of one checkout."""
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "crysdistill", *line],
            env={**os.environ, **threads, "PYTHONPATH": str(tree)},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _line(kind: str, tree: str, epochs: int) -> list[str]:
    """Return the command line of a run."""
    shared = [
        f"out=runs/{kind}-{tree}-{epochs}",
        f"trainer.epochs={epochs}",
        "trainer.threads=1",
        "trainer.progress=false",
    ]
    size = CRYSTALS[kind]
    if kind == "train":
        target = "target.name=formation_energy_per_atom"
        split = [f"split.train={size}", "split.val=1000", "split.test=1000"]
        batch = "trainer.batch_size=256"
        return ["train", f"dataset={tree}.h5", target, batch, *split, *shared]
    what = [f"objectives={OBJECTIVES}", f"encoder={ENCODER}", f"subset={size}"]
    return ["pretrain", f"corpus={tree}.h5", *what, *shared]


def _take_turns(
    trees: dict[str, Path], kind: str, epochs: int, folder: Path
) -> dict[str, float]:
    """Return the processor seconds of a run in each checkout."""
    running = {}
    for tree, path in trees.items():
        running[tree] = _start(path, _line(kind, tree, epochs), folder, tree)
        running[tree].send_signal(signal.SIGSTOP)
    spent = {}
    while running:
        for tree, process in list(running.items()):
            process.send_signal(signal.SIGCONT)
            end = time.monotonic() + TURN
            while time.monotonic() < end:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                if done:
                    if status:
                        raise SystemExit((folder / f"{tree}.log").read_text())
                    spent[tree] = usage.ru_utime + usage.ru_stime
                    del running[tree]
                    break
                time.sleep(0.005)
            else:
                process.send_signal(signal.SIGSTOP)
    return spent


if __name__ == "__main__":
    raise SystemExit(main())
