"""The run file: one writer, a reader that needs no torch, and a check of what a file holds."""

from .reader import Run, open_run
from .schema import RunFileError
from .validate import validate

__all__ = ["Run", "RunFileError", "open_run", "validate"]
