"""Matbench: `matbench:TASK`, such as `matbench:matbench_phonons`, by matminer's loader.

matminer does not work with pandas 3. If it is missing, the error names the file to
download. `tables.py` reads that file without any package and gives the same ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from crysdistill.errors import BadStructure, InputError, did_you_mean, first_line
from crysdistill.sources.entries import label_values
from crysdistill.sources.layouts import matbench_id
from crysdistill.sources.whole_sets import WholeSet
from crysdistill.store.origins import Origin

URL = "https://ml.materialsproject.org/projects/"
CITATION = "10.1038/s41524-020-00406-3"


class Task(NamedTuple):
    """A task on structures: its file in matminer 0.10.1, and its licence."""

    sha256: str
    licence: str = ""


TASKS = {
    "matbench_dielectric": Task(
        "83befa09bc2ec2f4b6143afc413157827a90e5e2e42c1eb507ccfa01bf26a1d6", "CC-BY-4.0"
    ),
    "matbench_jdft2d": Task(
        "26057dc4524e193e32abffb296ce819b58b6e11d1278cae329a2f97817a4eddf"
    ),
    "matbench_log_gvrh": Task(
        "098af941f4c663270f1fe21abf20ffad6fb85ecbfcba5786ceac03983ac29da7", "CC-BY-4.0"
    ),
    "matbench_log_kvrh": Task(
        "44b113ddb7e23aa18731a62c74afa7e5aa654199e0db5f951c8248a00955c9cd", "CC-BY-4.0"
    ),
    "matbench_mp_e_form": Task(
        "dedcb1d4ba2e3e50dbdd45ba5bc647a00e9c2bcf8f8bf556dc8e92caa39eb21f", "CC-BY-4.0"
    ),
    "matbench_mp_gap": Task(
        "58b65746bd88329986ed66031a2ac1369c7c522f7bc9f9081528e07097c2c057", "CC-BY-4.0"
    ),
    "matbench_mp_is_metal": Task(
        "9a028ed5750a4c76ca36e9f3c8d48fe0bf3fb21b76ec2289e58ae7048d527919", "CC-BY-4.0"
    ),
    "matbench_perovskites": Task(
        "4641e2417f8ec8b50096d2230864468dfa08278dc9d257c327f65d0305278483"
    ),
    "matbench_phonons": Task(
        "4db551f21ec5f577e6202725f10e34dfc509aa7df3a6bdaac497da7f6dbbb9b3", "CC-BY-4.0"
    ),
}
"""Tasks by name. Data of the Materials Project carry its licence."""

_ON_COMPOSITIONS = ("expt_gap", "expt_is_metal", "glass", "steels")


def open_service(rest: str) -> WholeSet:
    """Return the service that the text after `matbench:` names.

    Args:
        rest: the name of a task, with or without `matbench_` before it.

    Raises:
        InputError: there is no such task, it holds compositions, or matminer is missing
            or cannot download it.
    """
    short = rest.removeprefix("matbench_")
    name = f"matbench_{short}"
    if short in _ON_COMPOSITIONS:
        raise InputError(f"matbench: `{name}` holds compositions, no structures")
    if name not in TASKS:
        known = [task.removeprefix("matbench_") for task in TASKS]
        hint = did_you_mean(short, known) or f"; known: {', '.join(known)}"
        raise InputError(f"matbench: unknown task `{rest}`{hint}")
    by_hand = (
        f"download {URL}{name}.json.gz (sha256 {TASKS[name].sha256}) and give the file "
        "as a source"
    )
    try:
        from matminer.datasets import load_dataset
    except ImportError:
        raise InputError(
            f"`matminer` is not installed, and does not work with pandas 3; "
            f"{by_hand}, or `pip install crysdistill[matbench]`"
        ) from None
    try:
        table = load_dataset(name)
    except Exception as error:  # the network's, a wrong hash, a damaged file
        raise InputError(
            f"matbench: `{name}` cannot be downloaded ({first_line(error)}); {by_hand}"
        ) from None
    count = len(table)
    rows = zip(table.index, table.to_dict("records"), strict=True)
    origin = Origin(
        f"Matbench {name}",
        f"{URL}{name}.json.gz",
        TASKS[name].licence,
        name,
        citation=CITATION,
    )
    return WholeSet(origin, [_entry(name, index, row, count) for index, row in rows])


def _entry(task: str, index: Any, row: dict[str, Any], count: int) -> dict[str, Any]:
    """Return an entry for `tables.py`."""
    name = index if isinstance(index, str) else matbench_id(task, int(index), count)
    structure: Any = row.get("structure")
    plain = {
        key: value.item() if hasattr(value, "item") else value
        for key, value in row.items()
    }
    try:
        if not hasattr(structure, "as_dict"):
            raise BadStructure("no structure in its row; leave it out")
        values = label_values(plain, [key for key in row if key != "structure"])
    except BadStructure as problem:
        return {"material_id": name, "structure": None, "problem": str(problem)}
    return {"material_id": name, **values, "structure": structure.as_dict()}
