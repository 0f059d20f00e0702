"""The run file: one writer, a reader that needs no torch, and a check of what a file holds."""

from .reader import Run, open_run
from .schema import Contents, Row, RunFileError, StoredGradients
from .validate import validate

__all__ = [
    "Contents",
    "Row",
    "Run",
    "RunFileError",
    "StoredGradients",
    "open_run",
    "validate",
]
