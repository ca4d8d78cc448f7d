"""A teacher's atom embeddings, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crysdistill.errors import InputError
from crysdistill.files import write_whole
from crysdistill.graphs.batch import CrystalBatch
from crysdistill.transfer.distillation import Teacher


class TeacherCache:
    """Atom embeddings by row of the store, so that training gathers them.

    Args:
        embeddings: (A, F), the atoms of the first crystal, then of the second, ...
        rows: (R,) int64, the store's row of each of these crystals.
        ptr: (R + 1,) int64, the first atom of each.
    """

    def __init__(self, embeddings: Tensor, rows: Tensor, ptr: Tensor) -> None:
        self.embeddings = embeddings
        self.rows = rows
        self.ptr = ptr
        size = int(rows.max()) + 1 if len(rows) else 0
        self._position = torch.full((size,), -1, device=rows.device)
        self._position[rows] = torch.arange(len(rows), device=rows.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """F, of the embeddings."""
        return self.embeddings.shape[1]

    def gather(self, rows: Tensor, atoms: int | None = None) -> Tensor:
        """Return the embeddings of the atoms of some crystals, (N, F).

        Args:
            rows: (B,) rows of the store, as in `CrystalBatch.rows`.
            atoms: N, where known; a GPU then need not be waited for.

        Raises:
            InputError: a crystal is not in the cache; seen on the CPU only.
        """
        rows = rows.to(self.rows.device)
        inside = (rows >= 0) & (rows < len(self._position))
        position = self._position[torch.where(inside, rows, 0)].where(
            inside, -1
        )  # (B,)
        # A GPU would have to finish its queue before it could answer.
        if position.device.type == "cpu" and (position < 0).any():
            missing = int(rows[position < 0][0])
            raise InputError(
                f"row {missing} of the store has no cached teacher embeddings; "
                "compute the cache for all rows that are trained on"
            )
        start = self.ptr[position]
        count = self.ptr[position + 1] - start  # (B,)
        ends = torch.cumsum(count, 0)
        offset = torch.repeat_interleave(
            start - ends + count, count, output_size=atoms
        )  # (N,)
        return self.embeddings[offset + torch.arange(len(offset), device=rows.device)]

    def to(self, device: str | torch.device) -> TeacherCache:
        """Return this cache on another device."""
        return TeacherCache(
            self.embeddings.to(device), self.rows.to(device), self.ptr.to(device)
        )

    def save(self, path: Path, key: str) -> None:
        """Write to a file, which `load` maps into memory.

        Args:
            path: where; a file that is there is replaced at once or not at all.
            key: says what the embeddings depend on.
        """
        tensors = {"embeddings": self.embeddings, "rows": self.rows, "ptr": self.ptr}
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        write_whole(path, save(tensors, metadata={"key": key}))

    @classmethod
    def load(cls, path: Path, key: str) -> TeacherCache | None:
        """Map a file; None if it is absent, damaged, or made under another key."""
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                return cls(*(file.get_tensor(n) for n in ("embeddings", "rows", "ptr")))
        except (OSError, SafetensorError):
            return None


def cache_embeddings(teacher: Teacher, batches: Iterable[CrystalBatch]) -> TeacherCache:
    """Ask the teacher about every crystal once.

    Args:
        teacher: computes on the device where it and the batches are.
        batches: crystals with their `rows`, on the graph that the teacher knows; in
            any order.

    Returns:
        Embeddings in float32 on the CPU.

    Raises:
        InputError: there are no batches.
    """
    embeddings, rows, atoms = [], [], []
    for batch in batches:
        embeddings.append(teacher(batch).float().cpu())
        rows.append(batch.rows.cpu())
        atoms.append((batch.ptr[1:] - batch.ptr[:-1]).cpu())
    if not rows:
        raise InputError("there are no crystals to compute teacher embeddings for")
    counts = torch.cat(atoms)
    ptr = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=ptr[1:])
    return TeacherCache(torch.cat(embeddings), torch.cat(rows), ptr)


def load_or_cache(
    path: str | Path,
    teacher: Teacher,
    rows: Tensor,
    batches: Iterable[CrystalBatch],
    source: str,
) -> TeacherCache:
    """Return the teacher's embeddings from a file, or compute and write them.

    Args:
        path: the file; it is computed anew if teacher, rows or source have changed.
        teacher: whose embeddings.
        rows: (R,) the rows of the store that `batches` will bring.
        batches: read only if the file does not serve.
        source: the hash of the store.
    """
    path = Path(path)
    digest = hashlib.sha256(f"{teacher.fingerprint()} {source}".encode())
    digest.update(rows.to(torch.int64).cpu().contiguous().numpy().data)
    key = digest.hexdigest()
    cache = TeacherCache.load(path, key)
    if cache is None:
        cache_embeddings(teacher, batches).save(path, key)
        cache = TeacherCache.load(path, key)
        if cache is None:
            raise InputError(f"{path}: cannot read back what was just written there")
    return cache
