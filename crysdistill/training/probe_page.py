"""Draws the probe errors of the embeddings over the epochs of a pretraining run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from crysdistill.files import write_whole
from crysdistill.training.small_tasks import PROBED


def draw_probes(
    log: Path, picture: Path, controls: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw the error of every ridge probe by epoch, beside those of the controls.

    Args:
        log: the CSV with the logged numbers of a run.
        picture: the PNG to write.
        controls: the numbers of the controls, by name; they are named as in the log.
    """
    table = pd.read_csv(log)
    table = table[table[PROBED].notna()]
    epochs = table["epoch"] + 1
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    columns = map(str, table.columns)
    names = [c for c in columns if c.startswith("probe_") and c.endswith("_ridge")]
    for name in names:
        task = name.removeprefix("probe_").removesuffix("_ridge")
        axes.plot(epochs, table[name], marker="o", markersize=3, label=task)
    axes.plot(epochs, table[PROBED], color="black", linewidth=2, label="mean")
    for style, (name, numbers) in zip(("--", ":"), controls.items(), strict=False):
        axes.axhline(numbers[PROBED], color="gray", linestyle=style, label=name)
    axes.set(xlabel="epoch", ylabel="error of a ridge probe / error of the median")
    axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(picture, content.getbuffer())
