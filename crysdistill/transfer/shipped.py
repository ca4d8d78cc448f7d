"""Weights that come with the package: encoders pretrained on the Materials Project.

Give the name of one wherever a weights file is wanted, as in `weights=taught`. A file
of that name in the working folder comes first. `pretrain/README.md` says how they were
made, and what they bring.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "shipped"
"""The folder of the weights files, each with its card."""

LARGE = "-large"
"""The end of the names of large encoders, which are used only if they are named."""


def shipped() -> dict[str, Path]:
    """Return the weights files that come with the package, by name."""
    found = {path.stem: path for path in FOLDER.glob("*.safetensors")}
    return dict(sorted(found.items()))


def located(weights: str | Path) -> Path:
    """Return the path of a weights file, which may be the name of a shipped one.

    Args:
        weights: a path, or a name of `shipped`. An existing path comes first.

    Returns:
        The path as it is if no shipped file has that name.
    """
    path = Path(weights)
    return path if path.exists() else shipped().get(str(weights), path)
