"""Sharing weights: push them with card and checksum; pull and verify them.

A place is a folder, or `hf:OWNER/NAME` on Hugging Face. It holds `weights.safetensors`,
`weights.sha256` and the card, `README.md`.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from crysdistill.errors import InputError, first_line, not_installed
from crysdistill.files import writable, write_whole
from crysdistill.transfer.card import write_card
from crysdistill.transfer.weights import read_header

WEIGHTS, CHECKSUM, CARD = "weights.safetensors", "weights.sha256", "README.md"
SCHEME = "hf:"


def push(weights: str | Path, place: str) -> str:
    """Publish a weights file with its card and checksum.

    Args:
        weights: the file.
        place: a folder, created if it does not exist, or `hf:OWNER/NAME`.

    Returns:
        The published path or address.

    Raises:
        InputError: the file cannot be used, the place holds other weights, or Hugging
            Face refuses.
    """
    weights = Path(weights)
    card = write_card(weights)
    data = weights.read_bytes()
    checksum = f"{hashlib.sha256(data).hexdigest()}  {WEIGHTS}\n"
    if place.startswith(SCHEME):
        with tempfile.TemporaryDirectory(prefix="crysdistill-") as folder:
            _write(Path(folder), data, checksum, card)
            return _upload(Path(folder), place.removeprefix(SCHEME))
    target = Path(place)
    known = target / CHECKSUM
    if known.exists() and known.read_text("utf-8") != checksum:
        raise InputError(
            f"{target} holds other weights; give another folder, or remove that one"
        )
    _write(target, data, checksum, card)
    return str(target / WEIGHTS)


def pull(place: str, out: str | Path) -> Path:
    """Fetch published weights and verify their checksum.

    Args:
        place: a folder or `hf:OWNER/NAME`, as for `push`.
        out: the file to write.

    Raises:
        InputError: there are no weights, they do not match the checksum, or they cannot
            be used.
    """
    out = writable(out)
    if place.startswith(SCHEME):
        weights, checksum = _download(place.removeprefix(SCHEME))
    else:
        weights, checksum = Path(place) / WEIGHTS, Path(place) / CHECKSUM
    for path in (weights, checksum):
        if not path.is_file():
            raise InputError(f"{place} holds no {path.name}; nothing was pushed there")
    data = weights.read_bytes()
    wanted = checksum.read_text("utf-8").split()[:1]
    if [hashlib.sha256(data).hexdigest()] != wanted:
        raise InputError(
            f"{weights} is not what was published ({len(data):,} bytes, another "
            "checksum): it was cut short or changed; pull it again"
        )
    write_whole(out, data)
    read_header(out)  # another version may have written it
    return out


def _write(folder: Path, data: bytes, checksum: str, card: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, data)
    write_whole(folder / CARD, card.encode())
    write_whole(folder / CHECKSUM, checksum.encode())


def _client() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise not_installed("huggingface_hub", "hf") from None
    return huggingface_hub


def _upload(folder: Path, name: str) -> str:
    """Upload a folder; return its address."""
    hub = _client()
    try:
        api = hub.HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise InputError(f"hf:{name}: {first_line(error)}") from None
    return f"https://huggingface.co/{name}"


def _download(name: str) -> tuple[Path, Path]:
    """Return weights and checksum in the client's cache."""
    hub = _client()
    try:
        found = [Path(hub.hf_hub_download(name, file)) for file in (WEIGHTS, CHECKSUM)]
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise InputError(f"hf:{name}: {first_line(error)}") from None
    return found[0], found[1]
