"""The peak memory of a run: of the process, and of its GPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")


class PeakMemory:
    """Measures the peak from its creation on, if the system can reset the peak.

    Resident memory counts, including mapped pages of a store.

    Args:
        device: the device of the run; a GPU is measured too.

    Attributes:
        of_run: whether the peak is that of the run only; otherwise it is that of the
            process since its start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_run = _forget_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def of_process(self) -> int:
        """Return the most bytes that were resident."""
        if self.of_run:
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def of_gpu(self) -> int:
        """Return the most bytes that tensors held on the GPU; 0 without one."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self.device)


def available_memory(device: torch.device) -> float:
    """Return the bytes that a CPU can still allocate; infinite for other devices.

    A GPU refuses to allocate more than it has. Linux grants more memory than it has,
    and ends the process later.
    """
    if device.type != "cpu" or not _MEMORY.exists():
        return float("inf")
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return float("inf")


def _forget_peak() -> bool:
    """Let Linux reset the peak; return whether it does."""
    try:
        _CLEAR.write_text("5")
        return "VmHWM:" in _STATUS.read_text()
    except OSError:
        return False
