"""CIF files to graphs, against pymatgen's reader and the published graph."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pymatgen.core import Structure

from benchmarks.published import published_graph
from benchmarks.timing import Row, data, take_turns
from crysdistill.corpus.shards import BuildSettings, build_shard
from crysdistill.graphs.neighbors import GraphSettings
from crysdistill.sources import open_source


def measure() -> Iterator[Row]:
    """Compare on the same files, one core."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(data() / "cgcnn_folder" / "cgcnn_folder.zip") as archive:
            archive.extractall(folder)
        files = sorted(Path(folder).rglob("*.cif"))[:100]
        records = [record for path in files for record in open_source(path).records()]
        settings = BuildSettings(GraphSettings(), symmetry=None)
        seconds = take_turns(
            {
                "published": lambda: [
                    published_graph(Structure.from_file(path)) for path in files
                ],
                "ours": lambda: build_shard(records, (), settings),
            },
            repeats=5,
        )
    yield Row(
        "CIF files to graphs, checked and packed",
        f"{len(files) / seconds['published']:.0f} structures/s",
        f"{len(files) / seconds['ours']:,.0f} structures/s",
        seconds["published"] / seconds["ours"],
        ">= 30x",
    )
