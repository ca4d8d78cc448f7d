"""Sources: files, folders and databases, each opened as a stream of records."""

from crysdistill.sources.opening import ACCEPTED, open_source, open_sources
from crysdistill.sources.records import Record, Source, parse

__all__ = ["ACCEPTED", "Record", "Source", "open_source", "open_sources", "parse"]
