"""A run of `train` or `distill` in its own process, timed epoch by epoch.

    python -m benchmarks.our_training VERB KEY=VALUE ...

An epoch is timed with all its parts: loading, Lightning, validation, logs and
checkpoints. The output is JSON: the peak memory, and the seconds of each epoch but the
first, which warms up, and the last, which includes the end of the run.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
from itertools import pairwise
from typing import Any

import torch

from crysdistill.configs import load_config
from crysdistill.training import labelled, supervised
from crysdistill.training.distill import DistillConfig, distill
from crysdistill.training.train import TrainConfig, train

VERBS = {"train": (TrainConfig, train), "distill": (DistillConfig, distill)}


def main() -> None:
    """Run, and print the times and the peak memory."""
    verb, *overrides = sys.argv[1:]
    torch.set_flush_denormal(True)
    schema, run = VERBS[verb]
    config: Any = load_config(None, overrides, schema)
    begun: list[tuple[float, float]] = []

    class Timed(supervised.SupervisedModule):
        """Records when epochs begin."""

        def on_train_epoch_start(self) -> None:
            begun.append((time.perf_counter(), time.process_time()))
            super().on_train_epoch_start()

    from crysdistill.training import distill as distilling

    labelled.SupervisedModule = Timed  # type: ignore[misc]
    distilling.SupervisedModule = Timed  # type: ignore[misc]
    with contextlib.redirect_stdout(io.StringIO()):
        run(config)
    walls, processors = zip(*begun, strict=True)
    seconds, processor = (
        [end - start for start, end in pairwise(times)][1:]
        for times in (walls, processors)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results = json.loads((config.out / "results.json").read_text())
    told = {"epochs": seconds, "processor": processor, "peak": peak}
    print(json.dumps({**told, "mae": results["val"]}))


if __name__ == "__main__":
    main()
