"""The card of a weights file: its model, training data, results and licence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from crysdistill.transfer.tensors import read_tensors
from crysdistill.transfer.weights import WeightsHeader, read_header


def write_card(weights: Path) -> str:
    """Return the card of a weights file, as Markdown with the facts of model hubs.

    The numbers are read from `results.json` beside the file, if there is one.

    Raises:
        InputError: the file cannot be used.
    """
    header = read_header(weights)
    front: dict[str, Any] = {"library_name": "crysdistill", "tags": ["materials"]}
    if header.provenance.licence:
        front["license"] = header.provenance.licence.lower()
    yaml_text = yaml.safe_dump(front, sort_keys=False)
    results = weights.with_name("results.json")
    numbers = json.loads(results.read_text("utf-8")) if results.is_file() else {}
    lines = [
        f"---\n{yaml_text}---",
        f"# {_title(header)}",
        "\n".join(f"- {line}" for line in _facts(weights, header, numbers)),
        *_table(numbers),
        f"```sh\n{_command(header)}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _title(header: WeightsHeader) -> str:
    names = ", ".join(target.name for target in header.targets)
    network = header.encoder.get("name", "several predictors")
    return f"{network}: {names}" if names else f"{network}: a pretrained encoder"


def _facts(
    weights: Path, header: WeightsHeader, results: dict[str, Any]
) -> Iterator[str]:
    """Yield the facts in the file's header, one a line."""
    count = sum(tensor.numel() for tensor in read_tensors(weights).values())
    settings = header.encoder.get("settings", {})
    graph, source = header.graph, header.provenance
    yield f"kind: {header.kind}, {count:,} numbers"
    if settings:
        yield f"settings: `{json.dumps(settings)}`"
    yield f"graph: {graph.mode}, {graph.cutoff:g} Å, {graph.max_neighbors} neighbours"
    for target in header.targets:
        yield f"predicts: {target.name}{f' ({target.unit})' if target.unit else ''}"
    if source.origin:
        yield f"from: {source.origin}"
    if source.corpus:
        yield f"corpus: {source.corpus}"
    for check in source.checks:
        known = source.labels_of_corpus or bool(source.taught_by)
        yield f"overlap: {check.say(labels=known)}"
    if header.targets and "overlap" in results:
        yield f"overlap with its own dataset: {results['overlap']}"
    elif not source.checks:
        yield f"overlap with test sets: {source.overlap}"
    if source.formulas is not None:
        yield (
            f"overlap with others: it carries the {len(source.formulas):,} formulas "
            f"that it learned from; `crysdistill overlap {weights.name} dataset.h5`"
        )
    if source.taught_by:
        yield f"taught by: {source.taught_by}"
    yield f"licence: {source.licence or 'not known'}"
    yield f"written by crysdistill {header.version}"


def _table(numbers: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the held-out numbers, if there are any."""
    found = numbers.get("numbers", numbers)  # those of pretraining have their own place
    shown = {k: v for k, v in found.items() if isinstance(v, float)}
    if shown:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in shown.items())
        yield f"| number | value |\n|---|---|\n{rows}"


def _command(header: WeightsHeader) -> str:
    if header.kind == "encoder":
        return (
            "crysdistill fit dataset=dataset.h5 target.name=target "
            "'weights=[weights.safetensors]'"
        )
    return "crysdistill predict weights.safetensors crystals/ -o predictions.csv"
