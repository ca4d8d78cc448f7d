"""The run directory: where everything a run makes lies, and what is what."""

from __future__ import annotations

import csv
import json
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.tree import Tree

from crysdistill import __version__
from crysdistill.errors import InputError

CONTENTS = {
    "config.yaml": "what ran, with every default filled in",
    "environment.json": "versions and machine",
    "split.csv": "which crystal trained, chose or judged",
    "metrics.csv": "every logged number, by epoch",
    "tensorboard": "the same for `tensorboard --logdir`",
    "checkpoints": "to resume: `resume=true`",
    "teacher.safetensors": "the teacher's atom embeddings",
    "weights.safetensors": "the result: for predict, embed, distill and finetune",
    "predictions.csv": "test crystals: truth and prediction",
    "results.json": "the numbers",
}
"""Files of a run directory, and what each holds."""


class RunDirectory:
    """Creates, or for `resume` reopens, the folder of one run.

    Args:
        path: the folder.
        config: the resolved configuration, as YAML text.
        resume: go on with an interrupted run.
        overwrite: delete what an earlier run left.

    Raises:
        InputError: there is a finished run, or nothing to resume, or it was begun
            with another configuration.
    """

    def __init__(
        self,
        path: str | Path,
        config: str,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.resumed = resume and self.last_checkpoint.exists()
        if self.resumed:
            self._check_same(config)
            return
        if resume and self.path.exists() and any(self.path.iterdir()):
            raise InputError(
                f"{self.path} has no checkpoint to resume; start anew with "
                "`resume=false overwrite=true`"
            )
        if self.path.exists() and any(self.path.iterdir()):
            if not overwrite:
                raise InputError(
                    f"{self.path} holds an earlier run; give another `out`, or "
                    "`resume=true` to go on with it, or `overwrite=true`"
                )
            if not (self.path / "config.yaml").exists():
                raise InputError(
                    f"{self.path} is not a run directory, so it will not be "
                    "overwritten; give another `out`"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(config, encoding="utf-8")
        self.write_json("environment.json", _environment())

    @property
    def checkpoints(self) -> Path:
        """Where Lightning's checkpoints go."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint from which `resume` goes on."""
        return self.checkpoints / "last.ckpt"

    @property
    def weights(self) -> Path:
        """The weights file of the run."""
        return self.path / "weights.safetensors"

    def _check_same(self, config: str) -> None:
        """Refuse to resume under another configuration; list the differences."""
        before = (self.path / "config.yaml").read_text("utf-8").splitlines()
        ignored = ("resume:", "overwrite:")
        old = [line for line in before if not line.startswith(ignored)]
        new = [line for line in config.splitlines() if not line.startswith(ignored)]
        if old != new:
            changed = [line.strip() for line in new if line not in old]
            raise InputError(
                f"{self.path} was begun with another configuration; now different: "
                f"{'; '.join(changed) or 'fewer settings'}"
            )

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write a JSON file into the folder."""
        path = self.path / name
        partial = path.with_suffix(".partial")  # whole or not at all
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        return partial.replace(path)

    def write_csv(
        self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]
    ) -> Path:
        """Write a CSV file into the folder."""
        path = self.path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
        return path

    def print_tree(self) -> None:
        """Print the folder with a remark on every file."""
        tree = Tree(f"[bold]{self.path}")
        for name, remark in CONTENTS.items():
            if (self.path / name).exists():
                tree.add(f"{name}  [dim]{remark}")
        rich.print(tree)


def _environment() -> dict[str, Any]:
    """Return the versions that a result depends on."""
    from importlib.metadata import version

    packages = ("torch", "torch-geometric", "lightning", "numpy", "pymatgen", "spglib")
    return {
        "crysdistill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in packages},
    }
