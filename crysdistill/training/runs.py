"""The run directory, which holds all files of a run."""

from __future__ import annotations

import csv
import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich
import yaml
from rich.text import Text
from rich.tree import Tree

from crysdistill import __version__
from crysdistill.errors import InputError
from crysdistill.files import PARTIAL, remove_partials, write_whole
from crysdistill.locks import locked
from crysdistill.ranks import on_first_rank
from crysdistill.schema import read_dumped, write_value
from crysdistill.training.checkpoints import Checkpoints
from crysdistill.training.inputs import Inputs, find_inputs

CONTENTS = {
    "config.yaml": "what ran, with every default filled in",
    "environment.json": "versions and machine",
    "excluded.json": "corpus crystals left out, and why; a resumed run reads it",
    "split.csv": "which crystal trained, chose or judged",
    "metrics.csv": "every logged number, by epoch",
    "tensorboard": "the same for `tensorboard --logdir`",
    "checkpoints": "to resume: `resume=true`",
    "teacher": "the teacher's answers, where the dataset's folder is read-only",
    "weights.safetensors": "the result: for predict, embed, distill and finetune",
    "candidates.csv": "all candidates and their validation numbers",
    "probes.png": "errors of the probes on small tasks, by epoch",
    "predictions.csv": "test crystals: truth and prediction",
    "results.json": "the numbers",
    "throughput.json": "speed, waiting times and memory",
    "diverged.json": "the crystals and losses before it stopped",
}
"""Files of a run directory, and what each holds."""

MAY_CHANGE = (
    # How a run starts and where its files are, not what it does.
    "resume",
    "overwrite",
    "out",
    "trainer.progress",
    "trainer.ceilings",
    # When it is saved, not what.
    "trainer.checkpoint_minutes",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    # Which hardware computes: the same crystals in the same order, though sums may be
    # rounded differently.
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.threads",
)
"""Settings that may differ when a run is resumed."""


class RunDirectory:
    """Creates, or for `resume` reopens, the folder of one run.

    Args:
        path: the folder.
        config: the resolved configuration, as YAML text.
        resume: continue an interrupted run.
        overwrite: delete the files of an earlier run.
        parts: whether the run consists of others, which have their own folders and
            checkpoints; it has no checkpoints itself.

    Raises:
        InputError: there is a finished run, nothing to resume, or a run that was begun
            with another configuration.
    """

    def __init__(
        self,
        path: str | Path,
        config: str,
        resume: bool = False,
        overwrite: bool = False,
        parts: bool = False,
    ) -> None:
        self.path, self._of_parts = Path(path), parts
        self.resumed = self._prepare(config, resume, overwrite)

    def _prepare(self, config: str, resume: bool, overwrite: bool) -> bool:
        """Prepare the folder; return whether there is a checkpoint to resume from."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give another `out`, a folder")
        begun = (self.path / "config.yaml").exists()
        if self.path.exists() and any(map(_is_something, self.path.iterdir())):
            if resume:
                if begun:
                    check_same_run(self.path, config)
                    remove_partials(self.path)
                return self._find_checkpoint(begun, config)
            if not overwrite:
                raise InputError(
                    f"{self.path} holds an earlier run; give another `out`, or "
                    "`resume=true` to go on with it, or `overwrite=true`"
                )
            if not begun:
                raise InputError(
                    f"{self.path} is not a run directory, so it will not be "
                    "overwritten; give another `out`"
                )
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != "config.yaml":
                    path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        # Created first and removed last: this file marks the folder as a run directory.
        write_whole(self.path / "config.yaml", config.encode())
        self._write_environment(config)
        return False

    def _write_environment(self, config: str) -> None:
        """Write the versions, the machine, and hashes of the run's inputs."""
        inputs = find_inputs(_which_must_stay(_settings(config)))
        self.write_json("environment.json", {**_environment(), "inputs": inputs})

    def _find_checkpoint(self, begun: bool, config: str) -> bool:
        """Return whether a run has a checkpoint; False if killed before its first."""
        files = Checkpoints(self.checkpoints)
        if begun and self._of_parts:
            return True
        if begun:
            files.clean()
            if files.paths():
                return True
        if not begun or self.weights.exists():
            raise InputError(
                f"{self.path} has no checkpoint to resume; start anew with "
                "`resume=false overwrite=true`"
            )
        print(f"{self.path} has no checkpoint yet: from the beginning")
        self._write_environment(config)
        return False

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The weights file of the run."""
        return self.path / "weights.safetensors"

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write a JSON file into the folder."""
        text = json.dumps(value, indent=2) + "\n"
        return write_whole(self.path / name, text.encode())

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
        tree = Tree(Text(str(self.path), style="bold"))
        for name, remark in CONTENTS.items():
            if (self.path / name).exists():
                tree.add(f"{name}  [dim]{remark}")
        for part in sorted(self.path.glob("*/config.yaml")):
            tree.add(f"{part.parent.name}  [dim]a network's own run, with its numbers")
        rich.print(tree)


def _is_something(path: Path) -> bool:
    """Return whether a file is not just the partial one of a run killed at once."""
    return path.name != f"config.yaml{PARTIAL}"


@contextmanager
def open_run(
    path: str | Path,
    config: str,
    resume: bool = False,
    overwrite: bool = False,
    parts: bool = False,
) -> Iterator[RunDirectory]:
    """Open a run directory on the first rank, and lock it against other runs.

    Args:
        path: the folder.
        config: as for `RunDirectory`, like the others.
        resume: continue an interrupted run.
        overwrite: delete the files of an earlier run.
        parts: whether the run consists of others.

    Yields:
        The same directory on all ranks.

    Raises:
        InputError: see `RunDirectory`; or another process trains there.
    """
    path = Path(path)
    # Beside the folder, because `overwrite` empties it.
    lock = path.with_name(f".{path.name}.lock")

    def opened() -> RunDirectory:
        path.parent.mkdir(parents=True, exist_ok=True)
        refusal = f"{path}: another process trains there; wait, or give another `out`"
        held.enter_context(locked(lock, refusal))
        held.callback(lock.unlink, missing_ok=True)
        return RunDirectory(path, config, resume, overwrite, parts)

    with ExitStack() as held:
        yield on_first_rank(opened)


def check_same_run(folder: Path, config: str) -> None:
    """Refuse a run that was begun with another configuration; list the differences.

    Args:
        folder: of the run.
        config: the resolved configuration, as YAML text.

    Raises:
        InputError: they differ, or the configuration in the folder is damaged.
    """
    path = folder / "config.yaml"
    try:
        before = _settings(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        raise InputError(
            f"{path} is damaged; start anew with `resume=false overwrite=true`"
        ) from None
    now = _settings(config)
    changed = _differences(before, now, _inputs(folder), find_inputs(now))
    if changed:
        raise InputError(
            f"{folder} was begun with another configuration; now different: "
            f"{'; '.join(changed)}; give the old values, or another `out`"
        )


def _inputs(folder: Path) -> Inputs:
    """Return the hashes of a run's inputs when it began, as far as known."""
    try:
        found = json.loads((folder / "environment.json").read_bytes())
        return dict(found.get("inputs", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _settings(config: str) -> dict[str, Any]:
    """Return the settings of a configuration by their keys, nested ones with dots."""
    return dict(_flat(read_dumped(config), ""))


def _flat(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _which_must_stay(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in MAY_CHANGE}


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], read: Inputs, found: Inputs
) -> list[str]:
    """Return `key: old -> new` for every setting that must not change but differs.

    Paths are compared by their content: the spelling may differ, the content may not.

    Args:
        old: the settings when the run began.
        new: the settings now.
        read: the hashes of the inputs in `old`.
        found: the hashes of the inputs in `new`.
    """

    def shown(settings: Mapping[str, Any], key: str) -> str:
        return write_value(settings[key]) if key in settings else "absent"

    said = []
    for key in _which_must_stay({**old, **new}):
        before, after = shown(old, key), shown(new, key)
        known = read.get(key) if key in found else None
        if before != after and (known is None or known != found[key]):
            said.append(f"{key}: {before} -> {after}")
        elif known is not None and known != found[key]:
            said.append(f"{key}: {after} has changed since the run began")
    return said


def _environment() -> dict[str, Any]:
    """Return the versions that a result depends on."""
    packages = ("torch", "torch-geometric", "lightning", "numpy", "pymatgen", "spglib")
    return {
        "crysdistill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in packages},
    }


@cache
def _version(package: str) -> str:
    """Return the version that is installed; it takes milliseconds to find."""
    return version(package)
