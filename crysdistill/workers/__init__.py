"""Workers: this process, many processes, or a cluster."""

from crysdistill.workers.ground import await_files
from crysdistill.workers.workers import Workers, check_engine, engine, spread

__all__ = ["Workers", "await_files", "check_engine", "engine", "spread"]
