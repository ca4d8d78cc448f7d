"""Checkpoint files: written whole, the last few kept, the newest sound one found."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from crysdistill.errors import InputError
from crysdistill.files import remove_partials, write_whole
from crysdistill.ranks import on_first_rank

_NAME = re.compile(r"step-(\d+)\.ckpt")


class Checkpoints(TorchCheckpointIO):
    """The checkpoints of a run, named by the number of optimizer steps.

    Lightning decides what is saved; this class only writes the bytes to the disk. The
    format is a zip archive, and its checksums show damage.

    Args:
        folder: the folder of the checkpoints.

    Attributes:
        failure: why the last one could not be written. It is not raised at once: in
            `Trainer.save_checkpoint` other ranks wait for the one that writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failure: OSError | None = None

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self.folder / f"step-{step:08d}.ckpt"

    def paths(self) -> list[Path]:
        """Return the existing files, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def newest(self) -> Path:
        """Return the newest sound checkpoint; report newer ones that are damaged.

        Raises:
            InputError: there is no sound checkpoint.
        """
        return on_first_rank(self._newest)

    def _newest(self) -> Path:
        damaged: list[str] = []
        for path in reversed(self.paths()):
            if is_sound(path):
                if damaged:
                    said = f"{_are_damaged(damaged)}; going on from {path.name}"
                    print(f"{self.folder}: {said}")  # in one line, however long
                return path
            damaged.append(path.name)
        if not damaged:
            raise InputError(f"{self.folder} holds no checkpoint")
        raise InputError(
            f"{self.folder}: {_are_damaged(damaged)} and there is no other; start anew "
            "with `resume=false overwrite=true`"
        )

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint; Lightning calls this on the first rank."""
        self.failure = None
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), buffer.getbuffer())
        except OSError as error:
            self.failure = error

    def check_written(self) -> None:
        """Raise an error on all ranks if the last checkpoint could not be written.

        Raises:
            InputError: most likely the disk is full; the text says what is kept.
        """
        on_first_rank(self._check_written)

    def _check_written(self) -> None:
        if self.failure is not None:
            raise self.refusal(self.failure)

    def refusal(self, error: OSError) -> InputError:
        """Return the error for a file that could not be written."""
        paths = self.paths()
        kept = (
            f"the checkpoint of step {step_of(paths[-1])} is kept"
            if paths
            else "no checkpoint is kept yet"
        )
        where = f"{error.filename}: " if error.filename else f"{self.folder.parent}: "
        return InputError(
            f"{where}{error.strerror or error}; {kept}; make room, and the same "
            "command with `resume=true` goes on there"
        )

    def prune(self, step: int, keep: int) -> None:
        """Remove all checkpoints but the last few up to the step just written.

        Checkpoints of later steps are damaged: otherwise the run would have continued
        from one.
        """
        known = [path for path in self.paths() if step_of(path) <= step]
        for path in self.paths():
            if path not in known[-keep:]:
                path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove partial files that a killed run left."""
        remove_partials(self.folder)


def step_of(path: Path) -> int:
    """Return the number of steps of a checkpoint, from its name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _are_damaged(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} damaged"


def is_sound(path: Path) -> bool:
    """Return whether the checksums of a checkpoint are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except PermissionError:
        raise
    except Exception:  # a damaged file can raise almost any exception
        return False
