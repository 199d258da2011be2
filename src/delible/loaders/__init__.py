"""Records in and out: read files and data sets, write JSONL, check a forget request."""

from delible.loaders.mapping import Located, read_located, read_records
from delible.loaders.request import build_request
from delible.loaders.requests import read_requests
from delible.loaders.sources import Source, read_lines
from delible.loaders.writing import write_records

__all__ = [
    "Located",
    "Source",
    "build_request",
    "read_lines",
    "read_located",
    "read_records",
    "read_requests",
    "write_records",
]
