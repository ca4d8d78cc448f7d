"""How a build and a store grow: `python -m benchmarks.scale [FOLDER]`.

Builds stores of 1,000, 10,000, 50,000 and all structures of the unlabelled corpus, on
all cores, and prints time and memory for each. Then it opens the largest in one process
and in eight. The stores stay in FOLDER (a temporary one if none is given).
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from benchmarks.sharing import READERS, readers
from benchmarks.timing import data

SIZES = (1_000, 10_000, 50_000, None)


def _build(source: Path, out: Path, answer: multiprocessing.Queue) -> None:
    """Build in a separate process, whose peak memory is that of the build."""
    from crysdistill.corpus.build import build

    begun = time.perf_counter()
    report = build([source], out, progress=False, overwrite=True)
    seconds = time.perf_counter() - begun
    peaks = [
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    answer.put((report.read, seconds, *peaks))


def main() -> None:
    """Print both tables."""
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    whole = data() / "mp_corpus" / "structures.jsonl.gz"
    context = multiprocessing.get_context("spawn")
    print("| structures | seconds | µs each | peak MB, main | peak MB, worker |")
    print("|---|---|---|---|---|")
    for size in SIZES:
        source = whole
        if size is not None:
            source = folder / f"{size}.jsonl"
            with gzip.open(whole) as lines, source.open("wb") as file:
                # Lines from all over the corpus, as it spreads large cells unevenly.
                file.writelines(islice(lines, 0, None, 154_925 // size))
        answer = context.Queue()
        out = folder / f"{size or 'all'}.h5"
        process = context.Process(target=_build, args=(source, out, answer))
        process.start()
        read, seconds, main_peak, worker_peak = answer.get()
        process.join()
        each = 1e6 * seconds / read
        print(
            f"| {read:,} | {seconds:.1f} | {each:,.0f} | {main_peak:.0f} "
            f"| {worker_peak:.0f} |",
            flush=True,
        )
    one, many = readers(out, 1).beside, readers(out, READERS).beside
    print(
        f"\n{out.name}: {out.stat().st_size / 1e6:.0f} MB on disk; one reader holds "
        f"{one:.0f} MB, {READERS} readers together {many:.0f} MB ({many / one:.2f}x)"
    )


if __name__ == "__main__":
    main()
